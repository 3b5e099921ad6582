"""The data: tokenizers, text files, downloads from servers with faults, token files."""

import contextlib
import hashlib
import http.server
import io
import json
import os
import shutil
import threading
import time
import zlib

import numpy as np
import pytest
import requests

import data
from data import download, shards, textfile
from data.tokenizer import ByteTokenizer, CharTokenizer, from_state
from tests.helpers import HERE, SMALL, flags, losses, script


def test_tokenizers_give_back_what_they_took():
    text = "Häßlich?\r\n\tJa — 𝄞!\x00"
    for tokenizer in (CharTokenizer("".join(sorted(set(text)))), ByteTokenizer()):
        for twin in (tokenizer, from_state(json.loads(json.dumps(tokenizer.state())))):
            ids = twin.encode(text)
            assert ids.ndim == 1
            assert ids.max() < twin.vocab_size
            assert twin.decode(ids.tolist()) == text
    assert ByteTokenizer().decode([0xC3]) == "\ufffd"


def test_an_unknown_character_is_named():
    with pytest.raises(data.DataError, match=r"'x' \(number 3 "):
        CharTokenizer("ab").encode("abxz")
    with pytest.raises(data.DataError, match="kind 'bpe-of-2031'"):
        from_state({"kind": "bpe-of-2031"})


def test_own_text_is_characters_or_bytes(tmp_path, monkeypatch):
    file = tmp_path / "my.txt"
    file.write_bytes("naïve\r\n".encode() * 30)
    dataset = data.load(str(file), block_size=8)
    assert dataset.tokenizer.state() == {"kind": "char", "chars": "\n\raenvï"[:3] + "envï"}
    assert len(dataset.train) + len(dataset.val) == 7 * 30
    assert dataset.tokenizer.decode(dataset.train[:7].tolist()) == "naïve\r\n"

    text = "".join(chr(0x4E00 + n) for n in range(300))  # 300 different characters
    file.write_text(text)
    many = data.load(str(file), block_size=8)
    assert many.tokenizer.state() == {"kind": "byte"}
    monkeypatch.setattr(textfile, "LARGE", 100)
    large = data.load(str(file), block_size=8)
    base = large.train
    while not isinstance(base, np.memmap):
        base = base.base
    for d in (many, large):
        both = np.concatenate((d.train, d.val))
        assert len(d.train) == 810
        assert d.tokenizer.decode(both.tolist()) == text
    assert large.fingerprint() == many.fingerprint() != dataset.fingerprint()


@pytest.mark.parametrize("large", [1, 10**8])
def test_a_file_that_is_no_text_is_refused(tmp_path, monkeypatch, large):
    monkeypatch.setattr(textfile, "LARGE", large)
    file = tmp_path / "my.txt"
    cut = ("é" * 99).encode()[:-1]
    wrong = {b"": "empty", b"abc" * 3: "too short", b"abc\xff" * 99: "0xff", cut: "UTF-8"}
    for content, reason in wrong.items():
        file.write_bytes(content)
        with pytest.raises(data.DataError, match=reason):
            data.load(str(file), block_size=16)
    file.unlink()
    with pytest.raises(data.DataError, match="folder"):
        data.load(str(tmp_path), block_size=16)
    file.write_text("abc" * 99)
    monkeypatch.setenv("DENSEFORMER_CACHE", "/dev/null/cache")
    if large == 1:
        with pytest.raises(data.DataError, match="cannot get tokens of"):
            data.load(str(file), block_size=16)
    with pytest.raises(data.DataError, match="/dev/null"):
        download.fetch("http://127.0.0.1:9/x", download.cache_dir() / "x")
    with pytest.raises(data.DataError, match="did you mean shakespeare"):
        data.load("shakspeare", block_size=16)


# A web server on this machine that answers as it is told, one word for each request.

CONTENT = b"To be, or not to be, that is the question:\n" * 50
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setattr(download, "BACKOFF", 0.01)
    monkeypatch.setattr(download, "TIMEOUT", (2.0, 0.5))
    release = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            word = httpd.script.pop(0)
            httpd.requests += 1
            if isinstance(word, int):
                self.send_error(word)
                return
            self.send_response(200)
            body = {"wrong": CONTENT[::-1], "long": CONTENT * 2}.get(word, CONTENT)
            if word != "endless":
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            with contextlib.suppress(OSError):
                if word == "stalls":
                    self.wfile.write(body[:100])
                    release.wait(10)
                elif word == "trickles":
                    for byte in body:
                        self.wfile.write(bytes([byte]))
                        if release.wait(0.1):
                            break
                else:
                    self.wfile.write(body[: 100 if word == "truncated" else None])

        def log_message(self, *args):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    httpd.script, httpd.requests = [], 0
    httpd.url = f"http://127.0.0.1:{httpd.server_port}/input.txt"
    thread = threading.Thread(target=httpd.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield httpd
    release.set()
    httpd.shutdown()
    httpd.server_close()


def fetch(server, *script, deadline=None):
    server.script, server.requests = list(script), 0
    path = download.cache_dir() / "file.txt"
    return download.fetch(server.url, path, len(CONTENT), SHA256, deadline)


def cached():
    """What is in the cache, but for the locks, which stay."""
    return [p.name for p in download.cache_dir().iterdir() if p.suffix != ".lock"]


@pytest.mark.parametrize(
    "script",
    [["good"], [500, 503, "good"], [429, "good"], ["truncated", "good"], ["wrong", "good"],
     ["long", "good"], ["stalls", "good"], ["endless"]],
)  # fmt: skip
def test_download(server, script):
    path = fetch(server, *script)
    assert path.read_bytes() == CONTENT
    assert server.requests == len(script)
    assert cached() == ["file.txt"]
    assert fetch(server) == path  # from the cache: no request
    assert server.requests == 0
    path.write_bytes(CONTENT[:-1])  # a cache that went bad is fetched anew
    assert fetch(server, "good").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("script", "reason", "requests"),
    [(["wrong"] * 3, "sha256", 3), (["truncated"] * 4, "broke off|bytes", 4),
     ([500] * 4, "500", 4), ([404], "404", 1), ([403], "403", 1)],
)  # fmt: skip
def test_a_download_that_fails_leaves_nothing(server, script, reason, requests):
    with pytest.raises(data.DataError, match=reason):
        fetch(server, *script)
    assert server.requests == requests
    assert cached() == []


def test_a_download_from_nowhere(server):
    server.url = "http://127.0.0.1:9/input.txt"
    with pytest.raises(data.DataError, match="no connection"):
        fetch(server)


def test_a_local_copy_or_mirror(server, tmp_path):
    file = tmp_path / "copy.txt"
    file.write_bytes(CONTENT)
    server.url = str(file)
    assert fetch(server).read_bytes() == CONTENT
    download.cache_dir().joinpath("file.txt").unlink()
    file.write_bytes(CONTENT + b"!")
    with pytest.raises(data.DataError, match="bytes"):
        fetch(server)
    server.url = str(tmp_path / "missing.txt")
    with pytest.raises(data.DataError, match=r"missing\.txt"):
        fetch(server)


@pytest.mark.parametrize("script", [["stalls"] * 4, ["trickles"], [500] * 4])
def test_who_named_no_data_set_gets_pydoc_when_there_is_no_network(
    server, script, monkeypatch, capsys
):
    monkeypatch.setenv("SHAKESPEARE_URL", server.url)
    monkeypatch.setattr(data, "PATIENCE", 1.0)
    server.script = script
    begin = time.monotonic()
    dataset = data.load(None, block_size=64)
    assert time.monotonic() - begin < 10  # not a speed: 50 s of trickling would be far beyond
    assert dataset.name == "pydoc"
    assert len(dataset.train) > 300_000
    assert "TRAINING ON PYTHON'S LANGUAGE REFERENCE" in capsys.readouterr().out
    assert cached() == []


def test_a_named_data_set_is_never_replaced(server, monkeypatch):
    monkeypatch.setenv("SHAKESPEARE_URL", server.url)
    server.script = [404]
    with pytest.raises(data.DataError, match="404"):
        data.load("shakespeare", block_size=64)


# A hub: it redirects to an address on another host, says what the file is, and resumes.


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(download, "BACKOFF", 0.01)
    monkeypatch.setattr(download, "TIMEOUT", (2.0, 0.5))
    monkeypatch.setattr(download, "CHUNK", 1000)
    release = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            folder, _, name = self.path[1:].partition("/")
            content = httpd.files.get(name)
            if content is None:
                self.send_error(404)
            elif folder == "resolve":
                httpd.seen_here.append(self.headers.get("Authorization"))
                self.send_response(302)
                self.send_header("Location", f"http://localhost:{httpd.server_port}/signed/{name}")
                self.send_header("X-Linked-ETag", f'"{httpd.tag(content)}"')
                self.send_header("X-Linked-Size", str(len(content)))
                self.end_headers()
            else:
                with contextlib.suppress(OSError):
                    self.send(content, httpd.script.pop(0) if httpd.script else "good")

        def send(self, content, word):
            start = self.headers.get("Range", "").removeprefix("bytes=").removesuffix("-")
            httpd.seen.append((word, start, self.headers.get("Authorization")))
            start = int(start or 0)
            if word == 429:
                self.send_response(429)
                self.send_header("Retry-After", "0.01")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if isinstance(word, int):
                self.send_error(word)
                return
            if word == "changed":  # between this attempt and the next
                httpd.files = {name: c[::-1] for name, c in httpd.files.items()}
            start += 1000 if word == "another span" else 0
            if start and word != "ignores Range":
                self.send_response(206 if start < len(content) else 416)
                span = f"{start}-{len(content) - 1}" if start < len(content) else "*"
                self.send_header("Content-Range", f"bytes {span}/{len(content)}")
                content = content[start:]
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if word == "wrong":
                content = content[::-1]
            half = word in ("truncated", "stalls", "changed")
            self.wfile.write(content[: (len(content) + 1) // 2 if half else None])
            if word == "stalls":
                release.wait(10)

        def log_message(self, *args):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    httpd.script, httpd.seen, httpd.seen_here = [], [], []
    httpd.files = {"a.bin": os.urandom(300_000)}
    httpd.tag = lambda content: hashlib.sha256(content).hexdigest()
    httpd.url = f"http://127.0.0.1:{httpd.server_port}/resolve"
    threading.Thread(target=httpd.serve_forever, args=(0.05,), daemon=True).start()
    yield httpd
    release.set()
    httpd.shutdown()
    httpd.server_close()


def starts(hub):
    return [int(start or 0) for _, start, _ in hub.seen]


@pytest.mark.parametrize(
    ("script", "begins"),
    [
        (["good"], [0]),
        (["truncated", "good"], [0, 150_000]),
        (["stalls", 429, 503, "truncated", 403, "good"], [0] + [150_000] * 3 + [225_000] * 2),
        (["truncated", "ignores Range"], [0, 150_000]),
        (["truncated"] * 6, [300_000 - 300_000 // 2**n for n in range(6)]),
        (["changed", "good", "good"], [0, 150_000, 0]),
        (["wrong", "truncated", "good"], [0, 0, 150_000]),
    ],
)
def test_a_download_is_resumed(hub, script, begins):
    hub.script = script
    path = download.fetch(f"{hub.url}/a.bin", download.cache_dir() / "a.bin")
    assert path.read_bytes() == hub.files["a.bin"]
    assert starts(hub)[: len(begins)] == pytest.approx(begins, abs=2000)
    assert cached() == ["a.bin"]


def test_a_download_is_resumed_by_a_later_process(hub):
    path = download.cache_dir() / "a.bin"
    hub.script = ["truncated"] + [500] * 4
    with pytest.raises(data.DataError, match="500"):
        download.fetch(f"{hub.url}/a.bin", path)
    assert path.with_name(".a.bin.part").stat().st_size == 150_000
    download.fetch(f"{hub.url}/a.bin", path)
    assert starts(hub)[-1] == 150_000
    assert path.read_bytes() == hub.files["a.bin"]
    # Whole, but nobody had the time to look at it and give it its name.
    path.rename(path.with_name(".a.bin.part"))
    path.with_name(".a.bin.tag").write_text(hashlib.sha256(hub.files["a.bin"]).hexdigest())
    download.fetch(f"{hub.url}/a.bin", path)
    assert path.read_bytes() == hub.files["a.bin"]
    assert cached() == ["a.bin"]


@pytest.mark.parametrize("word", ["changed", "another span"])
def test_the_rest_of_another_file_is_not_taken(hub, word):
    hub.tag = lambda content: f"version-{zlib.crc32(content)}"  # no sha256 to find it out later
    hub.script = ["changed"] if word == "changed" else ["truncated", word]
    path = download.fetch(f"{hub.url}/a.bin", download.cache_dir() / "a.bin")
    assert path.read_bytes() == hub.files["a.bin"]


def test_a_download_that_is_three_times_another_file_ends(hub):
    hub.script = ["wrong"] * 3
    with pytest.raises(data.DataError, match="sha256"):
        download.fetch(f"{hub.url}/a.bin", download.cache_dir() / "a.bin")
    assert cached() == []
    assert len(hub.seen) == 3


def test_a_full_disk_is_seen_before(hub, monkeypatch):
    usage = type(shutil.disk_usage("."))(100, 90, 10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(data.DataError, match=r"0\.0 GB are free"):
        download.fetch(f"{hub.url}/a.bin", download.cache_dir() / "a.bin")
    assert cached() == []


def test_the_token_goes_to_its_host_alone(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    download.fetch(f"{hub.url}/a.bin", download.cache_dir() / "a.bin")
    assert hub.seen_here == [None]  # a mirror does not get it
    sent = []

    class Session(requests.Session):
        def send(self, request, **kwargs):
            sent.append((request.url, request.headers.get("Authorization")))
            response = requests.Response()
            response.request, response.url, response.status_code = request, request.url, 302
            response.headers["Location"] = "https://cdn.example/x"
            response.raw = io.BytesIO()
            if "cdn.example" in request.url:
                raise requests.ConnectionError
            if kwargs.get("allow_redirects", True):
                return list(self.resolve_redirects(response, request))[-1]
            return response

    monkeypatch.setattr(requests.sessions, "Session", Session)
    with pytest.raises(data.DataError) as error:
        download.fetch("https://huggingface.co/x", download.cache_dir() / "x")
    assert sent[:2] == [
        ("https://huggingface.co/x", "Bearer secret"),
        ("https://cdn.example/x", None),
    ]
    assert "secret" not in str(error.value)


def test_processes_do_not_fight_over_a_file(hub):
    path = download.cache_dir() / "a.bin"
    got = []
    one = lambda: got.append(download.fetch(f"{hub.url}/a.bin", path))  # noqa: E731
    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [path] * 4
    assert len(hub.seen) == 1


# Tokens in files


def test_shards_give_back_what_they_took(tmp_path):
    rng = np.random.default_rng(0)
    parts = [rng.integers(60_000, size=n).astype(np.uint16) for n in (10, 1, 0, 300)]
    for i, part in enumerate(parts):
        with shards.Writer(tmp_path / f"{i}.bin", 2) as writer:
            writer.write(part[:7])
            writer.write(part[7:])
    joined = shards.Joined([shards.read(tmp_path / f"{i}.bin") for i in range(4)])
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


def test_a_damaged_shard_is_refused(tmp_path):
    with shards.Writer(tmp_path / "a.bin", 1) as writer:
        writer.write(np.arange(100, dtype=np.uint8))
    good = (tmp_path / "a.bin").read_bytes()
    assert len(good) == 124
    for bad in (
        b"",
        good[:20],
        good[:-1],
        good + b"x",
        b"X" + good[1:],
        good[:8] + b"\2" + good[9:],
    ):
        (tmp_path / "a.bin").write_bytes(bad)
        with pytest.raises(data.DataError, match=r"a\.bin"):
            shards.read(tmp_path / "a.bin")
    with pytest.raises(data.DataError, match="cannot read"):
        shards.read(tmp_path / "none.bin")


@pytest.fixture
def small_gpt2(monkeypatch, tmp_path):
    """GPT-2's tokenizer with a vocabulary of bytes and a few merges, for the real one is elsewhere.

    In this process and in those that it starts.
    """
    pytest.importorskip("tiktoken")
    (tmp_path / "sitecustomize.py").write_text(
        "import tiktoken\n"
        "ranks = {bytes([b]): b for b in range(256)}\n"
        "ranks |= {w: 256 + i for i, w in enumerate([b'th', b'the', b' the', b'er', b'\\n\\n'])}\n"
        "ranks |= {b'\\xff%d' % i: i for i in range(len(ranks), 50256)}  # none of them a text\n"
        'pattern = (r"\'(?:[sdmt]|ll|ve|re)| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+"\n'
        "           r'|\\s+(?!\\S)|\\s+')\n"
        "encoding = tiktoken.Encoding('gpt2', pat_str=pattern, mergeable_ranks=ranks,\n"
        "                             special_tokens={'<|endoftext|>': 50256})\n"
        "tiktoken.get_encoding = lambda name: encoding\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    import tiktoken

    monkeypatch.setattr(tiktoken, "get_encoding", tiktoken.get_encoding)
    exec((tmp_path / "sitecustomize.py").read_text(), {})
    return tiktoken.get_encoding("gpt2")


def test_text_cut_in_pieces_has_the_tokens_of_the_whole(small_gpt2, tmp_path, monkeypatch):
    monkeypatch.setattr(textfile, "CHUNK", 64)
    rng = np.random.default_rng(0)
    words = [
        "the",
        " other",
        "\n",
        " ",
        "  ",
        "\n\n",
        "'s",
        "don't",
        "12",
        "naïve",
        "漢字",
        ".",
        "\t",
    ]
    text = "".join(rng.choice(words, 3000))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "1.txt").write_bytes(text.encode())
    (tmp_path / "texts" / "2.txt").write_bytes(b"the end")
    dataset = data.load(str(tmp_path / "texts"), block_size=8, tokenizer="gpt2")
    ids = np.concatenate((dataset.train, dataset.val)).tolist()
    whole = small_gpt2.encode_ordinary(text)
    assert ids == [*whole, 50256, *small_gpt2.encode_ordinary("the end"), 50256]
    assert len(list(textfile.pieces([tmp_path / "texts" / "1.txt"]))) > 20
    again = data.load(str(tmp_path / "texts"), block_size=8, tokenizer="gpt2")
    assert again.fingerprint() == dataset.fingerprint()
    assert data.load(str(tmp_path / "texts"), 8, "byte").tokenizer.state() == {"kind": "byte"}
    with pytest.raises(data.DataError, match="openwebtext comes"):
        data.load("openwebtext", 8, "char")


def test_train_txt_and_val_txt_are_the_splits(tmp_path):
    (tmp_path / "train.txt").write_text("abc" * 100)
    (tmp_path / "val.txt").write_text("cd" * 50)
    (tmp_path / "other.txt").write_text("xyz")
    dataset = data.load(str(tmp_path), block_size=8)
    assert dataset.tokenizer.decode(dataset.train.tolist()) == "abc" * 100
    assert dataset.tokenizer.decode(dataset.val.tolist()) == "cd" * 50


def test_a_tokenizer_must_fit_16_bits():
    with pytest.raises(data.DataError, match="16 bits"):
        CharTokenizer("".join(map(chr, range(0x10000, 0x20001))))
    text = "".join(map(chr, range(0x4E00, 0x4E00 + 1000)))
    many = CharTokenizer(text)
    assert many.encode(text).dtype == np.uint16
    assert many.decode(many.encode(text)) == text


def test_files_of_nanogpt(small_gpt2, tmp_path):
    ids = np.random.default_rng(0).integers(260, size=900).astype("<u2")
    ids[::50] = 50256
    ids[:800].tofile(tmp_path / "train.bin")
    ids[800:].tofile(tmp_path / "val.bin")
    dataset = data.load(str(tmp_path), block_size=8)
    assert np.array_equal(dataset.train, ids[:800])
    assert np.array_equal(dataset.val, ids[800:])
    assert dataset.tokenizer.state() == {"kind": "gpt2"}
    for content, reason in ((b"abc", "3 bytes"), (b"", "0 bytes"), (b"\xff" * 90, "65535")):
        (tmp_path / "train.bin").write_bytes(content)
        with pytest.raises(data.DataError, match=reason):
            data.load(str(tmp_path), block_size=8)
    (tmp_path / "meta.pkl").write_bytes(b"")
    with pytest.raises(data.DataError, match=r"meta\.pkl"):
        data.load(str(tmp_path), block_size=8)


def documents(n, seed):
    rng = np.random.default_rng(seed)
    words = ["the ", "other ", "thing. ", "naïve ", "\n\n", "<|endoftext|> "]
    return ["".join(rng.choice(words, rng.integers(5, 60))) for _ in range(n)]


def as_parquet(texts):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": texts}), file, row_group_size=100)
    return file.getvalue()


def test_openwebtext(small_gpt2, hub, monkeypatch, tmp_path, text):
    texts = [documents(700, seed) for seed in range(2)]
    name = "plain_text/train-{:05d}-of-00080.parquet"
    hub.files = {name.format(i): as_parquet(t) for i, t in enumerate(texts)}
    hub.script = ["truncated", 429, "stalls", "good", 503, "ignores Range"]
    monkeypatch.setenv("OPENWEBTEXT_URL", hub.url)
    dataset = data.load("openwebtext", block_size=16, n_shards=2)

    def tokens(texts):
        return [t for text in texts for t in (*small_gpt2.encode_ordinary(text), 50256)]

    held = [[t for t in ts if zlib.crc32(t.encode()) % 100 == 0] for ts in texts]
    kept = [t for ts in texts for t in ts if zlib.crc32(t.encode()) % 100]
    assert dataset.val.tolist() == tokens(held[0]) != []
    assert dataset.train[:].tolist() == tokens(kept)
    folder = download.cache_dir() / "openwebtext"
    visible = [p.name for p in folder.iterdir() if p.suffix != ".lock"]
    assert sorted(visible) == ["00.train.bin", "01.train.bin", "val.bin"]

    # Fewer shards have the same validation; what is there is not fetched again.
    asked = len(hub.seen)
    one = data.load("openwebtext", block_size=16, n_shards=1)
    assert np.array_equal(one.val, dataset.val)
    assert len(hub.seen) == asked
    with pytest.raises(data.DataError, match="404"):
        data.load("openwebtext", block_size=16, n_shards=3)
    with pytest.raises(data.DataError, match="1 to 80"):
        data.load("openwebtext", block_size=16, n_shards=81)
    hub.files[name.format(2)] = b"PAR1 but no more"
    with pytest.raises(data.DataError, match="no shard of openwebtext"):
        data.load("openwebtext", block_size=16, n_shards=3)

    # And by the scripts, as a user would.
    settings = SMALL | {"max_iters": 10, "dataset": "openwebtext", "shards": 2}
    out = tmp_path / "out"
    run = script("train.py", *flags(**settings, out_dir=out))
    assert run.returncode == 0, run.stderr
    assert losses(out)[-1][2] < losses(out)[0][2]
    run = script("sample.py", f"--out_dir={out}", "--start=the other", "--max_new_tokens=20")
    assert run.stdout.startswith("the other"), run.stderr
    run = script("train.py", f"--out_dir={out}", "--resume", "--max_iters=12", "--shards=1")
    assert run.returncode == 2
    assert "--shards" in run.stderr


def test_tiny_shakespeare_is_the_file_that_everybody_uses():
    file = HERE.parent / "shared" / "data" / "tinyshakespeare.txt"
    if not file.exists():
        pytest.skip("no copy of Tiny Shakespeare here")
    from data import shakespeare

    content = file.read_bytes()
    assert len(content) == shakespeare.SIZE
    assert hashlib.sha256(content).hexdigest() == shakespeare.SHA256
