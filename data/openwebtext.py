"""OpenWebText: 8 million web pages in 80 shards, as GPT-2's tokens; take as many as you like.

Shard NN becomes NN.train.bin in the cache (some 113 million tokens, 227 MB), and its parquet file
goes. One document in a hundred, by a hash of its text, is held out. Those of shard 0 are the
validation split, whichever shards are used; those of the others are left unused.
"""

import contextlib
import os
import zlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from data import download, shards
from data.dataset import DataError, Dataset
from data.tokenizer import GPT2Tokenizer

HUB = "https://huggingface.co/datasets/Skylion007/openwebtext/resolve/"
REVISIONS = ("79d93d786212f7344586290adb811d4ae6a1762c", "main")
SHARDS = 80
NAME = "plain_text/train-{:05d}-of-{:05d}.parquet"  # 302 MB, some 100,000 documents
SHARD_0 = "caed9f4b7053d7cd4d1a13ce9ec9224d84a3bba1f11579193562a7e31ebe656e"  # its sha256


def load(kind: str | None, n: int) -> Dataset:
    """The first n shards, downloaded and tokenized as far as they are not in the cache yet.

    OPENWEBTEXT_URL in the environment names a mirror or a folder with the same files. Raises
    DataError for an n that is not 1 to 80, a missing package, and data that cannot be had.
    """
    if kind not in (None, "gpt2"):
        raise DataError(f"openwebtext comes as GPT-2's tokens; --tokenizer cannot be {kind}")
    if not 1 <= n <= SHARDS:
        raise DataError(f"openwebtext has shards 1 to {SHARDS}, so --shards cannot be {n}")
    if find_spec("pyarrow") is None:
        raise DataError("openwebtext needs pyarrow: pip install pyarrow")
    tokenizer = GPT2Tokenizer()
    folder = download.cache_dir() / "openwebtext"
    for i in range(n):
        prepare(i, folder, tokenizer)
    train = [shards.read(folder / f"{i:02d}.train.bin") for i in range(n)]
    return Dataset("openwebtext", shards.Joined(train), shards.read(folder / "val.bin"), tokenizer)


def prepare(i: int, folder: Path, tokenizer: GPT2Tokenizer):
    """Have shard i in the folder as tokens. Of several processes one does it, the others wait."""
    train, val = folder / f"{i:02d}.train.bin", folder / "val.bin"
    if train.exists() and val.exists():
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{i:02d}.lock"):
            if train.exists() and val.exists():
                return
            parquet = get(i, folder)
            tokenize(parquet, tokenizer, train, val if i == 0 else None)
            parquet.unlink()
    except OSError as error:
        raise DataError(f"openwebtext: {error.filename or folder}: {error.strerror}") from None


def get(i: int, folder: Path) -> Path:
    """The parquet file of shard i."""
    mirror = os.environ.get("OPENWEBTEXT_URL")
    name, path = NAME.format(i, SHARDS), folder / f"{i:02d}.parquet"
    if mirror:
        return download.fetch(f"{mirror.rstrip('/')}/{name}", path)
    pinned, newest = REVISIONS
    try:
        return download.fetch(f"{HUB}{pinned}/{name}", path, sha256=SHARD_0 if i == 0 else None)
    except DataError as error:
        if "answers 404" not in str(error):
            raise
        return download.fetch(f"{HUB}{newest}/{name}", path)


def tokenize(parquet: Path, tokenizer: GPT2Tokenizer, train: Path, val: Path | None):
    """Write the documents' tokens to `train`, those held out to `val`, an end after each."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    def ids(text):
        return held_out(text), np.append(tokenizer.encode(text), np.uint16(tokenizer.end))

    def texts(file):  # a row group, some 1,000 documents, is in memory at a time
        for i in range(file.num_row_groups):
            yield from file.read_row_group(i, columns=["text"])["text"].to_pylist()

    try:
        with ParquetFile(parquet) as file, contextlib.ExitStack() as stack:
            out = {False: stack.enter_context(shards.Writer(train, 2))}
            if val:
                out[True] = stack.enter_context(shards.Writer(val, 2))
            documents = shards.in_threads(ids, texts(file))
            options = {"unit": " documents", "leave": False, "disable": None}
            total = file.metadata.num_rows
            for apart, tokens in tqdm(documents, f"tokenizing {train.name}", total, **options):
                if apart in out:
                    out[apart].write(tokens)
    except (ArrowException, KeyError) as error:
        parquet.unlink()  # it would be no better the next time
        raise DataError(f"{parquet.name} is no shard of openwebtext: {error}") from None


def held_out(text: str) -> bool:
    return zlib.crc32(text.encode()) % 100 == 0
