"""The interface of a data set, and a text in memory as a data set."""

import zlib
from dataclasses import dataclass

import numpy as np

from data.shards import ConcatTokens
from data.tokenizer import Tokenizer, make_tokenizer

VAL_FRACTION = 0.1  # the last tenth of a text is for validation
SAMPLES, SAMPLE = 64, 1 << 20  # fingerprint() reads 64 samples of a million tokens from a split


@dataclass
class Dataset:
    name: str  # the value of --dataset that loads it
    train: np.ndarray | ConcatTokens  # (tokens,) ids of any integer type
    val: np.ndarray
    tokenizer: Tokenizer

    def fingerprint(self) -> str:
        """Return a string that changes with the tokens and the tokenizer.

        Splits of up to 64 million tokens are read whole; of longer ones the head, the tail and
        evenly spaced samples are read.
        """
        crc = zlib.crc32(repr(self.tokenizer.state()).encode())
        for ids in (self.train, self.val):
            starts = np.linspace(0, max(0, len(ids) - SAMPLE), SAMPLES).astype(int)
            for start in np.unique(starts):
                crc = zlib.crc32(ids[start : start + SAMPLE].tobytes(), crc)
        return f"{len(self.train)}-{len(self.val)}-{crc:08x}"


def split(name: str, ids: np.ndarray, tokenizer: Tokenizer) -> Dataset:
    """Return ids split 90/10 by position, so that neighbouring sentences stay together."""
    n = int(len(ids) * (1 - VAL_FRACTION))
    return Dataset(name, ids[:n], ids[n:], tokenizer)


def from_text(name: str, text: str, kind: str | None) -> Dataset:
    """Return a text in memory as a data set; kind is the tokenizer's name, or None to choose."""
    tokenizer = make_tokenizer(kind, set(text))
    return split(name, tokenizer.encode(text), tokenizer)
