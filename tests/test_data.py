"""The data: tokenizers, texts, downloads from servers with faults, token files, OpenWebText."""

import contextlib
import gzip
import hashlib
import http.server
import io
import json
import shutil
import socket
import ssl
import tempfile
import threading
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import requests
from filelock import FileLock

import data
from data import dataset, download, openwebtext, shakespeare, shards, textfile
from data import tokenizer as tokenizers
from data.tokenizer import ByteTokenizer, CharTokenizer, GPT2Tokenizer, from_state, make_tokenizer
from lib.files import UserError
from tests.helpers import SHARED

MIXED = "Häßlich?\r\n\tJa — 𝄞!\x00"
CJK = "".join(map(chr, range(0x4E00, 0x4E00 + 300)))  # more than 256 characters
shared = pytest.mark.skipif(not SHARED.exists(), reason="no real texts here")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    for name in ("HF_ENDPOINT", "HF_TOKEN", "HF_TOKEN_PATH", "HF_HOME", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")


def refused(reason):
    return pytest.raises(UserError, match=reason)


def ids_of(dataset):
    return np.concatenate((dataset.train[:], dataset.val)).tolist()


def cached(folder=""):
    """Return the names in the cache, without the lock files, which stay."""
    return sorted(p.name for p in (download.cache_dir() / folder).iterdir() if p.suffix != ".lock")


# Tokenizers


@pytest.mark.parametrize("kind", ["char", "byte"])
@pytest.mark.parametrize("text", [MIXED, CJK])
def test_tokenizers_give_back_the_text(kind, text):
    tokenizer = make_tokenizer(kind, set(text))
    ids = tokenizer.encode(text)
    assert ids.max() < tokenizer.vocab_size
    assert from_state(json.loads(json.dumps(tokenizer.state()))).decode(ids.tolist()) == text


def test_what_a_tokenizer_does_not_know():
    assert ByteTokenizer().decode([0xC3]) == "\ufffd"
    with refused("'x'"):
        CharTokenizer("ab").encode("abxz")
    for n, kind in ((256, "char"), (257, "byte")):
        assert make_tokenizer(None, set(map(chr, range(n)))).state()["kind"] == kind


@pytest.fixture
def small_gpt2(monkeypatch):
    """GPT-2's tokenizer with a vocabulary of bytes and a few merges, which needs no download."""
    tiktoken = pytest.importorskip("tiktoken")
    words = [bytes([b]) for b in range(256)] + [b"th", b"the", b" the", b"er", b"\n\n"]
    words += [b"\xff%d" % i for i in range(len(words), 50256)]  # none of these is in a text
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    ranks = {word: i for i, word in enumerate(words)}
    merges = {"mergeable_ranks": ranks, "special_tokens": {"<|endoftext|>": 50256}}
    encoding = tiktoken.Encoding("gpt2", pat_str=pattern, **merges)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    monkeypatch.setattr(tokenizers, "find_vocabulary", lambda: "")
    return encoding


def test_a_million_spaces_are_encoded(small_gpt2):
    text = "be" + " \n" * 1_000_000 + "or"
    assert small_gpt2.decode(GPT2Tokenizer().encode(text).tolist()) == text


# Texts


def test_own_text_is_characters_or_bytes(tmp_path, monkeypatch):
    file = tmp_path / "my.txt"
    file.write_text(CJK)
    assert data.load(str(file), block_size=8).tokenizer.state() == {"kind": "byte"}
    file.write_bytes("naïve\r\n".encode() * 30)
    few = data.load(str(file), block_size=8)
    assert few.tokenizer.state() == {"kind": "char", "chars": "\n\raenvï"}
    assert few.tokenizer.decode(ids_of(few)) == "naïve\r\n" * 30
    assert len(few.val) == 21

    in_memory = data.load(str(file), 8, "byte")
    monkeypatch.setattr(textfile, "LARGE", 100)
    large = data.load(str(file), block_size=8)
    assert large.tokenizer.state() == {"kind": "byte"}
    assert bytes(ids_of(large)) == file.read_bytes()
    assert len(cached("text")) == 1
    assert large.fingerprint() == in_memory.fingerprint() != few.fingerprint()


def test_a_folder_of_texts(tmp_path):
    """Its files are joined without their byte-order marks; train.txt and val.txt are the splits."""
    for name in ("1.txt", "2.TXT"):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + b"abc" * 20)
    assert data.load(str(tmp_path), 8).tokenizer.state() == {"kind": "char", "chars": "abc"}
    assert bytes(ids_of(data.load(str(tmp_path), 8, "byte"))) == b"abc" * 40
    (tmp_path / "train.txt").write_text("abc" * 100)
    (tmp_path / "Val.TXT").write_text("cd" * 50)
    splits = data.load(str(tmp_path), block_size=8)
    assert splits.tokenizer.decode(splits.train.tolist()) == "abc" * 100
    assert splits.tokenizer.decode(splits.val.tolist()) == "cd" * 50


@pytest.mark.parametrize("large", [1, 10**8])
@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "empty"), (b"abc" * 3, "too short"), (b"abc\xff" * 99, "0xff"),
     (("é" * 99).encode()[:-1], "UTF-8"),
     (gzip.compress(b"abc" * 99, mtime=0), "compressed; unpack")],
)  # fmt: skip
def test_a_file_that_is_no_text_is_refused(tmp_path, monkeypatch, large, content, reason):
    monkeypatch.setattr(textfile, "LARGE", large)
    (tmp_path / "my.txt").write_bytes(content)
    with refused(reason):
        data.load(str(tmp_path / "my.txt"), block_size=16)


def test_names_and_paths(tmp_path):
    for name, reason in (
        ("", "no data set"), ("shakspeare", "did you mean shakespeare"), (".", "folder"),
        ("./none.txt", "file or folder './none.txt'"),
    ):  # fmt: skip
        with refused(reason):
            data.load(name, block_size=16)
    (tmp_path / "shakespeare").mkdir()
    (tmp_path / "shakespeare" / "my.txt").write_text("abc" * 100)
    own = data.load("./shakespeare", block_size=8)
    assert own.tokenizer.decode(ids_of(own)) == "abc" * 100
    assert own.name == "./shakespeare"  # which loads it again


def test_a_cache_that_cannot_be_written_is_named(text, monkeypatch):
    monkeypatch.setattr(textfile, "LARGE", 1)
    monkeypatch.setenv("DENSEFORMER_CACHE", "/dev/null/cache")
    with refused("cannot get tokens of"):
        data.load(text, block_size=16)
    with refused("/dev/null"):
        download.fetch("http://127.0.0.1:9/x", download.cache_dir() / "x")


def test_the_fingerprint_covers_both_splits_and_the_tokenizer(monkeypatch):
    ids = np.random.default_rng(0).integers(100, size=5000).astype(np.uint8)

    def fingerprint(change=None, tokenizer=ByteTokenizer(), train=np.asarray):  # noqa: B008
        new = ids.copy()
        if change is not None:
            new[change] += 1
        return data.Dataset("a", train(new[:4000]), new[4000:], tokenizer).fingerprint()

    assert fingerprint() == fingerprint(train=lambda a: shards.ConcatTokens([a[:7], a[7:]]))
    others = [fingerprint(change) for change in (0, 1234, 3999, 4000, 4999)]
    others += [fingerprint(None, CharTokenizer("".join(map(chr, range(n))))) for n in (100, 101)]
    assert len({fingerprint(), *others}) == 8
    monkeypatch.setattr(dataset, "SAMPLE", 10)  # of 64 x 10 tokens, the ends are always among them
    assert len({fingerprint(change) for change in (None, 0, 3999, 4000, 4999)}) == 5


def test_text_cut_in_pieces_has_the_tokens_of_the_whole(small_gpt2, tmp_path, monkeypatch):
    monkeypatch.setattr(textfile, "CHUNK", 64)
    words = ["the", " other", "\n", " ", "  ", "\n\n", "'s", "don't", "12", "naïve", "漢字"]
    words += [".", "\t"]
    text = "".join(np.random.default_rng(0).choice(words, 3000))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "1.txt").write_bytes(text.encode())
    (tmp_path / "texts" / "2.txt").write_bytes(b"the end")
    assert len(list(textfile.iter_text(tmp_path / "texts" / "1.txt"))) > 20
    texts = data.load(str(tmp_path / "texts"), block_size=8, tokenizer="gpt2")
    whole = small_gpt2.encode_ordinary(text)
    assert ids_of(texts) == [*whole, 50256, *small_gpt2.encode_ordinary("the end"), 50256]


# A server with faults. /plain/NAME is a file without a tag; /resolve/NAME redirects as the hub
# does, to /signed/NAME on another host, which resumes; /mirror/NAME redirects to /resolve/NAME.

CONTENT = b"To be, or not to be, that is the question:\n" * 7000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
FAST = {"BACKOFF": 0.01, "RATE_LIMIT": 0.01, "CHUNK": 1000, "TIMEOUT": (30.0, 30.0)}


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        folder, _, name = self.path[1:].partition("/")
        server, content = self.server, self.server.files.get(name)
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        server.seen.append((folder, start, self.headers.get("Authorization")))
        if content is None:
            self.answer(404)
        elif folder == "mirror":
            self.answer(308, Location=f"/resolve/{name}")
        elif folder == "resolve":
            host = f"http://localhost:{server.server_port}"
            tag = {"X-Linked-ETag": f'"{server.tag(content)}"'}
            self.answer(302, Location=f"{host}/signed/{name}", **tag)
        else:
            self.send(content, start, server.script.pop(0) if server.script else "good")

    def send(self, content, start, fault):
        """Answer with the status `fault`, or send the file, or its rest, with this fault."""
        if isinstance(fault, int):
            self.answer(fault, **{"X-Error-Message": "Who are you?"} if fault == 401 else {})
            return
        if fault == "changed":  # between this attempt and the next
            self.server.files = {name: c[::-1] for name, c in self.server.files.items()}
        if fault == "wrong":
            content = content[::-1]
        status, headers = 200, {}
        if start and fault != "ignores Range":
            status = 206 if start < len(content) else 416
            span = f"{start}-{len(content) - 1}" if status == 206 else "*"
            headers["Content-Range"] = f"bytes {span}/{len(content)}"
            content = content[start:] or b"no such range"
        if fault != "no length":
            headers["Content-Length"] = len(content)
        half = (len(content) + 1) // 2 if fault in ("truncated", "stalls", "changed") else None
        self.answer(status, content[:half], **headers)
        if fault == "stalls":
            self.server.release.wait(30)

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(body)

    def do_CONNECT(self):
        self.answer(407)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    for name, value in FAST.items():
        monkeypatch.setattr(download, name, value)
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    httpd.url = f"http://127.0.0.1:{httpd.server_port}"
    httpd.script, httpd.seen, httpd.release = [], [], threading.Event()
    httpd.files = {"a.bin": CONTENT}
    httpd.tag = lambda content: hashlib.sha256(content).hexdigest()
    threading.Thread(target=httpd.serve_forever, args=(0.05,), daemon=True).start()
    yield httpd
    httpd.release.set()
    httpd.shutdown()
    httpd.server_close()


def fetch(server, folder, *script, **options):
    """Fetch a.bin, which the server answers by this script; return its path."""
    server.script, server.seen[:] = list(script), []
    download.TIMEOUT = (30.0, 0.3 if "stalls" in script else 30.0)
    return download.fetch(f"{server.url}/{folder}/a.bin", download.cache_dir() / "a.bin", **options)


def starts(server):
    """Return the bytes at which the requests for content began."""
    return [start for folder, start, _ in server.seen if folder in ("plain", "signed")]


@pytest.mark.parametrize(
    ("folder", "script", "begins", "says"),
    [("plain", ["good"], [0], None), ("plain", [500, 503, "good"], [0, 0, 0], None),
     ("plain", [429, "good"], [0, 0], None), ("plain", ["truncated", "good"], [0, 0], None),
     ("plain", ["wrong", "good"], [0, 0], None), ("plain", ["stalls", "good"], [0, 0], None),
     ("plain", ["no length"], [0], None),
     # without an ETag nothing is left to resume
     ("plain", ["wrong"] * 4, [0] * 4, "sha256"), ("plain", [500] * 4, [0] * 4, "500"),
     ("plain", ["truncated"] * 4, [0] * 4, "broke off"), ("plain", [404], [0], "404"),
     ("plain", ["stalls"] * 4, [0] * 4, "in time"), ("plain", [403], [0], "403 Forbidden$"),
     ("plain", [401], [0], "401 Unauthorized: Who are you[?]$"),
     # with one, an attempt begins where the one before ended
     ("resolve", ["good"], [0], None), ("resolve", ["truncated", "good"], [0, 0.5], None),
     ("resolve", ["stalls", 429, 503, "truncated", 403, "good"],
      [0, 0.5, 0.5, 0.5, 0.75, 0.75], None),
     ("resolve", ["truncated", "ignores Range"], [0, 0.5], None),
     ("resolve", ["truncated"] * 6, [1 - 0.5**n for n in range(7)], None),
     ("resolve", ["changed", "good", "good"], [0, 0.5, 0], None),
     ("mirror", ["wrong", "truncated", "good"], [0, 0, 0.5], None)],
)  # fmt: skip
def test_download(server, folder, script, begins, says):
    options = {"sha256": SHA256} if folder == "plain" else {}  # the hub tells it
    if says:
        with refused(says):
            fetch(server, folder, *script, **options)
    else:
        assert fetch(server, folder, *script, **options).read_bytes() == server.files["a.bin"]
    assert starts(server) == pytest.approx([n * len(CONTENT) for n in begins], abs=2000)
    assert cached() == ([] if says else ["a.bin"])


def test_the_cache_is_verified(server):
    path = fetch(server, "plain", sha256=SHA256)
    assert fetch(server, "plain", sha256=SHA256) == path
    assert server.seen == []
    path.write_bytes(CONTENT[:-1])
    assert fetch(server, "plain", sha256=SHA256).read_bytes() == CONTENT


@pytest.mark.parametrize(("wait", "pause"), [("7", 7), ("0", 0), ("9999", 600), ("soon", 30)])
def test_a_busy_server_says_how_long_to_wait(wait, pause):
    response = requests.Response()
    response.status_code, response.headers["Retry-After"] = 429, wait
    failure = download.refusal(response)
    assert (failure.pause, failure.final) == (pause, False)


def test_pauses_double(server, tmp_path):
    pauses = []
    stop = SimpleNamespace(is_set=lambda: False, wait=pauses.append)
    server.script = [500] * 4
    with pytest.raises(download.Failed):
        download.attempts(f"{server.url}/plain/a.bin", tmp_path / "a.part", None, 4, stop)
    assert pauses == [0.01, 0.02, 0.04]


@pytest.mark.parametrize(
    ("url", "reason"),
    [("http://127.0.0.1:9/x", "refuses the connection"), ("http://nowhere.example/x", "host name"),
     ("http://[::1/x", "malformed"), ("http://a b/x", "malformed|host name"),
     ("ftp://a/x", "malformed"), (f"https://{'a' * 70}.com/x", "malformed"),
     ("https://proxied.example/x", "proxy refuses"),
     ("https://{}/x", "certificate is not trusted")],
)  # fmt: skip
def test_why_there_is_no_connection(server, monkeypatch, url, reason):
    def look_up(host, *args, real=socket.getaddrinfo, **options):
        if host == "nowhere.example":
            raise socket.gaierror(-2, "Name or service not known")
        return real(host, *args, **options)

    def distrust(*args, **options):
        raise ssl.SSLCertVerificationError(1, "self-signed certificate")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(ssl.SSLContext, "wrap_socket", distrust)
    if "proxied" in url:
        monkeypatch.setenv("HTTPS_PROXY", server.url)
    with refused(reason) as error:
        download.fetch(url.format(server.url[7:]), download.cache_dir() / "x")
    assert "Error" not in str(error.value)


def test_the_home_folder(tmp_path, monkeypatch):
    """~ is the home folder in the paths that the environment gives, too."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DENSEFORMER_CACHE", "~/cache")
    assert download.cache_dir() == tmp_path / "cache"
    (tmp_path / "copy.bin").write_bytes(CONTENT)
    assert download.fetch("~/copy.bin", tmp_path / "a.bin").read_bytes() == CONTENT


def test_a_local_copy(tmp_path):
    copy, path = tmp_path / "copy.bin", download.cache_dir() / "a.bin"
    copy.write_bytes(CONTENT)
    assert download.fetch(str(copy), path, SHA256).read_bytes() == CONTENT
    path.unlink()
    for name, reason in (("copy.bin", "sha256"), ("missing.bin", r"missing\.bin: No such file")):
        copy.write_bytes(CONTENT + b"!")
        with refused(reason):
            download.fetch(str(tmp_path / name), path, SHA256)
    assert cached() == []


def test_a_download_is_resumed_by_a_later_process(server):
    with refused("500"):
        fetch(server, "resolve", "truncated", *[500] * 4)
    assert cached() == [".a.bin.part", ".a.bin.tag"]
    assert fetch(server, "resolve").read_bytes() == CONTENT
    assert starts(server) == pytest.approx([len(CONTENT) // 2], abs=1000)


def test_the_rest_of_another_file_is_not_taken(server):
    server.tag = lambda content: f"version-{zlib.crc32(content)}"  # no sha256 that would tell later
    path = fetch(server, "resolve", "changed")
    assert path.read_bytes() == CONTENT[::-1]
    # A download that was whole, but killed before it had its name.
    path.rename(path.with_name(".a.bin.part"))
    path.with_name(".a.bin.tag").write_text(server.tag(CONTENT[::-1]))
    assert fetch(server, "resolve").read_bytes() == CONTENT[::-1]
    assert cached() == ["a.bin"]


def test_a_full_disk_is_seen_before(server, monkeypatch):
    usage = SimpleNamespace(free=download.RESERVE + len(CONTENT) - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with refused("has 100 MB free, and this needs 100 MB"):
        fetch(server, "resolve")
    assert cached() == []
    usage.free += 1
    assert fetch(server, "resolve").exists()


def test_processes_share_a_download_and_say_that_they_wait(server, capsys):
    url, path, lines = f"{server.url}/plain/a.bin", download.cache_dir() / "a.bin", []
    threads = [threading.Thread(target=download.fetch, args=(url, path)) for _ in range(4)]
    path.parent.mkdir()
    with FileLock(path.with_name(".a.bin.lock")):
        for thread in threads:
            thread.start()
        while len(lines) < 4 and all(thread.is_alive() for thread in threads):
            lines += capsys.readouterr().err.splitlines()
    for thread in threads:
        thread.join()
    assert lines == [f"waiting for another process to prepare {path}"] * 4
    assert capsys.readouterr().err == "downloading a.bin\n"
    assert path.read_bytes() == CONTENT
    assert starts(server) == [0]


@pytest.mark.parametrize("place", ["HF_TOKEN", "HF_TOKEN_PATH", "HF_HOME", "HOME", None])
def test_the_token_goes_to_the_hub_alone(server, monkeypatch, tmp_path, place):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password mine")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    folder = tmp_path / ("home/.cache/huggingface" if place == "HOME" else "hf")
    folder.mkdir(parents=True)
    (folder / "token").write_text("secret\n")
    values = {"HF_TOKEN": "secret", "HF_TOKEN_PATH": str(folder / "token"), "HF_HOME": str(folder)}
    if place in values:
        monkeypatch.setenv(place, values[place])
    auth = download.hub_auth("https://huggingface.co/x")
    for url in ("http://huggingface.co/x", "https://huggingface.co.example/x", "https://other/x"):
        assert download.hub_auth(url) is None
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror")
    assert bool(download.hub_auth("https://mirror/x")) == bool(auth) == bool(place)
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror")  # which would send it unencrypted
    assert download.hub_auth("http://mirror/x") is None

    monkeypatch.setattr(download, "hub_auth", lambda url: auth)  # the test's server has no https
    fetch(server, "mirror")
    sent = {folder: token for folder, _, token in server.seen}
    assert (sent["mirror"] == "Bearer secret") == bool(place)
    assert sent["signed"] is None
    (download.cache_dir() / "a.bin").unlink()
    with refused("401") as error:
        fetch(server, "plain", 401)
    assert ("HF_TOKEN" in str(error.value)) == bool(place)


# Tiny Shakespeare, or pydoc


@pytest.mark.parametrize("fault", ["stalls", 500])
def test_pydoc_replaces_tiny_shakespeare_if_nobody_named_it(server, fault, monkeypatch, capsys):
    monkeypatch.setattr(shakespeare, "SHA256", SHA256)
    monkeypatch.setattr(shakespeare, "URL", f"{server.url}/plain/a.bin")
    monkeypatch.setattr(data, "PATIENCE", 1.0)
    server.script = [fault]
    default = data.load(None, block_size=64)
    assert default.name == "pydoc"
    assert len(default.train) > 300_000
    assert "TRAINING ON PYTHON'S LANGUAGE REFERENCE" in capsys.readouterr().out
    assert cached() == []
    assert len(server.seen) <= 1  # one attempt
    server.script = [404]
    with refused("404"):
        data.load("shakespeare", block_size=64)
    monkeypatch.setenv("SHAKESPEARE_URL", "nowhere.txt")  # which asks for it
    with refused("nowhere.txt: No such file"):
        data.load(None, block_size=64)
    monkeypatch.delenv("SHAKESPEARE_URL")
    monkeypatch.setattr(data, "PATIENCE", 60.0)
    assert data.load(None, block_size=64).name == "shakespeare"

    def faulty(*args):
        raise UserError("a fault in the text")

    monkeypatch.setattr(shakespeare, "from_text", faulty)
    with refused("a fault in the text"):  # which is no failed download
        data.load(None, block_size=64)


# GPT-2's vocabulary


def test_the_vocabulary_is_downloaded_once_or_found(server, monkeypatch, tmp_path):
    server.files = {"vocab.bpe": b"merges", "encoder.json": b"ids"}
    urls = {f"{server.url}/plain/{name}": content for name, content in server.files.items()}
    sums = {url: hashlib.sha256(content).hexdigest() for url, content in urls.items()}
    monkeypatch.setattr(tokenizers, "VOCABULARY", sums)
    folder = tokenizers.find_vocabulary()
    assert folder == download.cache_dir() / "tiktoken"
    for url, content in urls.items():  # the names that tiktoken looks for
        assert (folder / hashlib.sha1(url.encode()).hexdigest()).read_bytes() == content
    theirs = folder.rename(tmp_path / "theirs")
    server.script = [404]
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "~/theirs")
    assert tokenizers.find_vocabulary() == theirs
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR")  # tiktoken's default is a folder in the temporary one
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    theirs = theirs.rename(tmp_path / "data-gym-cache")
    assert tokenizers.find_vocabulary() == theirs
    next(theirs.glob("[!.]*")).write_text("damaged")
    with refused(r"/plain/.*404"):
        tokenizers.find_vocabulary()


@shared
def test_the_tokens_of_the_real_vocabulary_are_those_of_nanogpt(monkeypatch):
    pytest.importorskip("tiktoken")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
    tokenizer = GPT2Tokenizer()
    ids = np.fromfile(SHARED / "openwebtext" / "val_nanogpt_layout.bin", "u2", 5000)
    first = ids[: ids.tolist().index(tokenizer.end)]
    assert tokenizer.encode(tokenizer.decode(first.tolist())).tolist() == first.tolist()
    assert tokenizer.decode(tokenizer.encode("<|endoftext|>").tolist()) == "<|endoftext|>"
    assert tokenizer.decode([50_300]) == ""


# Tokens in files


def test_shards_give_back_the_tokens(tmp_path):
    rng = np.random.default_rng(0)
    parts = [rng.integers(60_000, size=n).astype(np.uint16) for n in (10, 1, 0, 300)]
    (tmp_path / ".0.bin.part").write_bytes(b"left by a killed process" * 99)
    for i, part in enumerate(parts):
        shards.write(tmp_path / f"{i}.bin", "u2", [part[:7], part[7:]])
    joined = shards.ConcatTokens([shards.read(tmp_path / f"{i}.bin", "u2") for i in range(4)])
    whole = np.concatenate(parts)
    assert len(joined) == len(whole)
    for start in range(0, 20):
        for stop in (start, start + 1, start + 12, 311, 400):
            assert np.array_equal(joined[start:stop], whole[start:stop])

    def interrupted():
        yield parts[3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shards.write(tmp_path / "0.bin", "u2", interrupted())
    assert np.array_equal(shards.read(tmp_path / "0.bin", "u2"), parts[0])
    assert len(list(tmp_path.iterdir())) == 4


def test_items_are_mapped_in_order_and_in_bounded_memory(monkeypatch):
    monkeypatch.setattr(shards.os, "cpu_count", lambda: 2)
    taken = []
    results = shards.ordered_map(lambda i: -i, (taken.append(i) or i for i in range(100)))
    for n, result in enumerate(results, start=1):
        assert result == 1 - n
        assert len(taken) <= n + 4 * 2
    assert len(taken) == n == 100


def test_files_of_nanogpt(small_gpt2, tmp_path):
    ids = np.random.default_rng(0).integers(260, size=900).astype("u2")
    ids[::50] = 50256
    ids[:800].tofile(tmp_path / "train.bin")
    ids[800:].tofile(tmp_path / "val.bin")
    bins = data.load(str(tmp_path), block_size=8)
    assert np.array_equal(bins.train, ids[:800])
    assert np.array_equal(bins.val, ids[800:])
    assert bins.tokenizer.state() == {"kind": "gpt2"}
    with refused("cannot be char"):
        data.load(str(tmp_path), 8, "char")
    for content in (ids.tobytes() + b"x", b"", b"\xff" * 90, ids.astype("<u4").tobytes()):
        (tmp_path / "train.bin").write_bytes(content)
        with refused(r"train\.bin does not hold GPT-2's tokens as 16-bit numbers"):
            data.load(str(tmp_path), block_size=8)
    (tmp_path / "meta.pkl").write_bytes(b"")
    with refused(r"meta\.pkl"):
        data.load(str(tmp_path), block_size=8)


# OpenWebText

NAME = "plain_text/train-{:05d}-of-00080.parquet"


def documents(n, seed):
    rng = np.random.default_rng(seed)
    words = ["the ", "other ", "thing. ", "naïve ", "\n\n", "<|endoftext|> "]
    return ["".join(rng.choice(words, rng.integers(5, 60))) for _ in range(n)]


def as_parquet(texts, **options):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": texts}), file, row_group_size=100, **options)
    return file.getvalue()


def test_openwebtext(small_gpt2, server, monkeypatch):
    texts = [documents(700, seed) for seed in range(2)]
    server.files = {
        NAME.format(0): as_parquet([None, *texts[0]]),  # a null is no document
        NAME.format(1): as_parquet(texts[1]),
    }
    server.script = ["truncated", 429, "good", 503, "ignores Range"]
    monkeypatch.setenv("OPENWEBTEXT_URL", f"{server.url}/resolve")
    two = data.load("openwebtext", block_size=16, n_shards=2)

    def tokens(texts):
        return [t for text in texts for t in (*small_gpt2.encode_ordinary(text), 50256)]

    held = [t for t in texts[0] if zlib.crc32(t.encode()) % 100 == 0]
    kept = [t for ts in texts for t in ts if zlib.crc32(t.encode()) % 100]
    assert two.val.tolist() == tokens(held) != []
    assert two.train[:].tolist() == tokens(kept)
    assert cached("openwebtext") == ["train-00.bin", "train-01.bin", "val.bin"]

    # Fewer shards have the same validation; present shards are not downloaded again.
    asked = len(server.seen)
    one = data.load("openwebtext", block_size=16, n_shards=1)
    assert np.array_equal(one.val, two.val)
    assert len(server.seen) == asked
    for n, kind, reason in ((81, None, "1 to 80"), (0, None, "1 to 80"), (1, "char", "be char")):
        with refused(reason):
            data.load("openwebtext", 16, kind, n)
    monkeypatch.delenv("OPENWEBTEXT_URL")
    monkeypatch.setenv("HF_ENDPOINT", f"{server.url}/")
    with refused(f"{server.url}/{openwebtext.REPOSITORY}/{NAME.format(2)}.*404"):
        data.load("openwebtext", block_size=16, n_shards=3)


@pytest.mark.parametrize(
    "damage",
    [lambda good: good[:-50], lambda good: b"<html>Log in</html>",
     lambda good: good[:4] + b"\xff" * 100 + good[104:],  # in a page of data
     lambda good: good.replace("ï".encode(), b"\xff\xff"), lambda good: as_parquet([b"the"] * 300),
     lambda good: as_parquet([1, 2] * 300), lambda good: as_parquet([None] * 300)],
    ids=["cut short", "no parquet", "a bad page", "no UTF-8", "bytes", "numbers", "nulls"],
)  # fmt: skip
def test_a_damaged_shard_of_openwebtext_is_fetched_anew(small_gpt2, tmp_path, monkeypatch, damage):
    monkeypatch.setenv("OPENWEBTEXT_URL", str(tmp_path))
    good = as_parquet(documents(700, 0), compression="none")
    (tmp_path / "plain_text").mkdir()
    copy = tmp_path / NAME.format(0)
    copy.write_bytes(damage(good))
    with refused("shard of openwebtext"):
        data.load("openwebtext", block_size=16)
    assert cached("openwebtext") == []
    copy.write_bytes(good)
    assert len(data.load("openwebtext", block_size=16).train) > 10_000
    assert copy.exists()
