"""Errors for the user, files that are written whole or not at all, messages and progress bars."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TextIO

from tqdm import tqdm


class UserError(Exception):
    """An error that its message explains to the user, without a traceback."""


@contextlib.contextmanager
def open_new(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file for writing; it replaces `path` once complete.

    One process at a time may write to a path; it overwrites what a killed one left.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def say(text: str, file: TextIO | None = None) -> None:
    """Print above a progress bar, to stdout or `file`; ignore a closed one, as after `| head`."""
    with contextlib.suppress(OSError):
        tqdm.write(text, file)
        (file or sys.stdout).flush()


def progress_bar(task: str, total: int | None, unit: str) -> tqdm:
    """Return a bar that shows how much of a task is done; without a terminal, print the task."""
    terminal = sys.stderr.isatty()
    if not terminal:
        say(task, sys.stderr)
    look = {"unit": unit, "unit_scale": True, "leave": False, "disable": not terminal}
    return tqdm(desc=task, total=total, **look)
