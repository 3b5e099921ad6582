"""Token ids on disk: one array per file, written whole or not at all, and memory-mapped.

A file is a header of 24 bytes, little-endian, followed by the ids:

    8 bytes   DFTOKENS
    4 bytes   version, 1
    4 bytes   bytes per id, 1 or 2
    8 bytes   number of ids
"""

import contextlib
import os
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data.errors import DataError

HEADER = struct.Struct("<8sIIQ")
MAGIC, VERSION = b"DFTOKENS", 1


@contextlib.contextmanager
def open_new(path: Path) -> Iterator[BinaryIO]:
    """Open a file to write, which replaces the one at `path` when it is complete.

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


def write(path: Path, bytes_per_id: int, arrays: Iterable[np.ndarray]) -> None:
    """Write arrays of ids, one after the other, to a new file."""
    count = 0
    with open_new(path) as file:
        file.write(bytes(HEADER.size))
        for ids in arrays:
            file.write(ids.astype(f"<u{bytes_per_id}", copy=False).tobytes())
            count += len(ids)
        file.seek(0)
        file.write(HEADER.pack(MAGIC, VERSION, bytes_per_id, count))


def read(path: Path) -> np.ndarray:
    """Return the ids in a file, memory-mapped. Raises DataError for a damaged file."""
    with path.open("rb") as file:
        header = file.read(HEADER.size).ljust(HEADER.size)
    magic, version, width, count = HEADER.unpack(header)
    size = HEADER.size + width * count
    if (magic, version) != (MAGIC, VERSION) or path.stat().st_size != size:
        raise DataError(f"{path} is damaged, or from another version: delete it and run again")
    return np.asarray(np.memmap(path, f"<u{width}", "r", HEADER.size, (count,)))


class ConcatTokens:
    """Arrays one after the other, as one array with len() and [start:stop]."""

    def __init__(self, arrays: list[np.ndarray]):
        self.arrays = arrays
        self.ends = np.cumsum([len(array) for array in arrays])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, span: slice) -> np.ndarray:
        start, stop, _ = span.indices(len(self))
        i = int(np.searchsorted(self.ends, start, side="right"))
        pieces = [self.arrays[0][:0]]
        while start < stop:
            first = int(self.ends[i]) - len(self.arrays[i])  # position of the array's first token
            pieces.append(self.arrays[i][start - first : stop - first])
            start, i = int(self.ends[i]), i + 1
        return np.concatenate(pieces)


def ordered_map(function: Callable, items: Iterable) -> Iterator:
    """Yield function(item) for each item, in order, computed on all cores.

    At most four items per core are in memory. tiktoken and numpy release the interpreter lock, so
    threads suffice.
    """
    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        pending: deque = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) == 4 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
