"""`model-stub` and `python -m services.model_stub`."""

from services.common.entrypoint import run_main


def main() -> None:
    """Run the command line."""
    run_main("services.model_stub.cli", program="model-stub", extra="stub")


if __name__ == "__main__":
    main()
