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
from data.errors import DataError
from data.progress import locked, progress_bar
from data.tokenizer import GPT2Tokenizer, Tokenizer, make_tokenizer

LARGE = 100_000_000  # bytes; the tokens of a longer text are kept in a file, not in memory
CHUNK = 1 << 20  # bytes to read at a time

# GPT-2 begins a new token where white space begins, so a text that is cut there keeps its tokens.
CUT = re.compile(r"(?<=\S)[ \n]")


def load(name: str, kind: str | None) -> Dataset:
    """Return the text file or folder at the path `name` as a data set.

    A folder has train.bin and val.bin, or train.txt and val.txt, or any .txt files. kind is a
    tokenizer's name; None stands for char if the text has at most 256 different characters and
    100 MB, and for byte otherwise. The last tenth is for validation, unless there is a val.txt.
    Raises DataError for text that cannot be read, is empty, or is not UTF-8.
    """
    path = Path(name)
    try:
        if (path / "train.bin").exists() and (path / "val.bin").exists():
            return load_bins(name, kind)
        texts = find_texts(path)
        size = sum(file.stat().st_size for files in texts.values() for file in files)
        if size == 0:
            raise DataError(f"{path} is empty")
        if kind is None and size > LARGE:
            kind = "byte"
        chars: set[str] = set()
        if kind in (None, "char"):
            for text in iter_text([file for files in texts.values() for file in files]):
                chars.update(text)
        tokenizer = make_tokenizer(kind, chars)
        ids = {part: encode(files, tokenizer, size) for part, files in texts.items()}
    except OSError as error:
        raise DataError(f"cannot get tokens of {path}: {error.strerror}") from None
    if "val" in ids:
        return Dataset(name, ids["train"], ids["val"], tokenizer)
    return split(name, ids["all"], tokenizer)


def find_texts(path: Path) -> dict[str, list[Path]]:
    """Return {"train": files, "val": files}, or {"all": files} of a text that is to be split."""
    if not path.is_dir():
        return {"all": [path]}
    train, val = path / "train.txt", path / "val.txt"
    if train.exists() and val.exists():
        return {"train": [train], "val": [val]}
    files = sorted(path.glob("*.txt"))
    if not files:
        raise DataError(f"the folder {path} has neither .txt files nor train.bin and val.bin")
    return {"all": files}


def encode(files: list[Path], tokenizer: Tokenizer, size: int) -> np.ndarray:
    """Return the ids of the files, one after the other: in memory, or in the cache if that pays.

    size is that of the whole text in bytes.
    """
    if size <= LARGE and tokenizer.end is None:
        return np.concatenate([tokenizer.encode(text) for text in iter_text(files)])
    facts = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    key = zlib.crc32(repr((facts, tokenizer.state())).encode())
    shard = cache_dir() / "text" / f"{files[0].stem}-{key:08x}.bin"
    if not shard.exists():
        with locked(shard):
            if not shard.exists():
                write_shard(shard, files, tokenizer)
    return shards.read(shard)


def write_shard(shard: Path, files: list[Path], tokenizer: Tokenizer) -> None:
    """Write the ids of the files to a shard, with the end token, if there is one, after each."""
    bar = progress_bar(f"tokenizing {files[0].name}", sum(f.stat().st_size for f in files), "B")
    with shards.Writer(shard, 1 if tokenizer.vocab_size <= 256 else 2) as writer, bar:
        for file in files:
            for ids in shards.ordered_map(tokenizer.encode, iter_text([file], bar)):
                writer.write(ids)
            if tokenizer.end is not None:
                writer.write(np.array([tokenizer.end]))


def iter_text(files: list[Path], bar: tqdm | None = None) -> Iterator[str]:
    """Yield the text of the files in pieces of about a megabyte, cut where GPT-2's tokens allow.

    A byte-order mark at the start of a file is not part of the text. Raises DataError.
    """
    for path in files:
        decoder, text = codecs.getincrementaldecoder("utf-8-sig")(), ""
        try:
            with path.open("rb") as file:
                while chunk := file.read(CHUNK):
                    text += decoder.decode(chunk)
                    cuts = [m.start() for m in CUT.finditer(text, max(1, len(text) - 10_000))]
                    if cuts or len(text) > 16 * CHUNK:
                        end = cuts[-1] if cuts else len(text)
                        yield text[:end]
                        text = text[end:]
                    if bar is not None:
                        bar.update(len(chunk))
            yield text + decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path} is not UTF-8 text ({error.reason}: byte {error.object[error.start]:#04x});"
                f" convert it first, for instance with iconv"
            ) from None


def load_bins(name: str, kind: str | None) -> Dataset:
    """Return nanoGPT's train.bin and val.bin: GPT-2 ids as 16-bit numbers, without a header."""
    folder = Path(name)
    if (folder / "meta.pkl").exists():
        raise DataError(
            f"{folder} has tokens that only its meta.pkl explains, and a pickle can run any code; "
            f"give the text itself: --dataset {folder}/input.txt"
        )
    if kind not in (None, "gpt2"):
        raise DataError(f"{folder} has GPT-2's tokens, so --tokenizer cannot be {kind}")
    tokenizer, splits = GPT2Tokenizer(), []
    for path in (folder / "train.bin", folder / "val.bin"):
        size = path.stat().st_size
        if size == 0 or size % 2:
            raise DataError(f"{path} has {size:,} bytes, which is not a number of 16-bit tokens")
        ids = np.asarray(np.memmap(path, "<u2", "r"))
        # Reading all of a file may take minutes; one of another kind shows at its ends.
        for part in (ids[:1_000_000], ids[-1_000_000:]):
            if part.max() > tokenizer.end:
                raise DataError(f"{path} has a token {part.max()}; GPT-2's end at {tokenizer.end}")
            if not part[1::2].any():
                raise DataError(f"{path} seems to have tokens of 32 bits; nanoGPT's have 16")
        splits.append(ids)
    return Dataset(name, splits[0], splits[1], tokenizer)
