"""pytest test_denseformer.py: the model's mathematics.

Every reference here is written anew from the paper or from arithmetic, never from our own code.
"""

import copy
import gc
import math
import os
import pickle
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from bench import peak_memory
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


def tiny(dwa="1x1", n_layer=5, scale=1.0, **flags):
    """A small model in float64 with alphas far from the identity."""
    torch.manual_seed(0)
    shape = {"vocab_size": 17, "block_size": 8, "n_head": 2, "n_embd": 8}
    model = DenseFormer(DenseFormerConfig(**(shape | flags), n_layer=n_layer, dwa=dwa)).double()
    randomise(model.dwa, scale)
    return model


def randomise(dwa, scale=1.0):
    """Random values for the alphas that are trained, as they would be after training."""
    with torch.no_grad():
        for i, row in enumerate(dwa.mask.tolist(), start=1):
            if sum(row) > 1:  # else no DWA here
                dwa.alpha[i - 1] = scale * torch.randn(len(row)) * torch.tensor(row)


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
    dwa.tile_rows = int(impl) if impl.isdigit() else None
    randomise(dwa, 1 / (1 + n_layer**0.5))
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
    assert dwa.alpha.tolist() == [[0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0]]
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


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_is_trained(optimizer):
    if optimizer == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("torch has no Muon before 2.9")
    model = tiny()
    model.wpe = torch.nn.Embedding(8, 4)  # and those that somebody adds to the model
    optimizers = model.configure_optimizers(1e-3, optimizer=optimizer)
    groups = [group for each in optimizers for group in each.param_groups]
    ids = [id(p) for group in groups for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())


def test_frozen_alphas_stay_frozen_when_weights_are_loaded():
    model, plain = tiny("1x1"), tiny("none")
    model.dwa.alpha.requires_grad_(False)
    model.load_state_dict(model.state_dict())
    assert not model.dwa.alpha.requires_grad
    plain.load_state_dict(tiny("1x1").state_dict())
    assert plain.dwa.alpha.requires_grad


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
    # With alphas of a third, or activations grow threefold a layer.
    ours = tiny(dwa, n_layer, 1 / 3, **flags)
    naive = tiny(dwa, n_layer, 1 / 3, **flags, dwa_impl="naive")
    naive.load_state_dict(ours.state_dict())
    ours.dwa.tile_rows = tile
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
    assert ours.dwa.in_place_pays == (pattern not in ("none", "4x1", "4x5", "3x2", "1x5", "12x1"))
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
    assert memory.X.numel() == 10 * 2 * 8 * 8  # (L + 1) activations
    loss.backward(retain_graph=True)
    assert not any(buffer.numel() for buffer in (memory.X, memory.tile_G, memory.partial))
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
        dwa.tile_rows = 3

        def forward(dwa=dwa):
            return through_dwa(dwa, x, weights)[-1]

        peak[pattern] = peak_memory(lambda f=forward: f().backward(x.detach()), x.device)
        with torch.no_grad():
            peak[pattern, "inference"] = peak_memory(forward, x.device)
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
    dwa.tile_rows = 4
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
        randomise(dwa, 1 / 4)
        dwa.tile_rows = 5
        x0 = torch.randn(2, 32, 16).bfloat16().to(dtype).requires_grad_()
        (x, X), y = dwa.start(x0), []
        if impl == "inplace":
            X.memory.X = X.memory.X.to(stored)
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
