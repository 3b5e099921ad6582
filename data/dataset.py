"""The interface of a data set, and how a text becomes one."""

import zlib
from dataclasses import dataclass

import numpy as np

from data.shards import Joined
from data.tokenizer import ByteTokenizer, CharTokenizer, DataError, GPT2Tokenizer, Tokenizer

__all__ = ["DataError", "Dataset", "from_text"]

VAL_FRACTION = 0.1  # the last tenth of a text is for validation


@dataclass
class Dataset:
    name: str  # what --dataset calls it
    train: np.ndarray | Joined  # (tokens,) ids, of any integer type
    val: np.ndarray
    tokenizer: Tokenizer

    def fingerprint(self) -> str:
        """Tells whether a resumed run has the data that it began with."""
        return f"{len(self.train)}-{len(self.val)}-{zlib.crc32(self.val.tobytes()):08x}"


def split(name: str, ids: np.ndarray, tokenizer: Tokenizer) -> Dataset:
    """ids, split 90/10 by position: neighbouring sentences never are in both."""
    n = int(len(ids) * (1 - VAL_FRACTION))
    return Dataset(name, ids[:n], ids[n:], tokenizer)


def make_tokenizer(kind: str | None, chars: set[str]) -> Tokenizer:
    """The tokenizer of that name for a text of these characters.

    None is characters where the text has at most 256 different ones, else UTF-8 bytes.
    """
    if kind == "gpt2":
        return GPT2Tokenizer()
    if kind == "char" or (kind is None and len(chars) <= 256):
        return CharTokenizer("".join(sorted(chars)))
    return ByteTokenizer()


def from_text(name: str, text: str, kind: str | None) -> Dataset:
    """A text that is in memory, as tokens of that kind."""
    tokenizer = make_tokenizer(kind, set(text))
    return split(name, tokenizer.encode(text), tokenizer)
