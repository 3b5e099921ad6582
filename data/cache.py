"""The cache: files that are downloaded or made once, whole or not at all, by one process."""

import hashlib
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import requests
from filelock import FileLock, Timeout

from lib.files import UserError, open_new, say

TIMEOUT = (5.0, 15.0)  # seconds to connect, and to wait for the next bytes


def cache_dir() -> Path:
    """Return the folder of the cache: DENSEFORMER_CACHE in the environment, or data/cache."""
    return Path(os.environ.get("DENSEFORMER_CACHE") or Path(__file__).parent / "cache").expanduser()


def make_once(path: Path, write: Callable[[BinaryIO], object]) -> Path:
    """Return `path`, after calling write(file) to write the file unless it exists.

    It exists only once it is complete. One process at a time prepares it; the others wait, and say
    so. Raises UserError if it cannot be written.
    """
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_name(f".{path.name}.lock"))
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            say(f"waiting for another process to prepare {path}", sys.stderr)
            held = lock.acquire()
        with held:
            if not path.exists():
                with open_new(path) as file:
                    write(file)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; "
            f"DENSEFORMER_CACHE can name another folder for the cache"
        ) from None
    return path


def fetch(url: str, path: Path, sha256: str) -> Path:
    """Return `path`, after getting the file with this sha256 at `url` unless `path` exists.

    url is an http(s) address or the path of a local copy. Raises UserError that says why there is
    no file.
    """

    def write(file: BinaryIO) -> None:
        try:
            if "://" in url:
                say(f"downloading {Path(url).name}", sys.stderr)
                response = requests.get(url, timeout=TIMEOUT)
                response.raise_for_status()
                content = response.content
            else:
                content = Path(url).expanduser().read_bytes()
        except (OSError, ValueError) as error:
            raise UserError(f"cannot get {url}: {innermost(error)}") from None
        if hashlib.sha256(content).hexdigest() != sha256:
            raise UserError(f"cannot get {url}: its sha256 is not {sha256}")
        file.write(content)

    return make_once(path, write)


def innermost(error: BaseException) -> str:
    """Return the reason behind an error, without what each library wraps around it."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return " ".join((getattr(error, "strerror", None) or str(error)).split())


def import_extra(name: str):
    """Return a module of a package that only some data needs. Raises UserError if it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise UserError(f"this data needs {package}: pip install {package}") from None
