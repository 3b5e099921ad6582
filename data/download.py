"""Download a file once, with resuming, retries and verification: it is complete or absent."""

import hashlib
import os
import re
import shutil
import socket
import ssl
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import filelock
import requests

from data.progress import make_once
from lib.files import UserError, progress_bar, say

CHUNK = 1 << 14  # bytes; a broken connection loses less than one chunk
TIMEOUT = (5.0, 15.0)  # seconds to connect, and to wait for the next bytes
TRIES = 4  # attempts in a row without progress
BACKOFF = 1.0  # seconds before the second attempt; each later pause is twice as long
RATE_LIMIT = 30.0  # the same after a 429 that does not say how long to wait
RESERVE = 100_000_000  # bytes of disk to leave free


class Failed(Exception):
    """Why an attempt failed; after a final failure, another attempt is pointless."""

    def __init__(self, why: str, final: bool = False, pause: float | None = None):
        super().__init__(why)
        self.final, self.pause = final, pause


def cache_dir() -> Path:
    """Return the folder for downloads: DENSEFORMER_CACHE in the environment, or data/cache."""
    folder = os.environ.get("DENSEFORMER_CACHE") or Path(__file__).parent / "cache"
    return Path(os.path.expanduser(folder))


def fetch(url: str, path: Path, sha256: str | None = None, deadline: float | None = None) -> Path:
    """Return `path`, after downloading the file at `url` to it unless it is there already.

    url is an http(s) address or the path of a local copy. sha256 defaults to the one that the hub
    sends. An interrupted download is resumed, by a later run too, if the server sends an ETag.
    Processes that want the same file share one download. With a deadline in seconds there is a
    single attempt. Raises UserError with the reason.
    """
    part, tag = (path.with_name(f".{path.name}.{end}") for end in ("part", "tag"))

    def make() -> None:
        try:
            if "://" in url:
                download(url, part, sha256, deadline)
            else:
                shutil.copyfile(os.path.expanduser(url), part)
                verify(part, sha256)
            os.replace(part, path)
            tag.unlink(missing_ok=True)
        finally:
            if not tag.exists():  # it could not be resumed
                part.unlink(missing_ok=True)

    try:
        make_once(path, make, lambda: is_whole(path, sha256), deadline or -1)
    except (OSError, ValueError, Failed) as error:
        raise UserError(f"cannot get {url}: {reason(error)}") from None
    return path


def is_whole(path: Path, sha256: str | None) -> bool:
    """Return whether the file exists and has this sha256, if one is given."""
    if not path.is_file() or sha256 is None:
        return path.is_file()
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest() == sha256


def verify(part: Path, sha256: str | None) -> None:
    """Raise Failed if the file has another sha256; the next attempt then starts from zero."""
    if not is_whole(part, sha256):
        part.with_suffix(".tag").unlink(missing_ok=True)
        raise Failed(f"the downloaded file does not have the sha256 {sha256}")


def download(url: str, part: Path, sha256: str | None, deadline: float | None) -> None:
    """Call attempts() in a thread, because looking up a host name has no time limit."""
    stop, errors = threading.Event(), []

    def run() -> None:
        try:
            attempts(url, part, sha256, 1 if deadline else TRIES, stop)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        thread.join(deadline)
    finally:
        stop.set()
    if thread.is_alive():
        raise Failed(f"not finished within {deadline:.0f} seconds")
    if errors:
        raise errors[0]


def attempts(url: str, part: Path, sha256: str | None, tries: int, stop: threading.Event) -> None:
    """Receive the file, retrying until `tries` attempts in a row have made no progress."""
    failures = furthest = 0
    while not stop.is_set():
        try:
            receive(url, part, sha256, stop)
            return
        except Failed as error:
            failure = error
        except requests.RequestException as error:
            failure = Failed(reason(error), final=reason(error) in (UNTRUSTED, MALFORMED))
        have = part.stat().st_size if part.exists() else 0
        failures = 1 if have > furthest else failures + 1
        furthest = max(furthest, have)
        if failure.final or failures == tries:
            raise failure
        pause = (failure.pause or BACKOFF) * 2 ** (failures - 1)
        if pause > 5:
            words = f"{Path(url).name}: {failure}; next attempt in {pause:.0f} seconds"
            say(words, sys.stderr)
        stop.wait(pause)


def receive(url: str, part: Path, sha256: str | None, stop: threading.Event) -> None:
    """Receive and verify the file, or only its rest if the server still has the same content."""
    tag = part.with_suffix(".tag")  # the server's name (ETag) for the content of `part`
    known = tag.read_text() if tag.exists() and part.exists() else ""
    have = part.stat().st_size if known else 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with requests.get(
        url, headers=headers, auth=hub_auth(url), stream=True, timeout=TIMEOUT
    ) as response:
        # The hub gives the sha256 before it redirects to its storage, which has ETags of its own.
        hops = [hop.headers for hop in (*response.history, response)]
        linked = next((h["X-Linked-ETag"] for h in hops if "X-Linked-ETag" in h), "").strip('"')
        etag = linked or response.headers.get("ETag", "").strip('W/"')
        span = response.headers.get("Content-Range", "")
        if response.status_code == 200:
            have = 0
        elif response.status_code not in (206, 416):
            raise refusal(response)
        elif etag != known or not span.startswith(f"bytes {have}-"):
            tag.unlink(missing_ok=True)
            raise Failed("the file on the server changed")

        rest = int(response.headers.get("Content-Length") or 0)
        total, free = have + rest, shutil.disk_usage(part.parent).free
        if rest + RESERVE > free:
            why = f"{part.parent} has {free / 1e6:,.0f} MB free, and this needs"
            raise Failed(f"the disk is full: {why} {(rest + RESERVE) / 1e6:,.0f} MB", final=True)
        if stop.is_set():  # another process may have the lock by now
            raise Failed("stopped")
        if etag:
            tag.write_text(etag)
        else:
            tag.unlink(missing_ok=True)
        bar = progress_bar(f"downloading {Path(url).name}", total if rest else None, "B", have)
        with part.open("ab" if have else "wb") as file, bar:
            for chunk in response.iter_content(CHUNK):
                if stop.is_set():
                    raise Failed("stopped")
                file.write(chunk)
                bar.update(len(chunk))
    if part.stat().st_size < total:  # which urllib3 1 does not notice
        raise Failed("the connection broke off")
    verify(part, sha256 or (linked if re.fullmatch("[0-9a-f]{64}", linked) else None))


def refusal(response: requests.Response) -> Failed:
    """Return the failure for an HTTP error status, with the hub's own message."""
    status = response.status_code
    why = f"the server answered {status} {response.reason}"
    if message := response.headers.get("X-Error-Message"):
        why += f": {message}"
    if status in (401, 403) and hub_auth((*response.history, response)[0].url):
        why += " (with the token of HF_TOKEN or `hf auth login`)"
    # A busy or broken server may recover; after a redirect, a signed address may have expired.
    final = status < 500 and status not in (408, 429) and not response.history
    wait = response.headers.get("Retry-After", "")
    pause = min(float(wait), 600.0) if wait.isdigit() else None
    return Failed(why, final, RATE_LIMIT if status == 429 and pause is None else pause)


def hub_url() -> str:
    """Return the address of the Hugging Face hub, or of the mirror in HF_ENDPOINT."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def hub_auth(url: str) -> Callable | None:
    """Return a function that adds the user's token to a request, or None if it is not for the hub.

    The token is HF_TOKEN or that of `hf auth login`. Passed to requests as `auth`, it is not
    replaced by an entry of ~/.netrc, and is removed where a redirect leads to another host.
    """
    if not (url.startswith("https://") and url.startswith(f"{hub_url()}/")):
        return None
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    path = Path(os.environ.get("HF_TOKEN_PATH") or f"{home}/token").expanduser()
    token = os.environ.get("HF_TOKEN") or (path.read_text() if path.is_file() else "")

    def authorize(request):
        request.headers["Authorization"] = f"Bearer {token.strip()}"
        return request

    return authorize if token.strip() else None


UNTRUSTED = "the server's certificate is not trusted (behind a proxy, set REQUESTS_CA_BUNDLE)"
MALFORMED = "the address is malformed"
REASONS = {  # by error type; the first type found among an error's causes counts
    filelock.Timeout: "another process is still preparing it",
    requests.exceptions.ProxyError: "the proxy refuses the connection or cannot be reached",
    ssl.SSLCertVerificationError: UNTRUSTED,
    requests.exceptions.SSLError: "no secure connection to the server",
    TimeoutError: "the server does not answer in time",
    socket.gaierror: "the host name cannot be found; is there a network?",
    ConnectionRefusedError: "the server refuses the connection",
    requests.exceptions.ChunkedEncodingError: "the connection broke off",
    requests.exceptions.ConnectionError: "no connection",
    ValueError: MALFORMED,
}


def reason(error: BaseException) -> str:
    """Return in a few words why a download failed, without a library's nested descriptions."""
    causes = [error]
    while behind := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(behind)
    for kind, words in REASONS.items():
        if any(isinstance(cause, kind) for cause in causes):
            return words
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)
