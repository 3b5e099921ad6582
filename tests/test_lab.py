"""Tests of lab/: analyze, bench, compare and variants."""

import json
import math
import re
import statistics
import sys
from pathlib import Path

import pytest
import torch

import train
from denseformer import DWA, DenseFormerConfig, rotary_angles
from lab import analyze, bench, compare, variants
from lib.checkpoint import load_checkpoint
from lib.files import UserError
from lib.flags import UsageError
from tests.helpers import SMALL, flags, weights

TINY = DenseFormerConfig(vocab_size=11, block_size=16, n_layer=3, n_head=2, n_embd=16, dwa="none")


def test_prune_keeps_the_largest():
    dwa = DWA(2)
    dwa.alpha.data = torch.tensor([[1.0, 0, 0], [0.5, 1.0, 0], [0.1, -0.3, 0.2]])
    assert analyze.prune(dwa, 0.4).rows == [[], [0, 1], [1]]
    assert analyze.prune(dwa, 0.99).rows == [[], [1], []]
    pruned = analyze.prune(dwa, 0.6)  # a row that loses all its alphas has no DWA
    assert pruned.alpha.allclose(torch.tensor([[1, 0, 0], [0.5, 1, 0], [0, 0, 1]]))


def test_measurements(trained):
    run = analyze.Run(trained / "dense", analyze.AnalyzeConfig(tokens=10**6, device="cpu"))
    assert run.perplexity() == pytest.approx(math.exp(run.checkpoint["best_val_loss"]), rel=1e-5)
    model, (x, y) = run.model, map(torch.cat, zip(*run.batches, strict=True))
    model.dwa.alpha.data += 0.1 * torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    alpha = model.dwa.alpha.detach()
    X = [model.wte(x)]
    Y, cosines = X[0], [1.0]
    for i, block in enumerate(model.blocks, start=1):
        X.append(block(Y, rotary_angles(torch.arange(16), 8, Y.dtype)))
        Y = sum(a * x for a, x in zip(alpha[i], X, strict=False))
        cosines.append(torch.cosine_similarity(X[0], Y, dim=-1)[y >= 0].mean().item())
    assert run.cosines() == pytest.approx(cosines, abs=1e-5)
    dropped, perplexity = run.dropped([0, 50]), run.perplexity()
    sizes = sorted(abs(alpha[i, j].item()) for i in range(1, 4) for j in range(i + 1))
    alpha[alpha.abs() <= sizes[4]] = 0  # 5 of 9 alphas
    assert dropped == pytest.approx([perplexity, run.perplexity()], rel=1e-5)
    assert dropped[0] != pytest.approx(dropped[1], rel=1e-3)
    largest = [torch.linalg.norm(block.mlp.c_fc.weight, 2).item() for block in model.blocks]
    assert run.singular_values()["mlp.c_fc"][0].item() == pytest.approx(statistics.mean(largest))


def test_analyze(trained, run, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    with (run / "log.jsonl").open("a") as log:
        log.write('{"st')  # a run that was killed
    same = {"out_dir": run, "device": "cpu"}
    analyze.main(flags(**same, plain=trained / "plain", prune=0.5))
    for name in ("alpha", "alpha-steps", "cosine", "dropped", "singular"):
        assert (run / f"{name}.png").read_bytes().startswith(b"\x89PNG"), name
    assert sum(map(len, load_checkpoint(run / "pruned.pt")["model_config"]["dwa"])) == 4
    for wrong in ({"plain": run}, {"prune": 0.5, "out_dir": trained / "plain"}):
        with pytest.raises(UsageError, match=f"--{next(iter(wrong))}"):
            analyze.main(flags(**same | wrong))
    # Without matplotlib, the tables are still printed.
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    analyze.main(flags(**same))
    assert re.search("50 +\\d.*\n.*pip install matplotlib", capsys.readouterr().out, re.DOTALL)


def test_data_that_has_moved(text, tmp_path, capsys):
    config = {"out_dir": tmp_path / "run", "device": "cpu"}
    shape = {"dataset": text, "n_layer": 8, "dwa": "2x4", "max_iters": 1, "learning_rate": 0}
    assert train.main(flags(**SMALL | config | shape)) == 0
    moved, other = Path(text).rename(tmp_path / "moved.txt"), tmp_path / "other.txt"
    other.write_text(moved.read_text()[::-1])
    with pytest.raises(UserError, match=r"other\.txt is not the data"):
        analyze.main(flags(**config, dataset=other))
    analyze.main(flags(**config, dataset=moved, prune=0.25))
    assert re.search("from step 0.*pruned.pt has 6 of 8 alphas", capsys.readouterr().out, re.DOTALL)


def test_bench_runs_whole(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model: model)  # as quick as the eager mode
    pytest.importorskip("transformers")
    shape = {"n_layer": 5, "n_head": 1, "n_embd": 16, "batch_size": 1, "block_size": 16}
    rows = "gpt2, plain, 1x1 naive, 1x1 tensordot, 4x5, skip-gains, learned positions, 1x1 compiled"
    settings = shape | {"rows": rows, "rounds": 1, "json": tmp_path / "b.json", "device": "cpu"}
    bench.main(flags(**settings))
    report = json.loads((tmp_path / "b.json").read_text())
    names = rows.split(", ")
    assert [*report["training step, ms"]] == [*report["memory of a training step, MB"]] == names[1:]
    assert [*report["forward, ms"]] == names[1:-1]
    assert [*report["decoding 4 tokens, ms"]] == names[:-2]
    assert [*report["DWA alone, ms"]] == [*report["activations moved"]] == names[2:5]
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert "±" not in "".join(table)  # one round has no spread


def test_bench_refuses_before_it_measures(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "measure", lambda *_: pytest.fail("measured"))
    for row, says in (("1x1 quick", "impl"), ("4x5", "dwa 4x5 has no DWA in 4 blocks")):
        with pytest.raises(UsageError, match=f"row '{row}': {says}"):
            bench.main(flags(rows=f"plain, {row}", n_layer=4, device="cpu"))
    with pytest.raises(OSError, match="none"):
        bench.main(flags(json=tmp_path / "none" / "b.json", device="cpu"))


def test_rows_compute_what_they_say():
    c = bench.BenchConfig(n_layer=5, n_head=2, n_embd=16, vocab_size=11, block_size=16)
    idx, noise, results = torch.randint(11, (2, 16)), torch.randn(6, 6).tril(), []
    for impl in ("naive", "tensordot", "inplace", "tiled"):
        torch.manual_seed(0)
        model = bench.make_model(f"1x1 {impl}", c, torch.device("cpu"))
        model.dwa.alpha.data += noise
        loss = model(idx, idx)[1]
        loss.backward()
        results.append((loss, model.dwa.alpha.grad, model.wte.weight.grad))
        torch.testing.assert_close(results[-1], results[0], rtol=1e-4, atol=1e-6)


def test_columns():
    assert bench.cell([30.0], [20.0]) == "30 | 1.500"
    assert bench.cell([10.0, 20, 60, 80], [10, 10, 10, 40]) == "40 ± 24 | 2.000"
    assert bench.cell([4000, 1000, 1200], [1000, 1000, 1000]) == "1,200 | 1.200"
    assert bench.count_moved(DWA(8)) == 196
    assert bench.count_moved(bench.TensordotDWA(8)) == 282


def test_compare_tunes_pairs_and_resumes(tmp_path, monkeypatch):
    pytest.importorskip("scipy")
    losses = {  # by seed
        ("plain", "0.1"): [2.0, 2.2, 2.1], ("plain", "0.2"): [1.9, 2.1, 1.6],
        ("1x1", "0.1"): [1.8, 1.9, 1.7], ("1x1", "0.2"): [1.85, 1.0, 1.0],
    }  # fmt: skip
    calls = []

    def call(words, jobs):
        _, name, *settings = words
        given = dict(zip(settings[::2], settings[1::2], strict=False))
        calls.append(given)
        if given is calls[0]:
            raise UserError("killed")
        out_dir = tmp_path / given["--out_dir"]
        out_dir.mkdir(parents=True)
        loss = losses[name, given["--learning_rate"]][int(given["--seed"]) - 1]
        (out_dir / "log.jsonl").write_text(f'{{"{"final_" * (name == "1x1")}val_loss": {loss}}}')

    model = {"dwa.alpha": torch.zeros(3, 3), "w": torch.zeros(100)}
    checkpoint = {"model_config": {"dwa": "1x1", "n_layer": 2}, "model": model}
    monkeypatch.setattr(compare, "load_checkpoint", lambda path: checkpoint)
    monkeypatch.setattr(compare, "call", call)
    monkeypatch.setattr(compare, "LAB", tmp_path)
    argv = flags(name="x", rows="plain, 1x1 --min_lr 0,", seeds="1,2,3", rates="0.1,0.2", jobs=2)
    argv += ["--", "--n_layer", "2"]
    with pytest.raises(UserError, match="killed"):
        compare.main(argv)
    compare.main(argv)
    assert len(calls) == 9  # 2 rows at 2 rates, 2 rows with 2 more seeds, and the one killed
    assert {c["--n_layer"] + c["--min_lr"] for c in calls} == {"20.01", "20.02", "20"}
    differences = [-0.1, -0.2, 0.1]
    t = statistics.mean(differences) / statistics.stdev(differences) * 3**0.5
    p = 1 - abs(t) / (2 + t * t) ** 0.5  # Student's distribution with two degrees of freedom
    table = (tmp_path / "x.md").read_text()
    assert "| plain | 105 | 0.2 | 1.9000 | 2.1000 | 1.6000 | 1.8667 |  |  |" in table
    assert f"| 105 | 0.1 | 1.8000 | 1.9000 | 1.7000 | 1.8000 | -0.0667 | {p:.2g} |" in table


def test_skip_gains_are_those_of_the_paper():
    torch.manual_seed(0)
    plain = variants.MODELS["plain"](TINY).double()
    torch.manual_seed(0)
    model, idx = variants.SkipGains(TINY).double(), torch.randint(11, (2, 16))
    rotary, x = rotary_angles(torch.arange(16), 8, torch.float64), plain.wte(idx)
    for wrapped, block in zip(model.blocks, plain.blocks, strict=True):
        g = wrapped.gains.data.normal_()
        x = g[0] * x + block.attn(block.ln_1(x), rotary)
        x = g[1] * x + block.mlp(block.ln_2(x))
    assert model(idx, idx)[0].allclose(plain.lm_head(plain.ln_f(x)))


def test_variants_train(text, tmp_path):
    same = flags(**SMALL | {"max_iters": 1, "dataset": text})
    for name in ("skip-gains", "diagonal-0.1"):
        assert variants.main([name, *same, f"--out_dir={tmp_path / name}"]) == 0
    assert (weights(tmp_path / "skip-gains")["blocks.0.gains"] != 1).all()
    alpha = weights(tmp_path / "diagonal-0.1")["dwa.alpha"]
    first = (alpha - torch.eye(4)).abs() / alpha[1, 0].abs()  # the first steps of Adam are equal
    assert first.allclose((first > 0) * (1 - 0.9 * torch.eye(4)), rtol=1e-2)
    assert (first > 0).sum() == 9
    with pytest.raises(UsageError, match="'skip-pains'"):
        variants.main(["1x1", *same, "--dwa=skip-pains"])
