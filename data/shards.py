"""Token ids on disk: one array per file, written whole or not at all, and memory-mapped.

A file is a header of 24 bytes, little-endian, followed by the ids:

    8 bytes   DFTOKENS
    4 bytes   version, 1
    4 bytes   bytes per id, 1 or 2
    8 bytes   number of ids
"""

import os
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np

from data.errors import DataError

HEADER = struct.Struct("<8sIIQ")
MAGIC, VERSION = b"DFTOKENS", 1


class Writer:
    """Write ids to a new file: `with Writer(path, bytes_per_id) as writer: writer.write(ids)`.

    The file appears at the end of the block, unless an exception ends the block. One process at a
    time may write to a path; it overwrites what a killed one left.
    """

    def __init__(self, path: Path, bytes_per_id: int):
        self.path, self.part = path, path.with_name(f".{path.name}.part")
        self.dtype, self.count = np.dtype(f"<u{bytes_per_id}"), 0

    def __enter__(self):
        self.file = self.part.open("wb")
        self.file.write(bytes(HEADER.size))
        return self

    def write(self, ids: np.ndarray) -> None:
        self.file.write(ids.astype(self.dtype, copy=False).tobytes())
        self.count += len(ids)

    def __exit__(self, kind, error, traceback):
        try:
            with self.file:
                if kind is None:
                    self.file.seek(0)
                    self.file.write(HEADER.pack(MAGIC, VERSION, self.dtype.itemsize, self.count))
                    self.file.flush()
                    os.fsync(self.file.fileno())
            if kind is None:
                os.replace(self.part, self.path)
        finally:
            self.part.unlink(missing_ok=True)


def read(path: Path) -> np.ndarray:
    """Return the ids in a file, memory-mapped. Raises DataError for a damaged file."""
    try:
        with path.open("rb") as file:
            header = file.read(HEADER.size)
        if len(header) < HEADER.size or not header.startswith(MAGIC):
            raise DataError(f"{path} is not a file of tokens")
        _, version, width, count = HEADER.unpack(header)
        if version != VERSION or width not in (1, 2):
            raise DataError(f"{path} is of version {version}, with {width} bytes per token")
        if path.stat().st_size != HEADER.size + width * count:
            raise DataError(f"{path} should hold {count:,} tokens, and is too short or too long")
        if count == 0:  # an empty file cannot be mapped
            return np.zeros(0, dtype=f"<u{width}")
        return np.asarray(np.memmap(path, f"<u{width}", "r", HEADER.size, (count,)))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None


class ConcatTokens:
    """Arrays one after the other, as one array with len() and [start:stop]."""

    def __init__(self, arrays: list[np.ndarray]):
        self.arrays = arrays
        self.ends = np.cumsum([len(array) for array in arrays])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, span: slice) -> np.ndarray:
        start, stop, step = span.indices(len(self))
        if step != 1:
            raise IndexError("only neighbouring tokens can be taken from several arrays")
        i = int(np.searchsorted(self.ends, start, side="right"))
        pieces = []
        while start < stop:
            first = int(self.ends[i]) - len(self.arrays[i])  # position of the array's first token
            pieces.append(self.arrays[i][start - first : stop - first])
            start, i = int(self.ends[i]), i + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces or [self.arrays[0][:0]])


def ordered_map(function: Callable, items: Iterable) -> Iterator:
    """Yield function(item) for each item, in order, computed on all cores.

    At most four items per core are in memory. tiktoken and numpy release the interpreter lock, so
    threads suffice.
    """
    workers = os.cpu_count() or 1
    items = iter(items)
    with ThreadPoolExecutor(workers) as pool:
        pending = deque(pool.submit(function, item) for item in islice(items, 4 * workers))
        while pending:
            yield pending.popleft().result()
            pending.extend(pool.submit(function, item) for item in islice(items, 1))
