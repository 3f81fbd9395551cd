"""`cache-proxy` and `python -m services.cache_proxy`."""

from services.common.entrypoint import run_main


def main() -> None:
    """Run the command line."""
    run_main("services.cache_proxy.cli", program="cache-proxy", extra="proxy")


if __name__ == "__main__":
    main()
