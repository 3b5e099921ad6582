"""Fetch a file once: with time limits, retries and a progress bar; whole and verified, or not."""

import hashlib
import os
import shutil
import threading
from pathlib import Path

import requests
from tqdm import tqdm

from data.tokenizer import DataError

CHUNK = 1 << 16  # bytes
TIMEOUT = (5.0, 15.0)  # seconds to connect, and to wait for the next bytes
TRIES = 4
BACKOFF = 1.0  # seconds before the second try; each later pause is twice as long


def cache_dir() -> Path:
    """Where downloads are kept: data/cache, or DENSEFORMER_CACHE of the environment."""
    return Path(os.environ.get("DENSEFORMER_CACHE") or Path(__file__).parent / "cache")


def fetch(url: str, name: str, size: int, sha256: str, deadline: float | None = None) -> Path:
    """The path of the file `name` in the cache, got from `url` if it is not there yet.

    url is an http(s) address or the path of a local copy. The file has `size` bytes and that
    sha256. Raises DataError, with the reason, where it cannot be had; with a deadline, at the
    latest that many seconds from now. What is in the cache under that name is always whole.
    """
    path = cache_dir() / name
    if path.is_file() and digest(path) == sha256:
        return path
    part = path.with_name(f".{name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if url.startswith(("http://", "https://")):
            within(deadline, lambda given_up: download(url, part, size, sha256, given_up))
        else:
            shutil.copyfile(url, part)
            verify(part, size, sha256)
        os.replace(part, path)
    except OSError as error:
        raise DataError(f"cannot get {url}: {error.strerror or error}") from None
    except BadFile as error:
        raise DataError(f"cannot get {url}: {error}") from None
    finally:
        part.unlink(missing_ok=True)
    return path


class BadFile(Exception):
    """Something was received, and it is not the file."""


def download(url: str, part: Path, size: int, sha256: str, given_up: threading.Event):
    for attempt in range(1, TRIES + 1):
        if given_up.wait(BACKOFF * 2 ** (attempt - 2) if attempt > 1 else 0):
            return
        try:
            with requests.get(url, stream=True, timeout=TIMEOUT) as response:
                response.raise_for_status()
                options = {"unit": "B", "unit_scale": True, "leave": False, "disable": None}
                bar = tqdm(total=size, desc="downloading", **options)
                with part.open("wb") as file, bar:
                    for chunk in response.iter_content(CHUNK):
                        file.write(chunk)
                        bar.update(len(chunk))
                        if file.tell() > size:
                            break  # whatever this is, verify will refuse it
                    file.flush()
                    os.fsync(file.fileno())
            verify(part, size, sha256)
            return
        except (requests.RequestException, BadFile) as error:
            response = getattr(error, "response", None)
            status = None if response is None else response.status_code
            # The server's final word; too many requests and its own failures may pass.
            if attempt == TRIES or (status and 400 <= status < 500 and status not in (408, 429)):
                raise BadFile(reason(error)) from None


def reason(error: Exception) -> str:
    """What went wrong, without the library's nested representations."""
    if isinstance(error, requests.HTTPError):
        return f"the server answers {error.response.status_code} {error.response.reason}"
    if isinstance(error, requests.Timeout):
        return "the server does not answer in time"
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return "the connection broke off"
    if isinstance(error, requests.ConnectionError):
        return "no connection"
    return str(error)


def verify(path: Path, size: int, sha256: str):
    if path.stat().st_size != size:
        raise BadFile(f"it should have {size:,} bytes, what came has {path.stat().st_size:,}")
    if digest(path) != sha256:
        raise BadFile(f"it should have the sha256 {sha256}, what came has {digest(path)}")


def digest(path: Path) -> str:
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            sha256.update(chunk)
    return sha256.hexdigest()


def within(deadline: float | None, function):
    """Call function(given_up), an event that is set if it is not done in `deadline` seconds.

    In a thread, for a look-up of a host name obeys no time limit and cannot be interrupted.
    """
    given_up, failure = threading.Event(), []

    def run():
        try:
            function(given_up)
        except Exception as error:
            failure.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(deadline)
    if thread.is_alive():
        given_up.set()
        raise BadFile(f"not done in {deadline:.0f} seconds")
    if failure:
        raise failure[0]
