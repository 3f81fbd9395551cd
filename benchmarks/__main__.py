"""`make bench`: run every benchmark of this package, one after the other."""

import importlib

MODULES = (
    "l1",
    "store_pairs",
    "store_warm",
    "fleet",
    "augmenter_lines",
    "augmenter_minute",
    "augmenter_workers",
    "augmenter_day",
)
"""Each has a `main()` that prints a table and writes `.bench/NAME.json`."""


def main() -> None:
    """Run all benchmarks."""
    for name in MODULES:
        importlib.import_module(f"benchmarks.{name}").main()


if __name__ == "__main__":
    main()
