"""How long this process has run: what it imports counts in a budget of time."""

import os
import time
from pathlib import Path

MOST = 120.0  # seconds: in a container the clocks of the system and of a process may be apart


def since_start() -> float:
    """Seconds by the system's clocks; those of the CPU where it does not say when we began."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return time.process_time()


def process_age() -> float:
    """The same, 0 to MOST: to import torch takes a good part of a minute on a busy machine."""
    return min(MOST, max(0.0, since_start()))
