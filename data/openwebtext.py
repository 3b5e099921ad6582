"""OpenWebText: 8 million web pages in 80 shards, as GPT-2 tokens.

Shard NN becomes train-NN.bin in the cache (about 113 million tokens, 227 MB), and its parquet file
is removed. One document in a hundred, chosen by a hash of its text, is held out. The held-out
documents of shard 0 are the validation split, however many shards are used; those of the other
shards are not used at all.
"""

import os
import zlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from data import download, shards
from data.dataset import Dataset
from data.progress import make_once
from data.tokenizer import GPT2Tokenizer
from lib.files import UserError, progress_bar

REPOSITORY = "datasets/Skylion007/openwebtext/resolve/79d93d786212f7344586290adb811d4ae6a1762c"
SHARDS = 80
NAME = "plain_text/train-{:05d}-of-00080.parquet"  # 302 MB, about 100,000 documents


def load(kind: str | None, n: int) -> Dataset:
    """Return the first n shards, downloaded and tokenized unless they are in the cache.

    OPENWEBTEXT_URL in the environment names a mirror or a folder with the same files. Raises
    UserError.
    """
    if kind not in (None, "gpt2"):
        raise UserError(f"openwebtext comes as GPT-2 tokens, so --tokenizer cannot be {kind}")
    if not 1 <= n <= SHARDS:
        raise UserError(f"openwebtext has shards 1 to {SHARDS}, so --shards cannot be {n}")
    tokenizer = GPT2Tokenizer()
    folder = download.cache_dir() / "openwebtext"
    train, val = [folder / f"train-{i:02d}.bin" for i in range(n)], folder / "val.bin"
    try:
        for i in range(n):
            prepare(i, train[i], val, tokenizer)
        tokens = shards.ConcatTokens([shards.read(path, "u2") for path in train])
        return Dataset("openwebtext", tokens, shards.read(val, "u2"), tokenizer)
    except OSError as error:
        raise UserError(f"openwebtext: {error.filename or folder}: {error.strerror}") from None


def prepare(i: int, train: Path, val: Path, tokenizer: GPT2Tokenizer) -> None:
    """Make `train` of shard i, and `val` if i is 0, unless they are there already."""

    def make() -> None:
        if find_spec("pyarrow") is None:
            raise UserError("openwebtext needs pyarrow: pip install pyarrow")
        url = os.environ.get("OPENWEBTEXT_URL") or f"{download.hub_url()}/{REPOSITORY}"
        parquet = train.with_name(f"{i:02d}.parquet")
        download.fetch(f"{url.rstrip('/')}/{NAME.format(i)}", parquet)
        held_out: list[np.ndarray] = []  # one percent, some 2 MB
        shards.write(train, "u2", tokenize(parquet, tokenizer, held_out))
        if i == 0:
            shards.write(val, "u2", held_out)
        parquet.unlink()

    make_once(train, make, lambda: train.exists() and val.exists())


def tokenize(parquet: Path, tokenizer: GPT2Tokenizer, held_out: list) -> Iterator[np.ndarray]:
    """Yield the tokens of each document, and append those of held-out documents to a list."""

    def encode(text: str) -> tuple[bool, np.ndarray]:
        is_held_out = zlib.crc32(text.encode()) % 100 == 0
        return is_held_out, np.append(tokenizer.encode(text), np.uint16(tokenizer.end))

    for is_held_out, ids in shards.ordered_map(encode, documents(parquet)):
        if is_held_out:
            held_out.append(ids)
        else:
            yield ids
    if not held_out:
        parquet.unlink()
        raise UserError(f"{parquet.name} has too few documents for a shard of openwebtext")


def documents(parquet: Path) -> Iterator[str]:
    """Yield the texts in a parquet file, reading one row group at a time (about 1,000 documents).

    Removes a file that is not a shard of openwebtext, and raises UserError.
    """
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(parquet) as file:
            rows = file.metadata.num_rows
            with progress_bar(f"tokenizing {parquet.name}", rows, " documents") as bar:
                for i in range(file.num_row_groups):
                    for text in file.read_row_group(i, columns=["text"])["text"].to_pylist():
                        if not isinstance(text, str | None):
                            raise TypeError(f"a text is of the type {type(text).__name__}")
                        if text is not None:
                            yield text
                        bar.update()
    except (ArrowException, OSError, KeyError, TypeError, UnicodeDecodeError) as error:
        parquet.unlink()
        words = " ".join(str(error).split())
        raise UserError(f"{parquet.name} is not a shard of openwebtext: {words}") from None
