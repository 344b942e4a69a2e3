"""What the system says of this process's memory."""

from __future__ import annotations

import os
import sys


def resident() -> int:
    """Bytes of this process that are in memory now; where the system does not say, its peak so far."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError:
        return peak()


def peak() -> int:
    """The most bytes of this process that have been in memory."""
    try:
        with open("/proc/self/status") as file:
            (line,) = (line for line in file if line.startswith("VmHWM"))
            return int(line.split()[1]) << 10
    except (FileNotFoundError, ValueError):
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most << 10
