"""Run a program that the kernel ends when its parent ends (Linux; elsewhere it is just run).

Arguments: the parent's pid, then the program and its arguments. A script of its own, because code run
between fork and exec of a process with threads is not safe; standard library only, run with `-I -S`.
"""

import contextlib
import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1

if __name__ == "__main__":
    with contextlib.suppress(AttributeError):  # no prctl: the next start stops what was left behind
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() == int(sys.argv[1]):  # else the parent died before the line above
        os.execv(sys.argv[2], sys.argv[2:])  # noqa: S606 - the program is the caller's choice
