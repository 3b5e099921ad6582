"""Your own text: a file, a folder of .txt files, or the token files of nanoGPT."""

import codecs
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import shards
from data.dataset import Dataset, split
from data.download import cache_dir
from data.progress import make_once
from data.tokenizer import GPT2Tokenizer, Tokenizer, make_tokenizer
from lib.files import UserError, progress_bar

LARGE = 100_000_000  # bytes; the tokens of a longer text are kept in a file, not in memory
CHUNK = 1 << 20  # bytes to read at a time
# how files of gzip, zip, bzip2, xz and zstd begin
COMPRESSED = (b"\x1f\x8b", b"PK\x03\x04", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")

# The last place where white space begins. GPT-2 begins a new token there, so cutting a text there
# does not change its tokens.
CUT = re.compile(r".*\S(?=[ \n])", re.DOTALL)


def load(name: str, kind: str | None) -> Dataset:
    """Return the text file or folder at the path `name` as a data set.

    A folder has train.bin and val.bin, or train.txt and val.txt, or any .txt files. kind is a
    tokenizer's name; None stands for char if the text has at most 256 different characters and
    100 MB, and for byte otherwise. The last tenth is for validation, unless there is a val.txt.
    Raises UserError for text that cannot be read, is empty, or is not UTF-8.
    """
    path = Path(name)
    try:
        if (path / "train.bin").exists() and (path / "val.bin").exists():
            return load_bins(name, kind)
        parts = [[path]]
        if path.is_dir():
            texts = sorted(file for file in path.iterdir() if file.suffix.lower() == ".txt")
            splits = [[f for f in texts if f.stem.lower() == stem] for stem in ("train", "val")]
            parts = splits if all(splits) else [texts]
        files = [file for part in parts for file in part]
        if not files:
            raise UserError(f"the folder {path} has neither .txt files nor train.bin and val.bin")
        size = sum(file.stat().st_size for file in files)
        if size == 0:
            raise UserError(f"{path} is empty")
        if kind is None and size > LARGE:
            kind = "byte"
        chars: set[str] = set()
        if kind in (None, "char"):
            for file in files:
                for text in iter_text(file):
                    chars.update(text)
        tokenizer = make_tokenizer(kind, chars)
        ids = [encode(part, tokenizer, size) for part in parts]
    except OSError as error:
        raise UserError(f"cannot get tokens of {path}: {error.strerror}") from None
    if len(ids) == 1:
        return split(name, ids[0], tokenizer)
    return Dataset(name, ids[0], ids[1], tokenizer)


def encode(files: list[Path], tokenizer: Tokenizer, size: int) -> np.ndarray:
    """Return the ids of the files, one after the other; those of a long text are memory-mapped.

    size is that of the whole text in bytes. The end token, if there is one, follows each file.
    """

    def iter_ids(bar: tqdm | None = None) -> Iterator[np.ndarray]:
        for file in files:
            yield from shards.ordered_map(tokenizer.encode, iter_text(file, bar))
            if tokenizer.end is not None:
                yield np.array([tokenizer.end])

    if size <= LARGE and tokenizer.end is None:
        return np.concatenate(list(iter_ids()))
    facts = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    key = zlib.crc32(repr((facts, tokenizer.state())).encode())
    dtype = "u1" if tokenizer.vocab_size <= 256 else "u2"
    shard = cache_dir() / "text" / f"{files[0].stem}-{key:08x}.{dtype}"

    def make() -> None:
        total = sum(file.stat().st_size for file in files)
        with progress_bar(f"tokenizing {files[0].name}", total, "B") as bar:
            shards.write(shard, dtype, iter_ids(bar))

    make_once(shard, make, shard.exists)
    return shards.read(shard, dtype)


def iter_text(path: Path, bar: tqdm | None = None) -> Iterator[str]:
    """Yield a file's text in pieces of about a megabyte, cut where GPT-2's tokens allow.

    A byte-order mark at the start is not part of the text. Raises UserError.
    """
    decoder, text = codecs.getincrementaldecoder("utf-8-sig")(), ""
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                text += decoder.decode(chunk)
                cut = CUT.match(text, max(0, len(text) - 10_000))
                if cut or len(text) > 16 * CHUNK:
                    end = cut.end() if cut else len(text)
                    yield text[:end]
                    text = text[end:]
                if bar is not None:
                    bar.update(len(chunk))
        yield text + decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        with path.open("rb") as file:
            if file.read(6).startswith(COMPRESSED):
                raise UserError(f"{path} is compressed; unpack it first") from None
        raise UserError(
            f"{path} is not UTF-8 text ({error.reason}: byte {error.object[error.start]:#04x}); "
            f"convert it first, for instance with iconv"
        ) from None


def load_bins(name: str, kind: str | None) -> Dataset:
    """Return nanoGPT's train.bin and val.bin: GPT-2 ids as 16-bit numbers, without a header."""
    folder = Path(name)
    if (folder / "meta.pkl").exists():
        raise UserError(
            f"{folder} defines its tokens in meta.pkl, which is not loaded because a pickle can "
            f"run any code; give the text itself: --dataset {folder}/input.txt"
        )
    if kind not in (None, "gpt2"):
        raise UserError(f"{folder} has GPT-2's tokens, so --tokenizer cannot be {kind}")
    tokenizer, splits = GPT2Tokenizer(), []
    for path in (folder / "train.bin", folder / "val.bin"):
        head = np.fromfile(path, "u2", 1_000_000)
        is_32_bit = not head[1::2].any()  # the upper halves of the numbers are 0
        if is_32_bit or path.stat().st_size % 2 or head.max() > tokenizer.end:
            raise UserError(f"{path} does not hold GPT-2's tokens as 16-bit numbers")
        splits.append(shards.read(path, "u2"))
    return Dataset(name, splits[0], splits[1], tokenizer)
