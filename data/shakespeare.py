"""Tiny Shakespeare: 1.1 MB of plays, as char-rnn made it known."""

import os

from data import download
from data.dataset import Dataset, from_text

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SIZE = 1_115_394  # bytes
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def load(kind: str | None, deadline: float | None = None) -> Dataset:
    """From the cache, or downloaded. SHAKESPEARE_URL in the environment names a mirror or a file.

    Raises DataError where it cannot be had, at the latest `deadline` seconds from now.
    """
    url = os.environ.get("SHAKESPEARE_URL") or URL
    path = download.cache_dir() / "tinyshakespeare.txt"
    download.fetch(url, path, SIZE, SHA256, deadline)
    return from_text("shakespeare", path.read_bytes().decode(), kind)
