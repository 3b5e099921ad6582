"""The interface of a data set, and how a text becomes one."""

import zlib
from dataclasses import dataclass

import numpy as np

from data.tokenizer import ByteTokenizer, CharTokenizer, DataError, Tokenizer

__all__ = ["DataError", "Dataset", "from_text"]

VAL_FRACTION = 0.1  # the last tenth of a text is for validation


@dataclass
class Dataset:
    name: str  # what --dataset calls it
    train: np.ndarray  # (tokens,) ids, of any integer type
    val: np.ndarray
    tokenizer: Tokenizer

    def fingerprint(self) -> str:
        """Tells whether a resumed run has the data that it began with."""
        return f"{len(self.train)}-{len(self.val)}-{zlib.crc32(np.ascontiguousarray(self.val)):08x}"


def split(name: str, ids: np.ndarray, tokenizer: Tokenizer) -> Dataset:
    """ids, split 90/10 by position: neighbouring sentences never are in both."""
    n = int(len(ids) * (1 - VAL_FRACTION))
    return Dataset(name, ids[:n], ids[n:], tokenizer)


def from_text(name: str, text: str) -> Dataset:
    """Characters where the text has at most 256 different ones, else UTF-8 bytes."""
    chars = sorted(set(text))
    tokenizer = CharTokenizer("".join(chars)) if len(chars) <= 256 else ByteTokenizer()
    return split(name, tokenizer.encode(text), tokenizer)
