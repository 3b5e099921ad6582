"""Texts to token ids: a file, a folder of .txt or .parquet files, or nanoGPT's .bin."""

import hashlib
import itertools
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data.cache import cache_dir, import_extra, innermost, make_once
from data.dataset import Dataset
from data.tokenizer import Choice, Tokenizer, make_tokenizer
from lib.files import UserError, progress_bar, say

LARGE = 100_000_000  # bytes; the ids of a longer text are kept in a file, not in memory
CHUNK = 1 << 20  # characters to read at a time
FORMAT = 1  # of the files of ids, a part of their keys
# how files of gzip, zip, bzip2, xz and zstd begin
COMPRESSED = (b"\x1f\x8b", b"PK\x03\x04", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")

# The last place where white space begins. GPT-2 begins a new token there, so cutting a text there
# does not change its tokens.
CUT = re.compile(r".*\S(?=[ \n])", re.DOTALL)


def from_path(name: str, choice: Choice) -> Dataset:
    """Return the file or folder at the path `name` as a data set. Raises UserError."""
    path = Path(name)
    if (path / "train.bin").exists() and (path / "val.bin").exists():
        return from_bins(name, choice)
    if path.suffix == ".bin":
        raise UserError(f"{path} is a file of ids: give the folder with train.bin and val.bin")
    train, val = find_files(path) if path.is_dir() else ([path], [])
    return from_files(name, train, val, choice)


def find_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return a folder's files for training and for validation, by the words in their names.

    If some are named train, those are for training, otherwise all that are not named val or test.
    Parquet files go before .txt files. Says which files are not used.
    """
    found = sorted(f for f in folder.glob("[!.]*") if f.suffix.lower() in (".txt", ".parquet"))
    files = list(filter(is_parquet, found)) or found

    def named(words: str) -> list[Path]:
        word = re.compile(rf"(?<![a-z])({words})(?![a-z])", re.IGNORECASE)
        return [file for file in files if word.search(file.stem)]

    val = named("val|valid|validation|dev|eval|evaluation")
    train = named("train|training") or [f for f in files if f not in val + named("test|testing")]
    if not train:
        raise UserError(f"the folder {folder} has no .txt, .parquet or .bin files to train on")
    if unused := [f.name for f in found if f not in train + val]:
        say(f"not used from {folder}: {', '.join(unused)}", sys.stderr)
    return train, val


def from_files(name: str, train: list[Path], val: list[Path], choice: Choice) -> Dataset:
    """Return files of text, or parquet files with a column `text`, as a data set.

    Without files for validation, the last tenth of a text is. Of parquet files, it is one document
    in a hundred of the first file, chosen by a hash of its text; those of the other files are not
    used at all, so that the validation split does not depend on the number of files.
    """
    files = train + val
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} is a folder, a pipe or a broken link, not a file of text")
    size = sum(file.stat().st_size for file in files)
    if size == 0:
        raise UserError(f"{name} is empty")
    has_documents = is_parquet(train[0])
    if choice is None and (has_documents or size > LARGE):
        choice = "gpt2" if has_documents else "byte"
    scanned = files if choice in (None, "char") else []
    chars = {char for file in scanned for text in read(file) for char in set(text)}
    tokenizer = make_tokenizer(choice, chars)
    if val:
        return Dataset(name, encode(train, tokenizer), encode(val, tokenizer), tokenizer)
    if has_documents:
        held_out = encode(train[:1], tokenizer, held_out=True)
        return Dataset(name, encode(train, tokenizer, held_out=False), held_out, tokenizer)
    ids = encode(train, tokenizer)
    n = int(0.9 * len(ids))  # split by position, so that neighboring sentences stay together
    return Dataset(name, ids[:n], ids[n:], tokenizer)


def encode(files: list[Path], tokenizer: Tokenizer, held_out: bool | None = None) -> np.ndarray:
    """Return the ids of the files, one after the other; many are kept in a file of the cache.

    held_out chooses the documents that are held out, or those that are not; None takes all.
    """
    dtype = "u1" if tokenizer.vocab_size <= 256 else "u2"
    facts = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    size = sum(size for _, size, _ in facts)

    def encode_document(text: str) -> np.ndarray:
        # A newline, or what else a text may begin with, stands for an end token that is missing.
        return np.append(tokenizer.encode(text), np.array(tokenizer.start, dtype))

    def iter_ids(update: Callable = lambda n: None) -> Iterator[np.ndarray]:
        for file in files:
            texts = read(file, update)
            if is_parquet(file):
                chosen = (t for t in texts if held_out in (None, zlib.crc32(t.encode()) % 100 == 0))
                yield from ordered_map(encode_document, chosen)
            else:
                yield from ordered_map(tokenizer.encode, texts)
                yield np.array([] if tokenizer.end is None else [tokenizer.end], dtype)

    def write(cached: BinaryIO) -> None:
        with progress_bar(f"tokenizing {files[0].name}", size, "B") as bar:
            for ids in iter_ids(bar.update):
                cached.write(ids.astype(dtype, copy=False).tobytes())

    if size <= LARGE and tokenizer.end is None:
        return np.concatenate(list(iter_ids()) or [np.empty(0, dtype)])
    key = hashlib.sha256(repr((FORMAT, facts, tokenizer.state(), held_out)).encode()).hexdigest()
    path = cache_dir() / "tokens" / f"{files[0].stem}-{key[:16]}.{dtype}"
    return read_ids(make_once(path, write), dtype)


def read_ids(path: Path, dtype: str) -> np.ndarray:
    """Return the ids in a file of bare integers, as nanoGPT keeps them, memory-mapped."""
    n = path.stat().st_size // np.dtype(dtype).itemsize
    return np.asarray(np.memmap(path, dtype, "r", shape=n)) if n else np.empty(0, dtype)


def ordered_map(function: Callable, items: Iterable) -> Iterator:
    """Yield function(item) for each item, in order, computed on all cores.

    Four items per core are in memory. tiktoken and numpy release the interpreter lock, so threads
    suffice.
    """
    items, workers = iter(items), os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        while batch := list(itertools.islice(items, 4 * workers)):
            yield from pool.map(function, batch)


def is_parquet(path: Path) -> bool:
    return path.suffix.lower() == ".parquet"


def read(path: Path, update: Callable = lambda n: None) -> Iterator[str]:
    """Yield the documents of a parquet file, or the text of another one in pieces.

    update(n) is called when n more bytes were read. Raises UserError for what cannot be read.
    """
    try:
        yield from read_parquet(path, update) if is_parquet(path) else read_text(path, update)
    except (OSError, ValueError, LookupError, NotImplementedError) as error:  # of pyarrow, too
        raise UserError(f"cannot read {path}: {innermost(error)}") from None


def read_text(path: Path, update: Callable) -> Iterator[str]:
    """Yield a text in pieces of about a million characters, cut where GPT-2's tokens allow.

    A byte-order mark at the start is not part of the text.
    """
    rest = ""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            while chunk := file.read(CHUNK):
                if "\0" in chunk:
                    raise UserError(f"{path} has NUL characters: it is UTF-16, or no text at all")
                text = rest + chunk
                cut = CUT.match(text, max(0, len(text) - 10_000))
                end = cut.end() if cut else len(text)
                yield text[:end]
                rest = text[end:]
                update(len(chunk.encode()))
        yield rest
    except UnicodeDecodeError as error:
        if path.open("rb").read(6).startswith(COMPRESSED):
            raise UserError(f"{path} is compressed; unpack it first") from None
        raise UserError(
            f"{path} is not UTF-8 text ({error.reason}: byte {error.object[error.start]:#04x}); "
            f"convert it first, for instance with iconv"
        ) from None


def read_parquet(path: Path, update: Callable) -> Iterator[str]:
    """Yield the documents in the column `text`; a null is no document."""
    with import_extra("pyarrow.parquet").ParquetFile(path) as file:
        bytes_per_row = path.stat().st_size / max(1, file.metadata.num_rows)
        for batch in file.iter_batches(1000, columns=["text"]):
            yield from batch["text"].cast("string").drop_null().to_pylist()
            update(int(batch.num_rows * bytes_per_row))


def from_bins(name: str, choice: Choice) -> Dataset:
    """Return nanoGPT's train.bin and val.bin: GPT-2 ids as 16-bit numbers, without a header."""
    if Path(name, "meta.pkl").exists():
        raise UserError(
            f"{name} defines its tokens in meta.pkl, which is not loaded because a pickle can run "
            f"any code; give the text itself: --dataset {name}/input.txt"
        )
    tokenizer = make_tokenizer(choice or "gpt2", set())
    if tokenizer.end is None:
        raise UserError(f"{name} has GPT-2's tokens, so --tokenizer must be gpt2")
    train, val = (read_ids(Path(name, file), "u2") for file in ("train.bin", "val.bin"))
    for ids in (train[:1_000_000], val[:1_000_000]):
        # The upper halves of 32-bit numbers are 0.
        if not ids[1::2].any() or ids.max() > tokenizer.end:
            raise UserError(f"{name} does not hold GPT-2's tokens as 16-bit numbers")
    return Dataset(name, train, val, tokenizer)
