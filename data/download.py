"""Fetch a file once: resumed, retried, with a progress bar; whole and verified, or not at all."""

import contextlib
import hashlib
import math
import os
import re
import shutil
import threading
from pathlib import Path
from urllib.parse import urlsplit

import requests
from filelock import FileLock
from tqdm import tqdm

from data.tokenizer import DataError

CHUNK = 1 << 14  # bytes; a connection that breaks loses less than one
TIMEOUT = (5.0, 15.0)  # seconds to connect, and to wait for the next bytes
TRIES = 4  # in a row that bring nothing new
CHECKS = 3  # times that a file may arrive whole and be another
BACKOFF = 1.0  # seconds before the second try; each later pause is twice as long
RATE_LIMIT = 30.0  # times that, where a server is asked too often and does not say how long to wait
SPARE = 100_000_000  # bytes of disk to leave free
TOKEN_HOST = "huggingface.co"  # HF_TOKEN is for this host alone


def cache_dir() -> Path:
    """Where downloads are kept: data/cache, or DENSEFORMER_CACHE of the environment."""
    return Path(os.environ.get("DENSEFORMER_CACHE") or Path(__file__).parent / "cache")


class BadFile(Exception):
    """What is wrong with what was received."""


class WrongFile(BadFile):
    """It is whole, and not the file that it should be."""


class NoUse(BadFile):
    """Another try would bring the same."""


def fetch(
    url: str,
    path: Path,
    size: int | None = None,
    sha256: str | None = None,
    deadline: float | None = None,
) -> Path:
    """Get the file at `url` to `path`, unless it is there. Returns path, which is always whole.

    url is an http(s) address or the path of a local copy. size and sha256 are what the file must
    have; where they are None, the server's word is taken. What an interrupted download brought is
    kept and gone on from, if the server tags its content. Of several processes that want the file
    one gets it and the others wait. Raises DataError, with the reason, where the file cannot be
    had; with a deadline, at the latest that many seconds from now.
    """
    part, tag = (path.with_name(f".{path.name}.{end}") for end in ("part", "tag"))
    try:
        if is_there(path, sha256):
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock"), -1 if deadline is None else deadline):
            if is_there(path, sha256):
                return path
            try:
                if url.startswith(("http://", "https://")):
                    job = lambda given_up: download(url, part, tag, size, sha256, given_up)  # noqa: E731
                    within(deadline, job)
                else:
                    shutil.copyfile(url, part)
                    verify(part, size, sha256)
                os.replace(part, path)
                tag.unlink(missing_ok=True)
            finally:
                if not tag.exists():  # nobody could go on with it
                    part.unlink(missing_ok=True)
    except (OSError, BadFile) as error:
        name = getattr(error, "filename", None)
        where = f"{name}: " if name else ""
        why = getattr(error, "strerror", None) or error
        raise DataError(f"cannot get {url}: {where}{why}") from None
    return path


def is_there(path: Path, sha256: str | None) -> bool:
    return path.is_file() and (sha256 is None or digest(path) == sha256)


def download(url, part, tag, size, sha256, given_up: threading.Event):
    """Try until `part` is whole and right, or until that is not to be expected any more."""
    tries, checks, furthest, pause = 0, 0, 0, 0.0
    while not given_up.wait(pause):
        try:
            verify(part, *receive(url, part, tag, size, sha256, given_up))
            return
        except (requests.RequestException, BadFile) as error:
            here = part.stat().st_size if part.exists() else 0
            tries, furthest = (1, here) if here > furthest else (tries + 1, furthest)
            if isinstance(error, WrongFile):
                checks += 1
                tag.unlink(missing_ok=True)  # to begin anew
            if tries == TRIES or checks == CHECKS or is_final(error):
                raise BadFile(reason(error)) from None
            pause = pause_after(error, tries)
            if pause > 5:
                tqdm.write(f"{part.name[1:-5]}: {reason(error)}; next try in {pause:.0f} seconds")


def receive(url, part, tag, size, sha256, given_up):
    """Get the file, or the rest of it, into `part`; returns the size and sha256 it should have.

    `tag` keeps what the server calls this content, so that a later try knows whether the rest it
    is offered is the rest of the same file.
    """
    known = tag.read_text() if tag.exists() and part.exists() else None
    have = part.stat().st_size if known else 0
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    if os.environ.get("HF_TOKEN") and urlsplit(url)[:2] == ("https", TOKEN_HOST):
        # requests takes it off again where a redirect leads to another host.
        headers["Authorization"] = f"Bearer {os.environ['HF_TOKEN']}"
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        # A hub redirects to an address that expires, and knows the file better than that does.
        hub = (*response.history, response)[0].headers
        name = (hub.get("X-Linked-ETag") or response.headers.get("ETag") or "").strip('W/"')
        if "X-Linked-ETag" in hub and re.fullmatch("[0-9a-f]{64}", name):
            sha256 = sha256 or name
        total = int(hub.get("X-Linked-Size") or 0)
        if response.status_code in (206, 416):
            span = re.fullmatch(
                r"bytes (?:(\d+)-\d+|\*)/(\d+)", response.headers.get("Content-Range", "")
            )
            start = int(span[1] or span[2]) if span else -1
            if name != known or start != have:
                tag.unlink()
                raise BadFile("the file on the server changed")
            total = int(span[2])
            if response.status_code == 416:  # it was whole already
                return size or total, sha256
        else:
            response.raise_for_status()
            have = 0
            total = total or int(response.headers.get("Content-Length") or 0)
        free = shutil.disk_usage(part.parent).free
        if free < total - have + SPARE:
            raise NoUse(
                f"it needs {(total - have) / 1e9:.1f} GB in {part.parent}, and "
                f"{free / 1e9:.1f} GB are free"
            )
        if name:
            tag.write_text(name)
        else:
            tag.unlink(missing_ok=True)
        limit = size or total or math.inf
        options = {"unit": "B", "unit_scale": True, "leave": False, "disable": None}
        bar = tqdm(total=total or None, initial=have, desc=part.name[1:-5], **options)
        with part.open("ab" if have else "wb") as file, bar:
            for chunk in response.iter_content(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
                if given_up.is_set() or file.tell() > limit:
                    break  # verify will refuse it
            file.flush()
            os.fsync(file.fileno())
    return size or total or None, sha256


def answer(error: Exception) -> requests.Response | None:
    """What the server answered, where it did."""
    return error.response if isinstance(error, requests.RequestException) else None


def is_final(error: Exception) -> bool:
    """Whether that is the last word; too many requests and a server's own failures may pass."""
    response = answer(error)
    if response is None or response.status_code in (408, 429):
        return isinstance(error, NoUse)
    # Behind a redirect it may be that the signed address expired on the way; the next is fresh.
    return 400 <= response.status_code < 500 and not response.history


def pause_after(error: Exception, tries: int) -> float:
    """Seconds to wait before the next try."""
    pause = BACKOFF * 2 ** (tries - 1)
    response = answer(error)
    if response is not None and response.status_code == 429:
        pause *= RATE_LIMIT
        with contextlib.suppress(KeyError, ValueError):
            pause = float(response.headers["Retry-After"])
    return min(pause, 600.0)


def reason(error: Exception) -> str:
    """What went wrong, without the library's nested representations."""
    response = answer(error)
    if isinstance(error, requests.HTTPError) and response is not None:
        return f"the server answers {response.status_code} {response.reason}"
    if isinstance(error, requests.Timeout):
        return "the server does not answer in time"
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return "the connection broke off"
    if isinstance(error, requests.ConnectionError):
        return "no connection"
    return str(error)


def verify(path: Path, size: int | None, sha256: str | None):
    came = path.stat().st_size
    if size is not None and came != size:
        kind = BadFile if came < size else WrongFile
        raise kind(f"it should have {size:,} bytes, what came has {came:,}")
    if sha256 is not None and digest(path) != sha256:
        raise WrongFile(f"it should have the sha256 {sha256}, what came has {digest(path)}")


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
