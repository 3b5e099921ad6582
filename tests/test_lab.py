"""Tests of lab/: analyze, bench, compare and variants."""

import json
import math
import re
import statistics
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import train
from denseformer import DWA, DenseFormer, DenseFormerConfig, rotary_angles
from lab import analyze, bench, compare, variants
from lib.checkpoint import load_checkpoint
from lib.files import UserError
from lib.flags import UsageError
from tests.helpers import SMALL, flags

CPU = torch.device("cpu")
TINY = DenseFormerConfig(vocab_size=11, block_size=16, n_layer=3, n_head=2, n_embd=16, dwa="none")


def test_prune_keeps_the_largest():
    dwa = DWA(2)
    dwa.alpha.data = torch.tensor([[1.0, 0, 0], [0.5, 1.0, 0], [0.1, -0.3, 0.2]])
    assert analyze.prune(dwa, 0).rows == dwa.rows
    assert analyze.prune(dwa, 0.4).rows == [[], [0, 1], [1]]
    assert analyze.prune(dwa, 0.99).rows == [[], [1], []]
    pruned = analyze.prune(dwa, 0.6)  # a row that loses all its alphas has no DWA
    assert pruned.alpha.allclose(torch.tensor([[1, 0, 0], [0.5, 1, 0], [0, 0, 1]]))


def test_measurements(trained):
    """Perplexity, cosines, and the loss without the smallest alphas, by the formula."""
    run = analyze.Run(trained / "dense", analyze.AnalyzeConfig(tokens=10**6, device="cpu"))
    best = run.checkpoint["best_val_loss"]
    assert math.log(run.perplexity()) == pytest.approx(best, abs=1e-5)
    model, (x, y) = run.model, map(torch.cat, zip(*run.batches, strict=True))
    whole = (y >= 0).all(1)
    run.batches = [(x[whole], y[whole])]

    @torch.no_grad()
    def recompute(alpha):
        X = [model.wte(x[whole])]
        Y, cosines = X[0], [1.0]
        for i, block in enumerate(model.blocks, start=1):
            X.append(block(Y, rotary_angles(torch.arange(16), 8, Y.dtype)))
            Y = sum(a * x for a, x in zip(alpha[i], X, strict=False))
            cosines.append(F.cosine_similarity(X[0], Y, dim=-1).mean().item())
        logits = F.linear(model.ln_f(Y), model.wte.weight)
        return F.cross_entropy(logits.flatten(0, 1), y[whole].flatten()).exp().item(), cosines

    model.dwa.alpha.data += 0.1 * torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    alpha = model.dwa.alpha.detach().clone()
    perplexity, cosines = recompute(alpha)
    assert run.cosines() == pytest.approx(cosines, abs=1e-5)
    sizes = sorted(abs(alpha[i, j].item()) for i in range(1, 4) for j in range(i + 1))
    half = recompute(alpha.masked_fill(alpha.abs() <= sizes[4], 0))[0]  # 5 of 9 alphas
    assert half != pytest.approx(perplexity, rel=1e-3)
    assert run.dropped([0, 50]) == pytest.approx([perplexity, half], rel=1e-5)
    assert model.dwa.alpha.equal(alpha)


def test_analyze(trained, run, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    with (run / "log.jsonl").open("a") as log:
        log.write('{"st')  # a run that was killed
    same = {"out_dir": run, "device": "cpu"}
    analyze.main(flags(**same, plain=trained / "plain", prune=0.5))
    shown = capsys.readouterr().out
    for name in ("alpha", "alpha-steps", "cosine", "dropped", "singular"):
        assert (run / f"{name}.png").read_bytes().startswith(b"\x89PNG"), name
    best = load_checkpoint(run / "best.pt")
    s = [torch.linalg.svdvals(best["model"][f"blocks.{i}.mlp.c_fc.weight"]) for i in range(3)]
    assert re.search(rf"mlp.c_fc +{torch.stack(s).mean().item():.3f} ", shown)
    # The pruned model keeps its rows when its training continues.
    begin = {"init_from": run / "pruned.pt", "out_dir": tmp_path / "more", "device": "cpu"}
    assert train.main(flags(**begin, max_iters=3)) == 0
    rows = load_checkpoint(tmp_path / "more" / "last.pt")["model_config"]["dwa"]
    assert sum(map(len, rows)) == 4
    for wrong in ({"plain": run}, {"prune": 0.5, "out_dir": trained / "plain"}):
        with pytest.raises(UsageError, match=f"--{next(iter(wrong))}"):
            analyze.main(flags(**same | wrong))
    # Without matplotlib, the tables are still printed.
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    analyze.main(flags(**same))
    assert re.search("50 +\\d.*\n.*pip install matplotlib", capsys.readouterr().out, re.DOTALL)


def test_data_that_has_moved(text, tmp_path, capsys):
    """2x4 in 8 blocks: Y_4 reads X_0, X_2, X_4, and Y_8 reads X_0, X_2, X_4, X_6, X_8."""
    config = {"out_dir": tmp_path / "run", "device": "cpu"}
    shape = {"dataset": text, "n_layer": 8, "dwa": "2x4", "max_iters": 1, "learning_rate": 0}
    assert train.main(flags(**SMALL | config | shape)) == 0
    moved, other = Path(text).rename(tmp_path / "moved.txt"), tmp_path / "other.txt"
    other.write_text(moved.read_text()[::-1])
    with pytest.raises(UserError, match=r"my\.txt"):
        analyze.main(flags(**config))
    with pytest.raises(UserError, match=r"other\.txt is not the data"):
        analyze.main(flags(**config, dataset=other))
    analyze.main(flags(**config, dataset=moved, prune=0.5))
    assert re.search("from step 0.*pruned.pt has 4 of 8 alphas", capsys.readouterr().out, re.DOTALL)


def test_bench_runs_whole(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model: model)  # as quick as the eager mode
    monkeypatch.setattr(bench, "make_gpt2", lambda c: Gpt2())
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
    assert "decoding 4 tokens, ms | x gpt2" in table[0]
    assert len({line.count("|") for line in table}) == 1
    assert "±" not in "".join(table)  # one round has no spread


class Gpt2(nn.Module):
    def generate(self, idx, max_new_tokens, do_sample):
        assert (idx.shape, max_new_tokens, do_sample) == ((1, 12), 4, False)


@pytest.mark.parametrize(("row", "says"), [
    ("1x1 quick", "row '1x1 quick': impl"), ("4x5", "row '4x5'.* in 4 blocks"),
])  # fmt: skip
def test_a_wrong_row_is_named(row, says):
    with pytest.raises(UsageError, match=says):
        bench.main(flags(rows=f"plain, {row}", n_layer=4, device="cpu"))


def test_a_file_that_cannot_be_written_is_found_before_measuring(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "bench", lambda *_: pytest.fail("measured"))
    with pytest.raises(OSError, match="none"):
        bench.main(flags(json=tmp_path / "none" / "b.json", device="cpu"))


def test_cells_are_medians_of_ratios():
    assert bench.cell([30.0], [20.0]) == "30 | 1.500"
    assert bench.cell([10.0, 20, 60, 80], [10, 10, 10, 10]) == "40 ± 24 | 4.000"
    assert bench.cell([4000, 1000, 1200], [1000, 1000, 1000]) == "1,200 | 1.200"


def test_rows_compute_what_they_say():
    c = bench.BenchConfig(n_layer=5, n_head=2, n_embd=16, vocab_size=11, block_size=16)
    idx, noise, results = torch.randint(11, (2, 16)), torch.randn(6, 6).tril(), []
    for impl in ("naive", "tensordot", "inplace", "tiled"):
        torch.manual_seed(0)
        model = bench.make_model(f"1x1 {impl}", c, CPU)
        model.dwa.alpha.data += noise
        loss = model(idx, idx)[1]
        loss.backward()
        results.append((loss, model.dwa.alpha.grad, model.wte.weight.grad))
        torch.testing.assert_close(results[-1], results[0], rtol=1e-4, atol=1e-6)
    # learned positions: attention without any rotation
    block, x = model.blocks[0], torch.randn(2, 16, 16)
    still = torch.tensor([1.0, 0]).expand(16, 1, 4, 2)  # cos and sin of 0
    assert bench.attention(block.attn, x).allclose(block.attn(x, still), atol=1e-6)
    model = bench.make_model("learned positions", c, CPU)
    model.wte.weight.data.zero_()
    assert model.drop(model.wte(idx)).equal(model.wpe.weight.expand(2, 16, 16))


def test_activations_moved():
    assert bench.count_moved(DWA(8)) == 202
    assert bench.count_moved(bench.TensordotDWA(8)) == 282


def test_peak_memory():
    def work():
        torch.ones(1 << 20).sum()  # 4 MiB, freed
        (torch.ones(1 << 18) + torch.ones(1 << 18)).sum()

    assert bench.peak_memory(work, CPU) == pytest.approx(4 << 20, rel=0.01)


def test_p_value():
    """t is the two-sided 5% point of Student's distribution with n - 1 degrees of freedom."""
    for n, t in ((2, 12.7062), (3, 4.30265), (4, 3.18245), (11, 2.22814)):
        values = [math.sin(k) for k in range(n)]
        shift = t * statistics.stdev(values) / math.sqrt(n) - statistics.mean(values)
        for sign in (1, -1):
            p = compare.paired_t_test([sign * (value + shift) for value in values])
            assert p == pytest.approx(0.05, abs=1e-5)
    assert compare.paired_t_test([0.0] * 3) == 1


LOSSES = {  # {(pattern, rate): by seed}
    ("plain", "0.1"): [2.0, 2.2, 2.1], ("plain", "0.2"): [1.9, 2.1, 1.6],
    ("1x1", "0.1"): [1.8, 1.9, 1.7], ("1x1", "0.2"): [1.85, 1.0, 1.0],
}  # fmt: skip


def test_compare_tunes_pairs_and_resumes(tmp_path, monkeypatch, capsys):
    calls = []  # of lab.variants

    def call(words, jobs):
        _, name, *settings = words
        given = dict(zip(settings[::2], settings[1::2], strict=False))
        calls.append(given)
        if len(calls) == 4:
            raise UserError("killed")
        out_dir = tmp_path / given["--out_dir"]
        out_dir.mkdir(parents=True)
        loss = LOSSES[name, given["--learning_rate"]][int(given["--seed"]) - 1]
        log = [{"step": 0, "val_loss": 9.0}, {"step": 5, "val_loss": 8.0}]
        log += [{"step": 5, "final_val_loss": loss}, {"step": 5, "alpha": []}]
        (out_dir / "log.jsonl").write_text("\n".join(map(json.dumps, log)))

    model = {"dwa.alpha": torch.zeros(3, 3), "w": torch.zeros(100)}
    checkpoint = {"model_config": {"dwa": "1x1", "n_layer": 2}, "model": model}
    monkeypatch.setattr(compare, "load_checkpoint", lambda path: checkpoint)
    monkeypatch.setattr(compare, "call", call)
    monkeypatch.setattr(compare, "LAB", tmp_path)
    argv = [*flags(name="x", seeds="1,2,3", rates="0.1,0.2"), "--", "--n_layer", "2"]
    with pytest.raises(UserError, match="killed"):
        compare.main(argv)
    assert len(json.loads((tmp_path / "x.json").read_text())) == 3
    compare.main(argv)
    assert len(calls) == 9  # 2 rows at 2 rates, 2 rows with 2 more seeds, and the one killed
    assert {"--n_layer": "2", "--min_lr": "0.01"}.items() <= calls[0].items()
    p = compare.paired_t_test([1.8 - 1.9, 1.9 - 2.1, 1.7 - 1.6])
    for line in (
        "| plain | 105 | 0.2 | 1.9000 | 2.1000 | 1.6000 | 1.8667 |  |  |",
        f"| 1x1 | 105 | 0.1 | 1.8000 | 1.9000 | 1.7000 | 1.8000 | -0.0667 | {p:.2g} |",
        "| 1x1 | 1.8000 | 1.8500 |",
    ):
        assert line in (tmp_path / "x.md").read_text(), line
    compare.main(argv)
    assert len(calls) == 9


def build(name):
    torch.manual_seed(0)
    return variants.MODELS[name](TINY).double()


def test_skip_gains_are_those_of_the_paper():
    model, plain, idx = build("skip-gains"), build("plain"), torch.randint(11, (2, 16))
    assert model(idx, idx)[0].equal(plain(idx, idx)[0])
    gains = [torch.randn(2, dtype=torch.float64) for _ in range(3)]
    rotary, x = rotary_angles(torch.arange(16), 8, torch.float64), plain.wte(idx)
    for wrapped, block, g in zip(model.blocks, plain.blocks, gains, strict=True):
        wrapped.gains.data = g
        x = g[0] * x + block.attn(block.ln_1(x), rotary)
        x = g[1] * x + block.mlp(block.ln_2(x))
    assert model(idx, idx)[0].allclose(plain.lm_head(plain.ln_f(x)))


@pytest.mark.parametrize(("name", "factor"), [("hyper-connections", 4), ("attn-res", 1)])
def test_successors_start_as_the_plain_transformer(name, factor):
    """Up to the size of what the norms read, which only their eps notices."""
    pytest.importorskip(name.replace("-", "_"))
    model, plain, streams = build(name), build("plain"), []
    for m in (model, plain):
        m.eval().ln_f.register_forward_pre_hook(lambda module, args: streams.append(args[0]))
        for norm in (n for n in m.modules() if isinstance(n, nn.LayerNorm)):
            norm.eps = 1e-14
    idx = torch.randint(11, (1, 16))
    assert model(idx, idx)[0].allclose(plain(idx, idx)[0], rtol=1e-6)
    assert streams[0].allclose(factor * streams[1], rtol=1e-6)
    model(idx, idx)[1].backward()
    ids = model.generate(idx[:, :3], 6, temperature=0)  # with the cache, and without it:
    assert ids[0, -1] == model(ids[:, :-1])[0].argmax()


def test_the_diagonal_learns_at_its_own_rate():
    steps = []
    for k in (1.0, 0.1):
        dwa = DWA(3)
        optimizer = torch.optim.AdamW(dwa.parameters(), 0.01, weight_decay=0.0)
        variants.scale_diagonal([optimizer], dwa.alpha, k)
        for _ in range(2):  # the same gradient, to which Adam answers with the same steps
            dwa.alpha.grad = torch.ones(4, 4)
            optimizer.step()
        steps.append(dwa.alpha.detach() - torch.eye(4))
    assert steps[1].allclose(steps[0] * (1 - 0.9 * torch.eye(4)), rtol=1e-4)


def test_variants_train(text, tmp_path):
    same = flags(**SMALL | {"max_iters": 4, "dataset": text})
    for name in ("skip-gains", "diagonal-0", "last1"):
        assert variants.main([name, *same, f"--out_dir={tmp_path / name}"]) == 0
    gains = load_checkpoint(tmp_path / "skip-gains" / "last.pt")
    assert gains["model_config"]["dwa"] == "none"
    assert (gains["model"]["blocks.0.gains"] != 1).all()
    alpha = load_checkpoint(tmp_path / "diagonal-0" / "last.pt")["model"]["dwa.alpha"]
    assert (alpha.diagonal() == 1).all()
    assert (alpha.tril(-1)[1:, 0] != 0).all()
    assert load_checkpoint(tmp_path / "last1" / "last.pt")["model_config"]["dwa"] == "last1"
    assert train.DenseFormer is DenseFormer
