"""The data: tokenizers, texts, downloads from servers with faults, token files, OpenWebText."""

import contextlib
import hashlib
import http.server
import io
import json
import shutil
import socket
import ssl
import subprocess
import tempfile
import threading
import zlib
from collections import namedtuple

import numpy as np
import pytest
from filelock import FileLock

import data
from data import dataset, download, hub, openwebtext, progress, shakespeare, shards, textfile
from data import tokenizer as tokenizers
from data.tokenizer import ByteTokenizer, CharTokenizer, GPT2Tokenizer, from_state
from tests.helpers import HERE

SHARED = HERE.parent / "shared" / "data"
shared = pytest.mark.skipif(not SHARED.exists(), reason="no real texts here")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    for name in ("HF_ENDPOINT", "HF_TOKEN", "HF_TOKEN_PATH", "HF_HOME", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def ids_of(dataset):
    return np.concatenate((dataset.train[:], dataset.val)).tolist()


def cached(folder=""):
    """Return the names in the cache, without the lock files, which stay."""
    return sorted(p.name for p in (download.cache_dir() / folder).iterdir() if p.suffix != ".lock")


# Tokenizers


def test_tokenizers_give_back_what_they_took():
    text = "Häßlich?\r\n\tJa — 𝄞!\x00"
    for tokenizer in (CharTokenizer("".join(sorted(set(text)))), ByteTokenizer()):
        for twin in (tokenizer, from_state(json.loads(json.dumps(tokenizer.state())))):
            ids = twin.encode(text)
            assert ids.ndim == 1
            assert ids.max() < twin.vocab_size
            assert twin.decode(ids.tolist()) == text
    assert ByteTokenizer().decode([0xC3]) == "\ufffd"
    many = CharTokenizer("".join(map(chr, range(0x4E00, 0x4E00 + 1000))))
    assert many.encode(many.chars).dtype == np.uint16
    assert many.decode(many.encode(many.chars)) == many.chars


def test_what_a_tokenizer_cannot_take_is_named():
    with pytest.raises(data.DataError, match=r"'x' \(number 3 "):
        CharTokenizer("ab").encode("abxz")
    with pytest.raises(data.DataError, match="'bpe-of-2031'"):
        from_state({"kind": "bpe-of-2031"})
    with pytest.raises(data.DataError, match="16 bits"):
        CharTokenizer("".join(map(chr, range(0x10000, 0x20001))))


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


@pytest.mark.parametrize("space", [" ", "\n", " \n"])
def test_a_million_spaces_are_encoded(small_gpt2, space):
    text = "be" + space * 1_500_000 + "or"
    ids = GPT2Tokenizer().encode(text)
    assert ids.dtype == np.uint16
    assert small_gpt2.decode(ids.tolist()) == text


# Texts


def test_own_text_is_characters_or_bytes(tmp_path, monkeypatch):
    file = tmp_path / "my.txt"
    file.write_bytes("naïve\r\n".encode() * 30)
    few = data.load(str(file), block_size=8)
    assert few.tokenizer.state() == {"kind": "char", "chars": "\n\raenvï"}
    assert few.name == str(file)
    assert len(few.train) + len(few.val) == 7 * 30
    assert few.tokenizer.decode(few.train[:7].tolist()) == "naïve\r\n"

    text = "".join(chr(0x4E00 + n) for n in range(300))  # 300 different characters
    file.write_text(text)
    many = data.load(str(file), block_size=8)
    monkeypatch.setattr(textfile, "LARGE", 100)
    large = data.load(str(file), block_size=8)
    base = large.train
    while not isinstance(base, np.memmap):
        base = base.base
    for d in (many, large):
        assert d.tokenizer.state() == {"kind": "byte"}
        assert len(d.train) == 810
        assert d.tokenizer.decode(ids_of(d)) == text
    assert large.fingerprint() == many.fingerprint() != few.fingerprint()


def test_a_byte_order_mark_is_not_a_letter(tmp_path):
    for name in ("1.txt", "2.txt"):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + b"abc" * 20)
    assert data.load(str(tmp_path), 8).tokenizer.state() == {"kind": "char", "chars": "abc"}
    assert bytes(ids_of(data.load(str(tmp_path), 8, "byte"))) == b"abc" * 40


@pytest.mark.parametrize("large", [1, 10**8])
@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "empty"), (b"abc" * 3, "too short"), (b"abc\xff" * 99, "0xff"),
     (("é" * 99).encode()[:-1], "UTF-8")],
)  # fmt: skip
def test_a_file_that_is_no_text_is_refused(tmp_path, monkeypatch, large, content, reason):
    monkeypatch.setattr(textfile, "LARGE", large)
    (tmp_path / "my.txt").write_bytes(content)
    with pytest.raises(data.DataError, match=reason):
        data.load(str(tmp_path / "my.txt"), block_size=16)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("", "no data set"), ("shakspeare", "did you mean shakespeare"),
     ("./shakspeare", "no file or folder './shakspeare'"), (".", "folder")],
)  # fmt: skip
def test_a_name_that_is_no_data_set_is_refused(tmp_path, monkeypatch, name, reason):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(data.DataError, match=reason):
        data.load(name, block_size=16)


def test_a_name_with_a_separator_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shakespeare").mkdir()
    (tmp_path / "shakespeare" / "my.txt").write_text("abc" * 100)
    own = data.load("./shakespeare", block_size=8)
    assert own.tokenizer.decode(ids_of(own)) == "abc" * 100
    assert own.name == "./shakespeare"  # which loads it again


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(textfile, "LARGE", 1)
    (tmp_path / "my.txt").write_text("abc" * 99)
    monkeypatch.setenv("DENSEFORMER_CACHE", "/dev/null/cache")
    with pytest.raises(data.DataError, match="cannot get tokens of"):
        data.load(str(tmp_path / "my.txt"), block_size=16)
    with pytest.raises(data.DataError, match="/dev/null"):
        download.fetch("http://127.0.0.1:9/x", download.cache_dir() / "x")


def test_the_fingerprint_covers_both_splits_and_the_tokenizer(tmp_path, monkeypatch):
    ids = np.random.default_rng(0).integers(100, size=5000).astype(np.uint8)

    def fingerprint(ids, tokenizer=ByteTokenizer(), train=np.asarray):  # noqa: B008
        return data.Dataset("a", train(ids[:4000]), ids[4000:], tokenizer).fingerprint()

    def changed(at):
        other = ids.copy()
        other[at] += 1
        return fingerprint(other)

    whole = fingerprint(ids)
    assert whole == fingerprint(ids.copy())
    assert whole == fingerprint(ids, train=lambda a: shards.ConcatTokens([a[:7], a[7:]]))
    others = [changed(at) for at in (0, 1234, 3999, 4000, 4999)] + [fingerprint(ids[:-1])]
    others += [fingerprint(ids, CharTokenizer("".join(map(chr, range(n))))) for n in (100, 101)]
    assert len({whole, *others}) == 1 + len(others)
    monkeypatch.setattr(dataset, "SAMPLE", 10)  # of 64 x 10 tokens, the ends are always among them
    assert len({fingerprint(ids), *(changed(at) for at in (0, 3999, 4000, 4999))}) == 5
    monkeypatch.setattr(dataset, "SAMPLES", 2)  # cheap: the middle of a huge split is not read
    assert fingerprint(ids) == changed(2000)


def test_text_cut_in_pieces_has_the_tokens_of_the_whole(small_gpt2, tmp_path, monkeypatch):
    monkeypatch.setattr(textfile, "CHUNK", 64)
    words = ["the", " other", "\n", " ", "  ", "\n\n", "'s", "don't", "12", "naïve", "漢字"]
    words += [".", "\t"]
    text = "".join(np.random.default_rng(0).choice(words, 3000))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "1.txt").write_bytes(text.encode())
    (tmp_path / "texts" / "2.txt").write_bytes(b"the end")
    texts = data.load(str(tmp_path / "texts"), block_size=8, tokenizer="gpt2")
    whole = small_gpt2.encode_ordinary(text)
    assert ids_of(texts) == [*whole, 50256, *small_gpt2.encode_ordinary("the end"), 50256]
    assert len(list(textfile.iter_text([tmp_path / "texts" / "1.txt"]))) > 20
    again = data.load(str(tmp_path / "texts"), block_size=8, tokenizer="gpt2")
    assert again.fingerprint() == texts.fingerprint()
    assert data.load(str(tmp_path / "texts"), 8, "byte").tokenizer.state() == {"kind": "byte"}


def test_processes_tokenize_a_text_once(small_gpt2, text, monkeypatch):
    written, write = [], textfile.write_shard
    monkeypatch.setattr(textfile, "write_shard", lambda *args: written.append(1) or write(*args))
    in_parallel(lambda: data.load(text, 8, "gpt2"))
    assert len(written) == len(cached("text")) == 1


def test_train_txt_and_val_txt_are_the_splits(tmp_path):
    (tmp_path / "train.txt").write_text("abc" * 100)
    (tmp_path / "val.txt").write_text("cd" * 50)
    (tmp_path / "other.txt").write_text("xyz")
    splits = data.load(str(tmp_path), block_size=8)
    assert splits.tokenizer.decode(splits.train.tolist()) == "abc" * 100
    assert splits.tokenizer.decode(splits.val.tolist()) == "cd" * 50


# A server with faults. /plain/NAME is a file without a tag; /resolve/NAME redirects as a hub does,
# to /signed/NAME on another host, which resumes; /mirror/NAME redirects to /resolve/NAME.

CONTENT = b"To be, or not to be, that is the question:\n" * 7000


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        folder, _, name = self.path[1:].partition("/")
        content, server = self.server.files.get(name), self.server
        start = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-")
        server.seen.append((folder, int(start), self.headers.get("Authorization")))
        if content is None:
            self.send_error(404)
        elif folder == "mirror":
            self.answer(308, {"Location": f"/resolve/{name}"})
        elif folder == "resolve":
            tag = {"X-Linked-ETag": f'"{server.tag(content)}"', "X-Linked-Size": len(content)}
            self.answer(302, {"Location": f"{server.storage}/signed/{name}"} | tag)
        else:
            with contextlib.suppress(OSError):
                self.send(content, int(start), server.script.pop(0) if server.script else "good")

    def send(self, content, start, word):
        if isinstance(word, int | tuple):
            self.send_error(word) if isinstance(word, int) else self.answer(*word)
            return
        if word == "changed":  # between this attempt and the next
            self.server.files = {name: c[::-1] for name, c in self.server.files.items()}
        content = {"wrong": content[::-1], "long": content * 2}.get(word, content)
        start += 1000 if word == "another span" else 0
        status, headers = 200, {}
        if start and word != "ignores Range":
            status = 206 if start < len(content) else 416
            span = f"{start}-{len(content) - 1}" if status == 206 else "*"
            headers["Content-Range"] = f"bytes {span}/{len(content)}"
            content = content[start:]
        if word != "endless":
            headers["Content-Length"] = len(content)
        half = (len(content) + 1) // 2 if word in ("truncated", "stalls", "changed") else None
        if word != "trickles":
            self.answer(status, headers, content[:half])
        if word == "stalls":
            self.server.release.wait(30)
        if word == "trickles":
            self.answer(status, headers)
            for i in range(100):
                self.wfile.write(content[i * len(content) // 100 : (i + 1) * len(content) // 100])
                self.server.release.wait(0.1)

    def answer(self, status, headers=(), body=b""):
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def do_CONNECT(self):
        self.send_error(407)

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def serving(certificate=None):
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    host = f"127.0.0.1:{httpd.server_port}"
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        httpd.socket = context.wrap_socket(httpd.socket, server_side=True)
        host = f"localhost:{httpd.server_port}"
    httpd.script, httpd.seen, httpd.release = [], [], threading.Event()
    httpd.files = {"a.bin": CONTENT}
    httpd.tag = lambda content: hashlib.sha256(content).hexdigest()
    httpd.url = f"http{'s' if certificate else ''}://{host}"
    httpd.storage = f"http://localhost:{httpd.server_port}"
    threading.Thread(target=httpd.serve_forever, args=(0.05,), daemon=True).start()
    yield httpd
    httpd.release.set()
    httpd.shutdown()
    httpd.server_close()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "BACKOFF", 0.01)
    monkeypatch.setattr(download, "RATE_LIMIT", 0.01)
    monkeypatch.setattr(download, "TIMEOUT", (30.0, 30.0))
    monkeypatch.setattr(download, "CHUNK", 1000)
    with serving() as httpd:
        yield httpd


def fetch(server, folder, *script, **options):
    """Fetch a.bin, which the server answers by this script; return its path."""
    server.script, server.seen[:] = list(script), []
    download.TIMEOUT = (30.0, 0.3 if "stalls" in script else 30.0)
    return download.fetch(f"{server.url}/{folder}/a.bin", download.cache_dir() / "a.bin", **options)


def starts(server):
    """Return the bytes at which the requests for content began."""
    return [start for folder, start, _ in server.seen if folder in ("plain", "signed")]


def in_parallel(function):
    results = []
    threads = [threading.Thread(target=lambda: results.append(function())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    return results


SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.mark.parametrize(
    "script",
    [["good"], [500, 503, "good"], [429, "good"], [(429, {"Retry-After": 0}), "good"],
     ["long", "good"], ["truncated", "good"], ["wrong", "good"], ["stalls", "good"], ["endless"]],
)  # fmt: skip
def test_download(server, script):
    path = fetch(server, "plain", *script, sha256=SHA256)
    assert path.read_bytes() == CONTENT
    assert starts(server) == [0] * len(script)
    assert cached() == ["a.bin"]
    assert fetch(server, "plain", sha256=SHA256) == path  # from the cache
    assert server.seen == []
    path.write_bytes(CONTENT[:-1])  # a cache that went bad is fetched anew
    assert fetch(server, "plain", "good", sha256=SHA256).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("script", "reason", "requests"),
    [(["wrong"] * 4, "sha256", 4), (["truncated"] * 4, "broke off|bytes", 4), ([500] * 4, "500", 4),
     (["stalls"] * 4, "in time", 4), ([404], "404", 1),
     ([(401, {"X-Error-Message": "Who are you?"})], "401 Unauthorized: Who are you[?]$", 1),
     ([(403, {}, b'{"error": "It is\\nrestricted."}')], "403 Forbidden: It is restricted[.]$", 1),
     ([(403, {}, b"Ask for access")], "403 Forbidden: Ask for access$", 1),
     ([(403, {}, b"<html>no</html>")], "403 Forbidden$", 1)],
)  # fmt: skip
def test_a_download_that_fails_leaves_nothing(server, script, reason, requests):
    with pytest.raises(data.DataError, match=reason):
        fetch(server, "plain", *script, sha256=SHA256)
    assert len(server.seen) == requests
    assert cached() == []


@pytest.mark.parametrize(
    ("url", "reason"),
    [("http://127.0.0.1:9/x", "refuses the connection"), ("http://nowhere.example/x", "host name"),
     ("http://[::1/x", "malformed"), ("http://a b/x", "malformed"), ("ftp://a/x", "malformed"),
     (f"https://{'a' * 70}.com/x", "malformed"), ("https://proxied.example/x", "proxy refuses")],
)  # fmt: skip
def test_why_there_is_no_connection(server, monkeypatch, url, reason):
    def unknown(host, *args, **options):
        if host == "nowhere.example":
            raise socket.gaierror(-2, "Name or service not known")
        return look_up(host, *args, **options)

    look_up = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    if "proxied" in url:
        monkeypatch.setenv("HTTPS_PROXY", server.url)
    with pytest.raises(data.DataError, match=reason) as error:
        download.fetch(url, download.cache_dir() / "x")
    assert "Error" not in str(error.value)


def test_a_local_copy(tmp_path):
    copy, path = tmp_path / "copy.bin", download.cache_dir() / "a.bin"
    copy.write_bytes(CONTENT)
    assert download.fetch(str(copy), path, SHA256).read_bytes() == CONTENT
    path.unlink()
    copy.write_bytes(CONTENT + b"!")
    with pytest.raises(data.DataError, match="sha256"):
        download.fetch(str(copy), path, SHA256)
    with pytest.raises(data.DataError, match=r"missing\.bin"):
        download.fetch(str(tmp_path / "missing.bin"), path)
    assert cached() == []


@pytest.mark.parametrize(
    ("script", "begins"),
    [(["good"], [0]), (["truncated", "good"], [0, 0.5]),
     (["stalls", 429, 503, "truncated", 403, "good"], [0, 0.5, 0.5, 0.5, 0.75, 0.75]),
     (["truncated", "ignores Range"], [0, 0.5]),
     (["truncated"] * 6, [1 - 0.5**n for n in range(6)]),
     (["changed", "good", "good"], [0, 0.5, 0]),
     (["wrong", "truncated", "good"], [0, 0, 0.5])],
)  # fmt: skip
@pytest.mark.parametrize("folder", ["resolve", "mirror"])
def test_a_download_is_resumed(server, folder, script, begins):
    assert fetch(server, folder, *script).read_bytes() == server.files["a.bin"]
    begins = [begin * len(CONTENT) for begin in begins]
    assert starts(server)[: len(begins)] == pytest.approx(begins, abs=2000)
    assert cached() == ["a.bin"]


def test_a_download_is_resumed_by_a_later_process(server):
    with pytest.raises(data.DataError, match="500"):
        fetch(server, "resolve", "truncated", *[500] * 4)
    assert cached() == [".a.bin.part", ".a.bin.tag"]
    assert fetch(server, "resolve").read_bytes() == CONTENT
    assert starts(server) == pytest.approx([len(CONTENT) // 2], abs=1000)
    # A download that was whole, but killed before it had its name.
    path = download.cache_dir() / "a.bin"
    path.rename(path.with_name(".a.bin.part"))
    path.with_name(".a.bin.tag").write_text(SHA256)
    assert fetch(server, "resolve").read_bytes() == CONTENT
    assert cached() == ["a.bin"]


@pytest.mark.parametrize("word", ["changed", "another span"])
def test_the_rest_of_another_file_is_not_taken(server, word):
    server.tag = lambda content: f"version-{zlib.crc32(content)}"  # no sha256 that would tell later
    path = fetch(server, "resolve", *(["changed"] if word == "changed" else ["truncated", word]))
    assert path.read_bytes() == server.files["a.bin"]


def test_a_full_disk_is_seen_before(server, monkeypatch):
    free = download.RESERVE + len(CONTENT) - 1
    usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, free))
    with pytest.raises(data.DataError, match="100 MB free, and this needs 100 MB, of which 100 MB"):
        fetch(server, "resolve", "good")
    assert cached() == []
    free += 1
    assert fetch(server, "resolve", "good").exists()


def test_processes_share_a_download(server):
    path = download.cache_dir() / "a.bin"
    assert in_parallel(lambda: download.fetch(f"{server.url}/plain/a.bin", path)) == [path] * 4
    assert path.read_bytes() == CONTENT
    assert starts(server) == [0]


def test_waiting_and_downloading_are_said_without_a_terminal(server, monkeypatch):
    lines, said = [], threading.Event()
    monkeypatch.setattr(progress, "say", lambda line: lines.append(line) or said.set())
    download.cache_dir().mkdir()
    thread = threading.Thread(target=fetch, args=(server, "plain"))
    with FileLock(download.cache_dir() / ".a.bin.lock"):
        thread.start()
        assert said.wait(60)
        assert "waiting for another process" in lines[0]
    thread.join()
    assert lines[1:] == ["downloading a.bin"]


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    """A certificate for localhost that nobody knows: the paths of it and of its key."""
    if not shutil.which("openssl"):
        pytest.skip("no openssl to make a certificate")
    folder = tmp_path_factory.mktemp("tls")
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -out cert"
    command += " -keyout key -addext subjectAltName=DNS:localhost"
    subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)
    return folder / "cert", folder / "key"


def test_a_certificate_that_is_not_trusted(server, certificate):
    with serving(certificate) as tls, pytest.raises(data.DataError, match="certificate is not"):
        fetch(tls, "plain")


@pytest.mark.parametrize("place", ["HF_TOKEN", "HF_TOKEN_PATH", "HF_HOME", "~", None])
def test_the_token_goes_to_the_hub_alone(server, certificate, monkeypatch, tmp_path, place):
    (tmp_path / "netrc").write_text("machine localhost login me password mine")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate[0]))
    home = tmp_path / ("home/.cache/huggingface" if place == "~" else "hf")
    home.mkdir(parents=True)
    (home / "token").write_text("secret\n")
    values = {"HF_TOKEN": "secret", "HF_TOKEN_PATH": str(home / "token"), "HF_HOME": str(home)}
    if place in values:
        monkeypatch.setenv(place, values[place])
    with serving(certificate) as tls:
        tls.storage = server.url
        if place:
            monkeypatch.setenv("HF_ENDPOINT", tls.url)
        assert fetch(tls, "mirror").read_bytes() == CONTENT
        sent = {folder: token for folder, _, token in tls.seen + server.seen}
        assert sent["signed"] is None
        assert (sent["mirror"] == "Bearer secret") == bool(place)
        (download.cache_dir() / "a.bin").unlink()
        with pytest.raises(data.DataError, match="401") as error:
            fetch(tls, "plain", (401, {"X-Error-Message": "Invalid token"}))
        assert ("HF_TOKEN" in str(error.value)) == bool(place)
        assert "secret" not in str(error.value)


def test_other_hosts_do_not_get_the_token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert hub.hub_auth("https://huggingface.co/x")
    for url in ("http://huggingface.co/x", "https://huggingface.co.example/x", "https://other/x"):
        assert hub.hub_auth(url) is None
    monkeypatch.setenv("HF_ENDPOINT", "http://localhost")
    assert hub.hub_auth("http://localhost/x") is hub.hub_auth("https://huggingface.co/x") is None


# Tiny Shakespeare, or pydoc


@pytest.mark.parametrize("script", [["stalls"], ["trickles"], [500]])
def test_who_named_no_data_set_gets_pydoc_when_there_is_no_network(
    server, script, monkeypatch, capsys
):
    monkeypatch.setattr(shakespeare, "SHA256", SHA256)
    monkeypatch.setenv("SHAKESPEARE_URL", f"{server.url}/plain/a.bin")
    monkeypatch.setattr(data, "PATIENCE", 1.0)
    server.script = script
    default = data.load(None, block_size=64)
    assert default.name == "pydoc"
    assert len(default.train) > 300_000
    assert "TRAINING ON PYTHON'S LANGUAGE REFERENCE" in capsys.readouterr().out
    assert cached() == []
    assert len(server.seen) <= 1  # one attempt
    server.release.set()
    monkeypatch.setattr(data, "PATIENCE", 60.0)
    assert data.load(None, block_size=64).name == "shakespeare"


def test_a_named_data_set_is_never_replaced(server, monkeypatch):
    monkeypatch.setenv("SHAKESPEARE_URL", f"{server.url}/plain/none.txt")
    with pytest.raises(data.DataError, match="404"):
        data.load("shakespeare", block_size=64)


@shared
def test_tiny_shakespeare_is_the_file_that_everybody_uses(monkeypatch):
    monkeypatch.setenv("SHAKESPEARE_URL", str(SHARED / "tinyshakespeare.txt"))
    text = data.load("shakespeare", block_size=64)
    assert len(ids_of(text)) == 1_115_394
    assert text.tokenizer.vocab_size == 65


# GPT-2's vocabulary


def test_the_vocabulary_is_downloaded_once_or_found(server, monkeypatch, tmp_path):
    files = {"vocab.bpe": b"merges", "encoder.json": b"ids"}
    urls = {f"{server.url}/plain/{name}": content for name, content in files.items()}
    sums = {url: hashlib.sha256(content).hexdigest() for url, content in urls.items()}
    monkeypatch.setattr(tokenizers, "VOCABULARY", sums)
    server.files |= files
    server.script = [503, "truncated", "good", "good"]
    folder = tokenizers.find_vocabulary()
    assert folder == download.cache_dir() / "tiktoken"
    for url, content in urls.items():  # the names that tiktoken looks for
        assert (folder / hashlib.sha1(url.encode()).hexdigest()).read_bytes() == content
    asked = len(server.seen)
    assert tokenizers.find_vocabulary() == folder
    assert len(server.seen) == asked

    theirs = folder.rename(tmp_path / "data-gym-cache")  # where tiktoken puts it by itself
    assert tokenizers.find_vocabulary() == theirs
    theirs = theirs.rename(tmp_path / "elsewhere")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(theirs))
    assert tokenizers.find_vocabulary() == theirs
    assert len(server.seen) == asked
    next(theirs.glob("[!.]*")).write_text("damaged")
    server.script = [404]
    with pytest.raises(data.DataError, match=r"/plain/.*404"):
        tokenizers.find_vocabulary()


@shared
def test_the_tokens_of_the_real_vocabulary_are_those_of_nanogpt(monkeypatch):
    pytest.importorskip("tiktoken")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
    tokenizer = GPT2Tokenizer()
    ids = np.fromfile(SHARED / "openwebtext" / "val_nanogpt_layout.bin", "<u2", 5000)
    first = ids[: ids.tolist().index(tokenizer.end)]
    assert tokenizer.encode(tokenizer.decode(first.tolist())).tolist() == first.tolist()
    assert tokenizer.decode(tokenizer.encode("<|endoftext|>").tolist()) == "<|endoftext|>"
    assert tokenizer.decode([50_300]) == ""


# Tokens in files


def test_shards_give_back_what_they_took(tmp_path):
    rng = np.random.default_rng(0)
    parts = [rng.integers(60_000, size=n).astype(np.uint16) for n in (10, 1, 0, 300)]
    for i, part in enumerate(parts):
        with shards.Writer(tmp_path / f"{i}.bin", 2) as writer:
            writer.write(part[:7])
            writer.write(part[7:])
    joined = shards.ConcatTokens([shards.read(tmp_path / f"{i}.bin") for i in range(4)])
    whole = np.concatenate(parts)
    assert len(joined) == len(whole)
    for start in range(0, 20):
        for stop in (start, start + 1, start + 12, 311, 400):
            assert np.array_equal(joined[start:stop], whole[start:stop])

    with contextlib.suppress(KeyboardInterrupt), shards.Writer(tmp_path / "0.bin", 2) as writer:
        writer.write(parts[3])
        raise KeyboardInterrupt
    assert np.array_equal(shards.read(tmp_path / "0.bin"), parts[0])
    assert len(list(tmp_path.iterdir())) == 4


def test_what_a_killed_process_left_is_replaced(tmp_path):
    killed = shards.Writer(tmp_path / "a.bin", 1).__enter__()
    killed.write(np.zeros(100_000, dtype=np.uint8))
    assert len(list(tmp_path.iterdir())) == 1
    with shards.Writer(tmp_path / "a.bin", 1) as writer:
        writer.write(np.ones(3, dtype=np.uint8))
    assert list(tmp_path.iterdir()) == [tmp_path / "a.bin"]
    assert shards.read(tmp_path / "a.bin").tolist() == [1, 1, 1]


def test_a_damaged_shard_is_refused(tmp_path):
    with shards.Writer(tmp_path / "a.bin", 1) as writer:
        writer.write(np.arange(100, dtype=np.uint8))
    good = (tmp_path / "a.bin").read_bytes()
    assert len(good) == 124
    version_2 = good[:8] + b"\2" + good[9:]
    for bad in (b"", good[:20], good[:-1], good + b"x", b"X" + good[1:], version_2):
        (tmp_path / "a.bin").write_bytes(bad)
        with pytest.raises(data.DataError, match=r"a\.bin"):
            shards.read(tmp_path / "a.bin")
    with pytest.raises(data.DataError, match="cannot read"):
        shards.read(tmp_path / "none.bin")


def test_files_of_nanogpt(small_gpt2, tmp_path):
    ids = np.random.default_rng(0).integers(260, size=900).astype("<u2")
    ids[::50] = 50256
    ids[:800].tofile(tmp_path / "train.bin")
    ids[800:].tofile(tmp_path / "val.bin")
    bins = data.load(str(tmp_path), block_size=8)
    assert np.array_equal(bins.train, ids[:800])
    assert np.array_equal(bins.val, ids[800:])
    assert bins.tokenizer.state() == {"kind": "gpt2"}
    with pytest.raises(data.DataError, match="cannot be char"):
        data.load(str(tmp_path), 8, "char")
    wrong = {b"abc": "3 bytes", b"": "0 bytes", b"\xff" * 90: "65535"}
    wrong[ids.astype("<u4").tobytes()] = "32 bits"
    for content, reason in wrong.items():
        (tmp_path / "train.bin").write_bytes(content)
        with pytest.raises(data.DataError, match=reason):
            data.load(str(tmp_path), block_size=8)
    (tmp_path / "meta.pkl").write_bytes(b"")
    with pytest.raises(data.DataError, match=r"meta\.pkl"):
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

    held = [[t for t in ts if zlib.crc32(t.encode()) % 100 == 0] for ts in texts]
    kept = [t for ts in texts for t in ts if zlib.crc32(t.encode()) % 100]
    assert two.val.tolist() == tokens(held[0]) != []
    assert two.train[:].tolist() == tokens(kept)
    assert cached("openwebtext") == ["00.train.bin", "01.train.bin", "val.bin"]

    # Fewer shards have the same validation; what is there is not fetched again.
    asked = len(server.seen)
    one = data.load("openwebtext", block_size=16, n_shards=1)
    assert np.array_equal(one.val, two.val)
    assert len(server.seen) == asked
    for n, reason in ((3, "404"), (81, "1 to 80"), (0, "1 to 80")):
        with pytest.raises(data.DataError, match=reason):
            data.load("openwebtext", block_size=16, n_shards=n)
    with pytest.raises(data.DataError, match="openwebtext comes"):
        data.load("openwebtext", 8, "char")
    monkeypatch.delenv("OPENWEBTEXT_URL")
    monkeypatch.setenv("HF_ENDPOINT", f"{server.url}/")
    address = f"{server.url}/{openwebtext.REPOSITORY}/{NAME.format(2)}"
    with pytest.raises(data.DataError, match=f"{address}.*404"):
        data.load("openwebtext", block_size=16, n_shards=3)


DAMAGES = {
    "cut short": lambda good: good[:-50],
    "no parquet": lambda good: b"<html>Log in</html>",
    "a bad page": lambda good: good[:4] + b"\xff" * 100 + good[104:],
    "no UTF-8": lambda good: good.replace("ï".encode(), b"\xff\xff"),
    "bytes": lambda good: as_parquet([b"the", b"other"] * 300),
    "numbers": lambda good: as_parquet([1, 2] * 300),
    "nulls": lambda good: as_parquet([None] * 300),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_of_openwebtext_is_fetched_anew(small_gpt2, server, monkeypatch, damage):
    name = NAME.format(0)
    monkeypatch.setenv("OPENWEBTEXT_URL", f"{server.url}/plain")
    good = as_parquet(documents(700, 0), compression="none")
    server.files[name] = DAMAGES[damage](good)
    with pytest.raises(data.DataError, match="shard of openwebtext") as error:
        data.load("openwebtext", block_size=16)
    assert "None" not in str(error.value)
    assert cached("openwebtext") == []
    server.files[name] = good
    assert len(data.load("openwebtext", block_size=16).train) > 10_000


@shared
def test_real_openwebtext_from_a_folder(small_gpt2, tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    (tmp_path / "plain_text").mkdir()
    for i in range(2):
        real = SHARED / "openwebtext" / "plain_text" / f"train-0000{i}-of-00002.parquet"
        (tmp_path / NAME.format(i)).symlink_to(real.resolve())
    monkeypatch.setenv("OPENWEBTEXT_URL", str(tmp_path))
    text = data.load("openwebtext", block_size=1024, n_shards=2)
    assert ids_of(text).count(50256) > 1400  # of 1,426 documents, without those held out of shard 1
    assert (tmp_path / NAME.format(0)).exists()
