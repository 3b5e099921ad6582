"""What the data, the checkpoints and the command line share: errors for the user, safe writing."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


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
