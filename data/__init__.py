"""Training data: token ids to train on and to validate on, and their tokenizer.

dataset = data.load("shakespeare", block_size=128)
dataset.train, dataset.val      1-D arrays of token ids, memory-mapped where they are large
dataset.tokenizer               encode: str -> ids, decode: ids -> str, vocab_size, state()
"""

import contextlib
import os
import platform
import threading
from functools import partial
from pathlib import Path

from data.cache import cache_dir, fetch, import_extra, innermost, make_once
from data.dataset import Dataset
from data.text import from_files, from_path
from data.tokenizer import Choice
from lib.files import UserError, say

PATIENCE = 5.0  # seconds to wait for Tiny Shakespeare if no data set was named
SHAKESPEARE = "tinyshakespeare.txt"
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

OPENWEBTEXT = "Skylion007/openwebtext"  # on the Hugging Face hub
REVISION = "79d93d786212f7344586290adb811d4ae6a1762c"
SHARD = "plain_text/train-{:05d}-of-00080.parquet"  # 302 MB, about 113 million GPT-2 tokens
SHARDS = 80


def load(name: str | None, block_size: int, tokenizer: Choice = None, n_shards: int = 1) -> Dataset:
    """Return the data set shakespeare, pydoc or openwebtext, or the one at the path `name`.

    None means Tiny Shakespeare, or pydoc if Tiny Shakespeare cannot be downloaded. tokenizer is
    char, byte, gpt2, None to choose by the text, or a tokenizer, which must know all characters of
    the text. n_shards is for openwebtext. Raises UserError if the data cannot be loaded, or if a
    split is too short for one window of block_size tokens and the token after it.
    """
    name = default_name() if name is None else name
    if name == "shakespeare":
        dataset = from_files(name, [fetch_shakespeare()], [], tokenizer)
    elif name == "pydoc":
        dataset = from_files(name, [make_pydoc()], [], tokenizer)
    elif name == "openwebtext":
        dataset = from_files(name, fetch_openwebtext(n_shards), [], tokenizer)
    elif os.path.exists(name):
        dataset = from_path(name, tokenizer)
    else:
        raise UserError(
            f"there is no file or folder {name!r}, nor a data set of this name; the data sets are "
            f"shakespeare, pydoc and openwebtext"
        )
    for split, tokens in (("train", dataset.train), ("val", dataset.val)):
        if len(tokens) <= block_size:
            raise UserError(
                f"{name} is too short: its {split} split has {len(tokens)} tokens, and a "
                f"block_size of {block_size} needs at least {block_size + 1}"
            )
    return dataset


def default_name() -> str:
    """Return shakespeare, or pydoc if Tiny Shakespeare cannot be had within PATIENCE."""

    def attempt() -> None:
        with contextlib.suppress(UserError):
            fetch_shakespeare()

    # In a thread, because looking up a host name has no time limit.
    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    if (cache_dir() / SHAKESPEARE).exists():
        return "shakespeare"
    say(
        "Tiny Shakespeare cannot be downloaded (--dataset shakespeare says why), so this run uses "
        "pydoc, Python's language reference."
    )
    return "pydoc"


def fetch_shakespeare() -> Path:
    """Return the file of Tiny Shakespeare, 1.1 MB of plays, downloaded unless it is in the cache.

    SHAKESPEARE_URL in the environment names a mirror or a local copy.
    """
    url = os.environ.get("SHAKESPEARE_URL") or URL
    return fetch(url, cache_dir() / SHAKESPEARE, SHA256)


def make_pydoc() -> Path:
    """Return a file with the texts that help() shows, in the order of their names: 0.5 MB."""
    from pydoc_data.topics import topics

    path = cache_dir() / f"pydoc-{platform.python_version()}.txt"
    text = "\n".join(topics[name] for name in sorted(topics))
    return make_once(path, lambda file: file.write(text.encode()))


def fetch_openwebtext(n: int) -> list[Path]:
    """Return the first n parquet files of OpenWebText, in the cache of huggingface_hub.

    Raises UserError for one that is not there and cannot be downloaded.
    """
    if not 1 <= n <= SHARDS:
        raise UserError(f"openwebtext has 1 to {SHARDS} shards, so --shards cannot be {n}")
    hub = import_extra("huggingface_hub")
    get = partial(hub.hf_hub_download, OPENWEBTEXT, repo_type="dataset", revision=REVISION)
    try:
        return [Path(get(SHARD.format(i))) for i in range(n)]
    except Exception as error:  # its releases use different HTTP libraries, with their own errors
        raise UserError(f"cannot download openwebtext: {innermost(error)}") from None
