"""The door of every command: standard library only, so that a missing extra is one clear line."""

import importlib
import os
import sys
from typing import NoReturn


def run_main(module: str, *, program: str, extra: str) -> NoReturn:
    """Run `main()` of `module`; exit 2 with the pip line when what the extra installs is missing."""
    # gRPC's core writes its own lines about what we report ourselves; an operator may still ask for them.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        importlib.import_module(module).main()  # which imports more, once it knows what it is asked for
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in {"services", "protos"}:
            raise  # a broken installation, not a missing extra
        sys.stderr.write(f"{program}: {error.name} is not installed; run: pip install '.[{extra}]'\n")
        sys.exit(2)
    sys.exit(0)
