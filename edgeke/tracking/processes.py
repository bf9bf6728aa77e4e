"""Whose run it is: a process by host, number and start, so that a dead one's runs can be told.

psutil is imported when needed: a bare training machine has none.
"""

import platform

__all__ = ["PROCESS", "lives", "own"]

PROCESS = "edgeke.process"  # tag of a run: who writes it


def own() -> str:
    """This process, such as `host 4711 1763712000`: its host, its number, its start."""
    import psutil

    process = psutil.Process()
    return f"{platform.node()} {process.pid} {int(process.create_time())}"


def lives(process: str) -> bool:
    """Whether a process still runs. Of one on another host nothing is known: it is taken to."""
    import psutil

    host, number, started = process.rsplit(" ", 2)
    if host != platform.node():
        return True
    try:
        found = psutil.Process(int(number))
        return found.status() != psutil.STATUS_ZOMBIE and _same(found.create_time(), started)
    except psutil.NoSuchProcess:
        return False


def _same(start: float, noted: str) -> bool:
    return abs(int(start) - int(noted)) <= 1  # the clock of a booting machine is set once more
