"""train.py and sample.py as a user runs them."""

import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import data
import sample
import train
from data.tokenizer import ByteTokenizer
from denseformer import DWA, DenseFormer, DenseFormerConfig
from lib.checkpoint import FORMAT, load_checkpoint, load_weights
from lib.figures import text_heat_map
from lib.processes import StopSignals
from tests.helpers import HERE, SMALL, close, flags, log, losses, script, signal_in, spawn, weights


def test_validation_predicts_each_token_once():
    tokens = np.random.default_rng(0).integers(17, size=333)  # 66 windows of 5, and one of 2
    torch.manual_seed(0)
    model = DenseFormer(DenseFormerConfig(17, 5, n_layer=3, n_head=2, n_embd=8))
    autocast = torch.autocast("cpu", enabled=False)

    def evaluate(iters, B=4, steps=1):
        config = train.TrainConfig(block_size=5, batch_size=B, gradient_accumulation_steps=steps)
        with StopSignals() as stop:
            return train.evaluate(model, tokens, iters, config, autocast, stop)

    total = 0.0
    for window in (torch.tensor(tokens[s : s + 6]) for s in range(0, 332, 5)):
        logits = model(window[None, :-1], window[None, 1:])[0]
        total += torch.nn.functional.cross_entropy(logits[0], window[1:], reduction="sum").item()
    assert evaluate(1000) == pytest.approx(total / 332, rel=1e-6)
    assert evaluate(1) == evaluate(1) != evaluate(1000)
    assert evaluate(1, 2, 2) == pytest.approx(evaluate(1), rel=1e-6)
    assert model.training


def test_batches_cover_the_text_evenly_and_depend_on_seed_and_step():
    tokens = np.arange(100, dtype=np.uint8)
    dataset = data.Dataset("a", tokens, tokens, ByteTokenizer())

    def batch(step, seed=1):
        config = train.TrainConfig(batch_size=184, block_size=8, seed=seed)
        return train.get_batch(dataset, config, step, 0, torch.device("cpu"))

    x, y = batch(5)
    assert x.equal(y - 1)
    assert {1, 2, 3} >= set(x.view(184, 8)[:, 0].bincount(minlength=92).tolist())
    assert not x.equal(batch(6)[0])
    assert not x.equal(batch(5, seed=2)[0])


def test_the_learning_rate():
    config = train.TrainConfig(learning_rate=1.0, min_lr=0.1, warmup_iters=10, max_iters=110)
    rates = [train.get_lr(step, config) for step in (0, 9, 10, 35, 60, 110)]
    assert rates == pytest.approx([0.1, 1.0, 1.0, 0.55 + 0.45 * 0.5**0.5, 0.55, 0.1])


def test_flags_override_presets_which_override_defaults(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    words = ["--n_layer=1", "--out_dir=~/a b", "--bias", "--compile", "false", "--dwa", "[[],[0]]"]
    given = {"n_layer": 1, "out_dir": "/home/me/a b", "bias": True, "compile": False}
    for name, preset in train.PRESETS.items():
        config, _ = train.load_config([f"--preset={name}", *words])
        expected = asdict(train.TrainConfig()) | preset | given | {"preset": name}
        assert asdict(config) == expected | {"dwa": [[], [0]]}


# exit status, script, its arguments, and what the one sentence says
WRONG = [
    (2, train, "--n_layer=many", "--n_layer"), (2, train, "--beta1=1", "--beta1.* below 1, not 1"),
    (2, train, "--n_layer=0", "--n_layer: must be at least 1, not 0"),
    (2, train, "--learning_rate=nan", "--learning_rate"),
    (2, train, "--optimizer=sgd", "--optimizer"), (2, train, "--bias=maybe", "--bias"),
    (2, train, "--dataset=", "--dataset: is empty"), (2, train, "--device=abacus", "--device"),
    (2, train, "--dwa=[[],[0,1", "--dwa"), (2, train, "--n_layer=1 --dwa=[[],[2]]", "--dwa"),
    (2, train, "--n_layer=1 --dwa=[[],[0.5]]", "--dwa"), (2, sample, f"--seed={2**64}", "--seed"),
    (2, train, "--n_embd=6 --n_head=2", "n_embd"), (2, sample, "--top_p=0", "--top_p"),
    (2, train, "--min_lr=1 --learning_rate=0.1", "--min_lr"),
    (2, train, "--dwa_start_iter=9 --max_iters=9", "--dwa_start_iter"),
    (2, train, "--resume --overwrite", "--overwrite"), (2, train, "--n_layr=3", "--n_layr"),
    (2, train, "--resume --out_dir=run --max_iters=5", "already at step 40"),
    (2, train, "--resume --out_dir=run --n_layer=4", "--n_layer 4 contradicts"),
    (2, train, "--resume --out_dir=run --eval_iters=9", "--eval_iters 9 contradicts"),
    (2, train, "--resume --out_dir=run --batch_size=2", "stay at 4"),
    (2, train, "--resume --out_dir=run --init_from=a.pt", "which has none"),
    (2, train, "--init_from=run/last.pt --tokenizer=byte", "byte contradicts .*has char"),
    (1, train, "--init_from=run/last.pt --dataset=zebra.txt", "the character 'z'"),
    (1, train, "--init_from=missing", "missing"), (1, train, "--out_dir=my.txt", "my.txt"),
    (1, train, "--out_dir=run", "contains a run.*--resume.*--overwrite"),
    (1, train, "--resume --out_dir=missing", "missing"),
    (1, sample, "--out_dir=missing", "missing"), (1, sample, "--out_dir=run --start=Z", "'Z'"),
    (1, sample, "--out_dir=run --start=FILE:binary.txt", "UTF-8"),
]  # fmt: skip


def test_wrong_command_lines(run, text, fails):
    Path("zebra.txt").write_text("zebra " * 1000)
    Path("binary.txt").write_bytes(bytes(range(256)) * 10)
    for status, main, words, says in WRONG:
        fails(main, *words.split(), says=says, status=status)
    assert not list(Path("out").glob("*.pt"))


def test_advice_instead_of_a_traceback(fails, monkeypatch):
    for error, says in (
        (RuntimeError("can't allocate memory"), "--batch_size.*--gradient_accumulation_steps"),
        (RuntimeError("Failed to find C compiler"), "--compile=False --dwa_impl inplace"),
        (RuntimeError("Error(s) in loading state_dict for DenseFormer"), "another model"),
    ):
        monkeypatch.setattr(train, "main", Mock(side_effect=error))
        fails(train, says=says)


def test_a_run(trained):
    out, text = trained / "dense", (trained / "my.txt").read_text()
    assert [s for s, loss, _ in losses(out) if loss] == list(range(5, 41, 5))
    assert [s for s, _, val in losses(out) if val] == list(range(0, 41, 10))
    snapshots = [e for e in log(out) if "alpha" in e]
    assert [e["step"] for e in snapshots] == [2, 5, 10, 20, 40]
    assert torch.tensor(snapshots[-1]["alpha"]).equal(weights(out)["dwa.alpha"])
    # It has learned more than how often each character occurs.
    p = np.unique(list(text), return_counts=True)[1] / len(text)
    assert losses(out)[-1][2] < 0.8 * -(p * np.log(p)).sum()


def test_sample(trained, capsys, monkeypatch):
    def write(*args):
        capsys.readouterr()
        sample.main([f"--out_dir={trained / 'dense'}", "--max_new_tokens=60", *args])
        return capsys.readouterr().out

    once = write("--start=that")
    assert (once[:4], len(once)) == ("that", 4 + 60 + 1)
    assert once != write("--start=that", "--seed=1")
    assert write("--temperature=0") == write("--temperature=0", "--seed=1")
    Path("prompt.txt").write_bytes(b"\xef\xbb\xbfthat")  # with a byte order mark
    both = write("--start=FILE:prompt.txt", "--num_samples", "2").split("--- sample ")
    assert both[1] == f"1 ---\n{once}\n"
    assert both[2] != f"2 ---\n{once}"
    # A character of several tokens is printed whole.
    tokens = [torch.tensor([[byte]]) for byte in "é€".encode()]
    monkeypatch.setattr(DenseFormer, "stream", lambda *args: iter(tokens))
    loaded = DenseFormer(DenseFormerConfig(256, 8, 1, 1, 4)), ByteTokenizer(), {"step": 0}
    monkeypatch.setattr(sample, "load_model", lambda *args: loaded)
    assert write("--start=a") == "aé€\n"


@pytest.mark.parametrize("clip", [1e-12, 0])
def test_the_gradient_is_clipped(text, tmp_path, clip):
    """To a norm far below AdamW's epsilon, so that nothing is learned."""
    new = {"optimizer": "adamw", "weight_decay": 0, "max_iters": 10, "grad_clip": clip}
    assert train.main(flags(**SMALL | new, dataset=text, out_dir=tmp_path)) == 0
    first, last = (val for _, _, val in losses(tmp_path) if val)
    assert (abs(first - last) < 1e-4) == (clip > 0)


@pytest.mark.parametrize("seen_by", ["log_interval", "eval_interval", "evaluate"])
def test_divergence_keeps_the_checkpoint(text, tmp_path, fails, monkeypatch, seen_by):
    out, handler = tmp_path / "out", signal.getsignal(signal.SIGINT)
    wild = SMALL | {"learning_rate": 1e30, "optimizer": "adamw", "warmup_iters": 0}
    wild |= {"log_interval": 99, "eval_interval": 99, "max_iters": 200} | {seen_by: 1}
    if seen_by == "evaluate":  # which finds nan, though all weights are finite
        wild = SMALL
        monkeypatch.setattr(train, "evaluate", Mock(side_effect=[4.0, float("nan")]))
    fails(train, *flags(**wild, dataset=text, out_dir=out), says="diverged")
    assert signal.getsignal(signal.SIGINT) is handler
    assert all(w.isfinite().all() for w in weights(out).values())


def test_float16(text, tmp_path, monkeypatch):
    """The gradient of a matrix, which is Muon's, overflows in step 5: both optimizers skip it, and
    the scale of the gradients is halved, also after the run was resumed."""

    def training_step(model, *args, real=train.training_step):
        step = args[4]
        states[step] = {name: p.detach().clone() for name, p in model.named_parameters()}
        overflow = (lambda g: g * torch.inf) if step == 5 else (lambda g: g)
        with model.blocks[1].mlp.c_fc.weight.register_hook(overflow):
            return real(model, *args)

    states, begin = {}, flags(**SMALL | {"max_iters": 9, "dtype": "float16"}, dataset=text)
    monkeypatch.setattr(train, "training_step", training_step)
    signal_in(7, signal.SIGTERM)
    assert train.main([*begin, f"--out_dir={tmp_path}"]) == 128 + signal.SIGTERM
    assert train.main(["--resume", f"--out_dir={tmp_path}"]) == 0
    assert all(states[6][name].equal(states[5][name]) for name in states[0])
    assert not states[7]["wte.weight"].equal(states[6]["wte.weight"])
    assert load_checkpoint(tmp_path / "last.pt")["scaler"]["scale"] == 2**15


def test_best_has_the_lowest_validation_loss(text, tmp_path, monkeypatch, capsys):
    found, read = iter([5.0, 2.0, 1e6, 2.5, 2.4, 2.3, 2.2]), []

    def evaluate(model, tokens, iters, *args):
        read.append(iters)
        return next(found)

    monkeypatch.setattr(train, "evaluate", evaluate)
    same = flags(**SMALL | {"eval_interval": 15}, dataset=text, eval_iters=2, final_eval_iters=5)
    assert train.main([*same, f"--out_dir={tmp_path}"]) == 0
    assert read == [2, 2, 2, 2, 5]
    assert "val loss 2.4000" in capsys.readouterr().out
    assert log(tmp_path)[-1] == {"step": 40, "final_val_loss": 2.4}
    # A longer run keeps the old end, step 40, in its log.
    assert train.main(["--resume", f"--out_dir={tmp_path}", "--max_iters=41"]) == 0
    assert [val for _, _, val in losses(tmp_path) if val] == [5.0, 2.0, 1e6, 2.5, 2.3]
    assert [e["step"] for e in log(tmp_path) if "alpha" in e] == [2, 5, 10, 20, 40, 41]
    assert load_checkpoint(tmp_path / "best.pt")["step"] == 15


def test_text_heat_map():
    alpha = torch.zeros(4, 4)
    alpha[1, :2], alpha[3, :3] = torch.tensor([-0.2, 1.0]), torch.tensor([0.02, 0.05, -0.009])
    shown = text_heat_map(alpha, [[], [0, 1], [], [0, 2]]).splitlines()
    assert shown[1:4] == ["Y_1  |=█|", "Y_2  = X_2", "Y_3  |░   |"]
    assert text_heat_map(DWA(48).alpha.detach(), DWA(48).rows, max_rows=12).count("Y_") == 12


def test_the_end_of_a_run(text):
    """A plot, alphas and a sample, whatever stdout can encode; matplotlib's backend is kept."""
    pytest.importorskip("matplotlib")
    show = "import matplotlib\natexit.register(lambda: print('then', matplotlib.get_backend()))"
    settings = flags(**SMALL | {"max_iters": 2}, dataset=text, out_dir="out")
    (end,) = spawn(1, settings, show, PYTHONIOENCODING="ascii", MPLBACKEND="svg")
    assert Path("out/loss.png").read_bytes().startswith(b"\x89PNG"), end
    for words in ("\nY_3  |", "the last what the head reads", "a sample:", "then svg"):
        assert words in end.stdout, end


def test_resumed_is_uninterrupted(text, tmp_path, capsys):
    same = {"gradient_accumulation_steps": 2, "dropout": 0.1, "dwa_start_iter": 20}
    same |= {"dwa_impl": "tiled"}
    same, whole, parts = flags(**SMALL | same, dataset=text), tmp_path / "whole", tmp_path / "parts"
    assert train.main([*same, f"--out_dir={whole}"]) == 0
    for begin, number, step in ((same, signal.SIGTERM, 12), (["--resume"], signal.SIGINT, 29)):
        signal_in(step, number)
        assert train.main([*begin, f"--out_dir={parts}"]) == 128 + number
        assert "python train.py --resume --out_dir" in capsys.readouterr().out
        assert load_checkpoint(parts / "last.pt")["step"] == step + 1
    # Resuming drops what was logged after the last checkpoint, and malformed lines.
    with (parts / "log.jsonl").open("ab") as file:
        file.write(b'{"step": 35, "loss": 9.9}\n3\n\xff\n{"loss": 1}\n{"step": 39')
    assert train.main(["--resume", f"--out_dir={parts}"]) == 0
    identical(parts, whole)
    alphas = {e["step"]: torch.tensor(e["alpha"]) for e in log(parts) if "alpha" in e}
    initial = DWA(3).alpha
    assert {step: a.equal(initial) for step, a in alphas.items()} == {20: True, 40: False}


def identical(run, expected):
    torch.testing.assert_close(weights(run), weights(expected), rtol=0, atol=0)
    assert losses(run) == losses(expected)


def test_kill_at_any_moment_while_other_runs_are_kept_out(text, tmp_path, fails):
    # Such a run spends half its time on checkpoints, so many kills interrupt one.
    same = SMALL | {"max_iters": 200, "eval_interval": 2, "eval_iters": 1, "log_interval": 1}
    same, whole, out = flags(**same, dataset=text), tmp_path / "whole", tmp_path / "out"
    assert train.main([*same, f"--out_dir={whole}"]) == 0
    for begin, seconds in ((same, 0.25), (["--resume"], 0.1)):
        command = [sys.executable, HERE / "train.py", *begin, f"--out_dir={out}"]
        run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        next(line for line in run.stdout if "val loss" in line)
        for other in (["--resume"], [*same, "--overwrite"]):
            fails(train, *other, f"--out_dir={out}", says="another run is training")
        time.sleep(seconds)
        run.kill()
        run.communicate()
    assert 0 < load_checkpoint(out / "last.pt")["step"] < 200
    assert train.main(["--resume", f"--out_dir={out}"]) == 0
    identical(out, whole)


def test_the_first_ctrl_c_says_what_happens_and_a_later_one_ends_at_once(monkeypatch, capfd):
    now = [10.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with StopSignals() as stop:
        signal.raise_signal(signal.SIGINT)
        now[0] = 12.5
        signal.raise_signal(signal.SIGTERM)
        said = "\nsaving after this step; Ctrl-C after 3 seconds ends at once\n"
        assert (stop.any(), capfd.readouterr().err) == (signal.SIGINT, said)
        now[0] = 13.5
        with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("name", ["train.py", "sample.py"])
def test_ctrl_c_while_torch_is_imported(name):
    Path("torch.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    run = script(HERE / name, env=os.environ | {"PYTHONPATH": os.getcwd()})
    assert (run.returncode, run.stderr) == (-signal.SIGINT, "")  # 130 in a shell


def test_resume_takes_data_that_has_moved_and_new_settings(run, text, fails):
    run, again = run.rename("out"), ["--resume"]  # the folder has moved too
    (run / "log.jsonl").unlink()  # only the checkpoints were copied
    assert train.main([*again, f"--dataset={text}"]) == 0
    for name in ("best.pt", "last.pt"):
        assert load_checkpoint(run / name)["train_config"]["dataset"] == text
    assert train.main([*again, "--max_iters=41", "--weight_decay=0.5", "--beta2=0.5"]) == 0
    optimizers = load_checkpoint(run / "last.pt")["optimizers"]
    groups = [group for optimizer in optimizers for group in optimizer["param_groups"]]
    assert {group["weight_decay"] for group in groups} == {0.5, 0.0}
    assert {group["betas"][1] for group in groups if "betas" in group} == {0.5}
    Path(text).write_text("to be " * 3000)
    fails(train, *again, says="not the data")


def test_init_from_keeps_what_was_learned(trained, tmp_path):
    begin = {"device": "cpu", "max_iters": 10, "init_from": trained / "plain/last.pt"}
    # A text with fewer characters is encoded by the model's tokenizer: its loss is right at once.
    Path("sub.txt").write_text("or\nto " * 1000)
    sub, dense = tmp_path / "sub", tmp_path / "dense"
    assert train.main(flags(**begin, out_dir=sub, dataset="sub.txt")) == 0
    assert losses(sub)[0][2] < 2.5
    assert train.main(["--resume", f"--out_dir={sub}", "--max_iters=11"]) == 0
    # Shape and data come from the checkpoint; the DenseFormer starts as the same plain model.
    assert train.main(flags(**begin, out_dir=dense, dwa="1x1")) == 0
    assert losses(dense)[0][2] == pytest.approx(losses(trained / "plain")[-1][2], rel=1e-5)
    assert (weights(dense)["dwa.alpha"] != 0).sum() == 10
    # With another pattern, rows keep the alphas that they have in common, or stay as initialized.
    model = DenseFormer(DenseFormerConfig(10, 16, 3, 2, 16, dwa=[[], [0], [], [0, 1, 3]]))
    learned, expected = weights(dense), model.dwa.alpha.detach().clone()
    learned["dwa.alpha"][[1, 3], [0, 1]] = 0  # not in its pattern
    load_weights(model, learned)
    expected[3, [0, 3]] = learned["dwa.alpha"][3, [0, 3]]
    assert model.dwa.alpha.equal(expected)


def test_overwrite_removes_the_old_run_and_nothing_else(run, text, fails):
    for name in ("loss.png", "pruned.pt", "notes.txt", "alpha-mine.png"):
        (run / name).write_text("old")
    before = {file.name: file.read_bytes() for file in run.iterdir()}
    new = flags(**SMALL, dataset=text, out_dir=run, overwrite=True)
    fails(train, *new, "--dataset=missing", says="missing")
    assert {file.name: file.read_bytes() for file in run.iterdir()} == before
    signal_in(0, signal.SIGINT)
    assert train.main(new) == 128 + signal.SIGINT
    names = {file.name for file in run.iterdir()} - {".lock"}
    assert names == {"best.pt", "last.pt", "log.jsonl", "notes.txt", "alpha-mine.png"}
    assert [load_checkpoint(run / name)["step"] for name in ("best.pt", "last.pt")] == [0, 1]
    assert [e["step"] for e in log(run)] == [0]


@pytest.mark.parametrize("share", [0.0, 0.9])
def test_a_full_disk_keeps_the_checkpoint_before(run, fails, share):
    before, old = (run / "last.pt").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    (run / "log.jsonl").write_text("")  # the old log would not fit either
    again = ["--resume", f"--out_dir={run}", "--max_iters=41"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * len(before)), old[1]))
    try:
        fails(train, *again, says="cannot write|File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert (run / "last.pt").read_bytes() == before
    assert not list(run.glob(".*.part"))
    assert train.main(again) == 0


def test_foreign_checkpoints_are_a_sentence_and_run_nothing(run, tmp_path, fails):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, ("boom",)

    last, good = run / "last.pt", (run / "last.pt").read_bytes()
    nanogpt, older = {"model": {}, "iter_num": 3}, {"format": "denseformer-2"}
    for content in (good[:-99], Bomb(), {"format": FORMAT, "model": Bomb()}, nanogpt, older):
        last.write_bytes(content) if isinstance(content, bytes) else torch.save(content, last)
        fails(sample, "--checkpoint=last", f"--out_dir={run}", says=r"last\.pt")
        fails(train, "--resume", f"--out_dir={run}", says=r"last\.pt")
        fails(train, f"--init_from={last}", f"--out_dir={tmp_path}/new", says=r"last\.pt")
    fails(train, "--resume", f"--out_dir={run}", says="denseformer-2.*reads only denseformer-3")
    last.write_bytes((run / "best.pt").read_bytes())
    fails(train, "--resume", f"--out_dir={run}", says="needs a last.pt.*--init_from")
    assert os.listdir(tmp_path) == ["run"]


TWO = """
from tests.helpers import signal_in
def load(name, *args, real=train.data.load):
    if name is None:  # rank 0 alone decides, after a slow download
        assert train.RANK == 0
        time.sleep(1)
    return real(name or "my.txt", *args)
train.data.load = load
if train.RANK == 1: signal_in(12, signal.SIGTERM)
atexit.register(os.system, f"cat /proc/{os.getpid()}/task/*/comm")
"""


def test_two_micro_batches_or_two_processes_are_one(text, tmp_path):
    """Also if a signal to one of the two processes stops both, and one process goes on alone."""
    same = SMALL | {"dwa": "[[],[],[],[0,1]]"}  # X_2 is unread
    one, two, ranks = (tmp_path / name for name in ("one", "two", "ranks"))
    whole = {"batch_size": 8, "gradient_accumulation_steps": 1}
    split = {"batch_size": 4, "gradient_accumulation_steps": 2}
    assert train.main(flags(**same | whole, dataset=text, out_dir=one)) == 0
    assert train.main(flags(**same | split, dataset=text, out_dir=two)) == 0
    ended = spawn(2, flags(**same | split, out_dir=ranks), TWO)
    assert [rank.returncode for rank in ended] == [128 + signal.SIGTERM] * 2, ended
    assert ["stopped at step 13 and saved" in rank.stdout for rank in ended] == [True, False]
    # A thread of the process group that is left at exit can abort the process.
    assert ["gloo" in rank.stdout for rank in ended] == [False, False]
    assert train.main(["--resume", f"--out_dir={ranks}", *flags(**whole)]) == 0
    for run in (two, ranks):
        close(run, one)
        torch.testing.assert_close(weights(run), weights(one), rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("settings += ['--gradient_accumulation_steps=3']", "must be divisible by the 2"),
        ("if train.RANK == 0: settings += ['--dataset=missing']", "'missing'"),
        ("if train.RANK == 1: train.get_lr = lambda *args: open('missing')", "missing: No such"),
        ("train.torch.save = lambda *args: open('missing')", "best.pt: No such file"),
        ("if train.RANK == 1: train.get_lr = lambda *args: os._exit(1)", "lost the connection"),
        ("if train.RANK == 0: train.get_lr = lambda *args: os._exit(1)", ""),
    ],
)
def test_one_process_fails_and_all_end(text, line, says):
    settings = flags(**SMALL, gradient_accumulation_steps=2, dataset=text)
    ended = spawn(2, settings, line)
    told = "".join(rank.stderr for rank in ended)
    assert all(rank.returncode in (1, 2) for rank in ended), told
    assert ["-c: " in line and says in line for line in told.splitlines()] == [True] * bool(says)
