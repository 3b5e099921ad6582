"""A lock that lets one process at a time do a job."""

import sys
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from lib.files import say


def make_once(
    path: Path, make: Callable[[], None], is_ready: Callable[[], bool], timeout: float = -1
) -> None:
    """Call make(), which makes the file at `path`, unless is_ready().

    One process at a time does so; the others wait and say so. Raises filelock.Timeout after
    `timeout` seconds; -1 waits without a limit.
    """
    if is_ready():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        say(f"waiting for another process to prepare {path}", sys.stderr)
        held = lock.acquire(timeout=timeout)
    with held:
        if not is_ready():
            make()
