"""The data: tokenizers, texts, files of ids, and downloads from servers with faults."""

import hashlib
import http.server
import os
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

import data
from data import cache, text
from data.tokenizer import ByteTokenizer, CharTokenizer, from_state
from lib.files import UserError

CONTENT = b"To be, or not to be, that is the question:\n" * 7000


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("HF_", "SHAKESPEARE_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")


@pytest.fixture
def small_gpt2(monkeypatch):
    """GPT-2's tokenizer with a vocabulary of bytes and a few merges, which needs no download."""
    tiktoken = pytest.importorskip("tiktoken")
    words = [bytes([b]) for b in range(256)] + [b"th", b"the", b" the", b"er", b"\n\n"]
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    ranks, end = {word: i for i, word in enumerate(words)}, {"<|endoftext|>": 50256}
    encoding = tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens=end)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    return lambda texts: [t for s in texts for t in (*encoding.encode_ordinary(s), 50256)]


def refuse(reason, *args):
    with pytest.raises(UserError, match=reason):
        data.load(*args)


def ids_of(dataset):
    return [*dataset.train.tolist(), *dataset.val.tolist()]


def test_own_text_is_characters_or_bytes(monkeypatch):
    file, few, many = Path("my.txt"), "naïve 𝄞\r\n" * 30, "".join(map(chr, range(40, 400)))
    choices = (many, None, "byte"), (many, "char", "char"), (few, None, "char")
    for content, choice, kind in choices:
        file.write_bytes(content.encode())
        own = data.load("my.txt", 26, choice)
        assert own.tokenizer.state()["kind"] == kind
        assert from_state(own.tokenizer.state()).decode(ids_of(own)) == content
    refuse("its val split has 27 tokens, and a block_size of 27 needs at least 28", "my.txt", 27)
    monkeypatch.setattr(text, "LARGE", 100)
    assert isinstance(data.load("my.txt", 8).train.base.base, np.memmap)
    assert ByteTokenizer().decode([0xC3]) == "\ufffd"
    file.write_text("even a van\n" * 30)
    assert own.tokenizer.decode(ids_of(data.load("my.txt", 8, own.tokenizer))) == file.read_text()
    file.write_text("an evil van\n" * 30)
    refuse("the character 'i' is not among the 9 characters", "my.txt", 8, own.tokenizer)


def test_the_fingerprint_covers_both_splits_and_the_tokenizer(monkeypatch):
    monkeypatch.setattr(data.dataset, "SAMPLE", 2)
    a, b, byte = np.arange(9), np.append(np.arange(8), 0), ByteTokenizer()
    sets = [(a, a, byte), (a, b, byte), (b, a, byte), (a, a, CharTokenizer("ab"))]
    assert len({data.Dataset("a", *parts).fingerprint() for parts in sets}) == 4


@pytest.mark.parametrize(
    ("train", "val", "unused"),
    [("1 2 testament", "", ""), ("my-training train.x-1", "Valid_2 eval", "input"),
     ("a", "dev", "ptb.test")],
)  # fmt: skip
def test_the_names_of_a_folder_tell_the_splits(capsys, train, val, unused):
    for name in f"{train} {val} {unused} ._1".split():  # the last as macOS adds them
        Path(f"{name}.TXT").write_text("\ufeff" + name)  # a byte-order mark is no text
    folder = data.load(".", -1, "byte")
    assert bytes(ids_of(folder)).decode() == (train + val).replace(" ", "")
    assert not val or len(folder.val) == len(val.replace(" ", ""))
    assert capsys.readouterr().err == (f"not used from .: {unused}.TXT\n" if unused else "")


def test_what_is_no_text_is_named(monkeypatch):
    monkeypatch.setattr(text, "LARGE", 1)
    for content, reason in (
        (b"", "empty"), (b"abc\xff" * 99, "0xff"), (b"\x1f\x8b\x08\0" * 99, "compressed; unpack"),
        (("abc" * 99).encode("utf-16-le"), "it is UTF-16"), (b"abc" * 3, "too short"),
    ):  # fmt: skip
        Path("my.txt").write_bytes(content)
        for _ in range(2):  # nothing half made is left in the cache
            refuse(reason, "my.txt", 16)
    Path("train.bin").touch()
    os.mkfifo("pipe")
    monkeypatch.setenv("DENSEFORMER_CACHE", "/dev/null/x")
    for name, reason in (
        ("", "no file or folder ''"), ("shakspeare", "data sets are shakespeare, pydoc and"),
        ("cache", "cache has no"), ("pipe", "a pipe"), ("train.bin", r"folder with train\.bin"),
        ("my.txt", "cannot write /dev/null/x/tokens.*Not a directory; DENSEFORMER_CACHE can"),
    ):  # fmt: skip
        refuse(reason, name, 16)


def test_ids_are_kept_until_source_tokenizer_or_format_change(monkeypatch):
    monkeypatch.setattr(text, "LARGE", 1)
    for name, content, mtime, kind in (
        ("1/my.txt", "first", 1, "byte"), ("1/my.txt", "first", 1, "char"),
        ("1/my.txt", "other", 2, "byte"), ("2/my.txt", "third", 2, "byte"),
    ):  # fmt: skip
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(content * 50)
        os.utime(name, ns=(0, mtime))
        kept = data.load(name, 8, kind)
        assert kept.tokenizer.decode(ids_of(kept)) == content * 50
    monkeypatch.setattr(text, "read", None)
    assert ids_of(data.load(name, 8, kind)) == ids_of(kept)
    monkeypatch.setattr(text, "FORMAT", "new")
    with pytest.raises(TypeError):
        data.load(name, 8, kind)


def test_one_process_makes_a_file_and_the_others_wait(tmp_path, monkeypatch):
    path, lock, said = tmp_path / "a", FileLock(tmp_path / ".a.lock"), []

    def say(words, file):
        said.append(words)
        path.touch()  # by the process that has the lock
        lock.release()

    monkeypatch.setattr(cache, "say", say)
    lock.acquire()
    cache.make_once(path, said.append)
    assert said == [f"waiting for another process to prepare {path}"]


def test_files_of_nanogpt(small_gpt2):
    ids = np.random.default_rng(0).integers(260, size=900).astype("u2")
    ids[:800].tofile("train.bin")
    ids[800:].tofile("val.bin")
    bins = data.load(".", 8)
    assert (len(bins.train), ids_of(bins)) == (800, ids.tolist())
    refuse("must be gpt2", ".", 8, "byte")
    for content in (b"", b"\xff" * 90, ids.astype("<u4").tobytes()):
        Path("train.bin").write_bytes(content)
        refuse("does not hold GPT-2's tokens as 16-bit numbers", ".", 8)
    Path("meta.pkl").touch()
    refuse(r"meta\.pkl", ".", 8)


def test_text_cut_in_pieces_has_the_tokens_of_the_whole(small_gpt2, monkeypatch):
    monkeypatch.setattr(text, "CHUNK", 64)
    words = ["the", " other", "\n", " ", "  ", "\n\n", "'s", "don't", "12", "naïve", "漢字"]
    sample = "".join(np.random.default_rng(0).choice([*words, ".", "\t", "\r\n"], 3000))
    Path("1.txt").write_bytes(sample.encode())
    Path("2.txt").write_bytes(b"the end")
    assert ids_of(data.load(".", 8, "gpt2")) == small_gpt2([sample, "the end"])


def documents(seed):
    """Return 700 documents, those of them for training, and those that are held out."""
    rng = np.random.default_rng(seed)
    words = ["the ", "other ", "thing. ", "naïve ", "\n\n", "<|endoftext|> "]
    texts = ["".join(rng.choice(words, rng.integers(5, 60))) for _ in range(700)]
    held_out = [text for text in texts if zlib.crc32(text.encode()) % 100 == 0]
    return texts, [text for text in texts if text not in held_out], held_out


def write_parquet(path, texts, column="text"):
    pyarrow, parquet = map(pytest.importorskip, ("pyarrow", "pyarrow.parquet"))
    parquet.write_table(pyarrow.table({column: texts}), path, row_group_size=100)


def test_a_folder_of_parquet_files(small_gpt2):
    (first, train, val), (second, more, _) = documents(0), documents(1)
    Path("README.txt").write_text("no text to train on")
    write_parquet("train-0.parquet", [None, *first])  # a null is no document
    write_parquet("train-1.parquet", [text.encode() for text in second])
    both = data.load(".", 8)
    assert both.val.tolist() == small_gpt2(val) != []
    assert both.train.tolist() == small_gpt2(train + more)
    in_bytes = data.load("train-0.parquet", 8, "byte")
    assert bytes(in_bytes.train.tolist()).decode() == "\n".join([*train, ""])
    write_parquet("validation.parquet", second[:9])
    assert ids_of(data.load(".", 8)) == small_gpt2(first + second + second[:9])


def test_a_damaged_parquet_file_is_named(small_gpt2):
    for column, texts, reason in (("text", [[1], [2]], "cast"), ("content", ["a"], '"text"')):
        write_parquet("my.parquet", texts, column)
        refuse(f"cannot read my.parquet: .*{reason}", "my.parquet", 16)
    os.truncate("my.parquet", 100)
    refuse("cannot read my.parquet: .*magic", "my.parquet", 16)


class Handler(http.server.BaseHTTPRequestHandler):
    """Serve files at /plain/, and as the hub does: answer HEAD and redirect to another host."""

    def do_GET(self):
        server, folder, name = self.server, self.path.split("/")[1], Path(self.path).name
        content = Path(name).read_bytes()
        server.seen.append((folder, self.headers.get("Authorization")))
        fault = next(server.faults.get(folder, iter(())), None)
        status, headers = 200, {"Content-Length": len(content)}
        if isinstance(fault, int):
            status, headers = fault, {"Retry-After": 9999} if fault == 503 else {}
        elif data.REVISION in self.path:  # one of the hub's addresses
            location = f"http://localhost:{server.server_port}/signed/{name}"
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            headers = {"Location": location, "X-Repo-Commit": data.REVISION, "X-Linked-ETag": etag}
            status, headers["X-Linked-Size"] = 302, len(content)
        self.send_response(status)
        for header in headers.items():
            self.send_header(*header)
        self.end_headers()
        if self.command == "GET" and status < 300:
            self.wfile.write(content[: len(content) // 2 if fault else None])
        if fault == "stalls":
            server.release.wait(30)

    do_HEAD = do_GET


@pytest.fixture
def server(monkeypatch):
    Path("a.bin").write_bytes(CONTENT)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        httpd.url = f"http://127.0.0.1:{httpd.server_port}/plain/a.bin"
        httpd.faults, httpd.seen, httpd.release = {}, [], threading.Event()
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        monkeypatch.setattr(data, "SHA256", hashlib.sha256(CONTENT).hexdigest())
        threading.Thread(target=httpd.serve_forever, args=(0.05,), daemon=True).start()
        yield httpd
        httpd.release.set()
        httpd.shutdown()


FAULTS = {500: "500 Server", 404: "404 Client", "stalls": "timed out", "breaks": "150500 more"}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_download_that_fails_leaves_nothing(server, monkeypatch, fault):
    monkeypatch.setenv("SHAKESPEARE_URL", server.url)
    monkeypatch.setattr(cache, "TIMEOUT", (30.0, 0.3 if fault == "stalls" else 30.0))
    server.faults = {"plain": iter([fault])}
    refuse(f"cannot get {server.url}: .*{FAULTS[fault]}", "shakespeare", 64)
    assert [bytes(ids_of(data.load("shakespeare", 64, "byte"))) for _ in (1, 2)] == [CONTENT] * 2
    assert len(server.seen) == 2  # the second time, it is there


def test_a_vocabulary_that_tiktoken_cannot_download(monkeypatch):
    pytest.importorskip("tiktoken")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    Path("my.txt").write_text("to be " * 99)
    refuse("cannot get GPT-2's vocabulary: .*refused", "my.txt", 8, "gpt2")
    assert os.environ["TIKTOKEN_CACHE_DIR"] == str(cache.cache_dir() / "tiktoken")


def test_pydoc_replaces_tiny_shakespeare_if_nobody_named_it(server, monkeypatch, capsys):
    monkeypatch.setattr(data, "PATIENCE", 60.0)
    for url, reason in (
        ("http://127.0.0.1:9/x", "refused"), ("http://nowhere.invalid/x", "not known|resol"),
        ("missing.txt", "No such file"), (__file__, "sha256"), (server.url, "404"),
    ):  # fmt: skip
        monkeypatch.setenv("SHAKESPEARE_URL", url)
        server.faults = {"plain": iter([404, 500])}
        refuse(f"cannot get [^ ]*: [^(]*({reason})", "shakespeare", 64)
        assert data.load(None, 64).name == "pydoc"
        out = capsys.readouterr().out
        assert out.count("\n") == out.count("Tiny Shakespeare cannot be downloaded") == 1
    assert len(server.seen) == 2  # without a name, there is one attempt
    assert data.load(None, 64).name == "shakespeare"
    (cache.cache_dir() / data.SHAKESPEARE).unlink()
    ends = []  # of the lookup of the host's name
    monkeypatch.setattr(data, "PATIENCE", 0.1)
    monkeypatch.setattr("socket.getaddrinfo", lambda *_: ends.append(server.release.wait(30)) or [])
    assert data.load(None, 64).name == "pydoc"
    assert not ends


def test_openwebtext_from_a_hub_with_faults(server, small_gpt2, monkeypatch):
    (first, train, val), (second, more, _) = documents(0), documents(1)
    write_parquet(Path(data.SHARD.format(0)).name, first)
    write_parquet(Path(data.SHARD.format(1)).name, second)
    endpoint = f"http://127.0.0.1:{server.server_port}"
    for name, value in (("ENDPOINT", endpoint), ("HOME", "hf"), ("TOKEN", "secret")):
        monkeypatch.setenv(f"HF_{name}", value)
    for name in [name for name in sys.modules if name.startswith("huggingface_hub")]:
        monkeypatch.delitem(sys.modules, name)  # it reads the environment when it is imported
    constants = pytest.importorskip("huggingface_hub.constants")
    for folder, status in (("datasets", 401), ("datasets", 429), ("signed", 403)):
        server.faults = {folder: iter([status] * 9)}
        refuse(f"cannot download openwebtext: .*{status} ", "openwebtext", 16)
    server.faults = {"datasets": iter([429, 503]), "signed": iter([429, "breaks"])}
    two = data.load("openwebtext", 16, None, 2)
    assert set(server.seen) == {("datasets", "Bearer secret"), ("signed", None)}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    one = data.load("openwebtext", 16)
    assert two.train.tolist() == small_gpt2(train + more)
    assert one.train.tolist() == small_gpt2(train)
    assert one.val.tolist() == two.val.tolist() == small_gpt2(val)
    refuse("HF_HUB_OFFLINE", "openwebtext", 16, None, 3)
    refuse("1 to 80 shards", "openwebtext", 16, None, 0)
    for module, choice in (("pyarrow.parquet", "byte"), ("tiktoken", ""), ("huggingface_hub", "")):
        monkeypatch.setitem(sys.modules, module, None)
        refuse(f"needs {module.partition('.')[0]}: pip install", "openwebtext", 16, choice or None)
