"""The scripts as a user runs them."""

import contextlib
import copy
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import analyze
import bench
import common
import data
import sample
import train
from data.tokenizer import ByteTokenizer
from denseformer import DWA, DenseFormer, DenseFormerConfig, rotary_angles
from tests.helpers import HERE, SMALL, flags, losses, script, weights


@pytest.mark.parametrize("block_size", [7, 16, 64])
def test_validation_predicts_each_token_once(block_size):
    tokens = np.random.default_rng(0).integers(17, size=333)
    torch.manual_seed(0)
    shape = {"vocab_size": 17, "n_layer": 3, "n_head": 2, "n_embd": 8}
    model = DenseFormer(DenseFormerConfig(**shape, block_size=block_size))
    config = train.TrainConfig(batch_size=4, block_size=block_size, eval_iters=1000)
    cpu, plain = torch.device("cpu"), contextlib.nullcontext()
    ours = train.evaluate(model, tokens, config, train.Ranks(), 4, cpu, plain, [])
    total = 0.0
    for s in range(0, 332, block_size):
        x, y = tokens[s : s + block_size], tokens[s + 1 : s + block_size + 1]
        logits = model(torch.tensor(x[None, : len(y)]), torch.tensor(y[None]))[0]
        total += F.cross_entropy(logits[0], torch.tensor(y), reduction="sum").item()
    assert ours == pytest.approx(total / 332, rel=1e-6)

    config.eval_iters = 1
    sampled = train.evaluate(model, tokens, config, train.Ranks(), 4, cpu, plain, [])
    assert (
        sampled == train.evaluate(model, tokens, config, train.Ranks(), 4, cpu, plain, []) != ours
    )


class OneOf(train.Ranks):
    """One process of n, as torchrun would start it, without the others."""

    def __init__(self, rank, n):
        self.rank, self.n = rank, n


def test_batches_depend_on_seed_and_step_alone():
    tokens = np.arange(100, dtype=np.uint8)
    dataset = data.Dataset("a", tokens, tokens, ByteTokenizer())
    config = train.TrainConfig(batch_size=60, block_size=8, seed=1)

    def batch(step, ranks=None, parts=1):
        ranks = ranks or train.Ranks()
        batches = train.get_batch(dataset, config, step, ranks, parts, torch.device("cpu"))
        assert len({x.shape for x, _ in batches}) == 1  # or a compiled model is compiled again
        x, y = (torch.cat(t) for t in zip(*batches, strict=True))
        real = y[:, 0] >= 0
        return x[real], y[real]

    x, y = batch(5)
    assert torch.equal(x, batch(5)[0])
    assert not torch.equal(x, batch(6)[0])
    assert torch.equal(y, x + 1)  # the token that follows, and never beyond the end
    assert x.min() == 0  # the first window and the last are drawn too
    assert y.max() == 99
    assert torch.equal(x, batch(5, parts=7)[0])
    for n, parts in ((2, 1), (5, 1), (4, 4)):  # every window once, whoever takes it
        shares = [batch(5, OneOf(rank, n), parts)[0] for rank in range(n)]
        assert {len(share) for share in shares} == {60 // n}
        assert torch.equal(torch.cat(shares)[:, 0].sort().values, x[:, 0].sort().values)


def test_train_then_sample(text, tmp_path):
    out = tmp_path / "out"
    run = script("train.py", *flags(**SMALL, dataset=text, out_dir=out, dwa="2x1"))
    assert run.returncode == 0, run.stderr
    assert "DenseFormer 2x1" in run.stdout
    assert "what it writes now" in run.stdout
    log = losses(out)
    assert [s for s, loss, _ in log if loss] == list(range(5, 41, 5))
    assert [s for s, _, val in log if val] == list(range(0, 41, 10))
    assert log[-1][2] < log[0][2] - 0.2  # it learned
    pytest.importorskip("matplotlib")
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")

    def write(*args):
        run = script("sample.py", f"--out_dir={out}", *args)
        assert run.returncode == 0, run.stderr
        return run.stdout

    Path(text).unlink()  # a checkpoint needs no data set
    once = write("--start=that", "--max_new_tokens=60")
    assert once.startswith("that")
    assert len(once) == 4 + 60 + 1
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("that")
    both = write(f"--start=FILE:{prompt}", "--max_new_tokens", "60", "--num_samples", "2")
    assert both.split("--- sample ")[1] == f"1 ---\n{once}\n"
    assert both.split("--- sample ")[2] != f"2 ---\n{once}"


def test_resumed_is_uninterrupted(text, tmp_path):
    longer = SMALL | {"max_iters": 400, "gradient_accumulation_steps": 2, "dropout": 0.1}
    same = flags(**longer, dataset=text)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert script("train.py", *same, f"--out_dir={whole}").returncode == 0

    command = [sys.executable, str(HERE / "train.py"), *same, f"--out_dir={parts}"]
    for number, after in ((signal.SIGTERM, "step     25"), (signal.SIGINT, "step    130")):
        run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        for line in run.stdout:
            if line.startswith(after):
                run.send_signal(number)
                break
        rest = run.stdout.read()
        assert run.wait() == 128 + number
        assert "to go on: python train.py --resume --out_dir" in rest
        assert common.load_checkpoint(parts / "last.pt")["step"] < 400
        command = [sys.executable, str(HERE / "train.py"), "--resume", f"--out_dir={parts}"]
    # What a crash wrote beyond the last checkpoint goes, a half-written line too.
    with (parts / "log.jsonl").open("a") as log:
        log.write('{"step": 390, "loss": 9.9}\n{"step": 39')
    assert script(*command[1:]).returncode == 0
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(parts)[name]), name
    assert losses(parts) == losses(whole)


def test_what_a_resumed_run_takes_from_its_flags(text, tmp_path, capsys):
    out = tmp_path / "out"
    same = flags(**SMALL | {"max_iters": 6, "eval_interval": 3}, dataset=text, out_dir=out)
    assert train.main([*same, "--dtype=float32", "--weight_decay=0.3"]) == 0
    again = ["--resume", f"--out_dir={out}"]
    with pytest.raises(SystemExit) as stop:  # there is nothing left to do in this direction
        train.main([*again, "--max_iters=5"])
    assert stop.value.code == 2
    assert "is at step 6 already" in capsys.readouterr().err
    (out / "log.jsonl").unlink()  # only the checkpoint was copied to another machine
    again += [f"--dataset={Path(text).parent}/./{Path(text).name}"]  # another way to write the same
    assert train.main([*again, "--max_iters=7", "--weight_decay=0.5", "--beta2=0.5"]) == 0
    assert "in float32" in capsys.readouterr().out
    groups = [g for o in common.load_checkpoint(out / "last.pt")["optimizers"]
              for g in o["param_groups"]]  # fmt: skip
    assert {g["weight_decay"] for g in groups} == {0.5, 0.0}
    assert {g["betas"][1] for g in groups if "betas" in g} == {0.5}
    # To float16, which scales its gradients, and back.
    new = [*flags(**SMALL | {"max_iters": 3}, dataset=text, out_dir=tmp_path / "b"), "--dwa=none"]
    assert train.main([*new, "--optimizer=adamw"]) == 0
    for n, dtype in ((4, "float16"), (5, "float32")):
        again = ["--resume", f"--out_dir={tmp_path}/b", f"--max_iters={n}", f"--dtype={dtype}"]
        assert train.main(again) == 0


def test_a_signal_in_the_last_validation_loses_nothing(text, tmp_path, monkeypatch, capsys):
    real, calls = train.evaluate, []

    def evaluate(*args):
        calls.append(args)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(train, "evaluate", evaluate)
    same = flags(**SMALL | {"max_iters": 6, "eval_interval": 99}, dataset=text)
    assert train.main([*same, f"--out_dir={tmp_path}/out"]) == 128 + signal.SIGINT
    assert "to go on" in capsys.readouterr().out
    assert common.load_checkpoint(tmp_path / "out" / "last.pt")["step"] == 6
    assert train.main(["--resume", f"--out_dir={tmp_path}/out"]) == 0
    assert losses(tmp_path / "out")[-1][2]


def torchrun(n, *args):
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n}"]
    command += ["--standalone", str(HERE / "train.py"), *args]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)


def test_two_processes_are_one(text, tmp_path):
    # Not Muon, which works in bfloat16.
    settings = SMALL | {"dtype": "float32", "batch_size": 6, "optimizer": "adamw", "dwa": "2x1"}
    same = flags(**settings, dataset=text)
    one, two, parts = (tmp_path / name for name in ("one", "two", "parts"))
    assert script("train.py", *same, f"--out_dir={one}").returncode == 0
    run = torchrun(2, *same, f"--out_dir={two}", "--gradient_accumulation_steps=2")
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("what it writes now") == 1
    for name, tensor in weights(one).items():
        torch.testing.assert_close(weights(two)[name], tensor, rtol=1e-3, atol=2e-4)
    for ours, theirs in zip(losses(two), losses(one), strict=True):
        assert ours[0] == theirs[0]
        assert [x for x in ours if x] == pytest.approx([x for x in theirs if x], rel=1e-4)

    # Begun by two processes, resumed by one, and again by two.
    assert torchrun(2, *same, f"--out_dir={parts}", "--max_iters=20").returncode == 0
    for python in (script, lambda _, *args: torchrun(2, *args)):
        steps = common.load_checkpoint(parts / "last.pt")["step"] + 10
        run = python("train.py", "--resume", f"--out_dir={parts}", f"--max_iters={steps}")
        assert run.returncode == 0, run.stderr
    assert [step for step, _, val in losses(parts) if val] == [0, 10, 20, 30, 40]

    run = torchrun(4, *same, f"--out_dir={tmp_path}/four")
    assert run.returncode != 0
    assert "--batch_size 6 does not divide among 4 processes" in run.stderr
    run = torchrun(2, *same, f"--out_dir={one}")
    assert run.returncode != 0
    assert "holds a run already" in run.stderr


def test_a_step_is_cut_to_fit_the_memory():
    cpu = torch.device("cpu")
    small = DenseFormer(DenseFormerConfig(17, block_size=8, n_layer=2, n_head=2, n_embd=8))
    large = copy.copy(small)  # the shape is all that counts
    large.config = DenseFormerConfig(n_layer=12, n_head=12, n_embd=768, block_size=256)
    large.num_params = lambda: 124_000_000
    assert train.find_parts(small, 12, torch.float32, cpu) == 1
    assert train.find_parts(large, 1, torch.float32, cpu) == 1  # one is the least there is
    one = train.memory(large, 1, torch.bfloat16)
    assert 16 * large.num_params() < one < 8e9
    parts = train.find_parts(large, 400, torch.bfloat16, cpu)
    assert train.memory(large, math.ceil(400 / parts), torch.bfloat16) <= 6.4e9
    assert train.memory(large, math.ceil(400 / (parts - 1)), torch.bfloat16) > 6.4e9


def test_presets_are_settings():
    for name, preset in train.PRESETS.items():
        config = train.TrainConfig(**preset | {"preset": name})
        DenseFormerConfig(**train.model_flags(config), vocab_size=50304)
    paper = train.TrainConfig(**train.PRESETS["paper-48"])
    assert paper.n_embd // paper.n_head == 64
    assert paper.warmup_iters == 0.05 * paper.max_iters


def test_init_from_keeps_what_was_learned(text, tmp_path, capsys):
    plain, dense = tmp_path / "plain", tmp_path / "dense"
    same = SMALL | {"dataset": text, "max_iters": 10, "n_embd": 24}
    assert train.main(flags(**same, out_dir=plain, dwa="none")) == 0
    begin = {"init_from": plain / "last.pt", "dataset": text, "batch_size": 4, "device": "cpu"}
    begin |= {"max_iters": 10, "optimizer": "adamw", "learning_rate": 1e-2}
    # Shape and data are the checkpoint's; a DenseFormer begins as the plain model it is made of.
    its_data = {name: value for name, value in begin.items() if name != "dataset"}
    assert train.main(flags(**its_data, out_dir=dense, dwa="1x1")) == 0
    assert losses(dense)[0][2] == losses(plain)[-1][2]
    alpha = weights(dense)["dwa.alpha"]
    assert (alpha != 0).equal(DWA(3, "1x1").mask)
    # Another pattern keeps the alphas that it has.
    sparse = tmp_path / "sparse"
    begin["init_from"] = dense / "last.pt"
    assert train.main(flags(**begin | {"max_iters": 1, "learning_rate": 0.0}, min_lr=0,
                            out_dir=sparse, dwa="3x1")) == 0  # fmt: skip
    assert weights(sparse)["dwa.alpha"].equal(torch.tensor(
        [[0, alpha[0, 1], 0, 0], [0, 0, alpha[1, 2], 0], [alpha[2, 0], 0, 0, alpha[2, 3]]]
    ))  # fmt: skip
    with pytest.raises(SystemExit):
        train.main(flags(**begin, out_dir=tmp_path / "other", n_layer=4))
    assert "--n_layer 4" in capsys.readouterr().err
    with pytest.raises(train.Stop, match="dwa_start_iter"):
        train.main(flags(**begin, out_dir=tmp_path / "other", dwa_start_iter=3))
    with pytest.raises(train.Stop, match="tokenizer"):
        train.main(flags(**begin, out_dir=tmp_path / "other", tokenizer="byte"))


def test_dwa_start_iter(text, tmp_path):
    same = SMALL | {"dataset": text, "optimizer": "adamw", "dtype": "float32"}
    plain, late, cut = (tmp_path / name for name in ("plain", "late", "cut"))
    assert train.main(flags(**same, out_dir=plain, dwa="none")) == 0
    assert train.main(flags(**same, out_dir=late, dwa_start_iter=20)) == 0
    assert losses(late)[:7] == losses(plain)[:7]  # up to the validation at step 20
    assert losses(late)[-1] != losses(plain)[-1]
    log = [json.loads(line) for line in (late / "log.jsonl").read_text().splitlines()]
    steps = [e["step"] for e in log if "alpha" in e]
    assert steps == [20, 40]
    assert torch.tensor(log[-2]["alpha"]).allclose(weights(late)["dwa.alpha"], atol=1e-5)
    # stopped before the start of the alphas and resumed, it is the same
    assert train.main(flags(**same, out_dir=cut, dwa_start_iter=20)) == 0
    shutil.copytree(late, cut, dirs_exist_ok=True)
    run = subprocess.Popen(
        [sys.executable, str(HERE / "train.py"), "--overwrite",
         *flags(**same, out_dir=cut, dwa_start_iter=20)], stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    for line in run.stdout:
        if line.startswith("step     10  val"):
            run.send_signal(signal.SIGTERM)
            break
    run.stdout.read()
    assert run.wait() == 128 + signal.SIGTERM
    assert common.load_checkpoint(cut / "last.pt")["step"] < 20
    assert train.main(["--resume", f"--out_dir={cut}", "--device=cpu", "--dtype=float32"]) == 0
    assert weights(cut)["dwa.alpha"].equal(weights(late)["dwa.alpha"])
    assert losses(cut) == losses(late)


def test_prune_keeps_the_largest():
    dwa = DWA(2)
    with torch.no_grad():
        dwa.alpha.copy_(torch.tensor([[0.5, 1.0, 0.0], [0.1, -0.3, 0.2]]))
    assert analyze.prune(dwa, 0).mask.equal(dwa.mask)
    pruned = analyze.prune(dwa, 0.4)
    assert pruned.pattern == "1:0,1+2:1"
    assert pruned.alpha.allclose(torch.tensor([[0.5, 1, 0], [0, -0.3, 0]]))
    # a row that loses all its alphas has no DWA
    pruned = analyze.prune(dwa, 0.6)
    assert pruned.pattern == "1:0,1"
    assert pruned.alpha.allclose(torch.tensor([[0.5, 1, 0], [0, 0, 1]]))


def test_analyze(text, tmp_path, capsys, monkeypatch):
    dense, plain = tmp_path / "dense", tmp_path / "plain"
    same = SMALL | {"dataset": text, "dtype": "float32"}
    assert train.main(flags(**same, out_dir=dense)) == 0
    assert train.main(flags(**same, out_dir=plain, dwa="none")) == 0
    run = analyze.Run(dense / "last.pt", 10**6, torch.device("cpu"))
    assert math.log(run.perplexity()) == pytest.approx(losses(dense)[-1][2], abs=1e-5)
    # without 0% nothing changes, and without all but the identity it is another model
    alpha = run.model.dwa.alpha.clone()
    none, half = run.dropped([0, 0.5])
    assert none == pytest.approx(run.perplexity())
    assert half != none
    assert run.model.dwa.alpha.equal(alpha)
    # cosines, once more by hand, from the naive way
    cosines = run.cosines()
    assert cosines[0] == 1
    ids = torch.tensor(run.val.astype(np.int64))
    ids = ids[: (len(ids) - 1) // 16 * 16].view(-1, 16)
    model = run.model
    with torch.no_grad():
        X = [model.wte(ids)]
        Y = X[0]
        for i, block in enumerate(model.blocks):
            X.append(block(Y, rotary_angles(0, 16, 8, Y)))
            Y = sum(a * x for a, x in zip(model.dwa.alpha[i], X, strict=False))
            cosine = ((X[0] * Y).sum(-1) / X[0].norm(dim=-1) / Y.norm(dim=-1)).mean()
            assert cosines[i + 1] == pytest.approx(cosine.item(), abs=2e-2)
    capsys.readouterr()

    pytest.importorskip("matplotlib")
    analyze.main(flags(out_dir=dense, plain=plain, prune=0.5, device="cpu"))
    shown = capsys.readouterr().out
    for name in ("alpha", "alpha-steps", "cosine", "dropped", "singular"):
        assert (dense / f"{name}.png").read_bytes().startswith(b"\x89PNG"), name
    assert "Y_3" in shown
    s = torch.stack([torch.linalg.svdvals(b.mlp.c_fc.weight) for b in model.blocks])
    assert re.search(rf"mlp.c_fc +{s.mean().item():.3f} ", shown)
    # the pruned model keeps its mask when it is trained on
    out = tmp_path / "pruned"
    begin = flags(init_from=dense / "pruned.pt", out_dir=out, dataset=text, max_iters=3)
    assert train.main([*begin, "--device=cpu"]) == 0
    kept = weights(out)
    assert (kept["dwa.alpha"] != 0).sum() < DWA(3).num_params()
    for wrong in (["--prune=1"], [f"--plain={dense}"]):
        with pytest.raises(SystemExit) as stop:
            analyze.main([*flags(out_dir=dense, device="cpu"), *wrong])
        assert stop.value.code == 2
    # without matplotlib the tables remain, and a sentence
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    capsys.readouterr()
    analyze.main(flags(out_dir=dense, device="cpu"))
    shown = capsys.readouterr().out
    assert "pip install matplotlib" in shown
    assert "perplexity" in shown


def test_an_existing_run_is_kept(text, tmp_path, monkeypatch, capsys):
    same = flags(**SMALL | {"max_iters": 2}, dataset=text, out_dir=tmp_path / "out")
    assert train.main(same) == 0
    before = (tmp_path / "out" / "last.pt").read_bytes()
    with pytest.raises(train.Stop, match=r"--resume.*--overwrite"):
        train.main(same)
    for wrong in ("--n_layer=4", "--seed=2", "--dataset=pydoc"):
        with pytest.raises(SystemExit) as stop:
            train.main([f"--out_dir={tmp_path}/out", "--resume", wrong])
        assert stop.value.code == 2
        assert wrong.split("=")[0] in capsys.readouterr().err
    assert (tmp_path / "out" / "last.pt").read_bytes() == before
    Path(text).write_text("something else altogether " * 300)
    with pytest.raises(train.Stop, match="not the data"):
        train.main([f"--out_dir={tmp_path}/out", "--resume"])
    assert train.main([*same, "--overwrite"]) == 0


@pytest.mark.parametrize("seen_by", ["log_interval", "eval_interval"])
def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(text, tmp_path, seen_by):
    out = tmp_path / "out"
    wild = SMALL | {"learning_rate": 1e30, "optimizer": "adamw", "warmup_iters": 0}
    wild |= {"log_interval": 99, "eval_interval": 99} | {seen_by: 1}
    with pytest.raises(train.Stop, match="learning_rate"):
        train.main(flags(**wild, dataset=text, out_dir=out))
    assert all(w.abs().max() < 10 for w in weights(out).values() if w.is_floating_point())


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--bathc_size=3"], "--batch_size"),
        (["--max-iter=3"], "--max_iters"),
        (["--max-iters", "none"], "--max_iters"),
        (["--qqq"], "--help"),
        (["3"], "'3'"),
        (["--max_iters=many"], "--max_iters"),
        (["--max_iters"], "--max_iters"),
        (["--learning_rate=nan"], "--learning_rate"),
        (["--batch_size=0"], "--batch_size must be at least 1"),
        (["--compile=perhaps"], "--compile"),
        (["--dtype=int8"], "--dtype"),
        (["--dwa=4x"], "4x"),
        (["--n_head=3"], "n_head"),
        (["--beta2=1"], "--beta2"),
        (["--min_lr=1"], "--min_lr"),
        (["--device=tpu9"], "--device"),
        (["--resume", "--overwrite"], "--overwrite"),
    ],
)
def test_a_wrong_flag_is_a_sentence(argv, says, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        train.main([f"--out_dir={tmp_path}/out", *argv])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert says in error
    assert error.count("\n") == 1


def test_what_sample_refuses(text, tmp_path, capsys):
    out = tmp_path / "out"
    train.main(flags(**SMALL | {"max_iters": 1}, dataset=text, out_dir=out))

    def refuses(error, match, *argv):
        with pytest.raises(error, match=match):
            sample.main([f"--out_dir={out}", *argv])

    refuses(SystemExit, "2", "--temperature=-1")
    refuses(SystemExit, "2", "--top_p=0")
    refuses(data.DataError, "'Z'", "--start=be Z")
    refuses(data.DataError, "empty", "--start=")
    refuses(data.DataError, "cannot read", f"--start=FILE:{tmp_path}/none.txt")
    best = out / "best.pt"
    whole = best.read_bytes()
    flipped = whole[:20000] + bytes(255 - b for b in whole[20000:20008]) + whole[20008:]
    cut = [whole[:n] for n in (0, 100, len(whole) // 2, len(whole) - 1)]
    for content in (*cut, flipped, b"hello", pickle.dumps({"format": 1})):
        best.write_bytes(content)
        refuses(common.CheckpointError, "damaged")
    torch.save({"format": "denseformer-99"}, best)
    refuses(common.CheckpointError, "denseformer-99")
    best.unlink()
    refuses(common.CheckpointError, "no checkpoint")
    run = script("sample.py", f"--out_dir={tmp_path}/nowhere")
    assert run.returncode == 1
    assert run.stderr.count("\n") == 1
    assert "train.py" in run.stderr


def test_a_checkpoint_never_runs_code(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "boom"),)

    torch.save({"format": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(common.CheckpointError):
        common.load_checkpoint(tmp_path / "bomb.pt")
    assert not (tmp_path / "boom").exists()


def test_a_save_that_fails_keeps_the_checkpoint_before(tmp_path):
    path = tmp_path / "last.pt"
    common.save_checkpoint(path, {"step": 1})
    with pytest.raises((TypeError, AttributeError, pickle.PicklingError)):
        common.save_checkpoint(path, {"step": 2, "rng": lambda: None})
    assert common.load_checkpoint(path)["step"] == 1
    assert os.listdir(tmp_path) == ["last.pt"]


def test_a_compiler_that_fails_is_done_without(text, tmp_path):
    settings = SMALL | {"max_iters": 5, "n_layer": 1}
    run = script(
        "train.py", *flags(**settings, dataset=text, out_dir=tmp_path / "out"), "--compile",
        env=os.environ | {"CXX": "/no/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "going on without torch.compile, which fails here" in run.stdout
    assert losses(tmp_path / "out")[-1][0] == 5


def test_the_bench_runs_whole(tmp_path, capsys, monkeypatch):
    real = torch.nn.Module.compile

    def compile(block):  # without a C++ compiler
        real(block, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    shape = {"n_layer": 3, "n_embd": 64, "batch_size": 1, "block_size": 64, "rounds": 1}
    report = tmp_path / "bench.json"
    settings = shape | {"patterns": "4x5,2x1", "device": "cpu", "json": report}
    for mode in ([], ["--compile"], ["--dwa_only"]):
        assert bench.main([*flags(**settings), *mode]) == 0
        times = json.loads(report.read_text())["times"]
        assert {*times["dwa"]} == {"4x5", "2x1", "1x1 naive", "1x1 tensordot"}
        assert mode == ["--dwa_only"] or {*times["decode"]} == {"plain", "4x5", "2x1"}
    assert "compiling: 6 blocks" in capsys.readouterr().out


def test_the_comparison_runs_whole_and_goes_on(text, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from results import run

    monkeypatch.setattr(run, "RESULTS", tmp_path)
    small = {k: v for k, v in SMALL.items() if k != "learning_rate"} | {"n_layer": 5}
    config = {"name": "small", "dataset": text, "variants": "plain,pruned as 4x1", "jobs": 2,
              "seeds": 1, "sweep": "3e-3", "out_dir": tmp_path / "runs"}  # fmt: skip
    config["train"] = " ".join(flags(**small))
    run.main(flags(**config))
    table = (tmp_path / "small.md").read_text()
    done = json.loads((tmp_path / "small.json").read_text())
    assert len(done) == 4
    for flag in ("--dwa=none ", "--dwa=1x1 ", r"--dwa=\d+:", "--max_iters=10 "):
        assert any(re.search(flag, f"{key} ") for key in done), (flag, done)
    plain = next(loss for key, loss in done.items() if "--dwa=none" in key)
    (folder,) = (tmp_path / "runs" / "small").glob("none-*")
    assert plain == losses(folder)[-1][2]
    parameters = sum(w.numel() for name, w in weights(folder).items() if "dwa" not in name)
    assert f"| plain | 5 | {parameters:,} | | | {plain:.4f} ±" in table
    assert (tmp_path / "small.png").read_bytes().startswith(b"\x89PNG")

    def train_again(*args, **options):
        raise AssertionError(args)

    monkeypatch.setattr(run.subprocess, "run", train_again)
    run.main(flags(**config))
