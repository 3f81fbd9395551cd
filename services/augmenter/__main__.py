"""`augmenter` and `python -m services.augmenter`."""

from services.common.entrypoint import enter


def main() -> None:
    """Run the command line."""
    enter("services.augmenter.cli", program="augmenter", extra="augmenter")


if __name__ == "__main__":
    main()
