"""The data: tokenizers, texts, files of ids, and downloads from servers with faults."""

import gzip
import hashlib
import http.server
import io
import os
import re
import sys
import threading
import zlib

import numpy as np
import pytest
from filelock import FileLock

import data
from data import cache, text
from data import tokenizer as tokenizers
from data.tokenizer import ByteTokenizer, CharTokenizer, GPT2Tokenizer, from_state, make_tokenizer
from lib.files import UserError
from tests.helpers import SHARED

CJK = "".join(map(chr, range(0x4E00, 0x4E00 + 300)))  # more than 256 characters
shared = pytest.mark.skipif(not SHARED.exists(), reason="no real texts here")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    for name in list(os.environ):
        if name.startswith(("HF_", "SHAKESPEARE_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    monkeypatch.setenv("DENSEFORMER_CACHE", "cache")
    monkeypatch.chdir(tmp_path)


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
    monkeypatch.setattr(tokenizers, "fetch_vocabulary", lambda: None)
    return lambda texts: [t for s in texts for t in (*encoding.encode_ordinary(s), 50256)]


def refused(reason):
    return pytest.raises(UserError, match=reason)


def ids_of(dataset):
    return np.concatenate((dataset.train, dataset.val)).tolist()


# Tokenizers


@pytest.mark.parametrize("kind", ["char", "byte"])
@pytest.mark.parametrize("sample", ["Häßlich?\r\n\tJa — 𝄞!\x00", CJK])
def test_tokenizers_give_back_the_text(kind, sample):
    tokenizer = make_tokenizer(kind, set(sample))
    ids = tokenizer.encode(sample)
    assert ids.max() < tokenizer.vocab_size
    assert from_state(tokenizer.state()).decode(ids.tolist()) == sample
    assert ByteTokenizer().decode([0xC3]) == "\ufffd"


@pytest.mark.parametrize("large", [1, 10**8])
def test_the_tokenizer_of_a_model_encodes_another_text(tmp_path, monkeypatch, large):
    monkeypatch.setattr(text, "LARGE", large)
    model = CharTokenizer("\n abcdefg")
    (tmp_path / "sub.txt").write_text("a cab fed\n" * 30)
    sub = data.load("sub.txt", 8, model)
    assert sub.tokenizer is model
    assert model.decode(ids_of(sub)) == "a cab fed\n" * 30
    (tmp_path / "sub.txt").write_text("a cab fled\n" * 30)
    with refused("the character 'l' is not among the 9 characters"):
        data.load("sub.txt", 8, model)


@shared
def test_the_tokens_of_the_real_vocabulary_are_those_of_nanogpt(monkeypatch):
    pytest.importorskip("tiktoken")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
    tokenizer = GPT2Tokenizer()
    ids = np.fromfile(SHARED / "openwebtext" / "val_nanogpt_layout.bin", "u2", 5000)
    first = ids[: ids.tolist().index(tokenizer.end)]
    assert tokenizer.encode(tokenizer.decode(first.tolist())).tolist() == first.tolist()
    assert tokenizer.decode(tokenizer.encode("<|endoftext|>\ud800").tolist()) == "<|endoftext|>?"
    assert tokenizer.decode([50_300]) == ""


# Texts


def test_own_text_is_characters_or_bytes(tmp_path, monkeypatch):
    (tmp_path / "my.txt").write_text(CJK)
    assert data.load("my.txt", block_size=8).tokenizer.state() == {"kind": "byte"}
    (tmp_path / "my.txt").write_bytes("naïve\r\n".encode() * 30)
    few, in_memory = data.load("my.txt", block_size=20), data.load("my.txt", 8, "byte")
    assert few.tokenizer.state() == {"kind": "char", "chars": "\n\raenvï"}
    assert few.tokenizer.decode(ids_of(few)) == "naïve\r\n" * 30
    with refused("its val split has 21 tokens, and a block_size of 21 needs at least 22"):
        data.load("my.txt", block_size=21)
    monkeypatch.setattr(text, "LARGE", 100)
    large = data.load("my.txt", block_size=8)
    assert isinstance(large.train.base.base, np.memmap)
    assert large.tokenizer.decode(ids_of(large)) == "naïve\r\n" * 30
    assert large.fingerprint() == in_memory.fingerprint() != few.fingerprint()


@pytest.mark.parametrize(
    ("names", "train", "val", "unused"),
    [("1 2 testament", "12testament", "", ""), ("train val", "train", "val", ""),
     ("train.x-1 Valid_2", "train.x-1", "Valid_2", ""), ("a ptb.test", "a", "", "ptb.test.TXT"),
     ("a dev test", "a", "dev", "test.TXT"),
     ("input train validation", "train", "validation", "input.TXT")],
)  # fmt: skip
def test_the_names_of_a_folder_tell_the_splits(tmp_path, capsys, names, train, val, unused):
    for name in names.split():
        (tmp_path / f"{name}.TXT").write_text("\ufeff" + name)  # a byte-order mark is no text
    folder = data.load(".", -1, "byte")
    ids = (folder.train, folder.val) if val else (ids_of(folder), [])
    assert tuple(bytes(list(part)).decode() for part in ids) == (train, val)
    assert capsys.readouterr().err == (f"not used from .: {unused}\n" if unused else "")


@pytest.mark.parametrize("large", [1, 10**8])
@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "empty"), (b"abc" * 3, "too short"), (b"abc\xff" * 99, "0xff"),
     (("é" * 99).encode()[:-1], "UTF-8"), (("abc" * 99).encode("utf-16-le"), "it is UTF-16"),
     (gzip.compress(b"abc" * 99, mtime=0), "compressed; unpack")],
)  # fmt: skip
def test_a_file_that_is_no_text_is_refused(tmp_path, monkeypatch, large, content, reason):
    monkeypatch.setattr(text, "LARGE", large)
    (tmp_path / "my.txt").write_bytes(content)
    with refused(reason):
        data.load("my.txt", block_size=16)


def test_a_path_that_is_no_text_is_named(tmp_path, monkeypatch):
    (tmp_path / "folder" / "x.txt").mkdir(parents=True)
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "x.txt").symlink_to("nowhere")
    (tmp_path / "train.bin").write_bytes(b"\xff\xff")
    (tmp_path / "my.txt").write_text("abc" * 100)
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(text, "LARGE", 1)
    monkeypatch.setenv("DENSEFORMER_CACHE", "/dev/null/x")
    for name, reason in (
        ("", "no file or folder ''"), ("shakspeare", "data sets are shakespeare, pydoc and"),
        ("cache", "no file or folder"), ("pipe", "pipe is a folder, a pipe"),
        ("folder", r"folder/x\.txt is a folder"), ("link", r"link/x\.txt is .* broken link"),
        ("train.bin", r"give the folder with train\.bin"),
        ("my.txt", "cannot write /dev/null/x/tokens.*Not a directory; DENSEFORMER_CACHE can"),
    ):  # fmt: skip
        with refused(reason):
            data.load(name, block_size=16)


def test_text_cut_in_pieces_has_the_tokens_of_the_whole(small_gpt2, tmp_path, monkeypatch):
    monkeypatch.setattr(text, "CHUNK", 64)
    words = ["the", " other", "\n", " ", "  ", "\n\n", "'s", "don't", "12", "naïve", "漢字"]
    sample = "".join(np.random.default_rng(0).choice([*words, ".", "\t", "\r\n"], 3000))
    (tmp_path / "1.txt").write_bytes(sample.encode())
    (tmp_path / "2.txt").write_bytes(b"the end")
    assert len(list(text.read(tmp_path / "1.txt"))) > 20
    assert ids_of(data.load(".", 8, "gpt2")) == small_gpt2([sample, "the end"])


def test_the_fingerprint_covers_both_splits_and_the_tokenizer(monkeypatch):
    def fingerprint(change, tokenizer=ByteTokenizer()):  # noqa: B008
        ids = np.arange(5000) % 100
        ids[change] = 100
        return data.Dataset("a", ids[:4000], ids[4000:], tokenizer).fingerprint()

    changes = (0, 1234, 3999, 4000, 4999)
    assert len({*map(fingerprint, changes), fingerprint(0, CharTokenizer("ab"))}) == 6
    monkeypatch.setattr(data.dataset, "SAMPLE", 10)  # of 64 x 10 ids, the ends are among them
    assert len(set(map(fingerprint, changes))) == 5


# Files of ids


def test_ids_are_kept_until_source_tokenizer_or_format_change(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "LARGE", 1)
    (tmp_path / "sub").mkdir()
    file, other = tmp_path / "my.txt", tmp_path / "sub" / "my.txt"

    def load(path, expected, kind="byte"):
        dataset = data.load(str(path), 8, kind)
        assert dataset.tokenizer.decode(ids_of(dataset)) == expected * 50
        return len(list(tmp_path.glob("cache/tokens/my-*")))

    file.write_text("first" * 50)
    assert load(file, "first") == 1
    with monkeypatch.context() as patch:
        patch.setattr(text, "read", None)
        assert load(file, "first") == 1  # from the cache
    assert load(file, "first", "char") == 2
    file.write_text("other" * 50)  # of the same size
    assert load(file, "other") == 3
    other.write_text("third" * 50)
    os.utime(other, ns=(0, file.stat().st_mtime_ns))
    assert load(other, "third") == 4
    monkeypatch.setattr(text, "FORMAT", "new")
    assert load(other, "third") == 5


def test_a_file_is_made_once_and_whole(tmp_path, capsys):
    path, lines, made = tmp_path / "a", [], []

    def write(file, fault=None):
        made.append(file.write(b"content"))
        if fault:
            raise fault

    with pytest.raises(KeyboardInterrupt):
        cache.make_once(path, lambda file: write(file, KeyboardInterrupt))
    assert [p.name for p in tmp_path.iterdir()] == [".a.lock"]
    threads = [threading.Thread(target=cache.make_once, args=(path, write)) for _ in range(3)]
    with FileLock(tmp_path / ".a.lock"):
        for thread in threads:
            thread.start()
        while len(lines) < 3 and all(thread.is_alive() for thread in threads):
            lines += capsys.readouterr().err.splitlines()
    for thread in threads:
        thread.join()
    assert lines == [f"waiting for another process to prepare {path}"] * 3
    assert len(made) == 2
    assert path.read_bytes() == b"content"


def test_files_of_nanogpt(small_gpt2, tmp_path):
    ids = np.random.default_rng(0).integers(260, size=900).astype("u2")
    ids[::50] = 50256
    ids[:800].tofile(tmp_path / "train.bin")
    ids[800:].tofile(tmp_path / "val.bin")
    bins = data.load(".", block_size=8)
    assert (len(bins.train), ids_of(bins)) == (800, ids.tolist())
    assert bins.tokenizer.state() == {"kind": "gpt2"}
    with refused("must be gpt2"):
        data.load(".", 8, ByteTokenizer())
    for content in (b"", b"\xff" * 90, ids.astype("<u4").tobytes()):
        (tmp_path / "train.bin").write_bytes(content)
        with refused("does not hold GPT-2's tokens as 16-bit numbers"):
            data.load(".", block_size=8)
    (tmp_path / "meta.pkl").write_bytes(b"")
    with refused(r"meta\.pkl"):
        data.load(".", block_size=8)


# Parquet files


def documents(n, seed):
    rng = np.random.default_rng(seed)
    words = ["the ", "other ", "thing. ", "naïve ", "\n\n", "<|endoftext|> "]
    return ["".join(rng.choice(words, rng.integers(5, 60))) for _ in range(n)]


def as_parquet(texts, column="text", **options):
    pyarrow, parquet = map(pytest.importorskip, ("pyarrow", "pyarrow.parquet"))
    file = io.BytesIO()
    parquet.write_table(pyarrow.table({column: texts}), file, row_group_size=100, **options)
    return file.getvalue()


def split(texts):
    """Return the documents that are for training, and those that are held out."""
    held_out = [text for text in texts if zlib.crc32(text.encode()) % 100 == 0]
    return [text for text in texts if text not in held_out], held_out


def test_a_folder_of_parquet_files(small_gpt2, tmp_path):
    first, second = documents(700, 0), documents(700, 1)
    (tmp_path / "README.txt").write_text("no text to train on")
    (tmp_path / "train-0.parquet").write_bytes(as_parquet([None, *first]))  # a null is nothing
    (tmp_path / "train-1.parquet").write_bytes(as_parquet([t.encode() for t in second]))
    both = data.load(".", block_size=8)
    assert both.val.tolist() == small_gpt2(split(first)[1]) != []
    assert both.train.tolist() == small_gpt2(split(first + second)[0])
    in_bytes = data.load("train-0.parquet", 8, "byte")
    assert bytes(in_bytes.train.tolist()).decode() == "\n".join([*split(first)[0], ""])
    (tmp_path / "validation.parquet").write_bytes(as_parquet(second[:9]))
    named = data.load(".", block_size=8)
    assert named.val.tolist() == small_gpt2(second[:9])
    assert named.train.tolist() == small_gpt2(first + second)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [(lambda good: good[:-50], "cannot read my.parquet: .*magic"),
     (lambda good: good[:4] + b"\xff" * 100 + good[104:], "cannot read my.parquet: "),
     (lambda good: good.replace("ï".encode(), b"\xff\xff"), "cannot read my.parquet: .*(?i:utf)"),
     (lambda good: as_parquet([[1], [2]]), "cannot read my.parquet: .*cast"),
     (lambda good: as_parquet(["a"], "content"), 'cannot read my.parquet: .*"text"'),
     (lambda good: as_parquet([None] * 300), "too short")],
    ids=["cut short", "a bad page", "no UTF-8", "lists", "no text", "nulls"],
)  # fmt: skip
def test_a_damaged_parquet_file_is_named(small_gpt2, tmp_path, damage, reason):
    (tmp_path / "my.parquet").write_bytes(damage(as_parquet(documents(700, 0), compression="none")))
    with refused(reason):
        data.load("my.parquet", block_size=16)


@shared
def test_real_documents_of_openwebtext(monkeypatch):
    _, parquet = map(pytest.importorskip, ("tiktoken", "pyarrow.parquet"))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
    folder = SHARED / "openwebtext" / "plain_text"
    first, second = (parquet.read_table(f)["text"].to_pylist() for f in sorted(folder.iterdir()))
    web = data.load(str(folder), block_size=128)
    train, val = (web.tokenizer.decode(ids.tolist()) for ids in (web.train, web.val))
    assert train.split("<|endoftext|>") == [*split(first + second)[0], ""]
    assert val.split("<|endoftext|>") == [*split(first)[1], ""]


# A server with faults. /plain/NAME is a file. The hub's addresses answer HEAD as the hub does and
# redirect to /signed/NAME on another host, which can continue a download.

CONTENT = b"To be, or not to be, that is the question:\n" * 7000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        folder, _, path = self.path[1:].partition("/")
        server, content = self.server, self.server.files.get(path.rpartition("/")[2], b"")
        start = int(re.sub(r"\D", "", self.headers.get("Range", "0").partition("-")[0]))
        server.seen.append((folder, start, self.headers.get("Authorization")))
        fault = server.faults[folder].pop(0) if server.faults.get(folder) else "none"
        status, headers, rest = 200, {"Content-Length": len(content) - start}, content[start:]
        if isinstance(fault, int):
            status, headers, rest = fault, server.headers, b""
        elif folder == "datasets":
            location = f"http://localhost:{server.server_port}/signed/{path}"
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            headers = {"Location": location, "X-Repo-Commit": data.REVISION, "X-Linked-ETag": etag}
            status, headers["X-Linked-Size"] = 302, len(content)
        elif start:
            status, headers["Content-Range"] = 206, f"bytes {start}-/{len(content)}"
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET" and status < 300:
            rest = rest[::-1] if fault == "wrong" else rest
            self.wfile.write(rest[: len(rest) // 2] if fault in ("breaks", "stalls") else rest)
        if fault == "stalls":
            self.wfile.flush()
            server.release.wait(30)

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    httpd.url = f"http://127.0.0.1:{httpd.server_port}"
    httpd.files, httpd.headers, httpd.faults, httpd.seen = {"a.bin": CONTENT}, {}, {}, []
    httpd.release = threading.Event()
    threading.Thread(target=httpd.serve_forever, args=(0.05,), daemon=True).start()
    yield httpd
    httpd.release.set()
    httpd.shutdown()
    httpd.server_close()


@pytest.mark.parametrize(
    ("faults", "headers", "pauses", "says"),
    [([], {}, [], None), ([500, 503, 429], {}, [2, 4], None), ([404], {}, [], "404 Client Error"),
     ([429, 429], {"Retry-After": 7}, [7, 7], None), ([429], {"Retry-After": 9999}, [60], None),
     ([500] * 4, {}, [2, 4], "500"), (["stalls"], {}, [], "timed out"),
     (["breaks"], {}, [], "150500 more expected"), (["wrong"], {}, [], "its sha256 is not")],
)  # fmt: skip
def test_fetch(server, monkeypatch, tmp_path, faults, headers, pauses, says):
    slept, url, path = [], f"{server.url}/plain/a.bin", tmp_path / "folder" / "a.bin"
    monkeypatch.setattr("time.sleep", slept.append)
    monkeypatch.setattr(cache, "TIMEOUT", (30.0, 0.3 if "stalls" in faults else 30.0))
    server.faults, server.headers = {"plain": list(faults)}, headers
    if says:
        with refused(f"cannot get {url}: .*{says}"):
            cache.fetch(url, path, SHA256)
    for _ in range(2):  # the second time, it is there
        assert cache.fetch(url, path, SHA256).read_bytes() == CONTENT
    assert len(server.seen) == len(faults) + 1
    assert slept == pauses


@pytest.mark.parametrize(
    ("url", "reason"),
    [("http://127.0.0.1:9/x", "refused"), ("http://nowhere.invalid/x", "not known|resol"),
     ("ftp://a/x", "No connection adapters"), ("http://[::1/x", "not a valid host"),
     ("missing.txt", "No such file"), ("my.txt", "sha256")],
)  # fmt: skip
def test_why_a_file_cannot_be_had(tmp_path, url, reason):
    (tmp_path / "my.txt").write_text("another text")
    with refused(f"cannot get {re.escape(url)}: .*({reason})") as error:
        cache.fetch(url, tmp_path / "x", SHA256, tries=1)
    assert "Error" not in str(error.value)


@pytest.mark.parametrize("fault", ["stalls", "name", 500, None])
def test_pydoc_replaces_tiny_shakespeare_if_nobody_named_it(server, fault, monkeypatch, capsys):
    monkeypatch.setattr(data, "SHA256", SHA256)
    monkeypatch.setattr(data, "PATIENCE", 0.5 if fault in ("stalls", "name") else 60.0)
    monkeypatch.setenv("SHAKESPEARE_URL", f"{server.url}/plain/a.bin")
    server.faults = {"plain": [fault, 404] if fault else []}

    found = []

    def never(*args):
        found.append(server.release.wait(30))
        raise OSError

    if fault == "name":
        monkeypatch.setattr("socket.getaddrinfo", never)
    default = data.load(None, block_size=64)
    assert default.name == ("pydoc" if fault else "shakespeare")
    assert not found  # nobody waited for the name
    assert len(default.train) > 200_000
    out = capsys.readouterr().out
    assert out.count("\n") == out.count("Tiny Shakespeare cannot be downloaded") == bool(fault)
    assert len(server.seen) <= 1  # one attempt
    if fault == 500:
        with refused("404"):
            data.load("shakespeare", block_size=64)


@shared
def test_tiny_shakespeare_from_a_local_copy(tmp_path, monkeypatch):
    (tmp_path / "copy.txt").symlink_to(SHARED / "tinyshakespeare.txt")
    for name, value in (("HOME", tmp_path), ("SHAKESPEARE_URL", "~/copy.txt")):
        monkeypatch.setenv(name, str(value))
    plays = data.load(None, block_size=64)
    assert (len(plays.train), len(plays.val)) == (1_003_854, 111_540)  # as in nanoGPT


def test_the_vocabulary_is_downloaded_to_where_tiktoken_looks(server, monkeypatch, tmp_path):
    url = f"{server.url}/plain/a.bin"
    monkeypatch.setattr(tokenizers, "VOCABULARY", {url: SHA256})
    for folder in ("cache/tiktoken", "theirs", "theirs"):
        tokenizers.fetch_vocabulary()
        assert os.environ["TIKTOKEN_CACHE_DIR"] == folder
        assert (tmp_path / folder / hashlib.sha1(url.encode()).hexdigest()).exists()
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "theirs")
    assert len(server.seen) == 2


# OpenWebText


@pytest.fixture
def hub(server, small_gpt2, monkeypatch):
    """The server as the hub, with two shards, for a huggingface_hub that reads the environment."""
    names = [data.SHARD.format(i).rpartition("/")[2] for i in range(2)]
    server.files = {name: as_parquet(documents(700, seed)) for seed, name in enumerate(names)}
    monkeypatch.setattr("time.sleep", lambda seconds: None)

    def start(**environment):
        """Import the library as a new process with these variables does."""
        for name in [n for n in sys.modules if n.partition(".")[0] == "huggingface_hub"]:
            monkeypatch.delitem(sys.modules, name)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        constants = pytest.importorskip("huggingface_hub.constants")
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)

    server.start = start
    start(HF_ENDPOINT=server.url, HF_HOME="hf", HF_TOKEN="secret")
    return server


@pytest.mark.parametrize(
    ("faults", "says"),
    [({}, None), ({"datasets": [429, 503], "signed": [429]}, None), ({"signed": ["breaks"]}, None),
     ({"signed": ["breaks"] * 5}, None), ({"datasets": [401]}, "401 Unauthorized"),
     ({"datasets": [404]}, "404 Not Found"), ({"datasets": [429] * 9}, "429 Too Many"),
     ({"signed": [403]}, "403 Forbidden")],
)  # fmt: skip
def test_openwebtext_from_a_hub_with_faults(hub, small_gpt2, faults, says):
    hub.faults = {folder: list(codes) for folder, codes in faults.items()}
    if says:
        with refused(f"cannot download openwebtext: .*{says}"):
            data.load("openwebtext", block_size=16)
        hub.faults = {}
    web = data.load("openwebtext", block_size=16)
    assert (web.train.tolist(), web.val.tolist()) == tuple(
        map(small_gpt2, split(documents(700, 0)))
    )
    starts = [start for folder, start, _ in hub.seen if folder == "signed"]
    if n := faults.get("signed", []).count("breaks"):  # it goes on about where it ended
        ends = [len(next(iter(hub.files.values()))) * (1 - 0.5**i) for i in range(n + 1)]
        assert starts == pytest.approx(ends, abs=1000 * n)
    sent = {folder: token for folder, _, token in hub.seen}
    assert (sent["datasets"], sent["signed"]) == ("Bearer secret", None)  # for the hub alone


def test_the_shards_of_openwebtext(hub):
    two = data.load("openwebtext", block_size=16, n_shards=2)
    asked = len(hub.seen)
    one = data.load("openwebtext", block_size=16)  # has the same validation, and no new download
    assert len(hub.seen) == asked
    assert np.array_equal(one.val, two.val)
    assert np.array_equal(one.train, two.train[: len(one.train)])
    for n in (0, 81):
        with refused("1 to 80 shards"):
            data.load("openwebtext", 16, None, n)
    hub.files = dict.fromkeys(hub.files, as_parquet(documents(700, 2)))
    hub.start(HF_HOME="other")
    other = data.load("openwebtext", block_size=16)  # the same shard of another hub
    assert other.fingerprint() != one.fingerprint()
    hub.start(HF_HUB_OFFLINE="1")
    assert data.load("openwebtext", block_size=16).fingerprint() == other.fingerprint()
    with refused("HF_HUB_OFFLINE"):
        data.load("openwebtext", block_size=16, n_shards=2)


@pytest.mark.parametrize("package", ["huggingface_hub", "pyarrow", "tiktoken"])
def test_a_missing_package_is_named(hub, monkeypatch, package):
    for name in (package, f"{package}.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    with refused(f"needs {package}: pip install {package}"):
        data.load("openwebtext", block_size=16)
