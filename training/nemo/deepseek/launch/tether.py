"""Become a command that dies with the process that started it: ``tether.py PARENT COMMAND...``.

Run by path, with nothing imported but the standard library. Asking the kernel in the child between
fork and exec (``preexec_fn``) would run Python in a copy of a process that may have threads.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Tie, then exec."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":  # elsewhere a worker outlives a supervisor that is killed
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before we asked
            sys.exit(1)
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
