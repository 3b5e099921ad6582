"""Progress bars, and a lock that lets one process at a time do a job."""

import sys
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def progress_bar(task: str, total: int | None, unit: str, done: int = 0) -> tqdm:
    """Return a bar that shows how much of a task is done; without a terminal, print the task."""
    terminal = sys.stderr.isatty()
    if not terminal:
        say(task)
    look = {"unit": unit, "unit_scale": True, "leave": False, "disable": not terminal}
    return tqdm(desc=task, total=total, initial=done, **look)


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
        say(f"waiting for another process to prepare {path}")
        held = lock.acquire(timeout=timeout)
    with held:
        if not is_ready():
            make()
