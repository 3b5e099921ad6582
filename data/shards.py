"""Token ids on disk, as nanoGPT keeps them: bare integers, memory-mapped."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from lib.files import open_new


def write(path: Path, dtype: str, arrays: Iterable[np.ndarray]) -> None:
    """Write the concatenation of some arrays of ids to a new file."""
    with open_new(path) as file:
        for ids in arrays:
            file.write(ids.astype(dtype, copy=False).tobytes())


def read(path: Path, dtype: str) -> np.ndarray:
    """Return the ids in a file, memory-mapped."""
    if path.stat().st_size == 0:  # which cannot be mapped
        return np.empty(0, dtype)
    return np.asarray(np.memmap(path, dtype, "r"))


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
