"""The data: tokenizers, texts, files of ids, and downloads from servers with faults."""

import hashlib
import http.server
import os
import sys
import threading
import zlib
from pathlib import Path
from unittest.mock import create_autospec

import numpy as np
import pytest
from filelock import FileLock

import data
from data import cache, text
from data.tokenizer import ByteTokenizer, CharTokenizer, fetch_vocabulary, from_state
from lib.files import UserError

CONTENT = b"To be, or not to be, that is the question:\n" * 7000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith("SHAKESPEARE_") or name.lower().endswith("_proxy"):
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
    monkeypatch.setattr("data.tokenizer.fetch_vocabulary", lambda: None)
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
    [("1 2 testament", "", ""), ("train.x-1", "Valid_2", "input"), ("a", "dev", "ptb.test")],
)
def test_the_names_of_a_folder_tell_the_splits(capsys, train, val, unused):
    for name in f"{train} {val} {unused}".split():
        Path(f"{name}.TXT").write_text("\ufeff" + name)  # a byte-order mark is no text
    folder = data.load(".", -1, "byte")
    assert bytes(ids_of(folder)).decode() == train.replace(" ", "") + val
    assert not val or len(folder.val) == len(val)
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
    encode, decode = bins.tokenizer.encode, bins.tokenizer.decode
    assert decode(encode("<|endoftext|>\ud800").tolist()) == "<|endoftext|>?"
    assert decode([50_300]) == ""
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


def test_parquet_files_in_a_folder_or_on_the_hub(small_gpt2, monkeypatch):
    (first, train, val), (second, more, _) = documents(0), documents(1)
    Path("plain_text").mkdir()
    Path("plain_text/README.txt").write_text("no text to train on")
    write_parquet(data.SHARD.format(0), [None, *first])  # a null is no document
    write_parquet(data.SHARD.format(1), [text.encode() for text in second])

    def download(repo, name, repo_type, revision):
        try:
            return Path(name).resolve(strict=True)
        except OSError as error:
            raise ValueError("not in the cache, and no connection") from error

    hub = pytest.importorskip("huggingface_hub")
    real = create_autospec(hub.hf_hub_download, side_effect=download)
    monkeypatch.setattr(hub, "hf_hub_download", real)
    for both in (data.load("plain_text", 8), data.load("openwebtext", 8, None, 2)):
        assert both.val.tolist() == small_gpt2(val) != []
        assert both.train.tolist() == small_gpt2(train + more)
    in_bytes = data.load("openwebtext", 8, "byte")
    assert bytes(in_bytes.train.tolist()).decode() == "\n".join([*train, ""])
    write_parquet("plain_text/validation.parquet", second[:9])
    assert ids_of(data.load("plain_text", 8)) == small_gpt2(first + second + second[:9])
    for column, texts, reason in (("text", [[1], [2]], "cast"), ("content", ["a"], '"text"')):
        write_parquet("my.parquet", texts, column)
        refuse(f"cannot read my.parquet: .*{reason}", "my.parquet", 16)
    os.truncate("my.parquet", 100)
    refuse("cannot read my.parquet: .*magic", "my.parquet", 16)
    refuse("cannot download openwebtext: No such file", "openwebtext", 16, None, 3)
    refuse("1 to 80 shards", "openwebtext", 16, None, 0)
    for module, choice in (("pyarrow.parquet", "byte"), ("tiktoken", ""), ("huggingface_hub", "")):
        monkeypatch.setitem(sys.modules, module, None)
        refuse(f"needs {module.partition('.')[0]}: pip install", "openwebtext", 16, choice or None)


class Handler(http.server.BaseHTTPRequestHandler):
    """Answer with CONTENT, or with the next of the server's faults."""

    def do_GET(self):
        self.server.requests += 1
        fault = next(self.server.faults, 200)
        status = fault if isinstance(fault, int) else 200
        self.send_response(status)
        self.send_header("Content-Length", len(CONTENT))
        if status == 503:
            self.send_header("Retry-After", 9999)
        self.end_headers()
        self.wfile.write(CONTENT if status == fault else CONTENT[:150_000])
        if fault == "stalls":
            self.server.release.wait(30)


@pytest.fixture
def server(monkeypatch):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        httpd.url = f"http://127.0.0.1:{httpd.server_port}/a.bin"
        httpd.faults, httpd.pauses, httpd.requests = iter(()), [], 0
        httpd.release = threading.Event()
        monkeypatch.setattr("time.sleep", httpd.pauses.append)
        threading.Thread(target=httpd.serve_forever, args=(0.05,), daemon=True).start()
        yield httpd
        httpd.release.set()
        httpd.shutdown()


@pytest.mark.parametrize(
    ("faults", "pauses", "says"),
    [([500, 429, 503], [2, 60], None), ([500] * 4, [2, 4], "500"), ([404], [], "404 Client Error"),
     (["stalls"], [], "timed out"), (["breaks"], [], "151000 more expected")],
)  # fmt: skip
def test_the_vocabulary_is_fetched(server, monkeypatch, faults, pauses, says):
    monkeypatch.setattr("data.tokenizer.VOCABULARY", {server.url: SHA256})
    monkeypatch.setattr(cache, "TIMEOUT", (30.0, 0.3 if "stalls" in faults else 30.0))
    server.faults = iter(faults)
    if says:
        with pytest.raises(UserError, match=f"cannot get {server.url}: .*{says}"):
            fetch_vocabulary()
    for _ in range(2):  # the second time, it is there
        fetch_vocabulary()
    name = hashlib.sha1(server.url.encode()).hexdigest()  # where tiktoken looks for it
    assert Path(os.environ["TIKTOKEN_CACHE_DIR"], name).read_bytes() == CONTENT
    assert server.requests == len(faults) + 1
    assert server.pauses == pauses


def test_pydoc_replaces_tiny_shakespeare_if_nobody_named_it(server, monkeypatch, capsys):
    monkeypatch.setattr(data, "SHA256", SHA256)
    monkeypatch.setattr(data, "PATIENCE", 60.0)
    for url, reason in (
        ("http://127.0.0.1:9/x", "refused"), ("http://nowhere.invalid/x", "not known|resol"),
        ("missing.txt", "No such file"), (__file__, "sha256"), (server.url, "404"),
    ):  # fmt: skip
        monkeypatch.setenv("SHAKESPEARE_URL", url)
        server.faults = iter([404, 500])
        refuse(f"cannot get [^ ]*: [^(]*({reason})", "shakespeare", 64)
        assert data.load(None, 64).name == "pydoc"
        out = capsys.readouterr().out
        assert out.count("\n") == out.count("Tiny Shakespeare cannot be downloaded") == 1
    assert server.requests == 2  # without a name, there is one attempt
    assert data.load(None, 64).name == "shakespeare"
    (cache.cache_dir() / data.SHAKESPEARE).unlink()
    ends = []  # of the lookup of the host's name
    monkeypatch.setattr(data, "PATIENCE", 0.1)
    monkeypatch.setattr("socket.getaddrinfo", lambda *_: ends.append(server.release.wait(30)) or [])
    assert data.load(None, 64).name == "pydoc"
    assert not ends
