"""Trust: the scripts are broken on purpose, and nothing may be lost or silently wrong.

pytest tests/test_faults.py              some of each fault, in seconds
pytest tests/test_faults.py -m ""        all of them; at the end a table says how many
"""

import itertools
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

import analyze
import bench
import common
import sample
import train
from data import shards
from data.tokenizer import ByteTokenizer, DataError
from tests.helpers import HERE, SMALL, flags, script, survived, weights, write_text

SCRIPTS = {"train": train, "sample": sample, "analyze": analyze, "bench": bench}
slow = pytest.mark.slow


@pytest.fixture
def ends(monkeypatch, capsys):
    """A script with these arguments, in this process: its exit status and its last words."""

    def run(name, *args):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            common.start(SCRIPTS[name].main)
        error = capsys.readouterr().err
        if isinstance(stop.value.code, str):  # as Python does at the end
            return 1, stop.value.code + "\n"
        return stop.value.code or 0, error

    return run


@pytest.fixture
def run(text, tmp_path):
    """A short finished run."""
    out = tmp_path / "run"
    shape = {"max_iters": 4, "eval_interval": 2, "n_embd": 8, "n_layer": 2}
    assert train.main(flags(**SMALL | shape, dataset=text, out_dir=out)) == 0
    return out


def is_sentence(words):
    """One line that is not a traceback, a repr, or empty."""
    return words.count("\n") == 1 and "Traceback" not in words and len(words) > 20


# -----------------------------------------------------------------------------
# Killed, stopped


class Begun:
    """train.py as a process that goes on by itself."""

    def __init__(self, log, *args):
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "train.py"), *args], stdout=file, stderr=file,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip

    def wait_for(self, sign):
        """Until sign() is true, or the process has ended."""
        while not sign() and self.process.poll() is None:
            time.sleep(0.001)

    def end(self, number=None):
        """Its exit status, after that signal if any, and all that it said."""
        if number is not None:
            self.process.send_signal(number)
        status, words = self.process.wait(300), self.log.read_text()
        assert "Traceback" not in words, words
        return status, words


# Half of the time of such a run goes into checkpoints.
SAVING = SMALL | {"max_iters": 400, "eval_interval": 2, "eval_iters": 1, "log_interval": 1}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The flags of a run, and the weights that it ends with."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    same = flags(**SAVING, dataset=write_text(folder / "my.txt"))
    status, words = Begun(folder / "log", *same, f"--out_dir={folder}/out").end()
    assert status == 0, words
    return same, weights(folder / "out")


def go_on(out, log, same):
    """A process that resumes the run in `out`, or begins it."""
    rest = ["--resume"] if (out / "last.pt").exists() else same
    return Begun(log, *rest, f"--out_dir={out}")


def stopped(out, log, same, rng, number, often):
    """Status and words of a process that gets the signal at a random moment, `often` of the times
    while it trains and saves, otherwise from its start on."""
    if (out / "last.pt").exists() and common.load_checkpoint(out / "last.pt")["step"] > 300:
        shutil.rmtree(out)  # begin once more
    run = go_on(out, log, same)
    if rng.random() < often:
        run.wait_for(lambda: "validation" in log.read_text())
        time.sleep(rng.random() * 0.3)
    else:
        time.sleep(rng.random() * 3)
    return run.end(number)


@pytest.mark.parametrize("kills", [2, pytest.param(50, marks=slow)])
def test_kill_at_random_moments(uninterrupted, tmp_path, kills):
    same, whole = uninterrupted
    out, log, rng = tmp_path / "out", tmp_path / "log", random.Random(kills)
    for _ in range(kills):
        status, words = stopped(out, log, same, rng, signal.SIGKILL, often=0.8)
        assert status == -signal.SIGKILL or "what it writes now" in words, words
        if (out / "last.pt").exists():
            common.load_checkpoint(out / "last.pt")  # whole
        survived("kill -9, then --resume")
    status, words = go_on(out, log, same).end()
    assert status == 0, words
    assert all(torch.equal(tensor, weights(out)[name]) for name, tensor in whole.items())


@pytest.mark.parametrize("stops", [2, pytest.param(50, marks=slow)])
def test_signals_at_random_moments(uninterrupted, tmp_path, stops):
    same, whole = uninterrupted
    out, log, rng = tmp_path / "out", tmp_path / "log", random.Random(stops)
    for n in range(stops):
        number = (signal.SIGINT, signal.SIGTERM)[n % 2]
        status, words = stopped(out, log, same, rng, number, often=0.7)
        if "seconds; validation loss" in words:  # it was ready, and drew its picture
            assert status in (0, -number), words
            assert common.load_checkpoint(out / "last.pt")["step"] == SAVING["max_iters"]
        elif "validation" in words:
            assert status == 128 + number, words
            assert f"to go on: python train.py --resume --out_dir {out}" in words
        else:  # there is nothing to save yet: it ends at once
            assert status in (-number, 128 + number), words
        survived("Ctrl-C or SIGTERM, then --resume")
    assert go_on(out, log, same).end()[0] == 0
    assert all(torch.equal(tensor, weights(out)[name]) for name, tensor in whole.items())


def test_a_folder_is_for_one_run_at_a_time(text, tmp_path, ends):
    same = flags(**SAVING | {"max_iters": 10**6}, dataset=text, out_dir=tmp_path / "out")
    first = Begun(tmp_path / "log", *same)
    first.wait_for((tmp_path / "out" / "last.pt").exists)
    for again in (["--resume"], [*same, "--overwrite"]):
        status, words = ends("train", *again, f"--out_dir={tmp_path}/out")
        assert status == 1
        assert "another run" in words
        assert is_sentence(words)
        survived("a second run into one folder")
    first.end(signal.SIGKILL)
    # It is free again, whatever its end was.
    step = common.load_checkpoint(tmp_path / "out" / "last.pt")["step"]
    assert train.main(["--resume", f"--out_dir={tmp_path}/out", f"--max_iters={step + 1}"]) == 0


# -----------------------------------------------------------------------------
# A full disk


@pytest.fixture
def limit():
    """limit(n): from now on no file of this process grows beyond n bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda n: resource.setrlimit(resource.RLIMIT_FSIZE, (n, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_checkpoint_that_does_not_fit_keeps_the_one_before(run, limit, ends, share):
    before = (run / "last.pt").read_bytes()
    (run / "log.jsonl").write_text("")  # it would not fit either
    limit(int(share * len(before)))
    status, words = ends("train", "--resume", f"--out_dir={run}", "--max_iters=6")
    limit(resource.RLIM_INFINITY)
    assert status == 1
    assert is_sentence(words)
    assert (run / "last.pt").read_bytes() == before
    assert not list(run.glob(".*.part"))
    survived("disk full")
    assert ends("train", "--resume", f"--out_dir={run}", "--max_iters=6")[0] == 0


@pytest.mark.parametrize("room", [0, 30, 5000, 19_999])
def test_a_shard_that_does_not_fit_is_not_there(tmp_path, limit, room):
    limit(room)
    with pytest.raises(OSError), shards.Writer(tmp_path / "a.bin", 2) as writer:  # noqa: PT011, PT012
        for _ in range(100):
            writer.write(np.zeros(100, np.uint16))
    limit(resource.RLIM_INFINITY)
    assert not list(tmp_path.glob("*.bin*"))
    assert not list(tmp_path.glob(".*"))
    survived("disk full")


@slow
def test_a_full_file_system(text, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(small)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        same = flags(**SMALL | {"n_embd": 64, "max_iters": 20}, dataset=text)
        done = script("train.py", *same, f"--out_dir={small}/out")
        assert done.returncode == 1
        assert is_sentence(done.stderr[done.stderr.index("train.py:") :])
        files = {path.name for path in (small / "out").iterdir()}
        assert not any(name.endswith(".part") for name in files), files
        for name in files & {"best.pt", "last.pt"}:
            common.load_checkpoint(small / "out" / name)
        survived("disk full")
    finally:
        subprocess.run(["umount", str(small)], check=True)


# -----------------------------------------------------------------------------
# Damaged and foreign files


def same_content(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_content(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(itertools.starmap(same_content, zip(a, b, strict=True)))
    return a == b


@pytest.mark.parametrize("flips", [50, pytest.param(1000, marks=slow)])
def test_a_damaged_checkpoint_is_refused_or_whole(run, flips):
    path, rng = run / "best.pt", random.Random(0)
    whole, content = path.read_bytes(), common.load_checkpoint(path)
    damaged = [whole[: len(whole) * n // 20] for n in range(20)]
    for _ in range(flips):
        place = rng.randrange(len(whole))
        flipped = bytes([whole[place] ^ rng.randrange(1, 256)])
        damaged.append(whole[:place] + flipped + whole[place + 1 :])
    refused = 0
    for bytes_ in damaged:
        path.write_bytes(bytes_)
        try:  # a flip may be where it means nothing, as in a date of the archive
            assert same_content(common.load_checkpoint(path), content)
        except common.CheckpointError:
            refused += 1
        survived("checkpoint cut short or with a flipped byte")
    assert refused > 0.5 * len(damaged)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def foreign_files(run, boom):
    """{what it is: how to write it} for files that are no checkpoint of ours."""
    good = torch.load(run / "last.pt", weights_only=True)

    def changed(**keys):
        return lambda path: torch.save({**good, **keys}, path)

    def without(key):
        return lambda path: torch.save({k: v for k, v in good.items() if k != key}, path)

    return {
        "text": lambda path: path.write_text("hello"),
        "empty": lambda path: path.write_bytes(b""),
        "zeros": lambda path: path.write_bytes(bytes(10_000)),
        "a pickle": lambda path: path.write_bytes(pickle.dumps({"format": common.FORMAT})),
        "a pickle with code": lambda path: path.write_bytes(pickle.dumps(Bomb(boom))),
        "torch's old format, with code": lambda path: torch.save(
            Bomb(boom), path, _use_new_zipfile_serialization=False
        ),
        "an archive with code": lambda path: torch.save({**good, "model": Bomb(boom)}, path),
        "another program's": lambda path: torch.save({"model": {}, "iter_num": 3}, path),
        "an older format": changed(format="denseformer-1"),
        "a list": lambda path: torch.save([1, 2, 3], path),
        "a tensor": lambda path: torch.save(torch.zeros(3), path),
        "no weights": without("model"),
        "no settings": without("model_config"),
        "no tokenizer": without("tokenizer"),
        "weights of another shape": changed(
            model={k: torch.zeros(1) for k in good["model"]},
        ),
        "a weight too many": changed(model={**good["model"], "more": torch.zeros(1)}),
        "unknown settings": changed(model_config={**good["model_config"], "n_loop": 3}),
        "senseless settings": changed(model_config={**good["model_config"], "n_head": 3}),
        "settings of another type": changed(model_config={**good["model_config"], "n_layer": "2"}),
        "a list for settings": changed(model_config=[1]),
        "an unknown tokenizer": changed(tokenizer={"kind": "new"}),
        "a list for a tokenizer": changed(tokenizer=[]),
    }


def test_foreign_checkpoints_are_a_sentence_and_run_nothing(run, text, tmp_path, ends):
    boom, last, new = str(tmp_path / "boom"), run / "last.pt", tmp_path / "new"
    calls = {
        "sample": ("sample", "--checkpoint=last", f"--out_dir={run}"),
        "analyze": ("analyze", "--checkpoint=last", f"--out_dir={run}"),
        "resume": ("train", "--resume", f"--out_dir={run}", "--max_iters=5"),
        "init_from": ("train", f"--init_from={last}", f"--out_dir={new}", f"--dataset={text}"),
    }
    for what, write in foreign_files(run, boom).items():
        for how, call in calls.items():
            if how == "resume" and ("settings" in what or "tokenizer" in what):
                continue  # a resumed run makes these anew, of its flags and its data
            last.unlink(missing_ok=True)
            write(last)
            status, words = ends(*call)
            assert status == 1, (what, how, words)
            assert is_sentence(words), (what, how, words)
            assert "last.pt" in words or "unknown kind" in words, (what, how, words)
            assert not (new / "last.pt").exists()
            survived("foreign checkpoint")
    assert not Path(boom).exists()


def test_what_a_resumed_run_lacks_is_a_sentence(run, ends):
    good = torch.load(run / "last.pt", weights_only=True)
    changes = [
        {"optimizers": []}, {"optimizers": [{}, {}]}, {"optimizers": 3}, {"scaler": None},
        {"step": "three"}, {"train_config": {"n_loop": 3}}, {"train_config": 3}, {"best": None},
    ]  # fmt: skip
    for change in [*changes, *({name: ...} for name in good if name != "format")]:
        content = {k: v for k, v in {**good, **change}.items() if v is not ...}
        torch.save(content, run / "last.pt")
        status, words = ends("train", "--resume", f"--out_dir={run}", "--max_iters=6")
        if status == 0:
            assert {*change} <= {"tokenizer", "model_config", "scaler"}, change
            continue
        assert status == 1, (change, words)
        assert is_sentence(words), (change, words)
        survived("foreign checkpoint")


def test_a_damaged_shard_is_refused_or_whole(tmp_path):
    path, ids = tmp_path / "a.bin", np.arange(100, dtype=np.uint16)
    with shards.Writer(path, 2) as writer:
        writer.write(ids)
    whole, rng = path.read_bytes(), random.Random(0)
    header = shards.HEADER.size
    damaged = [whole[: len(whole) * n // 20] for n in range(20)] + [whole + b"1"]
    for place in range(header):
        for _ in range(5):
            flip = bytes([whole[place] ^ rng.randrange(1, 256)])
            damaged.append(whole[:place] + flip + whole[place + 1 :])
    for bytes_ in damaged:
        path.write_bytes(bytes_)
        with pytest.raises(DataError) as refused:
            shards.read(path)
        assert is_sentence(f"{refused.value}\n")
        survived("token file cut short or with a damaged header")


def test_tokens_beyond_the_vocabulary_are_found(text, run, tmp_path, ends, monkeypatch):
    """A token that its tokenizer does not have never gets to the model."""
    monkeypatch.setattr(ByteTokenizer, "vocab_size", 100)  # "t" is 116
    words = ends("train", *flags(**SMALL, dataset=text, tokenizer="byte", out_dir=tmp_path / "a"))
    assert words[0] == 1
    assert "a token 1" in words[1]
    assert is_sentence(words[1])
    survived("tokens outside the vocabulary")


def test_files_that_are_not_what_they_should_be(text, run, tmp_path, ends):
    folder, empty, missing = tmp_path / "folder", tmp_path / "empty.txt", tmp_path / "missing"
    folder.mkdir()
    empty.touch()
    binary = tmp_path / "binary.txt"
    binary.write_bytes(bytes(range(256)) * 10)
    new = flags(**SMALL, out_dir=tmp_path / "out")
    same = f"--out_dir={run}"
    shutil.copytree(run, tmp_path / "odd")
    (tmp_path / "odd" / "best.pt").unlink()
    (tmp_path / "odd" / "best.pt").mkdir()
    cases = [
        ("train", [*new, f"--dataset={folder}"], "folder"),
        ("train", [*new, f"--dataset={empty}"], "empty"),
        ("train", [*new, f"--dataset={missing}"], "missing"),
        ("train", [*new, f"--dataset={binary}"], "UTF-8"),
        ("train", [*new, f"--init_from={missing}", f"--dataset={text}"], "missing"),
        ("train", [*new, f"--init_from={folder}", f"--dataset={text}"], "folder"),
        ("train", ["--resume", f"--out_dir={missing}"], "missing"),
        ("train", ["--resume", f"--out_dir={text}"], "my.txt"),
        ("train", [*flags(**SMALL, out_dir=text), f"--dataset={text}"], "my.txt"),
        ("train", [*flags(**SMALL, out_dir="/proc/none/out"), f"--dataset={text}"], "/proc/none"),
        ("sample", [f"--out_dir={missing}"], "missing"),
        ("sample", [f"--out_dir={text}"], "my.txt"),
        ("sample", [f"--out_dir={tmp_path}/odd"], "best.pt"),
        ("sample", [same, f"--start=FILE:{missing}"], "missing"),
        ("sample", [same, f"--start=FILE:{folder}"], "folder"),
        ("sample", [same, f"--start=FILE:{binary}"], "UTF-8"),
        ("sample", [same, f"--start=FILE:{empty}"], "empty"),
        ("analyze", [f"--out_dir={missing}"], "missing"),
        ("analyze", [same, f"--plain={missing}"], "missing"),
        ("bench", ["--json=/proc/none/b.json", "--n_layer=1", "--n_embd=64", "--dwa_only",
                   "--block_size=64", "--device=cpu", "--rounds=1"], "/proc/none"),
    ]  # fmt: skip
    for name, args, says in cases:
        status, words = ends(name, *args)
        assert status == 1, (args, words)
        assert is_sentence(words.splitlines(keepends=True)[-1]), (args, words)
        assert says in words, (args, words)
        survived("file missing, empty, a folder, binary, or not to be written")


def test_no_permission(text, run, tmp_path):
    """As a user who may not read or write it, which root always may."""
    if os.geteuid() == 0 and shutil.which("setpriv") is None:
        pytest.skip("needs setpriv to leave root")
    other = [] if os.geteuid() else ["setpriv", "--reuid=65534", "--clear-groups"]
    for folder in (tmp_path, *tmp_path.parents[:-2]):
        folder.chmod(0o755)
    (run / "best.pt").chmod(0)
    command = [*other, sys.executable, str(HERE / "sample.py"), f"--out_dir={run}"]
    done = subprocess.run(command, capture_output=True, text=True)
    (run / "best.pt").chmod(0o644)
    if "No module named" in done.stderr or "can't open file" in done.stderr:
        pytest.skip("another user cannot run this Python")
    assert done.returncode == 1
    assert "Permission denied" in done.stderr
    assert is_sentence(done.stderr)
    survived("no permission")


# -----------------------------------------------------------------------------
# Wrong command lines


def wrong_command_lines(n):
    """n of them: (script, arguments, what the answer must name), drawn by a fixed seed."""
    rng = random.Random(0)
    configs = {
        "train": train.TrainConfig, "sample": sample.SampleConfig,
        "analyze": analyze.AnalyzeConfig, "bench": bench.BenchConfig,
    }  # fmt: skip
    for _ in range(n):
        name = rng.choice([*configs])
        f = rng.choice(fields(configs[name]))
        kind, low, choices = (f.metadata[k] for k in ("type", "low", "choices"))
        wrong = ["misspelt", "unknown", "not a flag"]
        wrong += ["type", "none"] if kind is not str else []
        wrong += ["range"] * 2 if low is not None else []
        wrong += ["choice"] if choices else []
        how = rng.choice(wrong)
        if how == "misspelt":
            at = rng.randrange(len(f.name))
            misspelt = f.name[:at] + rng.choice("qzxj") + f.name[at + 1 :]
            yield name, [f"--{misspelt}=1"], f"--{misspelt}"
        elif how == "unknown":
            yield name, [f"--not_{f.name}", "3"], f"--not_{f.name}"
        elif how == "not a flag":
            yield name, [f.name], f.name
        elif how == "none":
            value = [] if kind is not bool else ["perhaps"]
            yield name, [f"--{f.name}", *value], f"--{f.name}"
        elif how == "type":
            bad = {int: ["many", "1.5", "", "1e3", "0x10"], bool: ["2", "maybe", ""]}
            value = rng.choice(bad.get(kind, ["much", "", "1,5", "nan", "inf", "-inf"]))
            yield name, [f"--{f.name}={value}"], f"--{f.name}"
        elif how == "range":
            value = low - 1 if kind is int else low - rng.choice([1e-9, 1, 1e30])
            yield name, [f"--{f.name}={value}"], f"--{f.name}"
        else:
            yield name, [f"--{f.name}=such"], f"--{f.name}"


CONTRADICTIONS = [
    ("train", ["--resume", "--overwrite"], "--overwrite"),
    ("train", ["--n_head=5"], "n_head"),
    ("train", ["--n_embd=6", "--n_head=2"], "n_embd"),
    ("train", ["--min_lr=1", "--learning_rate=0.1"], "--min_lr"),
    ("train", ["--dropout=1"], "dropout"),
    ("train", ["--beta1=1"], "--beta1"),
    ("train", ["--beta2=7"], "--beta2"),
    ("train", ["--dwa=0x1"], "dwa"),
    ("train", ["--dwa=1x"], "dwa"),
    ("train", ["--dwa="], "dwa"),
    ("train", ["--dwa=last0"], "dwa"),
    ("train", ["--dwa=9:0,9"], "dwa"),
    ("train", ["--dwa=1x1+"], "dwa"),
    ("train", ["--dwa=4x5", "--n_layer=3"], "--dwa"),
    ("train", ["--dtype=float16", "--optimizer=muon"], "--dtype"),
    ("train", ["--device=abacus"], "--device"),
    ("sample", ["--device=cuda:99"], "--device"),
    ("sample", ["--top_p=0"], "--top_p"),
    ("sample", ["--top_p=1.5"], "--top_p"),
    ("sample", ["--device="], "--device"),
    ("analyze", ["--prune=1"], "--prune"),
    ("analyze", ["--prune=1.5"], "--prune"),
    ("analyze", ["--device=gpu"], "--device"),
    ("bench", ["--n_embd=100"], "--n_embd"),
    ("bench", ["--patterns=1x1,zzz"], "zzz"),
    ("bench", ["--patterns="], "dwa"),
    ("bench", ["--device=cpu:-4"], "--device"),
]


def test_wrong_command_lines(ends, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, args, says in [*wrong_command_lines(250), *CONTRADICTIONS]:
        status, words = ends(name, *args)
        assert status == 2, (name, args, words)
        assert is_sentence(words), (name, args, words)
        assert says in words, (name, args, words)
        survived("wrong command line")
    assert os.listdir(tmp_path) == []  # nothing was begun


# -----------------------------------------------------------------------------
# Numbers that run away


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("rate", [1, 100])
def test_a_run_that_blows_up_ends_and_its_last_good_model_writes(
    text, tmp_path, ends, capsys, dtype, rate
):
    out = tmp_path / "out"
    wild = SMALL | {"learning_rate": rate, "dtype": dtype, "max_iters": 400, "warmup_iters": 5}
    wild |= {"optimizer": "adamw" if dtype == "float16" else "muon"}
    status, words = ends("train", *flags(**wild, dataset=text, out_dir=out))
    if status == 0:  # it may also get through: then what it saved is finite
        assert rate == 1
    else:
        assert status == 1
        assert "learning_rate" in words
        assert is_sentence(words.splitlines(keepends=True)[-1])
    for name in ("best.pt", "last.pt"):
        model = common.load_checkpoint(out / name)["model"]
        assert all(w.isfinite().all() for w in model.values())
    assert ends("sample", f"--out_dir={out}", "--max_new_tokens=20")[0] == 0
    survived("training that blows up")
