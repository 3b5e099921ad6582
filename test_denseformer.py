"""pytest: the model's mathematics, the data, and the scripts as a user runs them.

Every reference here is written anew from the paper or from arithmetic, never from our own code.
"""

import contextlib
import copy
import gc
import hashlib
import http.server
import io
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
import zlib
from pathlib import Path

import numpy as np
import pytest
import requests
import torch
from torch.nn import functional as F

import analyze
import bench
import common
import data
import sample
import train
from data import download, shards, textfile
from data.tokenizer import ByteTokenizer, CharTokenizer, from_state
from denseformer import (
    DWA,
    DenseFormer,
    DenseFormerConfig,
    InPlaceMemory,
    dwa_mask,
    dwa_pattern,
)
from denseformer import sample as draw

HERE = Path(__file__).parent
PATTERNS = ["none", "1x1", "2x1", "4x1", "4x5", "3x2", "1x5", "12x1"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DENSEFORMER_CACHE", str(tmp_path / "cache"))


def tiny(dwa="1x1", n_layer=5, **flags):
    """A small model in float64 with alphas far from the identity."""
    torch.manual_seed(0)
    shape = {"vocab_size": 17, "block_size": 8, "n_head": 2, "n_embd": 8}
    model = DenseFormer(DenseFormerConfig(**(shape | flags), n_layer=n_layer, dwa=dwa)).double()
    randomise(model.dwa)
    return model


def randomise(dwa):
    """Random values for the alphas that are trained, as they would be after training."""
    with torch.no_grad():
        for i, row in enumerate(dwa.mask.tolist(), start=1):
            if sum(row) > 1:  # else no DWA here
                dwa.alpha[i - 1] = torch.randn(len(row)) * torch.tensor(row)


def terms(pattern, i):
    """The j that Y_i sums over, read off the paper's definition of k x p; None: Y_i = X_i."""
    if pattern == "none":
        return None
    k, p = map(int, pattern.split("x"))
    js = [j for j in range(i + 1) if j % k == i % k]
    return js if i % p == 0 and js != [i] else None


# -----------------------------------------------------------------------------
# Depth-weighted averages


def through_dwa(dwa, x, weights):
    """A stack of blocks B_i(y) = tanh(w_i * y), with the DWA module between them."""
    (x, X), outputs = dwa.start(x), []
    for i, w in enumerate(weights, start=1):
        x = dwa(i, torch.tanh(w * x), X)
        outputs.append(x)
    return torch.stack(outputs)


def through_formula(pattern, alpha, x, weights):
    """The same by the paper's formula."""
    X, Y = [x], [x]
    for i, w in enumerate(weights, start=1):
        X.append(torch.tanh(w * Y[-1]))
        js = terms(pattern, i)
        y = X[i] if js is None else torch.zeros_like(x)
        for j in js or []:
            y = y + alpha[i - 1, j] * X[j]
        Y.append(y)
    return torch.stack(Y[1:])


# Tiles of one row, of sizes that divide the depth and that do not, of all rows, and the default.
@pytest.mark.parametrize("impl", ["naive", "1", "4", "7", "99", "default"])
@pytest.mark.parametrize("n_layer", [1, 2, 5, 48])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_dwa_is_the_formula_of_the_paper(pattern, n_layer, impl):
    dwa = DWA(DenseFormerConfig(n_layer=n_layer, dwa=pattern)).double()
    dwa.impl = "naive" if impl == "naive" else "inplace"
    dwa.tile = int(impl) if impl.isdigit() else None
    randomise(dwa)
    with torch.no_grad():
        dwa.alpha /= 1 + n_layer**0.5
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(n_layer, 4, dtype=torch.float64, requires_grad=True)
    alpha = dwa.alpha.detach().clone().requires_grad_()
    ours, paper = through_dwa(dwa, x, weights), through_formula(pattern, alpha, x, weights)
    torch.testing.assert_close(ours, paper, rtol=1e-10, atol=1e-10)

    seed = torch.randn_like(ours)
    inputs = [x, weights] + ([dwa.alpha] if dwa.num_params() else [])
    ours = torch.autograd.grad(ours, inputs, seed)
    paper = torch.autograd.grad(paper, [x, weights, alpha][: len(inputs)], seed)
    torch.testing.assert_close(ours, paper, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("impl", ["naive", "inplace"])
@pytest.mark.parametrize("pattern", ["1x1", "2x1", "3x2"])
def test_gradients_are_finite_differences(pattern, impl):
    dwa = DWA(DenseFormerConfig(n_layer=4, dwa=pattern, dwa_impl=impl)).double()
    randomise(dwa)
    x = torch.randn(1, 2, 2, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    seed = torch.randn(4, 1, 2, 2, dtype=torch.float64)

    def loss():
        return (through_dwa(dwa, x, weights) * seed).sum()

    loss().backward()
    for tensor in (x, weights, dwa.alpha):
        allowed = dwa.mask if tensor is dwa.alpha else torch.ones_like(tensor)
        for entry in allowed.nonzero().tolist():
            if tensor is dwa.alpha and not dwa.sources[entry[0]]:
                continue
            with torch.no_grad():
                value = tensor[tuple(entry)].item()
                tensor[tuple(entry)] = value + 1e-6
                above = loss()
                tensor[tuple(entry)] = value - 1e-6
                below = loss()
                tensor[tuple(entry)] = value
            slope = (above - below).item() / 2e-6
            assert tensor.grad[tuple(entry)].item() == pytest.approx(slope, rel=1e-6, abs=1e-8)
    assert not dwa.alpha.grad[~dwa.mask].any()


@pytest.mark.parametrize("n_layer", [1, 2, 5, 48])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_mask(pattern, n_layer):
    mask = dwa_mask(pattern, n_layer)
    assert mask.shape == (n_layer, n_layer + 1)
    for i in range(1, n_layer + 1):
        expected = terms(pattern, i) or [i]
        assert mask[i - 1].nonzero().flatten().tolist() == expected


def test_mask_of_the_papers_example():
    # k = p = 4 (section 3.2): DWA_8 sees X_0, X_4, X_8, never X_5, the first to have used Y_4.
    assert dwa_mask("4x4", 8)[7].nonzero().flatten().tolist() == [0, 4, 8]
    assert dwa_mask("4x5", 10)[9].nonzero().flatten().tolist() == [2, 6, 10]


def test_any_mask_can_be_set():
    dwa = DWA(DenseFormerConfig(n_layer=3))
    mask = torch.tensor([[0, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 0]], dtype=torch.bool)
    dwa.set_mask(mask)
    assert dwa.num_params() == 3
    assert dwa.alpha.tolist() == [[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    for wrong in (mask.T, torch.ones(3, 4).bool(), torch.zeros(3, 4).bool()):
        with pytest.raises(ValueError, match="mask"):
            dwa.set_mask(wrong)
    other = DWA(DenseFormerConfig(n_layer=3))
    other.load_state_dict(dwa.state_dict())
    assert other.sources == dwa.sources


def test_masks_that_have_names():
    L = 9

    def mask(see):
        rows = [[j <= i and see(i, j) for j in range(L + 1)] for i in range(1, L + 1)]
        return torch.tensor(
            [r if any(r) else [j == i for j in range(L + 1)] for i, r in enumerate(rows, 1)]
        )

    def last(K):
        return lambda i, j: j == 0 or j > i - K

    assert dwa_mask("last4", L).equal(mask(last(4)))
    assert dwa_mask("connect-to-last", L).equal(mask(lambda i, j: i == L))
    both = mask(lambda i, j: last(2)(i, j) or (i - j) % 4 == 0)
    assert dwa_mask("last2+4x1", L).equal(both)
    rows = {4: [0, 3], 9: [0, 5, 9]}
    assert dwa_mask("4:0,3+9:0,5,9", L).equal(mask(lambda i, j: j in rows.get(i, [])))
    for pattern in (*PATTERNS, "last4", "connect-to-last", "last2+4x1", "4:0,3+9:0,5,9"):
        again = dwa_pattern(dwa_mask(pattern, L))
        assert dwa_mask(again, L).equal(dwa_mask(pattern, L)), pattern
    for wrong in ("last0", "last", "10:0", "4:5", "0:0", "4:", "1x1+", "+", "4:0,", "last4x5"):
        with pytest.raises(ValueError, match="dwa"):
            dwa_mask(wrong, L)


@pytest.mark.parametrize(
    ("pattern", "percent"),
    # Table 4 of the paper, and by definition. It gives 92% for 12x1, which is 1 - 1/(12 * 1);
    # counted, as the others are, it is 94%.
    [("last4", 84), ("connect-to-last", 96), ("4x5", 95), ("12x1", 94), ("1x1", 0), ("none", 100)],
)
def test_sparsity_is_the_papers(pattern, percent):
    dwa = DWA(DenseFormerConfig(n_layer=48, dwa=pattern))
    assert f"{dwa.sparsity():.0%}" == f"{percent}%"


def test_skips_with_gains():
    torch.manual_seed(0)
    plain, gains = tiny("none"), tiny("none", skip_gains=True)
    assert gains.num_params() == plain.num_params() + 2 * 5
    gains.load_state_dict(plain.state_dict(), strict=False)
    idx = torch.randint(17, (2, 8))
    assert torch.equal(plain(idx)[0], gains(idx)[0])  # the gains start at 1
    block = gains.blocks[2]
    with torch.no_grad():
        block.gains.copy_(torch.tensor([0.5, -2.0]))
    x, rotary = torch.randn(2, 8, 8).double(), gains.rotary
    attended = 0.5 * x + block.attn(block.ln_1(x), rotary)
    torch.testing.assert_close(block(x, rotary), -2 * attended + block.mlp(block.ln_2(attended)))
    gains(idx, idx)[1].backward()
    assert all(b.gains.grad.abs().min() > 0 for b in gains.blocks)
    (adamw,) = gains.configure_optimizers(1e-3)
    decayed = {id(p) for g in adamw.param_groups if g["weight_decay"] for p in g["params"]}
    assert id(block.gains) not in decayed


def test_number_of_parameters():
    for n_layer in (1, 2, 5, 48, 72):
        dwa = DWA(DenseFormerConfig(n_layer=n_layer))
        assert dwa.num_params() == n_layer * (n_layer + 3) // 2  # paper, section 3
    assert DWA(DenseFormerConfig(n_layer=48)).num_params() == 1224

    # The paper's models are too big to build here, but each block has the same size.
    def params(n_layer):
        config = DenseFormerConfig(n_layer=n_layer, dwa="none")
        return DenseFormer(config).num_params()

    one, two = params(1), params(2)
    for n_layer, millions in ((48, 378.45), (64, 491.72), (72, 548.35), (90, 675.78)):  # Table 1
        assert round((one + (n_layer - 1) * (two - one)) / 1e6, 2) == millions
    assert tiny("1x1").num_params() - tiny("none").num_params() == 5 * 8 // 2


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_what_is_masked_is_never_trained(optimizer):
    if optimizer == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    model = tiny("2x3", n_layer=6).float()
    before = model.dwa.alpha.detach().clone()
    optimizers = model.configure_optimizers(1e-2, weight_decay=10.0, optimizer=optimizer)
    for _ in range(3):
        idx = torch.randint(17, (2, 8))
        model(idx, idx)[1].backward()
        for o in optimizers:
            o.step()
            o.zero_grad()
    trained = torch.zeros(6, 7, dtype=torch.bool)
    trained[2, [1, 3]] = trained[5, [0, 2, 4, 6]] = True
    after = model.dwa.alpha.detach()
    assert torch.equal(after[~trained], before[~trained])
    assert (after[trained] != before[trained]).all()
    # Not decayed either: a decay of 10 x 1e-2 x 3 steps would have taken a quarter of each.
    assert (after - before).abs().max() < 0.05


def test_decay_is_for_the_matrices_and_the_embedding():
    model = tiny(bias=True)
    (adamw,) = model.configure_optimizers(1e-3, weight_decay=0.1)
    decayed = {id(p) for g in adamw.param_groups if g["weight_decay"] for p in g["params"]}
    for name, p in model.named_parameters():
        matrix = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight", "wte.weight"))
        assert (id(p) in decayed) == matrix, name
    groups = [p for g in adamw.param_groups for p in g["params"]]
    assert len({id(p) for p in groups}) == len(groups) == len(list(model.parameters()))


@pytest.mark.parametrize("impl", ["naive", "inplace"])
def test_bfloat16_is_summed_in_float32(impl):
    dwa = DWA(DenseFormerConfig(n_layer=48, dwa_impl=impl))
    with torch.no_grad():
        dwa.alpha[-1] = 1.0
    _, X = dwa.start(torch.full((1, 1, 64), 256.0, dtype=torch.bfloat16))
    for i in range(1, 48):
        dwa(i, torch.full((1, 1, 64), 1.0, dtype=torch.bfloat16), X)
    y = dwa(48, torch.full((1, 1, 64), 1.0, dtype=torch.bfloat16), X)
    # In bfloat16, 256 + 1 = 256: a sum kept in it would never leave 256.
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, torch.full_like(y, 256.0 + 48.0))


def test_autocast_keeps_the_stream_in_bfloat16_and_alpha_in_float32():
    model = tiny("1x1").float()
    seen = []
    model.blocks[3].register_forward_hook(lambda m, i, o: seen.extend((i[0].dtype, o.dtype)))
    idx = torch.randint(17, (2, 8))
    with torch.autocast("cpu", torch.bfloat16):
        logits, loss = model(idx, idx)
    loss.backward()
    assert seen == [torch.bfloat16, torch.bfloat16]
    assert model.dwa.alpha.dtype == model.dwa.alpha.grad.dtype == torch.float32
    full, _ = model(idx, idx)
    torch.testing.assert_close(logits.float(), full, rtol=0.1, atol=0.1)


# -----------------------------------------------------------------------------
# The in-place DWA in a model, against the naive one


def twins(dwa="1x1", n_layer=9, tile=4, **flags):
    """Two models of the same weights, in-place and naive."""
    ours, naive = tiny(dwa, n_layer, **flags), tiny(dwa, n_layer, **flags, dwa_impl="naive")
    naive.load_state_dict(ours.state_dict())
    ours.dwa.tile = tile
    with torch.no_grad():
        for model in (ours, naive):
            model.dwa.alpha /= 3  # or activations grow threefold a layer
    return ours, naive


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def same_gradients(ours, naive):
    # Where a mask leaves out a block altogether, one has a gradient of zeros and the other none.
    zeros = {name: torch.zeros_like(p) for name, p in naive.named_parameters() if p.requires_grad}
    ours, naive = zeros | gradients(ours), zeros | gradients(naive)
    torch.testing.assert_close(ours, naive, rtol=1e-9, atol=1e-10)


def frozen(model, names):
    for name, p in model.named_parameters():
        if name.startswith(names):
            p.requires_grad_(False)


HOLES = "3:0,2+4:1+5:0,1,2,3+6:2,6+7:0,1,4,5,6+8:1,3,5,6,7+9:0,1,5,7"  # rows with no diagonal too


@pytest.mark.parametrize("pattern", [*PATTERNS, "last2", "last3+9:2,5", HOLES])
def test_inplace_is_naive(pattern):
    ours, naive = twins(pattern)
    assert ours.dwa.dense == (pattern not in ("none", "4x1", "4x5", "3x2", "1x5", "12x1"))
    idx = torch.randint(17, (1, 8))
    for model in (ours, naive):
        logits, loss = model(idx, idx)
        loss.backward()
    same_gradients(ours, naive)
    with torch.inference_mode():
        torch.testing.assert_close(ours(idx, idx)[0], logits.detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "names",
    [("dwa.",), ("wte", "lm_head"), ("wte", "lm_head", "blocks.0.", "blocks.5."),
     ("dwa.", "wte", "lm_head", "blocks.0", "blocks.1", "blocks.2")],
)  # fmt: skip
@pytest.mark.parametrize("pattern", ["1x1", "2x1"])
def test_inplace_with_frozen_parts(pattern, names):
    ours, naive = twins(pattern)
    idx = torch.randint(17, (2, 8))
    for model in (ours, naive):
        frozen(model, names)
        model(idx, idx)[1].backward()
    same_gradients(ours, naive)


@pytest.mark.parametrize("pattern", ["1x1", "2x1"])
def test_inplace_passes_do_not_meet(pattern):
    ours, naive = twins(pattern)
    other, _ = twins(pattern)
    first, second = torch.randint(17, (2, 2, 8))
    for model in (ours, naive):
        a = model(first, first)[1]
        b = model(second, second)[1]
        other(first, second)[1].backward()  # another model, in between
        with torch.no_grad():
            model(second[:1, :3])
        (a + b).backward()
    same_gradients(ours, naive)


@pytest.mark.parametrize("last", [1, 4, 7])
@pytest.mark.parametrize("pattern", ["1x1", "2x1"])
def test_inplace_when_the_loss_is_of_an_inner_layer(pattern, last):
    grads = []
    for model in twins(pattern):
        x = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        weights = torch.linspace(0.5, 1.5, 36, dtype=torch.float64).view(9, 4).requires_grad_()
        through_dwa(model.dwa, x, weights)[last - 1].square().sum().backward()
        grads.append((weights.grad, model.dwa.alpha.grad))
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)


def test_inplace_with_activation_checkpointing():
    from torch.utils.checkpoint import checkpoint

    ours, naive = twins()
    idx = torch.randint(17, (2, 8))
    naive(idx, idx)[1].backward()
    for block in ours.blocks:
        forward = block.forward
        block.forward = lambda *args, f=forward: checkpoint(f, *args, use_reentrant=False)
    ours(idx, idx)[1].backward()
    same_gradients(ours, naive)


@pytest.fixture
def memories(monkeypatch):
    """Weak references to all InPlaceMemory there is."""
    made, init = [], InPlaceMemory.__init__

    def new(self, *args):
        made.append(weakref.ref(self))
        init(self, *args)

    monkeypatch.setattr(InPlaceMemory, "__init__", new)
    gc.disable()  # nothing shall wait for the collector
    yield made
    gc.enable()


def test_inplace_frees_its_memory(memories):
    ours, _ = twins()
    idx = torch.randint(17, (2, 8))
    logits, loss = ours(idx, idx)
    (memory,) = [ref() for ref in memories]
    assert sum(X.numel() for X in memory.X) == 10 * 2 * 8 * 8  # (L + 1) activations
    loss.backward(retain_graph=True)
    assert memory.X is memory.tile_G is memory.tile is None
    del logits, loss, memory
    ours(idx, idx)  # never goes backward
    ours.blocks[5].mlp.forward = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        ours(idx, idx)
    assert [ref() for ref in memories] == [None, None, None]


def test_memory_is_one_buffer_and_two_tiles():
    N, peak = 4 * 64 * 128, {}
    x = torch.randn(4, 64, 128, requires_grad=True)
    weights = torch.ones(24, 128)
    for pattern in ("none", "1x1", "4x1"):
        dwa = DWA(DenseFormerConfig(n_layer=24, dwa=pattern))
        dwa.tile = 3

        def forward(dwa=dwa):
            return through_dwa(dwa, x, weights)[-1]

        peak[pattern] = bench.peak_memory(lambda f=forward: f().backward(x.detach()), x.device)
        with torch.no_grad():
            peak[pattern, "inference"] = bench.peak_memory(forward, x.device)
    for pattern, tiles in (("1x1", 3), ("4x1", 3 * 4)):
        more = (peak[pattern] - peak["none"]) / (4 * N)
        assert 20 < more <= 25 + 2 * tiles + 0.5
        more = (peak[pattern, "inference"] - peak["none", "inference"]) / (4 * N)
        assert 20 < more <= 25 + tiles + 1.5  # one tile, and an output that is no tile's


def test_inplace_goes_backward_once():
    ours, _ = twins()
    idx = torch.randint(17, (2, 8))
    loss = ours(idx, idx)[1]
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="naive"):
        loss.backward()
    (grad,) = torch.autograd.grad(ours(idx, idx)[1], ours.wte.weight, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


def test_masks_of_the_papers_other_patterns():
    last3 = torch.ones(9, 10).tril(1).triu(-1) > 0
    last3[:, 0] = True
    to_last = torch.eye(10)[1:] > 0
    to_last[-1] = True
    for mask in (last3, to_last):
        ours, naive = twins("none")
        idx = torch.randint(17, (2, 8))
        for model in (ours, naive):
            model.dwa.set_mask(mask)
            with torch.no_grad():
                model.dwa.alpha.copy_(mask * torch.linspace(-1, 1, 10).double())
        loss = ours(idx, idx)[0].square().sum()
        loss.backward()
        naive(idx, idx)[0].square().sum().backward()
        same_gradients(ours, naive)
        grad = ours.dwa.alpha.grad
        assert (grad != 0).equal(mask & (mask.sum(1, keepdim=True) > 1))
        with torch.no_grad():  # and one of them as a finite difference
            i, j = divmod(grad.abs().argmax().item(), 10)
            ours.dwa.alpha[i, j] += 1e-6
            slope = (ours(idx, idx)[0].square().sum() - loss) / 1e-6
        assert grad[i, j].item() == pytest.approx(slope.item(), rel=1e-3)


def test_inplace_in_copies():
    ours, naive = twins("2x1")
    idx = torch.randint(17, (2, 8))
    naive(idx, idx)[1].backward()
    for model in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        model(idx, idx)[1].backward()
        same_gradients(model, naive)
    assert not gradients(ours)


def test_inplace_under_autocast():
    ours, naive = twins(n_embd=16)
    grads = []
    for model in (ours.float(), naive.float(), copy.deepcopy(naive).double()):
        torch.manual_seed(0)
        idx = torch.randint(17, (2, 8))
        with torch.autocast("cpu", torch.bfloat16, enabled=len(grads) < 2):
            model(idx, idx)[1].backward()
        grads.append(torch.cat([g.flatten().double() for g in gradients(model).values()]))
    error, scale = ((g - grads[2]).norm() / grads[2].norm() for g in grads[:2])
    assert error < 1.2 * scale + 1e-3


@pytest.mark.parametrize("impl", ["inplace", "naive"])
def test_autocast_does_not_round_the_sums(impl):
    dwa = DWA(DenseFormerConfig(n_layer=9, dwa_impl=impl))
    randomise(dwa)
    dwa.tile = 4
    torch.manual_seed(0)
    xs = torch.randn(10, 2, 8, 16)
    results = []
    for enabled in (False, True):
        dwa.alpha.grad = None
        x0 = xs[0].clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            _, X = dwa.start(x0)
            y = [dwa(i, xs[i], X) for i in range(1, 10)]
            sum(row.square().mean() for row in y).backward()
        results.append((*y, x0.grad, dwa.alpha.grad))
    torch.testing.assert_close(*results)


def test_blocks_are_compiled_once_for_all():
    ours, naive = twins(n_layer=12)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    ours.compile(backend="aot_eager")
    for size in ((2, 8), (2, 8)):
        idx = torch.randint(17, size)
        for model in (ours, naive):
            model.zero_grad()
            model(idx, idx)[1].backward()
        same_gradients(ours, naive)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 2  # a block, the loss
    assert not counters["graph_break"]
    torch._dynamo.reset()


def ddp_rank(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    for pattern in ("1x1", "4x5"):
        ours, _ = twins(pattern)
        model = torch.nn.parallel.DistributedDataParallel(ours)
        idx = torch.load(f"{folder}/idx.pt")[rank]
        for _ in range(2):  # the second time in the buckets that DDP built anew
            ours.zero_grad()
            model(idx, idx)[1].backward()
        torch.save(gradients(ours), f"{folder}/{pattern}-{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # the threads of gloo, of torch 2.13, may abort an interpreter that ends by itself


def test_inplace_with_ddp(tmp_path):
    idx = torch.randint(17, (2, 3, 8))
    torch.save(idx, tmp_path / "idx.pt")
    torch.multiprocessing.spawn(ddp_rank, (str(tmp_path),), nprocs=2)
    for pattern in ("1x1", "4x5"):
        _, naive = twins(pattern)
        naive(idx.flatten(0, 1), idx.flatten(0, 1))[1].backward()
        for rank in (0, 1):
            grads = torch.load(tmp_path / f"{pattern}-{rank}.pt")
            torch.testing.assert_close(grads, gradients(naive), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])  # as a CPU does, and a GPU
@pytest.mark.parametrize("pattern", ["1x1", "2x1"])
def test_inplace_rounds_as_a_sum_in_float32_does(pattern, stored, monkeypatch):
    monkeypatch.setattr("denseformer.PIECE", 1000)
    grads = []
    for dtype, impl in (
        (torch.bfloat16, "inplace"),
        (torch.bfloat16, "naive"),
        (torch.float64, "naive"),
    ):
        torch.manual_seed(0)
        dwa = DWA(DenseFormerConfig(n_layer=12, dwa=pattern, dwa_impl=impl))
        randomise(dwa)
        dwa.tile = 5
        with torch.no_grad():
            dwa.alpha /= 4
        x0 = torch.randn(2, 32, 16).bfloat16().to(dtype).requires_grad_()
        (x, X), y = dwa.start(x0), []
        if impl == "inplace":
            X.memory.X = [rows.to(stored) for rows in X.memory.X]
        for i in range(1, 13):
            x = dwa(i, x.detach().bfloat16().to(dtype) if i > 1 else x, X)
            y.append(x)
        y = torch.stack(y)
        y.float().square().mean().backward()
        grads.append((y.detach().double(), x0.grad.double(), dwa.alpha.grad.double()))
    for ours, naive, exact in zip(*grads, strict=True):
        error, scale = (ours - exact).norm() / exact.norm(), (naive - exact).norm() / exact.norm()
        assert error < 1.05 * scale


def test_inplace_takes_any_layout():
    grads = []
    for model in twins(n_layer=3):
        x = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0)).double()
        x = x.transpose(0, 2).requires_grad_()
        (y, X), dwa = model.dwa.start(x), model.dwa
        for i in (1, 2, 3):
            y = dwa(i, y.transpose(0, 1).cos().transpose(0, 1), X)
        y.sum().backward()  # its gradient is one number, expanded
        grads.append((y, x.grad, dwa.alpha.grad))
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)


# -----------------------------------------------------------------------------
# The model, against a Transformer written separately


def reference_logits(model, idx, pattern):
    """All logits, from the weights of the model and the textbook's formulas, in numpy."""
    c = model.config
    w = {name: p.detach().numpy() for name, p in model.state_dict().items()}
    n_head, hs = c.n_head, c.n_embd // c.n_head
    T = idx.shape[1]

    def norm(x, name):
        mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        y = (x - mean) / np.sqrt(var + 1e-5) * w[name + ".weight"]
        return y + w.get(name + ".bias", 0.0)

    def linear(x, name):
        return x @ w[name + ".weight"].T + w.get(name + ".bias", 0.0)

    def turn(x):  # (T, hs): channel pairs as complex numbers, multiplied by e^(i t theta)
        z = x[:, : hs // 2] + 1j * x[:, hs // 2 :]
        theta = 10000.0 ** (-2 * np.arange(hs // 2) / hs)
        z = z * np.exp(1j * np.arange(T)[:, None] * theta)
        return np.concatenate([z.real, z.imag], axis=1)

    def attention(x, name):
        heads = []
        qkv = linear(x, name + ".c_attn").reshape(T, 3, n_head, hs)
        for h in range(n_head):
            q, k, v = qkv[:, 0, h], qkv[:, 1, h], qkv[:, 2, h]
            scores = turn(q) @ turn(k).T / math.sqrt(hs)
            scores[np.triu_indices(T, 1)] = -np.inf
            p = np.exp(scores - scores.max(1, keepdims=True))
            heads.append(p / p.sum(1, keepdims=True) @ v)
        return linear(np.concatenate(heads, 1), name + ".c_proj")

    def mlp(x, name):
        h = linear(x, name + ".c_fc")
        erf = np.vectorize(math.erf)
        return linear(h * 0.5 * (1 + erf(h / math.sqrt(2))), name + ".c_proj")

    logits = []
    for row in idx.numpy():
        X = [w["wte.weight"][row]]
        y = X[0]
        for i in range(1, c.n_layer + 1):
            x = y + attention(norm(y, f"blocks.{i - 1}.ln_1"), f"blocks.{i - 1}.attn")
            X.append(x + mlp(norm(x, f"blocks.{i - 1}.ln_2"), f"blocks.{i - 1}.mlp"))
            js = terms(pattern, i)
            y = X[i] if js is None else sum(w["dwa.alpha"][i - 1, j] * X[j] for j in js)
        logits.append(norm(y, "ln_f") @ w["wte.weight"].T)
    return torch.from_numpy(np.stack(logits))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("pattern", ["none", "1x1", "2x1", "3x2"])
def test_model_is_the_reference(pattern, bias):
    model = tiny(pattern, bias=bias)
    with torch.no_grad():
        for p in model.parameters():
            if p is not model.dwa.alpha:
                p.add_(torch.randn_like(p) * 0.2)  # norms and biases too
    # The angles were made in float32; in float64 the comparison shall not end at their rounding.
    theta = 10000.0 ** (-torch.arange(0, 4, 2).double() / 4)
    angle = torch.outer(torch.arange(8).double(), theta)
    rotary = torch.stack((angle.cos(), angle.sin()))
    torch.testing.assert_close(model.rotary.double(), rotary, atol=1e-6, rtol=0)
    model.rotary = rotary
    idx = torch.randint(17, (2, 8))
    targets = torch.randint(17, (2, 8))
    expected = reference_logits(model, idx, pattern)
    logits, loss = model(idx, targets)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    p = expected.softmax(-1).gather(-1, targets[..., None])
    assert loss.item() == pytest.approx(-p.log().mean().item(), rel=1e-6)
    last, none = model(idx)
    assert none is None
    torch.testing.assert_close(last, expected[:, -1:], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_at_initialisation_it_is_the_plain_transformer(pattern):
    config = {"vocab_size": 17, "block_size": 8, "n_head": 2, "n_embd": 8, "n_layer": 5}
    model = DenseFormer(DenseFormerConfig(**config, dwa=pattern))
    plain = DenseFormer(DenseFormerConfig(**config, dwa="none"))
    weights = {k: v for k, v in model.state_dict().items() if not k.startswith("dwa.")}
    plain.load_state_dict(weights, strict=False)
    idx = torch.randint(17, (3, 8))
    assert torch.equal(model(idx, idx)[0], plain(idx, idx)[0])


def test_initialisation_is_gpt2s():
    torch.manual_seed(0)
    model = DenseFormer(DenseFormerConfig(vocab_size=512, n_layer=8, n_head=4, n_embd=256))
    for name, p in model.named_parameters():
        if name.endswith("c_proj.weight"):
            assert p.std().item() == pytest.approx(0.02 / 4, rel=0.02), name  # sqrt(2 * 8) = 4
        elif p.dim() == 2 and name != "dwa.alpha":
            assert p.std().item() == pytest.approx(0.02, rel=0.02), name
    assert model.lm_head.weight is model.wte.weight
    idx = torch.randint(512, (4, 64))
    assert model(idx, idx.roll(1))[1].item() == pytest.approx(math.log(512), abs=0.1)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_later_token_never_changes_an_earlier_logit(pattern):
    model = tiny(pattern)
    idx = torch.randint(17, (1, 8))
    before, _ = model(idx, idx)
    for t in range(8):
        changed = idx.clone()
        changed[0, t] = (changed[0, t] + 1) % 17
        after, _ = model(changed, idx)
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.equal(after[:, t], before[:, t])


def test_targets_of_minus_one_do_not_count():
    model = tiny()
    idx, targets = torch.randint(17, (1, 8)), torch.randint(17, (1, 8))
    targets[0, 3:] = -1
    logits, loss = model(idx, targets)
    assert loss.item() == pytest.approx(F.cross_entropy(logits[0, :3], targets[0, :3]).item())


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ({"n_embd": 10, "n_head": 3}, "n_embd"),
        ({"n_embd": 6, "n_head": 2}, "even"),
        ({"n_layer": 0}, "n_layer"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"dropout": 1.0}, "dropout"),
        ({"dwa": "0x1"}, "dwa"),
        ({"dwa": "1x0"}, "dwa"),
        ({"dwa": "dense"}, "dwa"),
        ({"dwa": "1x1x1"}, "dwa"),
        ({"dwa": "-1x1"}, "dwa"),
        ({"dwa_impl": "magic"}, "dwa_impl"),
    ],
)
def test_a_config_that_is_no_model_is_refused(flags, names):
    with pytest.raises(ValueError, match=names):
        DenseFormerConfig(**flags)


def test_more_tokens_than_block_size_are_refused():
    with pytest.raises(ValueError, match="block_size"):
        tiny()(torch.zeros(1, 9, dtype=torch.long))


def test_deepcopy_and_pickle():
    model = tiny("2x1")
    idx = torch.randint(17, (1, 8))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(idx)[0], model(idx)[0])
        assert twin.lm_head.weight is twin.wte.weight


# -----------------------------------------------------------------------------
# Generation


@pytest.mark.parametrize("prompt", [1, 5, 8, 13])  # block_size is 8
@pytest.mark.parametrize("pattern", PATTERNS)
def test_cached_generation_is_the_full_context_recomputed(pattern, prompt):
    model = tiny(pattern).float()
    idx = torch.randint(17, (3, prompt))
    logits = []
    model.lm_head.register_forward_hook(lambda m, i, o: logits.append(o[:, -1]))
    ours = model.generate(idx, 12, temperature=0)
    cached, expected = logits[:], idx
    for t in range(12):
        full = model(expected[:, -8:])[0][:, -1]
        torch.testing.assert_close(cached[t], full, rtol=1e-4, atol=1e-5)
        expected = torch.cat((expected, full.argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(ours, expected)


@torch.no_grad()
def test_cache_takes_several_tokens_at_once():
    from denseformer import KVCache

    model = tiny()
    idx = torch.randint(17, (2, 8))
    cache = KVCache(model.config, 2, idx.device, torch.float64)
    for part in idx.split((3, 1, 4), dim=1):
        logits, _ = model(part, cache=cache)
    torch.testing.assert_close(logits, model(idx)[0], rtol=1e-9, atol=1e-9)


def test_stream_is_generate():
    model = tiny(dropout=0.5).train()
    idx = torch.randint(17, (2, 4))
    options = {"temperature": 0.7, "top_k": 5, "top_p": 0.9}
    tokens = list(model.stream(idx, 6, **options, generator=torch.Generator().manual_seed(1)))
    whole = model.generate(idx, 6, **options, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.cat((idx, *tokens), dim=1), whole)
    assert model.training  # as it was, though without dropout in between
    assert model.generate(idx, 0).equal(idx)


def test_draw():
    p = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    logits = p.log().repeat(20000, 1)
    generator = torch.Generator().manual_seed(0)

    def frequencies(**options):
        options = {"temperature": 1.0, "top_k": None, "top_p": None} | options
        ids = draw(logits, **options, generator=generator)
        return ids.flatten().bincount(minlength=4) / len(logits)

    close = {"atol": 0.015, "rtol": 0}
    torch.testing.assert_close(frequencies(), p[0], **close)
    torch.testing.assert_close(frequencies(temperature=0.5), (p**2 / (p**2).sum())[0], **close)
    torch.testing.assert_close(frequencies(top_k=2), torch.tensor([0, 4, 0, 3]) / 7, **close)
    torch.testing.assert_close(frequencies(top_k=99), p[0], **close)
    # 0.4 + 0.3 falls short of 0.75, so 0.2 belongs to the smallest set that reaches it.
    torch.testing.assert_close(frequencies(top_p=0.75), torch.tensor([0, 4, 2, 3]) / 9, **close)
    for greedy in ({"temperature": 0.0}, {"temperature": 1e-30}, {"top_k": 1}, {"top_p": 1e-9}):
        assert frequencies(**greedy).tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize(
    ("options", "names"),
    [({"temperature": -1}, "temperature"), ({"top_k": 0}, "top_k"), ({"top_p": 0}, "top_p"),
     ({"top_p": 1.5}, "top_p"), ({"idx": torch.zeros(1, 0).long()}, "prompt")],
)  # fmt: skip
def test_generation_refuses_what_makes_no_sense(options, names):
    options = {"idx": torch.zeros(1, 1).long(), "max_new_tokens": 1} | options
    with pytest.raises(ValueError, match=names):
        tiny().generate(**options)


# -----------------------------------------------------------------------------
# Data


def test_tokenizers_give_back_what_they_took():
    text = "Häßlich?\r\n\tJa — 𝄞!\x00"
    for tokenizer in (CharTokenizer("".join(sorted(set(text)))), ByteTokenizer()):
        for twin in (tokenizer, from_state(json.loads(json.dumps(tokenizer.state())))):
            ids = twin.encode(text)
            assert ids.ndim == 1
            assert ids.max() < twin.vocab_size
            assert twin.decode(ids.tolist()) == text
    assert ByteTokenizer().decode([0xC3]) == "\ufffd"


def test_an_unknown_character_is_named():
    with pytest.raises(data.DataError, match=r"'x' \(number 3 "):
        CharTokenizer("ab").encode("abxz")
    with pytest.raises(data.DataError, match="kind 'bpe-of-2031'"):
        from_state({"kind": "bpe-of-2031"})


def test_own_text_is_characters_or_bytes(tmp_path, monkeypatch):
    file = tmp_path / "my.txt"
    file.write_bytes("naïve\r\n".encode() * 30)
    dataset = data.load(str(file), block_size=8)
    assert dataset.tokenizer.state() == {"kind": "char", "chars": "\n\raenvï"[:3] + "envï"}
    assert len(dataset.train) + len(dataset.val) == 7 * 30
    assert dataset.tokenizer.decode(dataset.train[:7].tolist()) == "naïve\r\n"

    text = "".join(chr(0x4E00 + n) for n in range(300))  # 300 different characters
    file.write_text(text)
    many = data.load(str(file), block_size=8)
    assert many.tokenizer.state() == {"kind": "byte"}
    monkeypatch.setattr(textfile, "LARGE", 100)
    large = data.load(str(file), block_size=8)
    base = large.train
    while not isinstance(base, np.memmap):
        base = base.base
    for d in (many, large):
        both = np.concatenate((d.train, d.val))
        assert len(d.train) == 810
        assert d.tokenizer.decode(both.tolist()) == text
    assert large.fingerprint() == many.fingerprint() != dataset.fingerprint()


@pytest.mark.parametrize("large", [1, 10**8])
def test_a_file_that_is_no_text_is_refused(tmp_path, monkeypatch, large):
    monkeypatch.setattr(textfile, "LARGE", large)
    file = tmp_path / "my.txt"
    cut = ("é" * 99).encode()[:-1]
    wrong = {b"": "empty", b"abc" * 3: "too short", b"abc\xff" * 99: "0xff", cut: "UTF-8"}
    for content, reason in wrong.items():
        file.write_bytes(content)
        with pytest.raises(data.DataError, match=reason):
            data.load(str(file), block_size=16)
    file.unlink()
    with pytest.raises(data.DataError, match="folder"):
        data.load(str(tmp_path), block_size=16)
    file.write_text("abc" * 99)
    monkeypatch.setenv("DENSEFORMER_CACHE", "/dev/null/cache")
    if large == 1:
        with pytest.raises(data.DataError, match="cannot get tokens of"):
            data.load(str(file), block_size=16)
    with pytest.raises(data.DataError, match="/dev/null"):
        download.fetch("http://127.0.0.1:9/x", download.cache_dir() / "x")
    with pytest.raises(data.DataError, match="did you mean shakespeare"):
        data.load("shakspeare", block_size=16)


# A web server on this machine that answers as it is told, one word for each request.

CONTENT = b"To be, or not to be, that is the question:\n" * 50
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setattr(download, "BACKOFF", 0.01)
    monkeypatch.setattr(download, "TIMEOUT", (2.0, 0.5))
    release = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            word = httpd.script.pop(0)
            httpd.requests += 1
            if isinstance(word, int):
                self.send_error(word)
                return
            self.send_response(200)
            body = {"wrong": CONTENT[::-1], "long": CONTENT * 2}.get(word, CONTENT)
            if word != "endless":
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            with contextlib.suppress(OSError):
                if word == "stalls":
                    self.wfile.write(body[:100])
                    release.wait(10)
                elif word == "trickles":
                    for byte in body:
                        self.wfile.write(bytes([byte]))
                        if release.wait(0.1):
                            break
                else:
                    self.wfile.write(body[: 100 if word == "truncated" else None])

        def log_message(self, *args):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    httpd.script, httpd.requests = [], 0
    httpd.url = f"http://127.0.0.1:{httpd.server_port}/input.txt"
    thread = threading.Thread(target=httpd.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield httpd
    release.set()
    httpd.shutdown()
    httpd.server_close()


def fetch(server, *script, deadline=None):
    server.script, server.requests = list(script), 0
    path = download.cache_dir() / "file.txt"
    return download.fetch(server.url, path, len(CONTENT), SHA256, deadline)


def cached():
    """What is in the cache, but for the locks, which stay."""
    return [p.name for p in download.cache_dir().iterdir() if p.suffix != ".lock"]


@pytest.mark.parametrize(
    "script",
    [["good"], [500, 503, "good"], [429, "good"], ["truncated", "good"], ["wrong", "good"],
     ["long", "good"], ["stalls", "good"], ["endless"]],
)  # fmt: skip
def test_download(server, script):
    path = fetch(server, *script)
    assert path.read_bytes() == CONTENT
    assert server.requests == len(script)
    assert cached() == ["file.txt"]
    assert fetch(server) == path  # from the cache: no request
    assert server.requests == 0
    path.write_bytes(CONTENT[:-1])  # a cache that went bad is fetched anew
    assert fetch(server, "good").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("script", "reason", "requests"),
    [(["wrong"] * 3, "sha256", 3), (["truncated"] * 4, "broke off|bytes", 4),
     ([500] * 4, "500", 4), ([404], "404", 1), ([403], "403", 1)],
)  # fmt: skip
def test_a_download_that_fails_leaves_nothing(server, script, reason, requests):
    with pytest.raises(data.DataError, match=reason):
        fetch(server, *script)
    assert server.requests == requests
    assert cached() == []


def test_a_download_from_nowhere(server):
    server.url = "http://127.0.0.1:9/input.txt"
    with pytest.raises(data.DataError, match="no connection"):
        fetch(server)


def test_a_local_copy_or_mirror(server, tmp_path):
    file = tmp_path / "copy.txt"
    file.write_bytes(CONTENT)
    server.url = str(file)
    assert fetch(server).read_bytes() == CONTENT
    download.cache_dir().joinpath("file.txt").unlink()
    file.write_bytes(CONTENT + b"!")
    with pytest.raises(data.DataError, match="bytes"):
        fetch(server)
    server.url = str(tmp_path / "missing.txt")
    with pytest.raises(data.DataError, match=r"missing\.txt"):
        fetch(server)


@pytest.mark.parametrize("script", [["stalls"] * 4, ["trickles"], [500] * 4])
def test_who_named_no_data_set_gets_pydoc_when_there_is_no_network(
    server, script, monkeypatch, capsys
):
    monkeypatch.setenv("SHAKESPEARE_URL", server.url)
    monkeypatch.setattr(data, "PATIENCE", 1.0)
    server.script = script
    begin = time.monotonic()
    dataset = data.load(None, block_size=64)
    assert time.monotonic() - begin < 10  # not a speed: 50 s of trickling would be far beyond
    assert dataset.name == "pydoc"
    assert len(dataset.train) > 300_000
    assert "TRAINING ON PYTHON'S LANGUAGE REFERENCE" in capsys.readouterr().out
    assert cached() == []


def test_a_named_data_set_is_never_replaced(server, monkeypatch):
    monkeypatch.setenv("SHAKESPEARE_URL", server.url)
    server.script = [404]
    with pytest.raises(data.DataError, match="404"):
        data.load("shakespeare", block_size=64)


# A hub: it redirects to an address on another host, says what the file is, and resumes.


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(download, "BACKOFF", 0.01)
    monkeypatch.setattr(download, "TIMEOUT", (2.0, 0.5))
    monkeypatch.setattr(download, "CHUNK", 1000)
    release = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            folder, _, name = self.path[1:].partition("/")
            content = httpd.files.get(name)
            if content is None:
                self.send_error(404)
            elif folder == "resolve":
                httpd.seen_here.append(self.headers.get("Authorization"))
                self.send_response(302)
                self.send_header("Location", f"http://localhost:{httpd.server_port}/signed/{name}")
                self.send_header("X-Linked-ETag", f'"{httpd.tag(content)}"')
                self.send_header("X-Linked-Size", str(len(content)))
                self.end_headers()
            else:
                with contextlib.suppress(OSError):
                    self.send(content, httpd.script.pop(0) if httpd.script else "good")

        def send(self, content, word):
            start = self.headers.get("Range", "").removeprefix("bytes=").removesuffix("-")
            httpd.seen.append((word, start, self.headers.get("Authorization")))
            start = int(start or 0)
            if word == 429:
                self.send_response(429)
                self.send_header("Retry-After", "0.01")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if isinstance(word, int):
                self.send_error(word)
                return
            if word == "changed":  # between this attempt and the next
                httpd.files = {name: c[::-1] for name, c in httpd.files.items()}
            start += 1000 if word == "another span" else 0
            if start and word != "ignores Range":
                self.send_response(206 if start < len(content) else 416)
                span = f"{start}-{len(content) - 1}" if start < len(content) else "*"
                self.send_header("Content-Range", f"bytes {span}/{len(content)}")
                content = content[start:]
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if word == "wrong":
                content = content[::-1]
            half = word in ("truncated", "stalls", "changed")
            self.wfile.write(content[: (len(content) + 1) // 2 if half else None])
            if word == "stalls":
                release.wait(10)

        def log_message(self, *args):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    httpd.script, httpd.seen, httpd.seen_here = [], [], []
    httpd.files = {"a.bin": os.urandom(300_000)}
    httpd.tag = lambda content: hashlib.sha256(content).hexdigest()
    httpd.url = f"http://127.0.0.1:{httpd.server_port}/resolve"
    threading.Thread(target=httpd.serve_forever, args=(0.05,), daemon=True).start()
    yield httpd
    release.set()
    httpd.shutdown()
    httpd.server_close()


def starts(hub):
    return [int(start or 0) for _, start, _ in hub.seen]


@pytest.mark.parametrize(
    ("script", "begins"),
    [
        (["good"], [0]),
        (["truncated", "good"], [0, 150_000]),
        (["stalls", 429, 503, "truncated", 403, "good"], [0] + [150_000] * 3 + [225_000] * 2),
        (["truncated", "ignores Range"], [0, 150_000]),
        (["truncated"] * 6, [300_000 - 300_000 // 2**n for n in range(6)]),
        (["changed", "good", "good"], [0, 150_000, 0]),
        (["wrong", "truncated", "good"], [0, 0, 150_000]),
    ],
)
def test_a_download_is_resumed(hub, script, begins):
    hub.script = script
    path = download.fetch(f"{hub.url}/a.bin", download.cache_dir() / "a.bin")
    assert path.read_bytes() == hub.files["a.bin"]
    assert starts(hub)[: len(begins)] == pytest.approx(begins, abs=2000)
    assert cached() == ["a.bin"]


def test_a_download_is_resumed_by_a_later_process(hub):
    path = download.cache_dir() / "a.bin"
    hub.script = ["truncated"] + [500] * 4
    with pytest.raises(data.DataError, match="500"):
        download.fetch(f"{hub.url}/a.bin", path)
    assert path.with_name(".a.bin.part").stat().st_size == 150_000
    download.fetch(f"{hub.url}/a.bin", path)
    assert starts(hub)[-1] == 150_000
    assert path.read_bytes() == hub.files["a.bin"]
    # Whole, but nobody had the time to look at it and give it its name.
    path.rename(path.with_name(".a.bin.part"))
    path.with_name(".a.bin.tag").write_text(hashlib.sha256(hub.files["a.bin"]).hexdigest())
    download.fetch(f"{hub.url}/a.bin", path)
    assert path.read_bytes() == hub.files["a.bin"]
    assert cached() == ["a.bin"]


@pytest.mark.parametrize("word", ["changed", "another span"])
def test_the_rest_of_another_file_is_not_taken(hub, word):
    hub.tag = lambda content: f"version-{zlib.crc32(content)}"  # no sha256 to find it out later
    hub.script = ["changed"] if word == "changed" else ["truncated", word]
    path = download.fetch(f"{hub.url}/a.bin", download.cache_dir() / "a.bin")
    assert path.read_bytes() == hub.files["a.bin"]


def test_a_download_that_is_three_times_another_file_ends(hub):
    hub.script = ["wrong"] * 3
    with pytest.raises(data.DataError, match="sha256"):
        download.fetch(f"{hub.url}/a.bin", download.cache_dir() / "a.bin")
    assert cached() == []
    assert len(hub.seen) == 3


def test_a_full_disk_is_seen_before(hub, monkeypatch):
    usage = type(shutil.disk_usage("."))(100, 90, 10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(data.DataError, match=r"0\.0 GB are free"):
        download.fetch(f"{hub.url}/a.bin", download.cache_dir() / "a.bin")
    assert cached() == []


def test_the_token_goes_to_its_host_alone(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    download.fetch(f"{hub.url}/a.bin", download.cache_dir() / "a.bin")
    assert hub.seen_here == [None]  # a mirror does not get it
    sent = []

    class Session(requests.Session):
        def send(self, request, **kwargs):
            sent.append((request.url, request.headers.get("Authorization")))
            response = requests.Response()
            response.request, response.url, response.status_code = request, request.url, 302
            response.headers["Location"] = "https://cdn.example/x"
            response.raw = io.BytesIO()
            if "cdn.example" in request.url:
                raise requests.ConnectionError
            if kwargs.get("allow_redirects", True):
                return list(self.resolve_redirects(response, request))[-1]
            return response

    monkeypatch.setattr(requests.sessions, "Session", Session)
    with pytest.raises(data.DataError) as error:
        download.fetch("https://huggingface.co/x", download.cache_dir() / "x")
    assert sent[:2] == [
        ("https://huggingface.co/x", "Bearer secret"),
        ("https://cdn.example/x", None),
    ]
    assert "secret" not in str(error.value)


def test_processes_do_not_fight_over_a_file(hub):
    path = download.cache_dir() / "a.bin"
    got = []
    one = lambda: got.append(download.fetch(f"{hub.url}/a.bin", path))  # noqa: E731
    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [path] * 4
    assert len(hub.seen) == 1


# Tokens in files


def test_shards_give_back_what_they_took(tmp_path):
    rng = np.random.default_rng(0)
    parts = [rng.integers(60_000, size=n).astype(np.uint16) for n in (10, 1, 0, 300)]
    for i, part in enumerate(parts):
        with shards.Writer(tmp_path / f"{i}.bin", 2) as writer:
            writer.write(part[:7])
            writer.write(part[7:])
    joined = shards.Joined([shards.read(tmp_path / f"{i}.bin") for i in range(4)])
    whole = np.concatenate(parts)
    assert len(joined) == len(whole)
    for start in range(0, 20):
        for stop in (start, start + 1, start + 12, 311, 400):
            assert np.array_equal(joined[start:stop], whole[start:stop])

    with contextlib.suppress(KeyboardInterrupt), shards.Writer(tmp_path / "0.bin", 2) as writer:
        writer.write(parts[3])
        raise KeyboardInterrupt
    assert np.array_equal(shards.read(tmp_path / "0.bin"), parts[0])
    assert len(list(tmp_path.iterdir())) == 4


def test_a_damaged_shard_is_refused(tmp_path):
    with shards.Writer(tmp_path / "a.bin", 1) as writer:
        writer.write(np.arange(100, dtype=np.uint8))
    good = (tmp_path / "a.bin").read_bytes()
    assert len(good) == 124
    for bad in (
        b"",
        good[:20],
        good[:-1],
        good + b"x",
        b"X" + good[1:],
        good[:8] + b"\2" + good[9:],
    ):
        (tmp_path / "a.bin").write_bytes(bad)
        with pytest.raises(data.DataError, match=r"a\.bin"):
            shards.read(tmp_path / "a.bin")
    with pytest.raises(data.DataError, match="cannot read"):
        shards.read(tmp_path / "none.bin")


@pytest.fixture
def small_gpt2(monkeypatch, tmp_path):
    """GPT-2's tokenizer with a vocabulary of bytes and a few merges, for the real one is elsewhere.

    In this process and in those that it starts.
    """
    pytest.importorskip("tiktoken")
    (tmp_path / "sitecustomize.py").write_text(
        "import tiktoken\n"
        "ranks = {bytes([b]): b for b in range(256)}\n"
        "ranks |= {w: 256 + i for i, w in enumerate([b'th', b'the', b' the', b'er', b'\\n\\n'])}\n"
        "ranks |= {b'\\xff%d' % i: i for i in range(len(ranks), 50256)}  # none of them a text\n"
        'pattern = (r"\'(?:[sdmt]|ll|ve|re)| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+"\n'
        "           r'|\\s+(?!\\S)|\\s+')\n"
        "encoding = tiktoken.Encoding('gpt2', pat_str=pattern, mergeable_ranks=ranks,\n"
        "                             special_tokens={'<|endoftext|>': 50256})\n"
        "tiktoken.get_encoding = lambda name: encoding\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    import tiktoken

    monkeypatch.setattr(tiktoken, "get_encoding", tiktoken.get_encoding)
    exec((tmp_path / "sitecustomize.py").read_text(), {})
    return tiktoken.get_encoding("gpt2")


def test_text_cut_in_pieces_has_the_tokens_of_the_whole(small_gpt2, tmp_path, monkeypatch):
    monkeypatch.setattr(textfile, "CHUNK", 64)
    rng = np.random.default_rng(0)
    words = [
        "the",
        " other",
        "\n",
        " ",
        "  ",
        "\n\n",
        "'s",
        "don't",
        "12",
        "naïve",
        "漢字",
        ".",
        "\t",
    ]
    text = "".join(rng.choice(words, 3000))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "1.txt").write_bytes(text.encode())
    (tmp_path / "texts" / "2.txt").write_bytes(b"the end")
    dataset = data.load(str(tmp_path / "texts"), block_size=8, tokenizer="gpt2")
    ids = np.concatenate((dataset.train, dataset.val)).tolist()
    whole = small_gpt2.encode_ordinary(text)
    assert ids == [*whole, 50256, *small_gpt2.encode_ordinary("the end"), 50256]
    assert len(list(textfile.pieces([tmp_path / "texts" / "1.txt"]))) > 20
    again = data.load(str(tmp_path / "texts"), block_size=8, tokenizer="gpt2")
    assert again.fingerprint() == dataset.fingerprint()
    assert data.load(str(tmp_path / "texts"), 8, "byte").tokenizer.state() == {"kind": "byte"}
    with pytest.raises(data.DataError, match="openwebtext comes"):
        data.load("openwebtext", 8, "char")


def test_train_txt_and_val_txt_are_the_splits(tmp_path):
    (tmp_path / "train.txt").write_text("abc" * 100)
    (tmp_path / "val.txt").write_text("cd" * 50)
    (tmp_path / "other.txt").write_text("xyz")
    dataset = data.load(str(tmp_path), block_size=8)
    assert dataset.tokenizer.decode(dataset.train.tolist()) == "abc" * 100
    assert dataset.tokenizer.decode(dataset.val.tolist()) == "cd" * 50


def test_a_tokenizer_must_fit_16_bits():
    with pytest.raises(data.DataError, match="16 bits"):
        CharTokenizer("".join(map(chr, range(0x10000, 0x20001))))
    text = "".join(map(chr, range(0x4E00, 0x4E00 + 1000)))
    many = CharTokenizer(text)
    assert many.encode(text).dtype == np.uint16
    assert many.decode(many.encode(text)) == text


def test_files_of_nanogpt(small_gpt2, tmp_path):
    ids = np.random.default_rng(0).integers(260, size=900).astype("<u2")
    ids[::50] = 50256
    ids[:800].tofile(tmp_path / "train.bin")
    ids[800:].tofile(tmp_path / "val.bin")
    dataset = data.load(str(tmp_path), block_size=8)
    assert np.array_equal(dataset.train, ids[:800])
    assert np.array_equal(dataset.val, ids[800:])
    assert dataset.tokenizer.state() == {"kind": "gpt2"}
    for content, reason in ((b"abc", "3 bytes"), (b"", "0 bytes"), (b"\xff" * 90, "65535")):
        (tmp_path / "train.bin").write_bytes(content)
        with pytest.raises(data.DataError, match=reason):
            data.load(str(tmp_path), block_size=8)
    (tmp_path / "meta.pkl").write_bytes(b"")
    with pytest.raises(data.DataError, match=r"meta\.pkl"):
        data.load(str(tmp_path), block_size=8)


def documents(n, seed):
    rng = np.random.default_rng(seed)
    words = ["the ", "other ", "thing. ", "naïve ", "\n\n", "<|endoftext|> "]
    return ["".join(rng.choice(words, rng.integers(5, 60))) for _ in range(n)]


def as_parquet(texts):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": texts}), file, row_group_size=100)
    return file.getvalue()


def test_openwebtext(small_gpt2, hub, monkeypatch, tmp_path, text):
    texts = [documents(700, seed) for seed in range(2)]
    name = "plain_text/train-{:05d}-of-00080.parquet"
    hub.files = {name.format(i): as_parquet(t) for i, t in enumerate(texts)}
    hub.script = ["truncated", 429, "stalls", "good", 503, "ignores Range"]
    monkeypatch.setenv("OPENWEBTEXT_URL", hub.url)
    dataset = data.load("openwebtext", block_size=16, n_shards=2)

    def tokens(texts):
        return [t for text in texts for t in (*small_gpt2.encode_ordinary(text), 50256)]

    held = [[t for t in ts if zlib.crc32(t.encode()) % 100 == 0] for ts in texts]
    kept = [t for ts in texts for t in ts if zlib.crc32(t.encode()) % 100]
    assert dataset.val.tolist() == tokens(held[0]) != []
    assert dataset.train[:].tolist() == tokens(kept)
    folder = download.cache_dir() / "openwebtext"
    visible = [p.name for p in folder.iterdir() if p.suffix != ".lock"]
    assert sorted(visible) == ["00.train.bin", "01.train.bin", "val.bin"]

    # Fewer shards have the same validation; what is there is not fetched again.
    asked = len(hub.seen)
    one = data.load("openwebtext", block_size=16, n_shards=1)
    assert np.array_equal(one.val, dataset.val)
    assert len(hub.seen) == asked
    with pytest.raises(data.DataError, match="404"):
        data.load("openwebtext", block_size=16, n_shards=3)
    with pytest.raises(data.DataError, match="1 to 80"):
        data.load("openwebtext", block_size=16, n_shards=81)
    hub.files[name.format(2)] = b"PAR1 but no more"
    with pytest.raises(data.DataError, match="no shard of openwebtext"):
        data.load("openwebtext", block_size=16, n_shards=3)

    # And by the scripts, as a user would.
    settings = SMALL | {"max_iters": 10, "vocab_size": 0} | {"dataset": "openwebtext", "shards": 2}
    del settings["vocab_size"]
    out = tmp_path / "out"
    run = script("train.py", *flags(**settings, out_dir=out))
    assert run.returncode == 0, run.stderr
    assert losses(out)[-1][2] < losses(out)[0][2]
    run = script("sample.py", f"--out_dir={out}", "--start=the other", "--max_new_tokens=20")
    assert run.stdout.startswith("the other"), run.stderr
    run = script("train.py", f"--out_dir={out}", "--resume", "--max_iters=12", "--shards=1")
    assert run.returncode == 2
    assert "--shards" in run.stderr


@pytest.mark.parametrize("block_size", [7, 16, 64])
def test_validation_predicts_each_token_once(block_size):
    tokens = np.random.default_rng(0).integers(17, size=333)
    model = tiny("1x1", block_size=block_size)
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
    config = train.TrainConfig(batch_size=60, block_size=8, seed=1)

    def batch(step, ranks=None, parts=1):
        ranks = ranks or train.Ranks()
        batches = train.get_batch(tokens, config, step, ranks, parts, torch.device("cpu"))
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


# -----------------------------------------------------------------------------
# The scripts


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "my.txt"
    words = np.random.default_rng(0).choice(["to ", "be ", "or ", "not\n", "that "], 2000)
    file.write_text("".join(words))
    return str(file)


SMALL = {
    "n_layer": 3, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 4, "device": "cpu",
    "max_iters": 40, "eval_interval": 10, "log_interval": 5, "learning_rate": 3e-3,
}  # fmt: skip


def flags(**settings):
    return [f"--{name}={value}" for name, value in settings.items()]


def script(*args, **options):
    """A script as its own process, as a user runs it, from a folder that is not its own."""
    command = [sys.executable, str(HERE / args[0]), *args[1:]]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def weights(out_dir):
    return common.load_checkpoint(Path(out_dir) / "last.pt")["model"]


def losses(out_dir):
    lines = [json.loads(line) for line in (Path(out_dir) / "log.jsonl").read_text().splitlines()]
    return [(e["step"], e.get("loss"), e.get("val_loss")) for e in lines if "alpha" not in e]


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
    small = tiny(n_layer=2)
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
    # The shape is the checkpoint's, and a DenseFormer begins as the plain model it is made of.
    assert train.main(flags(**begin, out_dir=dense, dwa="1x1")) == 0
    assert losses(dense)[0][2] == losses(plain)[-1][2]
    alpha = weights(dense)["dwa.alpha"]
    assert (alpha != 0).equal(dwa_mask("1x1", 3))
    # Another pattern keeps the alphas that it has.
    sparse = tmp_path / "sparse"
    begin["init_from"] = dense / "last.pt"
    assert train.main(flags(**begin | {"max_iters": 1, "learning_rate": 0.0}, min_lr=0,
                            out_dir=sparse, dwa="3x1")) == 0  # fmt: skip
    assert weights(sparse)["dwa.alpha"].equal(torch.tensor(
        [[0, 1, 0, 0], [0, 0, 1, 0], [alpha[2, 0], 0, 0, alpha[2, 3]]]
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
    alpha = torch.tensor([[0.5, 1.0, 0.0], [0.1, -0.3, 0.2]])
    mask = dwa_mask("1x1", 2)
    assert analyze.prune(alpha, mask, 0).equal(mask)
    assert analyze.prune(alpha, mask, 0.4).equal(
        torch.tensor([[True, True, False], [False, True, False]])
    )
    # a row that loses everything is no DWA
    assert analyze.prune(alpha, mask, 0.6).equal(
        torch.tensor([[True, True, False], [False, False, True]])
    )


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
            X.append(block(Y, model.rotary))
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
    # the pruned model keeps its mask when it is trained on
    out = tmp_path / "pruned"
    begin = flags(init_from=dense / "pruned.pt", out_dir=out, dataset=text, max_iters=3)
    assert train.main([*begin, "--device=cpu"]) == 0
    kept = weights(out)
    assert kept["dwa.mask"].sum() < dwa_mask("1x1", 3).sum()
    assert (kept["dwa.alpha"] != 0).logical_and(~kept["dwa.mask"]).sum() == 0
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


def test_tiny_shakespeare_is_the_file_that_everybody_uses():
    file = HERE.parent / "shared" / "data" / "tinyshakespeare.txt"
    if not file.exists():
        pytest.skip("no copy of Tiny Shakespeare here")
    from data import shakespeare

    content = file.read_bytes()
    assert len(content) == shakespeare.SIZE
    assert hashlib.sha256(content).hexdigest() == shakespeare.SHA256
