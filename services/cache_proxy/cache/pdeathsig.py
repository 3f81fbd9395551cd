"""Run a program that the kernel terminates when its parent process ends (PR_SET_PDEATHSIG of Linux).

Arguments: the parent's process id, then the program and its arguments. On other systems the program is run
without that link. This is a script by itself because code that runs between fork and exec of a process with
threads is not safe. It uses the standard library only and is run with `-I -S`.
"""

import contextlib
import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1

if __name__ == "__main__":
    # A system without prctl: the next start of the proxy stops a server that was left behind.
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    # Do not run the program if the parent ended before the signal was set.
    if os.getppid() == int(sys.argv[1]):
        os.execv(sys.argv[2], sys.argv[2:])  # noqa: S606 - the caller chooses the program
