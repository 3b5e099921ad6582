"""Fault injection: nothing may be lost or silently wrong.

pytest tests/test_faults.py              some of each kind
pytest tests/test_faults.py -m ""        all of them; a table at the end says how many
"""

import fcntl
import os
import pickle
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
import zipfile
from dataclasses import fields
from typing import get_args

import pytest
import torch

import sample
import train
from data.tokenizer import ByteTokenizer
from denseformer import DenseFormer
from lab import analyze, bench
from lib import flags as config
from lib.checkpoint import FORMAT, load_checkpoint
from lib.files import UserError
from tests.helpers import (
    FAULTS,
    HERE,
    SMALL,
    flags,
    losses,
    same_weights,
    script,
    torchrun,
    write_program,
)

SETTINGS = {
    train: train.TrainConfig, sample: sample.SampleConfig, analyze: analyze.AnalyzeConfig,
    bench: bench.BenchConfig,
}  # fmt: skip
slow = pytest.mark.slow


# -----------------------------------------------------------------------------
# Kills, signals, closed outputs


class Process:
    """train.py as a process of its own, with its output in a file."""

    def __init__(self, log, *args, **environment):
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "train.py"), *args], stdout=file, stderr=file,
                env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
            )  # fmt: skip

    def wait_for(self, words):
        while words not in self.log.read_text() and self.process.poll() is None:
            time.sleep(0.001)

    def end(self, number=None):
        """Send the signal, if any; return the exit status and the output."""
        if number is not None:
            self.process.send_signal(number)
        status, words = self.process.wait(300), self.log.read_text()
        assert "Traceback" not in words, words
        return status, words


@pytest.mark.parametrize("kills", [2, pytest.param(50, marks=slow)])
def test_kill_at_random_moments(text, tmp_path, kills):
    # Such a run spends half its time on checkpoints, so many kills interrupt one.
    same = SMALL | {"max_iters": 200, "eval_interval": 2, "eval_iters": 1, "log_interval": 1}
    same, rng = flags(**same, dataset=text), random.Random(kills)
    whole, out, log = (tmp_path / name for name in ("whole", "out", "log"))
    assert train.main([*same, f"--out_dir={whole}"]) == 0
    for n in range(kills):
        if (out / "last.pt").exists() and load_checkpoint(out / "last.pt")["step"] > 150:
            shutil.rmtree(out)
        begun = (out / "last.pt").exists()
        run = Process(log, *(["--resume"] if begun else same), f"--out_dir={out}")
        if n % 5 < 4:  # every fifth kill may come before the first step
            run.wait_for("val loss")
        time.sleep(rng.random() * 0.5)
        run.end(signal.SIGKILL)
        if (out / "last.pt").exists():
            load_checkpoint(out / "last.pt")
        FAULTS["kill -9, then --resume"] += 1
    begun = (out / "last.pt").exists()
    assert train.main([*(["--resume"] if begun else same), f"--out_dir={out}"]) == 0
    assert same_weights(out, whole)
    assert losses(out) == losses(whole)


def test_sigterm_twice_at_once_as_from_slurm(text, tmp_path):
    same = flags(**SMALL | {"max_iters": 10**6, "eval_interval": 10**6}, dataset=text)
    log, out = tmp_path / "log", tmp_path / "twice"
    run = Process(log, *same, f"--out_dir={out}")
    run.wait_for("step 5:")
    run.process.send_signal(signal.SIGTERM)
    time.sleep(0.05)
    status, words = run.end(signal.SIGTERM)
    # the second one may come when all is saved and the process is about to exit
    assert status in (128 + signal.SIGTERM, -signal.SIGTERM)
    assert f"python train.py --resume --out_dir {out}" in words
    assert load_checkpoint(out / "last.pt")["step"] >= 5
    FAULTS["a second SIGTERM"] += 1


@pytest.mark.parametrize("terminal", [False, True])
def test_training_survives_an_output_that_is_gone(text, tmp_path, terminal):
    out, (keyboard, screen) = tmp_path / "out", os.openpty()
    fcntl.ioctl(screen, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    endless = SMALL | {"max_iters": 10**6, "eval_interval": 10**6, "log_interval": 1}
    command = [sys.executable, str(HERE / "train.py")]
    command += flags(**endless, dataset=text, out_dir=out)
    run = subprocess.Popen(
        command, stdout=subprocess.PIPE, start_new_session=True,
        stderr=screen if terminal else subprocess.PIPE,
    )  # fmt: skip
    os.close(screen)
    for line in run.stdout:
        if line.startswith(b"step 3:"):
            break
    run.stdout.close()
    if terminal:
        assert b"step/s" in os.read(keyboard, 10**6)  # the progress bar
    os.close(keyboard)
    time.sleep(0.5)
    assert run.poll() is None  # still training
    run.send_signal(signal.SIGINT)
    error = b"" if terminal else run.stderr.read()
    assert (run.wait(300), error) == (128 + signal.SIGINT, b"")
    assert load_checkpoint(out / "last.pt")["step"] > 3
    FAULTS["closed pipe or terminal"] += 1


def test_a_second_signal_some_seconds_later_ends_at_once(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(train.time, "monotonic", lambda: now[0])
    signals = train.StopSignals()
    signals.install()
    try:
        for now[0], number in ((10, signal.SIGTERM), (12, signal.SIGTERM), (12.5, signal.SIGINT)):
            signal.raise_signal(number)
        assert signals.any() == signal.SIGTERM
        now[0] = 14
        with pytest.raises(SystemExit) as exit:
            signal.raise_signal(signal.SIGTERM)
    finally:
        signals.restore()
    assert exit.value.code == 128 + signal.SIGTERM


@pytest.mark.parametrize("encoding", ["ascii", pytest.param("cp1252", marks=slow)])
def test_an_output_that_cannot_encode_the_text(tmp_path, encoding):
    text, out = tmp_path / "\u0142.txt", tmp_path / "out"
    text.write_text("\u201cna\u00efve\u201d \u2014 \u0142\n" * 100, encoding="utf-8")
    short = SMALL | {"max_iters": 1, "dataset": text, "out_dir": out}
    environment = os.environ | {"PYTHONIOENCODING": encoding, "OMP_NUM_THREADS": "1"}
    environment |= {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}  # as in Colab
    environment |= {"PYTHONWARNINGS": "error::ResourceWarning"}  # of files left open
    run = script("train.py", *flags(**short), env=environment, encoding=encoding)
    assert (run.returncode, run.stderr) == (0, "")
    assert "loss curve:" in run.stdout
    run = script("sample.py", f"--out_dir={out}", env=environment, encoding=encoding)
    assert (run.returncode, run.stderr) == (0, "")
    FAULTS["stdout that cannot encode the text"] += 2
    command = f"{sys.executable} {HERE}/sample.py --out_dir={out} --max_new_tokens=2 >&- 2>&-"
    assert subprocess.run(command, shell=True, env=environment).returncode == 0
    FAULTS["stdout and stderr closed"] += 1


@pytest.mark.parametrize(
    ("error", "says"),
    [(error, ["--batch_size", "--gradient_accumulation_steps"]) for error in (
        MemoryError(), torch.OutOfMemoryError("CUDA"), RuntimeError("can't allocate memory")
    )] + [(RuntimeError("Failed to find C compiler"), ["--compile=False --dwa_impl naive"]),
          (RuntimeError("not permitted when stream is capturing\nmore"), ["--compile=False"])],
)  # fmt: skip
def test_advice_instead_of_a_traceback(text, tmp_path, fails, monkeypatch, error, says):
    def forward(*args):
        raise error

    monkeypatch.setattr(DenseFormer, "forward", forward)
    fails(train, *flags(**SMALL, dataset=text, out_dir=tmp_path / "out"), says=says)
    FAULTS["out of memory, no C compiler, no CUDA graph"] += 1


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, 130), (BrokenPipeError, 1)])
def test_ctrl_c_and_a_closed_pipe_need_no_words(error, status, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as exit:
        config.run_cli(main)
    assert (exit.value.code, capsys.readouterr().err) == (status, "")


def test_internal_error_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="a bug"):
        config.run_cli(lambda: exec("raise RuntimeError('a bug')"))


def test_a_coarse_clock(run, monkeypatch):
    monkeypatch.setattr(train.time, "perf_counter", lambda: 1.0)
    assert train.main(["--resume", *flags(out_dir=run, max_iters=41, log_interval=1)]) == 0


def test_a_folder_is_for_one_run_at_a_time(text, tmp_path, fails):
    out = tmp_path / "out"
    same = flags(**SMALL | {"max_iters": 10**6}, dataset=text)
    first = Process(tmp_path / "log", *same, f"--out_dir={out}")
    first.wait_for("val loss")
    for again in (["--resume"], [*same, "--overwrite"]):
        fails(train, *again, f"--out_dir={out}", says=["another run"])
        FAULTS["a second run in one folder"] += 1
    first.end(signal.SIGKILL)
    step = load_checkpoint(out / "last.pt")["step"]
    assert train.main(["--resume", f"--out_dir={out}", f"--max_iters={step + 1}"]) == 0


# -----------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_full_disk_keeps_the_checkpoint_before(run, fails, share):
    before, old = (run / "last.pt").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    (run / "log.jsonl").write_text("")  # the old log would not fit either
    again = ["--resume", f"--out_dir={run}", "--max_iters=41"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * len(before)), old[1]))
    try:
        fails(train, *again, says=[r"cannot write .*last\.pt: (File too large|is the disk full)"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert (run / "last.pt").read_bytes() == before
    assert not list(run.glob(".*.part"))
    FAULTS["disk full"] += 1
    assert train.main(again) == 0


@pytest.mark.parametrize("flips", [50, pytest.param(1000, marks=slow)])
def test_a_damaged_checkpoint_is_refused(run, flips):
    """Truncate it, or change a byte of its contents (not of the archive's timestamps)."""
    path, rng = run / "best.pt", random.Random(0)
    whole, places = path.read_bytes(), []
    with zipfile.ZipFile(path) as archive:
        for file in archive.infolist():
            with archive.open(file) as stored:
                begin = stored._orig_compress_start
            places += range(begin, begin + file.file_size)
    damaged = [whole[: len(whole) * n // 20] for n in range(20)] + [whole[:-1]]
    for place in rng.sample(places, flips):
        flipped = bytes([whole[place] ^ rng.randrange(1, 256)])
        damaged.append(whole[:place] + flipped + whole[place + 1 :])
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(UserError, match="damaged"):
            load_checkpoint(path)
        FAULTS["checkpoint cut short, or with a changed byte"] += 1


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def foreign_files(good, boom):
    """Return {description: function that writes such a file} for invalid checkpoints."""

    def changed(**keys):
        content = {k: v for k, v in {**good, **keys}.items() if v is not ...}
        return lambda path: torch.save(content, path)

    model, settings = good["model"], good["model_config"]
    return {
        "text": lambda path: path.write_text("hello"),
        "empty": lambda path: path.write_bytes(b""),
        "a pickle": lambda path: path.write_bytes(pickle.dumps({"format": FORMAT})),
        "a pickle with code": lambda path: path.write_bytes(pickle.dumps(Bomb(boom))),
        "torch's old format, with code": lambda path: torch.save(
            Bomb(boom), path, _use_new_zipfile_serialization=False
        ),
        "an archive with code": changed(model=Bomb(boom)),
        "nanoGPT's": lambda path: torch.save({"model": {}, "iter_num": 3}, path),
        "an older format": changed(format="denseformer-1"),
        "a list": lambda path: torch.save([1, 2, 3], path),
        "no weights": changed(model=...),
        "no settings": changed(model_config=...),
        "no tokenizer": changed(tokenizer=...),
        "weights of another shape": changed(model={k: torch.zeros(1) for k in model}),
        "a weight too many": changed(model={**model, "more": torch.zeros(1)}),
        "unknown settings": changed(model_config={**settings, "n_loop": 3}),
        "impossible settings": changed(model_config={**settings, "n_head": 3}),
        "settings of another type": changed(model_config={**settings, "n_layer": "2"}),
        "an unknown tokenizer": changed(tokenizer={"kind": "new"}),
        "a list for a tokenizer": changed(tokenizer=[]),
    } | {f"resume {change}": changed(**change) for change in (
        {"optimizers": []}, {"optimizers": [{}, {}]}, {"optimizers": 3}, {"step": "three"},
        {"train_config": {"n_loop": 3}}, {"train_config": 3}, {"best_val_loss": None},
        *({name: ...} for name in ("optimizers", "scaler", "train_config", "fingerprint", "step")),
    )}  # fmt: skip


def test_foreign_checkpoints_are_a_sentence_and_run_nothing(run, tmp_path, fails):
    boom, last, new = str(tmp_path / "boom"), run / "last.pt", tmp_path / "new"
    calls = {
        "sample": (sample, "--checkpoint=last", f"--out_dir={run}"),
        "analyze": (analyze, "--checkpoint=last", f"--out_dir={run}"),
        "resume": (train, "--resume", f"--out_dir={run}", "--max_iters=41"),
        "init_from": (train, f"--init_from={last}", f"--out_dir={new}"),
    }
    good = torch.load(last, weights_only=True)
    for what, write in foreign_files(good, boom).items():
        for how, call in calls.items():
            if how == "resume" and ("settings" in what or "tokenizer" in what):
                continue  # a resumed run takes these from its flags and its data
            if how != "resume" and what.startswith("resume"):
                continue  # only a resumed run needs these
            last.unlink(missing_ok=True)
            write(last)
            fails(*call, says=["last.pt|unknown"])
            FAULTS["foreign checkpoint"] += 1
    assert not (new / "last.pt").exists()
    assert not os.path.exists(boom)


def test_tokens_outside_the_vocabulary_are_found(text, tmp_path, fails, monkeypatch):
    monkeypatch.setattr(ByteTokenizer, "vocab_size", 100)  # "t" is 116
    new = flags(**SMALL, dataset=text, tokenizer="byte", out_dir=tmp_path / "a")
    fails(train, *new, says=["the token 1"])
    FAULTS["tokens outside the vocabulary"] += 1


def test_processes_with_different_data_are_refused(tmp_path):
    for rank in range(2):
        (tmp_path / f"{rank}.txt").write_text(f"text of process {rank} " * 100)
    settings = flags(**SMALL, gradient_accumulation_steps=2, out_dir=tmp_path / "out")
    program = write_program(
        tmp_path / "program.py", settings,
        f"settings += ['--dataset', {str(tmp_path)!r} + f'/{{train.RANK}}.txt']",
    )  # fmt: skip
    run = torchrun(2, program=program)
    assert run.returncode == 1
    assert "differs between processes" in run.stderr
    assert "threads: python" in run.stderr
    assert "gloo" not in run.stderr
    assert not (tmp_path / "out" / "last.pt").exists()
    FAULTS["processes with different data"] += 1


def test_files_that_are_not_as_they_should_be(text, run, tmp_path, fails):
    folder, empty, missing = tmp_path / "folder", tmp_path / "empty.txt", tmp_path / "missing"
    folder.mkdir()
    empty.touch()
    binary = tmp_path / "binary.txt"
    binary.write_bytes(bytes(range(256)) * 10)
    new, ours = flags(**SMALL, out_dir=tmp_path / "out"), f"--out_dir={run}"
    odd = shutil.copytree(run, tmp_path / "odd")
    (odd / "best.pt").unlink()
    (odd / "best.pt").mkdir()
    for main, args, says in [
        (train, [*new, f"--dataset={missing}"], "missing"),
        (train, [*new, f"--init_from={missing}", f"--dataset={text}"], "missing"),
        (train, [*new, f"--init_from={folder}", f"--dataset={text}"], "folder"),
        (train, ["--resume", f"--out_dir={missing}"], "missing"),
        (train, ["--resume", f"--out_dir={text}"], "my.txt"),
        (train, [*flags(**SMALL, out_dir=text), f"--dataset={text}"], "my.txt"),
        (train, [*flags(**SMALL, out_dir="/proc/none/out"), f"--dataset={text}"], "/proc/none"),
        (sample, [f"--out_dir={missing}"], "missing"),
        (sample, [f"--out_dir={text}"], "my.txt"),
        (sample, [f"--out_dir={odd}"], "best.pt"),
        (sample, [ours, f"--start=FILE:{folder}"], "folder"),
        (sample, [ours, f"--start=FILE:{binary}"], "UTF-8"),
        (sample, [ours, f"--start=FILE:{empty}"], "empty"),
        (sample, [ours, "--start=be Z"], "'Z'"),
        (analyze, [f"--out_dir={missing}"], "missing"),
        (analyze, [ours, f"--plain={missing}"], "missing"),
        (bench, ["--json=/proc/none/b.json", "--n_layer=5", "--n_embd=64", "--dwa_only",
                 "--block_size=64", "--device=cpu", "--rounds=1"], "/proc/none"),
    ]:  # fmt: skip
        fails(main, *args, says=[says])
        FAULTS["file missing, empty, binary, a folder, or not writable"] += 1


# -----------------------------------------------------------------------------
# Wrong command lines


def wrong_flags(script):
    """Yield (arguments, what the answer must name): each flag, wrong in each possible way."""
    settings = SETTINGS[script]
    wrong_values = {
        int: ["many", "1.5", "", "1e3", "0x10", str(2**64)], bool: ["2", "maybe", ""],
        float: ["much", "", "1,5", "nan", "inf", "-inf"], str: [""],
    }  # fmt: skip
    for f in fields(settings):
        kind, low = (get_args(f.type) or (f.type,))[0], f.metadata["low"]
        misspelt = f"--{f.name[:-1]}q"
        yield [f"{misspelt}=1"], misspelt
        yield [f.name], f.name
        yield from (([f"--{f.name}={value}"], f"--{f.name}") for value in wrong_values[kind])
        if kind is not bool:
            yield [f"--{f.name}"], f"--{f.name}"
        if low is not None:
            yield [f"--{f.name}", f"{low - 1}"], f"--{f.name} must be at least {low}"
        if (below := f.metadata["below"]) is not None:
            yield [f"--{f.name}", f"{below}"], f"--{f.name} must be below {below}"
        if f.metadata["choices"]:
            yield [f"--{f.name}=such"], f"--{f.name}"


CONTRADICTIONS = [
    (train, "--resume --overwrite", "--overwrite"), (train, "--n_head=7", "n_head"),
    (train, "--n_embd=6 --n_head=2", "n_embd"), (train, "--dropout=1", "--dropout"),
    (train, "--min_lr=1 --learning_rate=0.1", "--min_lr"),
    (train, "--dwa=0x1", "--dwa"), (train, "--device=abacus", "--device"),
    (sample, "--start -Well", "needs the form --flag=VALUE"),
    (train, "--qqq", "--help"),
    (train, "--max-iter=3", "did you mean --max_iters?"), (train, "--device=meta", "--device"),
    (sample, "--device=cuda:99", "--device"), (sample, "--top_p=0", "--top_p"),
    (sample, "--top_p=1.5", "--top_p"), (analyze, "--device=gpu", "--device"),
    (bench, "--n_embd=100", "--n_embd"), (bench, "--patterns=1x1,zzz", "zzz"),
    (bench, "--device=cpu:-4", "--device"),
]  # fmt: skip


def test_wrong_command_lines(fails, tmp_path):
    cases = [(script, *case) for script in SETTINGS for case in wrong_flags(script)]
    cases += [(script, words.split(), says) for script, words, says in CONTRADICTIONS]
    for script_, args, says in cases:
        fails(script_, *args, says=[re.escape(says)], status=2)
        FAULTS["wrong command line"] += 1
    assert os.listdir(tmp_path) == []  # nothing was written


@pytest.mark.parametrize("script_", SETTINGS)
def test_help_lists_every_flag(script_, capsys):
    with pytest.raises(SystemExit) as exit:
        script_.main(["--help"])
    shown = capsys.readouterr().out
    assert exit.value.code == 0
    assert all(f"\n  --{f.name} " in shown for f in fields(SETTINGS[script_]))
    assert script_ is not train or train.describe_presets() in shown


# -----------------------------------------------------------------------------
# Divergence


@pytest.mark.parametrize("seen_by", ["log_interval", "eval_interval"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_training_that_diverges_ends_and_keeps_the_checkpoint(
    text, tmp_path, fails, seen_by, dtype
):
    out, handler = tmp_path / "out", signal.getsignal(signal.SIGINT)
    wild = SMALL | {"learning_rate": 1e30, "optimizer": "adamw", "warmup_iters": 0, "dtype": dtype}
    wild |= {"log_interval": 99, "eval_interval": 99, "max_iters": 200} | {seen_by: 1}
    fails(train, *flags(**wild, dataset=text, out_dir=out), says=["diverged"])
    assert signal.getsignal(signal.SIGINT) is handler
    for name in ("best.pt", "last.pt"):
        model = load_checkpoint(out / name)["model"]
        assert all(w.isfinite().all() for w in model.values())
    FAULTS["training that diverges"] += 1


def test_best_is_the_lowest_validation_loss_and_overfitting_is_not_divergence(
    text, tmp_path, monkeypatch
):
    found = iter([5.0, 2.0, 1e6, 3.0, 2.5, 2.4, 2.3])
    monkeypatch.setattr(train, "evaluate", lambda *args: next(found))
    assert train.main(flags(**SMALL, dataset=text, out_dir=tmp_path)) == 0
    assert train.main(["--resume", f"--out_dir={tmp_path}", "--max_iters=41"]) == 0
    assert load_checkpoint(tmp_path / "best.pt")["step"] == 10
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 41
