"""`cache-proxy` and `python -m services.cache_proxy`."""

from services.common.entrypoint import enter


def main() -> None:
    """Run the command line."""
    enter("services.cache_proxy.cli", program="cache-proxy", extra="proxy")


if __name__ == "__main__":
    main()
