"""The scripts as a user runs them."""

import contextlib
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
from collections import Counter
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import data
import sample
import train
from data.tokenizer import ByteTokenizer, CharTokenizer
from denseformer import DWA, DenseFormer, DenseFormerConfig, rotary_angles
from lab import analyze, bench
from lib.checkpoint import load_checkpoint
from lib.figures import text_heat_map
from lib.files import UserError
from lib.flags import parse_flags
from tests.helpers import (
    SHARED,
    SMALL,
    flags,
    log,
    losses,
    same_weights,
    torchrun,
    weights,
    write_program,
)
from train import StopSignals, show_run

CPU = torch.device("cpu")


# -----------------------------------------------------------------------------
# Batches


@pytest.mark.parametrize("block_size", [7, 16, 64])
def test_validation_predicts_each_token_once(block_size):
    tokens = np.random.default_rng(0).integers(17, size=333)
    torch.manual_seed(0)
    shape = {"vocab_size": 17, "n_layer": 3, "n_head": 2, "n_embd": 8}
    model = DenseFormer(DenseFormerConfig(**shape, block_size=block_size))

    def evaluate(eval_iters, batch_size=4, steps=1):
        config = train.TrainConfig(
            block_size=block_size, batch_size=batch_size, gradient_accumulation_steps=steps,
            eval_iters=eval_iters,
        )  # fmt: skip
        return train.evaluate(model, tokens, config, CPU, contextlib.nullcontext(), StopSignals())

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
    for batch_size, accumulation in ((60, 1), (30, 2), (15, 4)):
        assert x.equal(next(batch(5, batch_size, accumulation)))


def test_two_micro_batches_or_two_processes_are_one(text, tmp_path):
    same = SMALL | {"dataset": text, "dtype": "float32", "dwa": "3:0,1"}  # X_3 is unread
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


def test_torchrun_messages(monkeypatch):
    monkeypatch.setenv("PYTHONWARNINGS", "always::ResourceWarning")  # of files left open
    run = torchrun(2, "--help")
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("usage:") == 1
    assert "/dev/null" not in run.stderr
    run = torchrun(2, "--gradient_accumulation_steps=3")
    assert run.returncode == 1
    assert run.stderr.count("3 must be divisible by the 2 processes") == 1


# -----------------------------------------------------------------------------
# Training, stopping, resuming


def test_train_then_sample(trained, tmp_path, capsys):
    out = trained / "dense"
    assert [s for s, loss, _ in losses(out) if loss] == list(range(5, 41, 5))
    assert [s for s, _, val in losses(out) if val] == list(range(0, 41, 10))
    assert [e["step"] for e in log(out) if "alpha" in e] == [2, 5, 10, 20, 40]
    best, last = (load_checkpoint(out / name).keys() for name in ("best.pt", "last.pt"))
    assert last - best == {"optimizers", "scaler"}
    pytest.importorskip("matplotlib")
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")

    def write(*args):
        capsys.readouterr()
        sample.main([f"--out_dir={out}", "--max_new_tokens=60", *args])
        return capsys.readouterr().out

    once = write("--start=that")
    assert once.startswith("that")
    assert len(once) == 4 + 60 + 1
    assert once != write("--start=that", "--seed=1")
    for greedy in ("--temperature=0", "--top_k=1", "--top_p=1e-9"):
        assert write(greedy) == write(greedy, "--seed=1")
    prompt = tmp_path / "prompt.txt"
    prompt.write_bytes(b"\xef\xbb\xbfthat")  # with a byte order mark
    both = write(f"--start=FILE:{prompt}", "--num_samples", "2")
    assert both.split("--- sample ")[1] == f"1 ---\n{once}\n"
    assert both.split("--- sample ")[2] != f"2 ---\n{once}"
    prompt.write_bytes(b"a\r\nb")  # as it is, for models that can read \r, unlike this one
    for tokenizer in (CharTokenizer("\n\rab"), ByteTokenizer()):
        assert sample.read_prompt(f"FILE:{prompt}", tokenizer)[0] == "a\r\nb"
    prompt.write_bytes(b"not\r\n")
    assert write(f"--start=FILE:{prompt}").startswith("not\n")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_learns_more_than_how_often_each_character_occurs(text, tmp_path, optimizer):
    same = SMALL | {"max_iters": 150, "eval_interval": 150, "learning_rate": 1e-2}
    new = flags(**same, warmup_iters=10, optimizer=optimizer, dataset=text, out_dir=tmp_path / "a")
    assert train.main(new) == 0
    counts = np.array(list(Counter(Path(text).read_text()).values()))
    entropy = np.log(counts.sum()) - (counts * np.log(counts)).sum() / counts.sum()
    assert losses(tmp_path / "a")[-1][2] < 0.6 * entropy


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


def test_a_signal_during_the_last_validation_loses_nothing(text, tmp_path, signal_at):
    out, before = tmp_path / "out", signal.getsignal(signal.SIGINT)
    signal_at(signal.SIGINT, "evaluate", 2)
    same = flags(**SMALL | {"max_iters": 6, "eval_interval": 99}, dataset=text, out_dir=out)
    assert train.main(same) == 128 + signal.SIGINT
    assert signal.getsignal(signal.SIGINT) is before
    assert load_checkpoint(out / "last.pt")["step"] == 6
    assert train.main(["--resume", f"--out_dir={out}"]) == 0
    assert losses(out)[-1][2]


def test_a_signal_during_the_first_validation_replaces_the_overwritten_run(run, text, signal_at):
    signal_at(signal.SIGINT, "evaluate", 1)
    new = flags(**SMALL, dataset=text, out_dir=run)
    assert train.main([*new, "--overwrite"]) == 128 + signal.SIGINT
    for name in ("best.pt", "last.pt"):
        assert load_checkpoint(run / name)["step"] == 0
    assert log(run) == []


def test_resume_flags(run, trained, tmp_path, fails):
    again = ["--resume", f"--out_dir={run}"]
    for wrong, says in (
        ("--max_iters=5", "is already at step 40"), ("--n_layer=4", "--n_layer"),
        ("--seed=2", "--seed"), ("--batch_size=2", "stay at 4 sequences"),
    ):  # fmt: skip
        fails(train, *again, wrong, says=[says], status=2)
    # The text has moved, and only the checkpoint was copied.
    moved = tmp_path / "moved.txt"
    moved.write_bytes((trained / "my.txt").read_bytes())
    (run / "log.jsonl").unlink()
    more = [f"--dataset={moved}", "--max_iters=41", "--weight_decay=0.5", "--beta2=0.5"]
    assert train.main([*again, *more]) == 0
    checkpoint = load_checkpoint(run / "last.pt")
    groups = [group for o in checkpoint["optimizers"] for group in o["param_groups"]]
    assert {group["weight_decay"] for group in groups} == {0.5, 0.0}
    assert {group["betas"][1] for group in groups if "betas" in group} == {0.5}
    rate = train.get_lr(40, train.TrainConfig(**checkpoint["train_config"]))
    assert all(g["lr"] == pytest.approx(rate * g.get("lr_scale", 1)) for g in groups)
    scales = [group["lr_scale"] for group in groups if "lr_scale" in group]
    assert scales == [train.PRESETS["cpu"]["dwa_lr_scale"]]
    assert checkpoint["train_config"]["dataset"] == str(moved)
    moved.write_text("something else altogether " * 300)
    with pytest.raises(UserError, match="not the data"):
        train.main(again)
    moved.unlink()
    with pytest.raises(UserError, match="if the data has moved, add --dataset"):
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


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_an_overflow_in_float16_is_skipped_by_both_optimizers(text, tmp_path, monkeypatch, value):
    """One gradient of a matrix, which is Muon's, overflows in step 5."""

    class Overflowing(DenseFormer):
        def __init__(self, config):
            super().__init__(config)
            self.blocks[1].mlp.c_fc.weight.register_hook(self.overflow)
            model.append(self)

        def overflow(self, gradient):
            return gradient.fill_(value) if len(before) == 5 else gradient

    def get_lr(step, config, real=train.get_lr):  # called before each step of the optimizers
        before.append({name: p.detach().clone() for name, p in model[0].named_parameters()})
        return real(step, config)

    model, before = [], []
    monkeypatch.setattr(train, "DenseFormer", Overflowing)
    monkeypatch.setattr(train, "get_lr", get_lr)
    new = SMALL | {"max_iters": 8, "dtype": "float16", "optimizer": "muon"}
    assert train.main(flags(**new, dataset=text, out_dir=tmp_path / "out")) == 0
    for name in before[0]:
        assert before[6][name].equal(before[5][name]), name
        assert before[7][name].isfinite().all()
    assert not before[7]["wte.weight"].equal(before[6]["wte.weight"])


@pytest.mark.parametrize("clip", [1e-12, 0])
def test_the_gradient_is_clipped(text, tmp_path, clip):
    """To a norm far below AdamW's epsilon, so that nothing is learned."""
    new = {"optimizer": "adamw", "weight_decay": 0, "warmup_iters": 0, "dtype": "float32"}
    assert train.main(flags(**SMALL, **new, grad_clip=clip, dataset=text, out_dir=tmp_path)) == 0
    first, *_, last = (val for _, _, val in losses(tmp_path) if val)
    assert (abs(first - last) < 1e-4) == (clip > 0)


def test_main_from_a_thread_and_with_its_own_backend(text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "show_run", show_run)  # with the plot and the sample
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("svg")
    result, same = [], flags(**SMALL | {"max_iters": 2}, dataset=text, out_dir=tmp_path / "out")
    thread = threading.Thread(target=lambda: result.append(train.main(same)))
    thread.start()
    thread.join()
    assert result == [0]
    assert matplotlib.get_backend() == "svg"
    assert (tmp_path / "out" / "loss.png").exists()
    shown = capsys.readouterr().out
    assert "\nY_3  |" in shown
    assert "a sample:" in shown
    # A plot that fails costs one line.
    (tmp_path / "out" / "loss.png").unlink()
    (tmp_path / "out" / "loss.png").mkdir()
    assert train.main(["--resume", f"--out_dir={tmp_path}/out", "--max_iters=3"]) == 0
    assert re.search(r"no loss curve: .*Is a directory.*a sample:", capsys.readouterr().out, re.S)


@pytest.mark.skipif(not SHARED.exists(), reason="no real texts here")
def test_openwebtext_from_its_shards_to_a_sample(tmp_path, monkeypatch, capsys, fails):
    pytest.importorskip("pyarrow")
    pytest.importorskip("tiktoken")
    mirror, out = tmp_path / "mirror" / "plain_text", tmp_path / "out"
    mirror.mkdir(parents=True)
    for i, shard in enumerate(sorted((SHARED / "openwebtext/plain_text").iterdir())):
        (mirror / f"train-{i:05d}-of-00080.parquet").symlink_to(shard)
    monkeypatch.setenv("OPENWEBTEXT_URL", str(mirror.parent))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
    small = SMALL | {"max_iters": 2, "eval_iters": 1, "out_dir": out}
    assert train.main(flags(**small, dataset="openwebtext", shards=2)) == 0
    assert losses(out)[-1][2] == pytest.approx(math.log(50304), abs=0.2)
    capsys.readouterr()
    sample.main([f"--out_dir={out}", "--start=The", "--max_new_tokens=5"])
    assert capsys.readouterr().out.startswith("The")
    assert train.main(["--resume", f"--out_dir={out}", "--max_iters=3"]) == 0
    fails(train, "--resume", f"--out_dir={out}", "--shards=1", says=["--shards 1"], status=2)


def test_an_existing_run_is_kept(run, fails):
    checkpoint = (run / "best.pt").read_bytes()
    same = flags(**SMALL | {"max_iters": 1}, dataset="none.txt", out_dir=run)
    fails(train, *same, says=["contains a run.*--resume.*--overwrite"])
    (run / "last.pt").unlink()  # best.pt alone is a run as well, but one that cannot be resumed
    fails(train, *same, says=["contains a run.*: use --overwrite"])
    (run / "last.pt").write_bytes(checkpoint)
    fails(train, "--resume", f"--out_dir={run}", says=["lacks the optimizers' state.*--init_from"])
    (run / "last.pt").unlink()
    fails(train, *same, f"--init_from={run}/best.pt", says=["contains a run"])
    assert (run / "best.pt").read_bytes() == checkpoint


def test_flags_override_presets_which_override_defaults():
    for name, preset in train.PRESETS.items():
        config, _ = train.load_config([f"--preset={name}", "--n_layer=5", "--beta1=0.8"])
        expected = asdict(train.TrainConfig()) | preset
        assert asdict(config) == expected | {"preset": name, "n_layer": 5, "beta1": 0.8}


def test_the_learning_rate():
    config = train.TrainConfig(learning_rate=1.0, min_lr=0.1, warmup_iters=10, max_iters=110)
    rates = [train.get_lr(step, config) for step in (0, 9, 10, 60, 110)]
    assert rates == pytest.approx([0.1, 1.0, 1.0, 0.55, 0.1])


def test_a_compiler_that_fails_ends_the_run_with_a_hint(text, tmp_path, monkeypatch, fails):
    def backend(graph, inputs):
        raise RuntimeError("no C++ compiler\nmore")

    monkeypatch.setattr(DenseFormer, "compile", lambda model: model.loss.compile(backend=backend))
    new = flags(**SMALL, dataset=text, out_dir=tmp_path / "out")
    assert train.main([*new, "--max_iters=1"]) == 0
    before = {name: (tmp_path / "out" / name).read_bytes() for name in ("last.pt", "log.jsonl")}
    says = [r"^train.py: torch.compile failed: .*no C\+\+ compiler.*; --compile=False"]
    fails(train, *new, "--compile", "--overwrite", says=says)
    for name, content in before.items():  # not overwritten yet
        assert (tmp_path / "out" / name).read_bytes() == content
    assert train.main([*new, "--compile=False", "--max_iters=1", "--overwrite"]) == 0


# -----------------------------------------------------------------------------
# DWA


def test_init_from_keeps_what_was_learned(trained, tmp_path, fails):
    begin = {"batch_size": 4, "device": "cpu", "dtype": "float32", "max_iters": 10}
    begin |= {"optimizer": "adamw", "learning_rate": 1e-2, "init_from": trained / "plain/last.pt"}
    # Shape and data come from the checkpoint; the DenseFormer starts as the same plain model.
    dense = tmp_path / "dense"
    assert train.main(flags(**begin, out_dir=dense, dwa="1x1")) == 0
    assert losses(dense)[0][2] == losses(trained / "plain")[-1][2]
    alpha = weights(dense)["dwa.alpha"]
    assert (alpha != 0).equal(DWA(3, "1x1").mask)
    # With another pattern, the alphas that it has in common are kept.
    sparse, begin = tmp_path / "sparse", begin | {"init_from": dense / "last.pt"}
    still = begin | {"max_iters": 1, "learning_rate": 0.0, "min_lr": 0}
    assert train.main(flags(**still, out_dir=sparse, dwa="3x1")) == 0
    assert weights(sparse)["dwa.alpha"].equal(torch.tensor(
        [[0, alpha[0, 1], 0, 0], [0, 0, alpha[1, 2], 0], [alpha[2, 0], 0, 0, alpha[2, 3]]]
    ))  # fmt: skip
    for wrong, status, says in (
        ({"n_layer": 4}, 2, "--n_layer 4"), ({"tokenizer": "byte"}, 1, "tokenizer"),
    ):  # fmt: skip
        new = flags(**begin, out_dir=tmp_path / "other", **wrong)
        fails(train, *new, says=[says], status=status)


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
    assert torch.tensor(snapshots[1]["alpha"]).allclose(weights(late)["dwa.alpha"], atol=1e-5)
    # A run that is stopped before the alphas start, and resumed, ends with the same weights.
    signal_at(signal.SIGTERM, "get_lr", 11)
    assert train.main(flags(**same, out_dir=cut)) == 128 + signal.SIGTERM
    assert train.main(["--resume", f"--out_dir={cut}"]) == 0
    assert same_weights(cut, late)


def test_text_heat_map():
    alpha = torch.tensor([[-0.2, 1.0, 0], [0.02, 0.05, -0.009]])
    shown = text_heat_map(alpha, torch.tensor([[True, True, False], [True, False, True]]))
    assert shown.splitlines()[1:3] == ["Y_1  |=█|", "Y_2  |░  |"]
    shown = text_heat_map(alpha, torch.tensor([[False, False, False], [True, False, True]]))
    assert shown.splitlines()[1] == "Y_1  = X_1"  # no DWA
    deep = text_heat_map(DWA(48).alpha.detach(), DWA(48).mask, max_rows=12).splitlines()
    assert len(deep) == 14
    assert deep[1].startswith("Y_1 ")
    assert deep[12].startswith("Y_48")
    assert max(map(len, deep)) <= 80


def test_prune_keeps_the_largest():
    dwa = DWA(2)
    with torch.no_grad():
        dwa.alpha.copy_(torch.tensor([[0.5, 1.0, 0.0], [0.1, -0.3, 0.2]]))
    assert analyze.prune(dwa, 0).mask.equal(dwa.mask)
    pruned = analyze.prune(dwa, 0.4)
    assert pruned.pattern == "1:0,1+2:1"
    assert pruned.alpha.allclose(torch.tensor([[0.5, 1, 0], [0, -0.3, 0]]))
    pruned = analyze.prune(dwa, 0.6)  # a row that loses all its alphas has no DWA
    assert pruned.pattern == "1:0,1"
    assert pruned.alpha.allclose(torch.tensor([[0.5, 1, 0], [0, 0, 1]]))


def test_analyze_measurements(trained):
    run = analyze.Run(trained / "dense/last.pt", 10**6, CPU)
    assert math.log(run.perplexity()) == pytest.approx(losses(trained / "dense")[-1][2], abs=1e-5)
    # Recompute the perplexity and the cosines with the formula, on whole windows.
    n, model = (len(run.val) - 1) // 16, run.model
    run.offsets = run.offsets[:n]
    ids = torch.tensor(run.val[: n * 16 + 1].astype(np.int64))

    @torch.no_grad()
    def recompute(alpha):
        X = [model.wte(ids[:-1].view(n, 16))]
        Y, cosines = X[0], [1.0]
        for i, block in enumerate(model.blocks):
            X.append(block(Y, rotary_angles(torch.arange(16), 8, Y.dtype)))
            Y = sum(a * x for a, x in zip(alpha[i], X, strict=False))
            cosines.append(F.cosine_similarity(X[0], Y, dim=-1).mean().item())
        logits = F.linear(model.ln_f(Y), model.wte.weight)
        return F.cross_entropy(logits.flatten(0, 1), ids[1:]).exp().item(), cosines

    with torch.no_grad():
        model.dwa.alpha += 0.1 * torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    alpha = model.dwa.alpha.detach().clone()
    perplexity, cosines = recompute(alpha)
    assert run.cosines() == pytest.approx(cosines, abs=1e-5)
    smallest = (alpha.abs() + ~model.dwa.mask).flatten().argsort()[:5]  # of 9 alphas
    half = recompute(alpha.flatten().index_fill(0, smallest, 0).view(3, 4))[0]
    assert half != pytest.approx(perplexity, rel=1e-3)
    assert run.dropped([0, 0.5]) == pytest.approx([perplexity, half], rel=1e-5)
    assert model.dwa.alpha.equal(alpha)


def test_analyze(trained, run, tmp_path, capsys, monkeypatch, fails):
    pytest.importorskip("matplotlib")
    plain = trained / "plain"
    analyze.main(flags(out_dir=run, plain=plain, prune=0.5, device="cpu"))
    shown = capsys.readouterr().out
    for name in ("alpha", "alpha-steps", "cosine", "dropped", "singular"):
        assert (run / f"{name}.png").read_bytes().startswith(b"\x89PNG"), name
    assert "Y_3" in shown
    best = load_checkpoint(run / "best.pt")["model"]
    s = torch.stack([torch.linalg.svdvals(best[f"blocks.{i}.mlp.c_fc.weight"]) for i in range(3)])
    assert re.search(rf"mlp.c_fc +{s.mean().item():.3f} ", shown)
    # The pruned model keeps its pattern when its training continues.
    out = tmp_path / "pruned"
    begin = flags(init_from=run / "pruned.pt", out_dir=out, max_iters=3, device="cpu")
    assert train.main(begin) == 0
    kept = weights(out)["dwa.alpha"]
    pattern = load_checkpoint(out / "last.pt")["model_config"]["dwa"]
    assert DWA(3, pattern).num_params() < DWA(3).num_params()
    assert not kept[~DWA(3, pattern).mask & DWA(3, pattern).mask.any(1, keepdim=True)].any()
    for wrong in ("--prune=1", f"--plain={run}"):
        fails(analyze, *flags(out_dir=run, device="cpu"), wrong, says=[wrong[:7]], status=2)
    # Without matplotlib, the tables are still printed.
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    analyze.main(flags(out_dir=run, checkpoint="last", prune=0.5, device="cpu"))
    assert load_checkpoint(run / "pruned.pt").keys() == load_checkpoint(run / "best.pt").keys()
    shown = capsys.readouterr().out
    assert "pip install matplotlib" in shown
    assert "perplexity" in shown


# -----------------------------------------------------------------------------
# The other scripts


def test_the_home_folder_in_flags(trained, tmp_path, monkeypatch, capsys):
    home = str(tmp_path / "home")
    monkeypatch.setenv("HOME", home)
    shutil.copytree(trained, home)
    (tmp_path / "home" / "prompt.txt").write_text("to be")
    new = SMALL | {"max_iters": 1, "dataset": "~/my.txt", "out_dir": "~/new"}
    assert train.main(flags(**new)) == 0
    more = {"init_from": "~/new/last.pt", "out_dir": "~/more", "max_iters": 1, "device": "cpu"}
    assert train.main(flags(**more)) == 0
    capsys.readouterr()
    sample.main(["--out_dir=~/more", "--max_new_tokens=1", "--start=FILE:~/prompt.txt"])
    assert capsys.readouterr().out.startswith("to be")
    for settings, args in (
        (analyze.AnalyzeConfig, ["--out_dir=~/dense", "--plain=~/plain"]),
        (bench.BenchConfig, ["--json=~/bench.json"]),
    ):
        assert all(path.startswith(home) for path in parse_flags(settings, args, "").values())
    assert os.listdir(tmp_path) == ["home"]  # no folder named ~


def test_only_the_names_of_flags_are_normalized():
    words = ["--out-dir=a-b", "--start", "--Well-known man, ", "--max-new-tokens=1"]
    expected = {"out_dir": "a-b", "start": "--Well-known man, ", "max_new_tokens": 1}
    assert parse_flags(sample.SampleConfig, words, "") == expected


def test_a_character_of_several_tokens_is_printed_whole(run, capsys, monkeypatch):
    tokens = [torch.tensor([[byte]]) for byte in "é€".encode()]
    monkeypatch.setattr(DenseFormer, "stream", lambda *args: iter(tokens))
    loaded = DenseFormer, ByteTokenizer(), {"step": 0}
    monkeypatch.setattr(sample, "load_model", lambda *args: loaded)
    sample.main([f"--out_dir={run}", "--start=a"])
    shown = capsys.readouterr()
    assert shown.out == "aé€\n"
    assert "best.pt is from step 0, before training" in shown.err


def test_the_bench_runs_whole(tmp_path, capsys, monkeypatch):
    report, graphs = tmp_path / "bench.json", []

    def backend(graph, inputs):  # as quick as the eager mode
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    monkeypatch.setenv("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "0")  # restored after the test
    shape = {"n_layer": 5, "n_embd": 64, "batch_size": 1, "block_size": 64, "rounds": 1}
    shape |= {"patterns": "1x1,4x5", "device": "cpu", "compile_model": True}
    assert bench.main(flags(**shape, json=report)) == 0
    times = json.loads(report.read_text())["times"]
    assert {*times} == {"dwa", "train", "forward", "decode", "recompute"}
    assert {*times["dwa"]} == {"1x1", "4x5", "1x1 naive", "1x1 tensordot"}
    compiled = {"plain, compiled", "1x1 naive, compiled"}
    assert {*times["train"]} == {*times["dwa"], "plain", *compiled}
    assert len(graphs) == 2  # each whole model is one graph
    assert "1x1 naive: 0 s for a training step" in re.sub(r"\d+ s", "0 s", capsys.readouterr().out)
    # The goals, which only some shapes have: one is met, one missed, one not measured.
    goals = {"naive": 2.0, "1x1 train": 1.1, "4x5 train": 1.0}
    assert bench.print_goals(goals, {"naive": 2.5, "1x1 train": 1.2}) == 1
    assert re.search("met .*fast as naive\nMISSED.*1x1 train", capsys.readouterr().out)


def test_the_comparison_runs_whole_and_resumes(text, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from lab import compare as run

    calls = []

    def run_script(name, *args, **environment):  # in this process, which saves start-up time
        calls.append(name)
        mains[name](args)

    mains = {"train.py": train.main, "analyze.py": analyze.main}
    monkeypatch.setattr(run, "run_script", run_script)
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    small = {k: v for k, v in SMALL.items() if k != "learning_rate"} | {"n_layer": 5}
    config = {"name": "small", "dataset": text, "variants": "plain,pruned as 4x5,X_0 and X_1",
              "jobs": 1, "seeds": 1, "sweep": "3e-3", "out_dir": tmp_path / "runs"}  # fmt: skip
    config["train"] = " ".join(flags(**small))
    run.main(flags(**config))
    done = json.loads((tmp_path / "small.json").read_text())
    assert len(done) == 5
    for part in ("=none ", "=1x1 ", r"dwa=\d+:", r"=last1\+1:1\+2:1", "max_iters=10 "):
        assert any(re.search(part, f"{key} ") for key in done), (part, done)
    plain = next(loss for key, loss in done.items() if "--dwa=none" in key)
    (folder,) = (tmp_path / "runs" / "small").glob("none-*")
    assert plain == losses(folder)[-1][2]
    parameters = sum(w.numel() for name, w in weights(folder).items() if "dwa" not in name)
    table = Path(tmp_path / "small.md").read_text()
    assert f"| plain | 5 | {parameters:,} | | | {plain:.4f} ±" in table
    assert (tmp_path / "small.png").read_bytes().startswith(b"\x89PNG")
    assert calls.count("train.py") == 5
    run.main(flags(**config))
    assert calls.count("train.py") == 5
