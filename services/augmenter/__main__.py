"""Entry point of `augmenter` and `python -m services.augmenter`."""

from services.common.entrypoint import run_main


def main() -> None:
    """Run the command line."""
    run_main("services.augmenter.cli", program="augmenter", extra="augmenter")


if __name__ == "__main__":
    main()
