"""Any UTF-8 text of yours."""

import codecs
from pathlib import Path

import numpy as np

from data.dataset import DataError, Dataset, from_text, split
from data.tokenizer import ByteTokenizer

LARGE = 100_000_000  # bytes; a text beyond is not read into memory but mapped, as bytes


def load(path: Path) -> Dataset:
    """Characters where the file has at most 256 different ones and 100 MB, else UTF-8 bytes.

    Raises DataError for a file that cannot be read, is empty, or is not UTF-8.
    """
    try:
        if path.is_dir():
            raise DataError(f"{path} is a folder; --dataset takes a text file")
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty")
        if path.stat().st_size <= LARGE:
            return from_text(str(path), path.read_bytes().decode())
        with path.open("rb") as file:
            decoder = codecs.getincrementaldecoder("utf-8")()
            while chunk := file.read(1 << 24):
                decoder.decode(chunk)
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text ({error.reason}: byte {error.object[error.start]:#04x}); "
            f"convert it first, for instance with iconv"
        ) from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    return split(str(path), np.memmap(path, dtype=np.uint8, mode="r"), ByteTokenizer())
