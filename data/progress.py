"""Messages, progress bars, and a lock that lets one process at a time do a job."""

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from filelock import FileLock, Timeout
from tqdm import tqdm


def say(text: str, file: TextIO | None = None) -> None:
    """Print above a progress bar, to stdout or `file`; ignore a closed one, as after `| head`."""
    with contextlib.suppress(OSError):
        tqdm.write(text, file)
        (file or sys.stdout).flush()


def progress_bar(task: str, total: int | None, unit: str, done: int = 0) -> tqdm:
    """Return a bar that shows how much of a task is done; without a terminal, print the task."""
    terminal = sys.stderr.isatty()
    if not terminal:
        say(task, sys.stderr)
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
        say(f"waiting for another process to prepare {path}", sys.stderr)
        held = lock.acquire(timeout=timeout)
    with held:
        if not is_ready():
            make()
