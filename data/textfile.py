"""Any UTF-8 text of yours, a file or a folder of them; and the token files of nanoGPT."""

import codecs
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import shards
from data.dataset import DataError, Dataset, make_tokenizer, split
from data.download import cache_dir
from data.tokenizer import GPT2Tokenizer, Tokenizer

LARGE = 100_000_000  # bytes; the tokens of a longer text are kept in a file, not in memory
CHUNK = 1 << 20  # bytes read at a time

# Where white space begins, a new token of GPT-2's begins: a text that is cut there has the same
# tokens as the whole.
CUT = re.compile(r"(?<=\S)[ \n]")


def load(path: Path, kind: str | None) -> Dataset:
    """A text file; a folder with train.txt and val.txt, or with any .txt files; or nanoGPT's bins.

    kind is a tokenizer's name, or None: characters where the text has at most 256 different ones
    and 100 MB, else UTF-8 bytes. The last tenth is for validation, unless there is a val.txt.
    Raises DataError for what cannot be read, is empty, or is not UTF-8.
    """
    try:
        if (path / "train.bin").exists() and (path / "val.bin").exists():
            return load_bins(path, kind)
        texts = find_texts(path)
        size = sum(file.stat().st_size for files in texts.values() for file in files)
        if size == 0:
            raise DataError(f"{path} is empty")
        chars = set()
        if kind == "char" or (kind is None and size <= LARGE):
            chars = {c for files in texts.values() for piece in pieces(files) for c in set(piece)}
        elif kind is None:
            kind = "byte"
        tokenizer = make_tokenizer(kind, chars)
        ids = {name: encode(files, tokenizer, size) for name, files in texts.items()}
    except OSError as error:
        raise DataError(f"cannot get tokens of {path}: {error.strerror}") from None
    if "val" in ids:
        return Dataset(str(path), ids["train"], ids["val"], tokenizer)
    return split(str(path), ids["all"], tokenizer)


def find_texts(path: Path) -> dict[str, list[Path]]:
    """The text files at `path`: {"all": files}, or "train" and "val" where they are two."""
    if not path.is_dir():
        return {"all": [path]}
    train, val = path / "train.txt", path / "val.txt"
    if train.exists() and val.exists():
        return {"train": [train], "val": [val]}
    files = sorted(path.glob("*.txt"))
    if not files:
        raise DataError(f"the folder {path} has no .txt files, nor train.bin and val.bin")
    return {"all": files}


def encode(files: list[Path], tokenizer: Tokenizer, size: int) -> np.ndarray:
    """The ids of these files, one after the other; in a file of the cache where that pays."""
    if size <= LARGE and tokenizer.end is None:
        return np.concatenate([tokenizer.encode(piece) for piece in pieces(files)])
    facts = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    key = zlib.crc32(repr((facts, tokenizer.state())).encode())
    shard = cache_dir() / "text" / f"{files[0].stem}-{key:08x}.bin"
    if not shard.exists():
        total = sum(f.stat().st_size for f in files)
        options = {"unit": "B", "unit_scale": True, "leave": False, "disable": None}
        with (
            shards.Writer(shard, 1 if tokenizer.vocab_size <= 256 else 2) as writer,
            tqdm(desc="tokenizing", total=total, **options) as bar,
        ):
            for file in files:
                for ids in shards.in_threads(tokenizer.encode, pieces([file], bar)):
                    writer.write(ids)
                if tokenizer.end is not None:
                    writer.write(np.array([tokenizer.end]))
    return shards.read(shard)


def pieces(files: list[Path], bar=None) -> Iterator[str]:
    """The text of the files, in pieces of about a megabyte that can be tokenized one by one."""
    for path in files:
        decoder, text = codecs.getincrementaldecoder("utf-8")(), ""
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


def load_bins(folder: Path, kind: str | None) -> Dataset:
    """nanoGPT's train.bin and val.bin: GPT-2's ids in 16 bits each, and nothing else."""
    if (folder / "meta.pkl").exists():
        raise DataError(
            f"{folder} has tokens whose meaning is in meta.pkl, a kind of file that can run code, "
            f"so it is not read; give the text itself: --dataset {folder}/input.txt"
        )
    if kind not in (None, "gpt2"):
        raise DataError(f"{folder} has GPT-2's tokens already, so --tokenizer cannot be {kind}")
    tokenizer, splits = GPT2Tokenizer(), []
    for name in ("train.bin", "val.bin"):
        path = folder / name
        size = path.stat().st_size
        if size == 0 or size % 2:
            raise DataError(f"{path} has {size:,} bytes, which is no number of 16-bit tokens")
        with path.open("rb") as file:
            own = file.read(len(shards.MAGIC)) == shards.MAGIC
        ids = shards.read(path) if own else np.asarray(np.memmap(path, "<u2", "r"))
        # All of it may take minutes to read; a file of another kind shows at once.
        for part in (ids[:1_000_000], ids[-1_000_000:]):
            if part.max() > tokenizer.end:
                raise DataError(f"{path} has a token {part.max()}, and GPT-2's end at 50256")
        splits.append(ids)
    return Dataset(str(folder), splits[0], splits[1], tokenizer)
