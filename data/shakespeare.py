"""Tiny Shakespeare: 1.1 MB of plays, known from char-rnn."""

import os
from pathlib import Path

from data import download
from data.dataset import Dataset, from_text

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def fetch(deadline: float | None = None) -> Path:
    """Return the text file, downloaded unless it is in the cache; deadline is that of
    download.fetch.

    SHAKESPEARE_URL in the environment names a mirror or a local copy. Raises UserError.
    """
    url = os.environ.get("SHAKESPEARE_URL") or URL
    return download.fetch(url, download.cache_dir() / "tinyshakespeare.txt", SHA256, deadline)


def load(kind: str | None) -> Dataset:
    return from_text("shakespeare", fetch().read_bytes().decode(), kind)
