"""train.py and sample.py as a user runs them."""

import contextlib
import math
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import data
import sample
import train
from data.tokenizer import ByteTokenizer
from denseformer import DWA, DenseFormer, DenseFormerConfig
from lib.checkpoint import FORMAT, load_checkpoint, load_weights
from lib.figures import text_heat_map
from lib.files import UserError
from lib.flags import parse_flags
from lib.processes import StopSignals
from tests.helpers import (
    HERE,
    SMALL,
    flags,
    log,
    losses,
    run_ranks,
    same_weights,
    script,
    torchrun,
    weights,
    write_program,
)

CPU = torch.device("cpu")


# -----------------------------------------------------------------------------
# Batches, schedule, settings


@pytest.mark.parametrize("block_size", [7, 64])
def test_validation_predicts_each_token_once(block_size):
    tokens = np.random.default_rng(0).integers(17, size=333)
    torch.manual_seed(0)
    shape = {"vocab_size": 17, "n_layer": 3, "n_head": 2, "n_embd": 8}
    model = DenseFormer(DenseFormerConfig(**shape, block_size=block_size))

    def evaluate(iters, batch_size=4, steps=1):
        config = train.TrainConfig(
            block_size=block_size, batch_size=batch_size, gradient_accumulation_steps=steps
        )
        with StopSignals() as stop:
            return train.evaluate(model, tokens, iters, config, contextlib.nullcontext(), stop)

    total = 0.0
    for s in range(0, 332, block_size):
        x, y = tokens[s : s + block_size], tokens[s + 1 : s + block_size + 1]
        logits = model(torch.tensor(x[None, : len(y)]), torch.tensor(y[None]))[0]
        total += F.cross_entropy(logits[0], torch.tensor(y), reduction="sum").item()
    assert evaluate(1000) == pytest.approx(total / 332, rel=1e-6)
    assert evaluate(1) == evaluate(1) != evaluate(1000)
    assert evaluate(1, 2, 2) == pytest.approx(evaluate(1), rel=1e-6)


def test_batches_depend_on_seed_and_step_alone():
    tokens = np.arange(100, dtype=np.uint8)
    dataset = data.Dataset("a", tokens, tokens, ByteTokenizer())

    def batch(step, batch_size=60, accumulation=1):
        config = train.TrainConfig(
            batch_size=batch_size, gradient_accumulation_steps=accumulation, block_size=8, seed=1
        )
        batches = [train.get_batch(dataset, config, step, n, CPU) for n in range(accumulation)]
        assert all(x.shape == (batch_size, 8) for x, _ in batches)
        return (torch.cat(part) for part in zip(*batches, strict=True))

    x, y = batch(5)
    assert y.equal(x + 1)
    assert (x.min(), y.max()) == (0, 99)  # the first window and the last are drawn too
    assert not x.equal(next(batch(6)))
    for batch_size, accumulation in ((60, 1), (15, 4)):
        assert x.equal(next(batch(5, batch_size, accumulation)))


def test_the_learning_rate():
    config = train.TrainConfig(learning_rate=1.0, min_lr=0.1, warmup_iters=10, max_iters=110)
    rates = [train.get_lr(step, config) for step in (0, 9, 10, 60, 110)]
    assert rates == pytest.approx([0.1, 1.0, 1.0, 0.55, 0.1])


def test_flags_override_presets_which_override_defaults():
    for name, preset in train.PRESETS.items():
        config, _ = train.load_config([f"--preset={name}", "--n_layer=5", "--beta1=0.8"])
        expected = asdict(train.TrainConfig()) | preset
        assert asdict(config) == expected | {"preset": name, "n_layer": 5, "beta1": 0.8}


WRONG = [
    (train, "--n_layr=3", "--n_layr"), (train, "n_layer", "n_layer"),
    (train, "--n_layer", "--n_layer"), (train, "--n_layer=many", "--n_layer"),
    (train, "--n_layer=0", "--n_layer: must be at least 1, not 0"), (train, "--seed=-1", "--seed"),
    (train, "--learning_rate=nan", "--learning_rate"),
    (train, "--beta1=1", "--beta1.* below 1, not 1"), (train, "--optimizer=sgd", "--optimizer"),
    (train, "--bias=maybe", "--bias"), (train, "--dataset=", "--dataset: is empty"),
    (train, "--dwa=0x1", "--dwa"), (train, "--dwa=[[],[0,1", "--dwa"),
    (train, "--dwa=[1,2]", "--dwa"), (train, "--n_layer=3 --dwa=[[],[0,1],[2]]", "--dwa"),
    (train, "--n_embd=6 --n_head=2", "n_embd"), (train, "--device=abacus", "--device"),
    (train, "--min_lr=1 --learning_rate=0.1", "--min_lr"),
    (train, "--dwa_start_iter=9 --max_iters=9", "--dwa_start_iter"),
    (train, "--resume --overwrite", "--overwrite"), (sample, "--device=cuda:99", "--device"),
    (sample, "--top_p=0", "--top_p"), (sample, "--temperature=-1", "--temperature"),
]  # fmt: skip


def test_wrong_command_lines(fails, tmp_path):
    for script_, words, says in WRONG:
        fails(script_, *words.split(), says=[says], status=2)
    assert os.listdir(tmp_path) == []  # nothing was written


def test_flags_are_read_as_python_values(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    words = ["--out_dir=~/a b", "--bias", "--compile", "false", "--dwa", "[[],[0,1]]", "--seed=0"]
    expected = {"out_dir": "/home/me/a b", "bias": True, "compile": False, "dwa": [[], [0, 1]]}
    assert parse_flags(train.TrainConfig, words, "") == expected | {"seed": 0}


# -----------------------------------------------------------------------------
# A run, and what it learns


def test_train_then_sample(trained, tmp_path, capsys):
    out = trained / "dense"
    assert [s for s, loss, _ in losses(out) if loss] == list(range(5, 41, 5))
    assert [s for s, _, val in losses(out) if val] == list(range(0, 41, 10))
    snapshots = [e for e in log(out) if "alpha" in e]
    assert [e["step"] for e in snapshots] == [2, 5, 10, 20, 40]
    assert torch.tensor(snapshots[-1]["alpha"]).equal(weights(out)["dwa.alpha"])
    best, last = (load_checkpoint(out / name).keys() for name in ("best.pt", "last.pt"))
    assert last - best == {"optimizers", "scaler"}

    def write(*args):
        capsys.readouterr()
        sample.main([f"--out_dir={out}", "--max_new_tokens=60", *args])
        return capsys.readouterr().out

    once = write("--start=that")
    assert once.startswith("that")
    assert len(once) == 4 + 60 + 1
    assert once != write("--start=that", "--seed=1")
    assert write("--temperature=0") == write("--temperature=0", "--seed=1")
    prompt = tmp_path / "prompt.txt"
    prompt.write_bytes(b"\xef\xbb\xbfthat")  # with a byte order mark
    both = write(f"--start=FILE:{prompt}", "--num_samples", "2")
    assert both.split("--- sample ")[1] == f"1 ---\n{once}\n"
    assert both.split("--- sample ")[2] != f"2 ---\n{once}"
    prompt.write_bytes(b"not\r\n")
    assert write(f"--start=FILE:{prompt}").startswith("not\n")


def test_a_character_of_several_tokens_is_printed_whole(run, capsys, monkeypatch):
    tokens = [torch.tensor([[byte]]) for byte in "é€".encode()]
    monkeypatch.setattr(DenseFormer, "stream", lambda *args: iter(tokens))
    loaded = DenseFormer, ByteTokenizer(), {"step": 0}
    monkeypatch.setattr(sample, "load_model", lambda *args: loaded)
    sample.main([f"--out_dir={run}", "--start=a"])
    shown = capsys.readouterr()
    assert shown.out == "aé€\n"
    assert "best.pt is from step 0, before training" in shown.err


def test_training_learns_more_than_how_often_each_character_occurs(text, tmp_path):
    same = SMALL | {"max_iters": 150, "eval_interval": 150, "learning_rate": 1e-2}
    assert train.main(flags(**same, warmup_iters=10, dataset=text, out_dir=tmp_path / "a")) == 0
    counts = np.array(list(Counter(Path(text).read_text()).values()))
    entropy = np.log(counts.sum()) - (counts * np.log(counts)).sum() / counts.sum()
    assert losses(tmp_path / "a")[-1][2] < 0.6 * entropy


@pytest.mark.parametrize("clip", [1e-12, 0])
def test_the_gradient_is_clipped(text, tmp_path, clip):
    """To a norm far below AdamW's epsilon, so that nothing is learned."""
    new = {"optimizer": "adamw", "weight_decay": 0, "warmup_iters": 0, "dtype": "float32"}
    assert train.main(flags(**SMALL, **new, grad_clip=clip, dataset=text, out_dir=tmp_path)) == 0
    first, *_, last = (val for _, _, val in losses(tmp_path) if val)
    assert (abs(first - last) < 1e-4) == (clip > 0)


@pytest.mark.parametrize("impl", ["naive", "tiled"])
def test_dwa_impl_changes_no_result(trained, tmp_path, impl):
    same = SMALL | {"dataset": trained / "my.txt", "dtype": "float32"}
    assert train.main(flags(**same, out_dir=tmp_path, dwa_impl=impl)) == 0
    for ours, expected in zip(losses(tmp_path), losses(trained / "dense"), strict=True):
        assert [x for x in ours if x] == pytest.approx([x for x in expected if x], rel=1e-4)


@pytest.mark.parametrize("seen_by", ["log_interval", "eval_interval"])
def test_training_that_diverges_ends_and_keeps_the_checkpoint(text, tmp_path, fails, seen_by):
    out, handler = tmp_path / "out", signal.getsignal(signal.SIGINT)
    wild = SMALL | {"learning_rate": 1e30, "optimizer": "adamw", "warmup_iters": 0}
    wild |= {"log_interval": 99, "eval_interval": 99, "max_iters": 200} | {seen_by: 1}
    fails(train, *flags(**wild, dataset=text, out_dir=out), says=["diverged"])
    assert signal.getsignal(signal.SIGINT) is handler
    for name in ("best.pt", "last.pt"):
        model = load_checkpoint(out / name)["model"]
        assert all(w.isfinite().all() for w in model.values())


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_an_overflow_in_float16_is_skipped_by_both_optimizers(text, tmp_path, monkeypatch, value):
    """One gradient of a matrix, which is Muon's, overflows in step 5."""

    def training_step(model, *args, real=train.training_step):
        states.append({name: p.detach().clone() for name, p in model.named_parameters()})
        overflow = (lambda g: g.fill_(value)) if len(states) == 6 else (lambda g: g)
        hook = model.blocks[1].mlp.c_fc.weight.register_hook(overflow)
        loss = real(model, *args)
        hook.remove()
        return loss

    states = []
    monkeypatch.setattr(train, "training_step", training_step)
    new = SMALL | {"max_iters": 8, "dtype": "float16", "optimizer": "muon"}
    assert train.main(flags(**new, dataset=text, out_dir=tmp_path / "out")) == 0
    assert all(states[6][name].equal(states[5][name]) for name in states[0])
    assert all(w.isfinite().all() for w in states[7].values())
    assert not states[7]["wte.weight"].equal(states[6]["wte.weight"])


def test_best_is_the_lowest_validation_loss_and_the_last_one_reads_more(
    text, tmp_path, monkeypatch, capsys
):
    found, read = iter([5.0, 2.0, 1e6, 3.0, 2.5, 2.4, 2.3, 2.2]), []

    def evaluate(model, tokens, iters, *args):
        read.append(iters)
        return next(found)

    monkeypatch.setattr(train, "evaluate", evaluate)
    same = flags(**SMALL, dataset=text, out_dir=tmp_path, eval_iters=2, final_eval_iters=5)
    assert train.main(same) == 0
    assert read == [2, 2, 2, 2, 2, 5]
    assert "val loss 2.4000" in capsys.readouterr().out
    assert log(tmp_path)[-1] == {"step": 40, "final_val_loss": 2.4}
    assert train.main(["--resume", f"--out_dir={tmp_path}", "--max_iters=41"]) == 0
    assert [val for _, _, val in losses(tmp_path) if val] == [5.0, 2.0, 1e6, 3.0, 2.5, 2.3]
    assert load_checkpoint(tmp_path / "best.pt")["step"] == 10
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 41


def test_dwa_start_iter(trained, tmp_path, signal_at):
    same = SMALL | {"dataset": trained / "my.txt", "dtype": "float32", "dwa_start_iter": 20}
    late, cut = tmp_path / "late", tmp_path / "cut"
    assert train.main(flags(**same, out_dir=late)) == 0
    plain = losses(trained / "plain")
    assert losses(late)[:7] == plain[:7]  # up to the validation at step 20
    assert losses(late)[-1] != plain[-1]
    snapshots = [e for e in log(late) if "alpha" in e]
    assert [e["step"] for e in snapshots] == [20, 40]
    assert torch.tensor(snapshots[0]["alpha"]).equal(DWA(3).alpha)
    assert train.main(flags(**same | {"max_iters": 21}, out_dir=tmp_path / "short")) == 0
    assert not weights(tmp_path / "short")["dwa.alpha"].equal(DWA(3).alpha)
    # A run that is stopped before the alphas start, and resumed, ends with the same weights.
    signal_at(signal.SIGTERM, "get_lr", 11)
    assert train.main(flags(**same, out_dir=cut)) == 128 + signal.SIGTERM
    assert train.main(["--resume", f"--out_dir={cut}"]) == 0
    assert same_weights(cut, late)


def test_text_heat_map():
    alpha = torch.tensor([[1.0, 0, 0], [-0.2, 1.0, 0], [0.02, 0.05, -0.009]])
    shown = text_heat_map(alpha, [[], [0, 1], [0, 2]])
    assert shown.splitlines()[1:3] == ["Y_1  |=█|", "Y_2  |░  |"]
    assert text_heat_map(alpha, [[], [], [0]]).splitlines()[1] == "Y_1  = X_1"  # no DWA
    deep = text_heat_map(DWA(48).alpha.detach(), DWA(48).rows, max_rows=12).splitlines()
    assert (len(deep), deep[1][:4], deep[12][:4]) == (14, "Y_1 ", "Y_48")


def test_the_end_of_a_run(text, tmp_path):
    """A plot, alphas and a sample, whatever stdout can encode; matplotlib's backend is kept."""
    pytest.importorskip("matplotlib")
    program = write_program(
        tmp_path / "program.py", flags(**SMALL | {"max_iters": 2}, dataset=text, out_dir="out"),
        "import matplotlib",
        "show = lambda: print('then:', matplotlib.get_backend(), os.environ['MPLBACKEND'])",
        "atexit.register(show)",
    )  # fmt: skip
    run = script(program, env=os.environ | {"PYTHONIOENCODING": "ascii", "MPLBACKEND": "svg"})
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG"), run.stderr
    for words in ("\nY_3  |", "the last what the head reads", "a sample:", "then: svg svg"):
        assert words in run.stdout, (run.stdout, run.stderr)


# -----------------------------------------------------------------------------
# Stopping and resuming


def test_resumed_is_uninterrupted(text, tmp_path, signal_at, capsys):
    same = SMALL | {"gradient_accumulation_steps": 2, "dropout": 0.1}
    same = flags(**same, dataset=text)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train.main([*same, f"--out_dir={whole}"]) == 0
    again = same
    for number, steps, step in ((signal.SIGTERM, 13, 13), (signal.SIGINT, 17, 30)):
        signal_at(number, "get_lr", steps)
        assert train.main([*again, f"--out_dir={parts}"]) == 128 + number
        assert "python train.py --resume --out_dir" in capsys.readouterr().out
        assert load_checkpoint(parts / "last.pt")["step"] == step
        again = ["--resume"]
    # Resuming drops what was logged after the last checkpoint, and malformed lines.
    with (parts / "log.jsonl").open("a") as file:
        file.write('{"step": 35, "loss": 9.9}\n3\n{"loss": 1}\n{"step": 39')
    assert train.main(["--resume", f"--out_dir={parts}"]) == 0
    assert same_weights(whole, parts)
    assert losses(parts) == losses(whole)
    assert [e["step"] for e in log(parts) if "alpha" in e] == [2, 5, 10, 20, 40]


def test_kill_at_random_moments(text, tmp_path):
    # Such a run spends half its time on checkpoints, so many kills interrupt one.
    same = SMALL | {"max_iters": 200, "eval_interval": 2, "eval_iters": 1, "log_interval": 1}
    same, rng = flags(**same, dataset=text), random.Random(2)
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert train.main([*same, f"--out_dir={whole}"]) == 0
    for _ in range(2):
        begun = (out / "last.pt").exists()
        command = [sys.executable, HERE / "train.py", *(["--resume"] if begun else same)]
        run = subprocess.Popen([*command, f"--out_dir={out}"], stdout=subprocess.PIPE, text=True)
        next(line for line in run.stdout if "val loss" in line)
        time.sleep(rng.random() * 0.3)
        run.kill()
        run.communicate()
    assert 0 < load_checkpoint(out / "last.pt")["step"] < 200
    assert train.main(["--resume", f"--out_dir={out}"]) == 0
    assert same_weights(out, whole)
    assert losses(out) == losses(whole)


def test_a_longer_run_keeps_the_old_end_in_the_log(run, text):
    assert train.main(["--resume", f"--out_dir={run}", "--max_iters=45"]) == 0
    before = log(run)
    assert train.main(["--resume", f"--out_dir={run}", "--max_iters=70"]) == 0
    assert [s for s, _, val in losses(run) if val] == [0, 10, 20, 30, 40, 45, 50, 60, 70]
    assert all(entry in log(run) for entry in before if "final_val_loss" not in entry)


def test_the_first_ctrl_c_says_what_happens_and_a_later_one_ends_at_once(monkeypatch, capfd):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with StopSignals() as stop:
        for now[0], number in ((10, signal.SIGINT), (12, signal.SIGINT), (12.5, signal.SIGTERM)):
            signal.raise_signal(number)
            said = capfd.readouterr().err
            assert (now[0] == 10) == (
                "saving after this step" in said and "after 3 seconds ends at once" in said
            )
        assert stop.any() == signal.SIGINT
        now[0] = 14
        with pytest.raises(SystemExit) as exit:
            signal.raise_signal(signal.SIGTERM)
    assert exit.value.code == 128 + signal.SIGTERM


@pytest.mark.parametrize("name", ["train.py", "sample.py"])
def test_ctrl_c_while_torch_is_imported(tmp_path, name):
    (tmp_path / "torch.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    run = script(name, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert (run.returncode, run.stderr) == (-signal.SIGINT, "")  # 130 in a shell


def test_resume_flags(run, trained, tmp_path, fails):
    again = ["--resume", f"--out_dir={run}"]
    for wrong, says in (
        ("--max_iters=5", "already at step 40"), ("--n_layer=4", "--n_layer 4 contradicts"),
        ("--batch_size=2", "stay at 4"), ("--init_from=a.pt", "which has none"),
    ):  # fmt: skip
        fails(train, *again, wrong, says=[says], status=2)
    # The text has moved, and only the checkpoint was copied.
    moved = tmp_path / "moved.txt"
    moved.write_bytes((trained / "my.txt").read_bytes())
    (run / "log.jsonl").unlink()
    assert train.main([*again, f"--dataset={moved}"]) == 0
    for name in ("best.pt", "last.pt"):
        assert load_checkpoint(run / name)["train_config"]["dataset"] == str(moved)
    assert train.main([*again, "--max_iters=41", "--weight_decay=0.5", "--beta2=0.5"]) == 0
    optimizers = load_checkpoint(run / "last.pt")["optimizers"]
    groups = [group for optimizer in optimizers for group in optimizer["param_groups"]]
    assert {group["weight_decay"] for group in groups} == {0.5, 0.0}
    assert {group["betas"][1] for group in groups if "betas" in group} == {0.5}
    moved.write_text("to be " * 3000)
    with pytest.raises(UserError, match="not the data"):
        train.main(again)


def test_float16_is_resumed_with_its_gradient_scaler(run, tmp_path):
    whole, parts = run, shutil.copytree(run, tmp_path / "parts")

    def resume(out_dir, max_iters, dtype="float16"):
        constant_rate = {"min_lr": SMALL["learning_rate"], "warmup_iters": 0}
        same = flags(out_dir=out_dir, max_iters=max_iters, dtype=dtype, **constant_rate)
        assert train.main(["--resume", *same]) == 0
        return load_checkpoint(out_dir / "last.pt")["scaler"]

    assert resume(whole, 44)["_growth_tracker"] > 2  # the steps since it last changed its scale
    resume(parts, 42)
    assert resume(parts, 44) == load_checkpoint(whole / "last.pt")["scaler"]
    assert same_weights(whole, parts)
    assert resume(parts, 45, "float32") == {}


def test_init_from_keeps_what_was_learned(trained, tmp_path, fails):
    begin = {"batch_size": 4, "device": "cpu", "dtype": "float32", "max_iters": 10}
    begin |= {"optimizer": "adamw", "learning_rate": 1e-2, "init_from": trained / "plain/last.pt"}
    # Shape and data come from the checkpoint; the DenseFormer starts as the same plain model.
    dense = tmp_path / "dense"
    assert train.main(flags(**begin, out_dir=dense, dwa="1x1")) == 0
    assert losses(dense)[0][2] == losses(trained / "plain")[-1][2]
    alpha = weights(dense)["dwa.alpha"]
    assert (alpha != 0).sum() == 10
    # With another pattern, the alphas that it has in common are kept.
    model = DenseFormer(DenseFormerConfig(10, 16, 3, 2, 16, dwa="3x1"))
    load_weights(model, weights(dense))
    common = torch.diag(alpha.diagonal())
    common[3, 0] = alpha[3, 0]
    assert model.dwa.alpha.equal(common)
    # A row that has none of its alphas in common stays as initialized, not 0.
    model = DenseFormer(DenseFormerConfig(10, 16, 3, 2, 16, dwa=[[], [0], [], [3]]))
    load_weights(model, weights(trained / "plain"))
    assert model.dwa.alpha.equal(DWA(3, model.dwa.rows).alpha)
    new = flags(**begin, out_dir=tmp_path / "other", tokenizer="byte")
    fails(train, *new, says=["--tokenizer byte contradicts .*which has char"], status=2)


def test_init_from_takes_a_text_with_fewer_characters(trained, tmp_path, fails):
    """The model's tokenizer encodes it, so the loss is right from the start."""
    (tmp_path / "sub.txt").write_text("or\nto " * 1000)
    (tmp_path / "more.txt").write_text("zebra " * 1000)
    same = {"init_from": trained / "dense/last.pt", "device": "cpu", "max_iters": 3}
    out = tmp_path / "out"
    assert train.main(flags(**same, dataset=tmp_path / "sub.txt", out_dir=out)) == 0
    assert losses(out)[0][2] < 2.5  # as on the text it has learned; at random it were higher
    assert train.main(["--resume", f"--out_dir={out}", "--max_iters=4"]) == 0
    new = flags(**same, dataset=tmp_path / "more.txt", out_dir=tmp_path / "more")
    fails(train, *new, says=["the character 'z'"])


# -----------------------------------------------------------------------------
# Files


def test_overwrite_removes_the_old_run_and_nothing_else(run, text, fails, signal_at, monkeypatch):
    old = ("loss.png", "pruned.pt", "alpha.png", "alpha-steps.png", "cosine.png", "dropped.png")
    for name in (*old, "singular.png", "notes.txt", "alpha-mine.png"):
        (run / name).write_text("old")
    before = {file.name: file.read_bytes() for file in run.iterdir()}
    new = flags(**SMALL, dataset=text, out_dir=run)
    fails(train, *new, says=["contains a run.*--resume.*--overwrite"])
    new.append("--overwrite")
    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", Mock(side_effect=UserError("it was stopped")))
        fails(train, *new, says=["it was stopped"])
    assert {file.name: file.read_bytes() for file in run.iterdir()} == before
    signal_at(signal.SIGINT, "evaluate", 1)
    assert train.main(new) == 128 + signal.SIGINT
    names = {file.name for file in run.iterdir()} - {".lock"}
    assert names == {"best.pt", "last.pt", "log.jsonl", "notes.txt", "alpha-mine.png"}
    assert all(load_checkpoint(run / name)["step"] == 0 for name in ("best.pt", "last.pt"))
    assert log(run) == []


def test_a_folder_is_for_one_run_at_a_time(text, tmp_path, fails):
    out, same = tmp_path / "out", flags(**SMALL | {"max_iters": 10**6}, dataset=text)
    command = [sys.executable, HERE / "train.py", *same, f"--out_dir={out}"]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    next(line for line in first.stdout if "val loss" in line)
    for again in (["--resume"], [*same, "--overwrite"]):
        fails(train, *again, f"--out_dir={out}", says=["another run"])
    first.kill()
    first.communicate()
    step = load_checkpoint(out / "last.pt")["step"]
    assert train.main(["--resume", f"--out_dir={out}", f"--max_iters={step + 1}"]) == 0


@pytest.mark.parametrize("share", [0.0, 0.9])
def test_a_full_disk_keeps_the_checkpoint_before(run, fails, share):
    before, old = (run / "last.pt").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    (run / "log.jsonl").write_text("")  # the old log would not fit either
    again = ["--resume", f"--out_dir={run}", "--max_iters=41"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * len(before)), old[1]))
    try:
        fails(train, *again, says=["cannot write|File too large"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert (run / "last.pt").read_bytes() == before
    assert not list(run.glob(".*.part"))
    assert train.main(again) == 0


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("boom",)


def test_foreign_checkpoints_are_a_sentence_and_run_nothing(run, tmp_path, fails):
    last, good = run / "last.pt", (run / "last.pt").read_bytes()
    writers = {
        "text": lambda: last.write_text("hello"),
        "cut short": lambda: last.write_bytes(good[: len(good) // 2]),
        "a pickle with code": lambda: last.write_bytes(pickle.dumps(Bomb())),
        "an archive with code": lambda: torch.save({"format": FORMAT, "model": Bomb()}, last),
        "nanoGPT's": lambda: torch.save({"model": {}, "iter_num": 3}, last),
        "an older format": lambda: torch.save({"format": "denseformer-2"}, last),
    }
    for write in writers.values():
        write()
        fails(sample, "--checkpoint=last", f"--out_dir={run}", says=[r"last\.pt"])
        fails(train, "--resume", f"--out_dir={run}", says=[r"last\.pt"])
        fails(train, f"--init_from={last}", f"--out_dir={tmp_path}/new", says=[r"last\.pt"])
    fails(train, "--resume", f"--out_dir={run}", says=["denseformer-2.*reads only denseformer-3"])
    shutil.copy(run / "best.pt", last)
    fails(train, "--resume", f"--out_dir={run}", says=["needs a last.pt.*--init_from"])
    assert sorted(os.listdir(tmp_path)) == ["run"]


def test_files_that_are_not_as_they_should_be(text, run, tmp_path, fails):
    folder, missing, binary = tmp_path / "folder", tmp_path / "missing", tmp_path / "binary.txt"
    folder.mkdir()
    binary.write_bytes(bytes(range(256)) * 10)
    new, ours = flags(**SMALL, out_dir=tmp_path / "out"), f"--out_dir={run}"
    for main, args, says in [
        (train, [*new, f"--dataset={missing}"], "missing"),
        (train, [*new, f"--init_from={missing}"], "missing"),
        (train, ["--resume", f"--out_dir={missing}"], "missing"),
        (train, [*flags(**SMALL, out_dir=text), f"--dataset={text}"], "my.txt"),
        (sample, [f"--out_dir={missing}"], "missing"),
        (sample, [ours, f"--start=FILE:{folder}"], "folder"),
        (sample, [ours, f"--start=FILE:{binary}"], "UTF-8"),
        (sample, [ours, "--start=be Z"], "'Z'"),
    ]:
        fails(main, *args, says=[says])


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (torch.OutOfMemoryError("CUDA"), "--batch_size.*--gradient_accumulation_steps"),
        (RuntimeError("can't allocate memory"), "--batch_size.*--gradient_accumulation_steps"),
        (RuntimeError("Failed to find C compiler"), "--compile=False --dwa_impl inplace"),
    ],
)
def test_advice_instead_of_a_traceback(text, tmp_path, fails, monkeypatch, error, says):
    monkeypatch.setattr(train, "training_step", Mock(side_effect=error))
    fails(train, *flags(**SMALL, dataset=text, out_dir=tmp_path / "out"), says=[says])


# -----------------------------------------------------------------------------
# Several processes


def test_two_micro_batches_or_two_processes_are_one(text, tmp_path):
    same = SMALL | {"dataset": text, "dtype": "float32", "dwa": "[[],[],[],[0,1]]"}  # X_2 is unread
    one, two, ranks = (tmp_path / name for name in ("one", "two", "ranks"))
    split = {"batch_size": 4, "gradient_accumulation_steps": 2}
    assert train.main(flags(**same | {"batch_size": 8}, out_dir=one)) == 0
    assert train.main(flags(**same | split, out_dir=two)) == 0
    run = torchrun(2, *flags(**same | split | {"max_iters": 20}, out_dir=ranks))
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("a sample:") == 1
    for ours in (losses(two), losses(ranks)):
        for a, b in zip(ours, losses(one), strict=False):
            assert a[0] == b[0]
            assert [x for x in a if x] == pytest.approx([x for x in b if x], rel=1e-4)
    for name, tensor in weights(one).items():
        torch.testing.assert_close(weights(two)[name], tensor, rtol=1e-3, atol=2e-4)
    # Continue with one process, which takes the 8 sequences at once.
    resumed = ["--resume", f"--out_dir={ranks}", "--max_iters=40"]
    assert train.main([*resumed, "--batch_size=8", "--gradient_accumulation_steps=1"]) == 0
    assert [step for step, _, val in losses(ranks) if val] == [0, 10, 20, 30, 40]


def test_a_signal_to_one_process_stops_all(text, tmp_path):
    out = tmp_path / "out"
    settings = flags(**SMALL, dataset=text, gradient_accumulation_steps=2, out_dir=out)
    program = write_program(
        tmp_path / "program.py", settings,
        "def get_lr(step, config, real=train.get_lr):",
        "    if (step, train.RANK) == (12, 1):",
        "        signal.raise_signal(signal.SIGTERM)",
        "    return real(step, config)",
        "train.get_lr = get_lr",
    )  # fmt: skip
    run = torchrun(2, program=program)
    assert "stopped at step 13 and saved" in run.stdout, run.stderr
    # A thread of the process group that is left at exit can abort the process.
    assert "threads: python" in run.stderr
    assert "gloo" not in run.stderr
    assert load_checkpoint(out / "last.pt")["step"] == 13


# where one of two processes fails, or both do: lines that make it fail there, and the one sentence
FAILURES = {
    "start": (
        ["processes.START = datetime.timedelta(seconds=3)", "if train.RANK == 0:",
         "    os._exit(1)"],
        "1: of 2 processes, some have not started",
    ),
    "flags": (["settings += ['--gradient_accumulation_steps=3']"], "must be divisible by the 2"),
    "data": (["if train.RANK == 0:", "    settings += ['--dataset=missing']"], "'missing'"),
    "other data": (
        ["def load(*args, real=train.data.load):", "    dataset = real(*args)",
         "    dataset.train = dataset.train[train.RANK :]", "    return dataset",
         "train.data.load = load"],
        "differs from that of rank 0",
    ),
    "training": (
        ["def get_lr(step, config, real=train.get_lr):", "    if (step, train.RANK) == (12, 1):",
         "        raise flags.UserError('it broke')", "    return real(step, config)",
         "train.get_lr = get_lr"],
        "it broke",
    ),
    "a bug": (
        ["def get_lr(step, config):", "    raise ValueError('in both')", "train.get_lr = get_lr"],
        "ValueError: in both",
    ),
    "saving": (
        ["def save(*args):", "    raise OSError(28, 'No space left')",
         "checkpoint.torch.save = save"],
        "best.pt: No space left",
    ),
}  # fmt: skip


@pytest.mark.parametrize("where", FAILURES)
def test_one_process_fails_and_all_end(text, tmp_path, where):
    lines, sentence = FAILURES[where]
    settings = flags(**SMALL, gradient_accumulation_steps=2, out_dir=tmp_path / "out", dataset=text)
    program = write_program(
        tmp_path / "program.py", settings,
        *lines,
        "def leave(real=processes.distributed.destroy_process_group):",
        "    import gc",
        "    alive = [o for o in gc.get_objects() if type(o) is train.DistributedDataParallel]",
        "    print('DDP is freed' if not alive else 'DDP is alive', file=sys.stderr)",
        "    real()",
        "processes.distributed.destroy_process_group = leave",
    )  # fmt: skip
    ended = run_ranks(2, program)
    assert all(status for status, _ in ended), ended
    told = "".join(words for _, words in ended)
    assert told.count(sentence) == 1, told
    assert told.count("program.py: ") == (where != "a bug"), told
    assert told.count("Traceback") == (where == "a bug"), told
    assert told.count("DDP is freed") == (0 if where == "start" else 2), told
    assert "gloo" not in told


def test_rank_0_decides_the_default_data_set(tmp_path):
    out = tmp_path / "out"
    program = write_program(
        tmp_path / "program.py", flags(**SMALL, gradient_accumulation_steps=2, out_dir=out),
        "def load(name, *args, real=train.data.load):",
        "    if name is None:",
        "        assert train.RANK == 0",
        "        time.sleep(3)  # a slow download",
        "    return real(name or 'pydoc', *args)",
        "train.data.load = load",
    )  # fmt: skip
    assert [status for status, _ in run_ranks(2, program)] == [0, 0]
    assert load_checkpoint(out / "last.pt")["train_config"]["dataset"] == "pydoc"
