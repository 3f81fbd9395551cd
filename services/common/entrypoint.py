"""The entry point of every command. It imports only the standard library, to report a missing extra."""

import importlib
import os
import sys
from typing import NoReturn


def run_main(module: str, *, program: str, extra: str) -> NoReturn:
    """Run `main()` of `module`. Exit with code 2 and the pip command if a package of the extra is missing."""
    # gRPC's core logs errors that are reported here as well. An operator can turn its log on.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        importlib.import_module(module).main()
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in {"services", "protos"}:
            # A broken installation, not a missing extra.
            raise
        sys.stderr.write(f"{program}: {error.name} is not installed; run: pip install '.[{extra}]'\n")
        sys.exit(2)
    sys.exit(0)
