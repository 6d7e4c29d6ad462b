"""Exit codes: what a script that calls `bitmill` can rely on."""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    """
    OK           what was asked for was done
    FAILED       it was tried and did not succeed: the awaited job failed, a check found a fault
    USAGE        the command line or the configuration is wrong; nothing was tried
    UNREACHABLE  no server answers, or it answered that it cannot serve now (5xx)
    REFUSED      the server understood and said no (4xx): a bad key, an unknown job, a job that cannot succeed
    INTERRUPTED  Ctrl-C; a submitted job goes on
    """

    OK = 0
    FAILED = 1
    USAGE = 2
    UNREACHABLE = 3
    REFUSED = 4
    INTERRUPTED = 130
