"""Show the progress of long work: as a bar, or as one line where there is no terminal."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def progress_bar(task: str, total: int | None, unit: str, done: int = 0) -> tqdm:
    """Return a bar that shows how much of a task is done; without a terminal, print the task."""
    terminal = sys.stderr is not None and sys.stderr.isatty()
    if not terminal:
        say(task)
    look = {"unit": unit, "unit_scale": True, "leave": False, "disable": not terminal}
    return tqdm(desc=task, total=total, initial=done, **look)


@contextlib.contextmanager
def locked(path: Path, timeout: float = -1) -> Iterator[None]:
    """Let one process at a time prepare the file at `path`; the others wait, and say so.

    Raises filelock.Timeout after `timeout` seconds; -1 waits without a limit.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"waiting for another process to prepare {path}")
        lock.acquire(timeout=timeout)
    try:
        yield
    finally:
        lock.release()
