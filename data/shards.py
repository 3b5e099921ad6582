"""Token ids on disk: one array a file, written whole or not at all, and read by mapping it.

A file begins with 24 bytes, little-endian, and then has nothing but the ids:

    8 bytes   DFTOKENS
    4 bytes   version, 1
    4 bytes   bytes of an id, 1 or 2
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

from data.tokenizer import DataError

HEADER = struct.Struct("<8sIIQ")
MAGIC, VERSION = b"DFTOKENS", 1


class Writer:
    """with Writer(path, bytes_per_id) as shard: shard.write(ids). At the end path is there."""

    def __init__(self, path: Path, bytes_per_id: int):
        self.path, self.part = path, path.with_name(f".{path.name}.{os.getpid()}.part")
        self.dtype, self.count = np.dtype(f"<u{bytes_per_id}"), 0

    def __enter__(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.part.open("wb")
        self.file.write(bytes(HEADER.size))
        return self

    def write(self, ids: np.ndarray):
        self.file.write(ids.astype(self.dtype, copy=False).tobytes())
        self.count += len(ids)

    def __exit__(self, kind, error, traceback):
        try:
            with self.file:
                if kind is None:
                    self.file.seek(0)
                    header = HEADER.pack(MAGIC, VERSION, self.dtype.itemsize, self.count)
                    self.file.write(header)
                    self.file.flush()
                    os.fsync(self.file.fileno())
            if kind is None:
                os.replace(self.part, self.path)
        finally:
            self.part.unlink(missing_ok=True)


def read(path: Path) -> np.ndarray:
    """The ids of a shard, mapped. Raises DataError for a file that is cut short or another kind."""
    try:
        with path.open("rb") as file:
            header = file.read(HEADER.size)
        if len(header) < HEADER.size or not header.startswith(MAGIC):
            raise DataError(f"{path} is no file of tokens")
        _, version, width, count = HEADER.unpack(header)
        if version != VERSION or width not in (1, 2):
            raise DataError(f"{path} is of version {version}, with {width} bytes a token")
        if path.stat().st_size != HEADER.size + width * count:
            raise DataError(f"{path} should hold {count:,} tokens, and is cut short or too long")
        if count == 0:
            return np.zeros(0, dtype=f"<u{width}")
        return np.asarray(np.memmap(path, f"<u{width}", "r", HEADER.size, (count,)))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None


class Joined:
    """Arrays one after the other, as one: len() and [start:stop]. Nothing is copied but a slice."""

    def __init__(self, arrays: list[np.ndarray]):
        self.arrays = arrays
        self.ends = np.cumsum([len(array) for array in arrays])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, span: slice) -> np.ndarray:
        start, stop, step = span.indices(len(self))
        if step != 1:
            raise IndexError("only neighbouring tokens can be taken from several shards")
        i = int(np.searchsorted(self.ends, start, side="right"))
        pieces = []
        while start < stop:
            offset = int(self.ends[i]) - len(self.arrays[i])
            pieces.append(self.arrays[i][start - offset : stop - offset])
            start, i = int(self.ends[i]), i + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces or [self.arrays[0][:0]])


def in_threads(function: Callable, items: Iterable) -> Iterator:
    """function(item) of each, in order, made by all cores; few of them are held at a time."""
    workers = os.cpu_count() or 1
    items = iter(items)
    with ThreadPoolExecutor(workers) as pool:  # tiktoken and numpy let go of the interpreter
        waiting = deque(pool.submit(function, item) for item in islice(items, 4 * workers))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(function, item) for item in islice(items, 1))
