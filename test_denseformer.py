"""The mathematics of denseformer.py: pytest test_denseformer.py

The references are the paper's formula, finite differences, arithmetic, and a Transformer written
separately in numpy, in float64. Where a test says "naive", NaivePass stands in for the formula that
the first tests compare it with.
"""

import copy
import gc
import math
import os
import pickle
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import denseformer
from bench import count_traffic, peak_memory
from denseformer import DWA, DenseFormer, DenseFormerConfig, KVCache, dwa_pattern, dwa_rows
from denseformer import sample as draw

PATTERNS = ["none", "1x1", "2x1", "4x1", "4x5", "3x2", "1x5", "12x1"]
HOLES = (
    "3:0,2+4:1+5:0,1,2,3+6:2,6+7:0,1,4,5,6+8:1,3,5,6,7+9:0,1,5,7"  # some rows lack their own X_i
)


def tiny(dwa="1x1", n_layer=9, **flags):
    """A small model in float64 with alphas far from the identity, as they are after training."""
    torch.manual_seed(0)
    flags = {"vocab_size": 17, "block_size": 8, "n_head": 2, "n_embd": 8} | flags
    model = DenseFormer(DenseFormerConfig(n_layer=n_layer, dwa=dwa, **flags)).double()
    randomise(model.dwa)
    return model


@torch.no_grad()
def randomise(dwa):
    """Random alphas in the mask, such that activations keep their size over the depth, and nan
    wherever alpha must never be read."""
    noise = torch.randn(dwa.alpha.shape, dtype=dwa.alpha.dtype)
    dwa.alpha.copy_((noise / (1 + dwa.n_layer**0.5)).masked_fill(~dwa.mask, math.nan))


def terms(pattern, i):
    """The j of the sum for Y_i, read off the paper's definition of k x p; none: Y_i = X_i."""
    if pattern == "none":
        return []
    k, p = map(int, pattern.split("x"))
    return [j for j in range(i + 1) if j % k == i % k] if i % p == 0 else []


IDX = torch.randint(17, (2, 8), generator=torch.Generator().manual_seed(0))


def gradients(model):
    """All gradients; zeros and none are the same. A masked alpha has none."""
    return {
        n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()
    }


def assert_same(ours, reference, tolerance=1e-9):
    torch.testing.assert_close(ours, reference, rtol=tolerance, atol=tolerance)


# -----------------------------------------------------------------------------
# DWA against the formula


class Formula:
    """The paper's formula, from its definition of k x p."""

    def __init__(self, pattern, alpha, x):
        self.pattern, self.alpha, self.X = pattern, alpha, [x]

    def step(self, i, x):
        self.X.append(x)
        y = torch.zeros_like(x)
        for j in terms(self.pattern, i):
            y = y + self.alpha[i - 1, j] * self.X[j]
        return y if terms(self.pattern, i) else x


def all_outputs(depth, x, weights):
    """Y_1..Y_L of a stack of blocks B_i(y) = tanh(w_i * y)."""
    Y = []
    for i, w in enumerate(weights, start=1):
        x = depth.step(i, torch.tanh(w * x))
        Y.append(x)
    return torch.stack(Y)


# Tiles of one row, of sizes that divide the depth and that do not, and of all rows.
@pytest.mark.parametrize("impl", ["naive", 1, 3, 4, 8, 99])
@pytest.mark.parametrize("n_layer", [1, 2, 5, 48])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_dwa_is_the_formula_of_the_paper(pattern, n_layer, impl, monkeypatch):
    torch.manual_seed(0)
    dwa = DWA(n_layer, pattern).double()
    randomise(dwa)
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(n_layer, 4, dtype=torch.float64, requires_grad=True)
    alpha = dwa.alpha.detach().nan_to_num(0).requires_grad_()
    if impl == "naive":
        depth = denseformer.NaivePass(F.pad(dwa.weights(), (0, 0, 1, 0)), dwa.rows, x)
    else:  # in place for every pattern, also where DWA would choose naive
        monkeypatch.setattr(denseformer, "TILE", impl)
        depth = denseformer.InPlacePass(F.pad(dwa.weights(), (0, 0, 1, 0)), x)
    ours = all_outputs(depth, x, weights)
    paper = all_outputs(Formula(pattern, alpha, x), x, weights)
    assert_same(ours, paper, 1e-11)
    seed = torch.randn_like(ours)
    n = 3 if dwa.num_params() else 2  # are there alphas to train?
    ours = torch.autograd.grad(ours, (x, weights, dwa.alpha)[:n], seed)
    paper = torch.autograd.grad(paper, (x, weights, alpha)[:n], seed)
    assert_same(ours, paper, 1e-11)


@pytest.mark.parametrize("impl", ["naive", "inplace"])
def test_gradients_are_finite_differences(impl):
    torch.manual_seed(0)
    dwa = DWA(4, "1x1", impl).double()
    randomise(dwa)
    x = torch.randn(1, 2, 2, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    seed = torch.randn(4, 1, 2, 2, dtype=torch.float64)

    def loss():
        return (all_outputs(dwa(x), x, weights) * seed).sum()

    loss().backward()
    for tensor in (x, weights, dwa.alpha):
        for entry in map(tuple, tensor.detach().isfinite().nonzero().tolist()):
            with torch.no_grad():
                value = tensor[entry].item()
                tensor[entry] = value + 1e-6
                above = loss()
                tensor[entry] = value - 1e-6
                below = loss()
                tensor[entry] = value
            slope = (above - below).item() / 2e-6
            assert tensor.grad[entry].item() == pytest.approx(slope, rel=1e-6, abs=1e-8)


# -----------------------------------------------------------------------------
# Patterns


@pytest.mark.parametrize("n_layer", [1, 2, 5, 48])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_mask_is_the_papers_definition(pattern, n_layer):
    rows = [terms(pattern, i) for i in range(1, n_layer + 1)]
    assert dwa_rows(pattern, n_layer) == rows
    dwa = DWA(n_layer, pattern)
    assert [row.nonzero().flatten().tolist() for row in dwa.mask] == rows
    # alpha is the whole map at first: the identity
    assert dwa.weights().equal(torch.eye(n_layer + 1)[1:])
    assert dwa_rows(dwa_pattern(dwa.mask), n_layer) == rows


def test_mask_of_the_papers_example():
    # k = p = 4 (section 3.2): DWA_8 sees X_0, X_4, X_8, never X_5, the first to have used Y_4.
    assert dwa_rows("4x4", 8)[7] == [0, 4, 8]
    assert dwa_rows("4x5", 10)[9] == [2, 6, 10]


@pytest.mark.parametrize(
    ("pattern", "reads"),
    [
        ("last4", lambda i, j: j == 0 or j > i - 4),
        ("connect-to-last", lambda i, j: i == 9),
        ("last2+4x1", lambda i, j: j == 0 or j > i - 2 or (i - j) % 4 == 0),
        ("4:0,3+9:0,5,9", lambda i, j: (i == 4 and j in (0, 3)) or (i == 9 and j in (0, 5, 9))),
    ],
)
def test_masks_that_have_names(pattern, reads):
    rows = [[j for j in range(i + 1) if reads(i, j)] for i in range(1, 10)]
    assert dwa_rows(pattern, 9) == rows
    assert dwa_rows(dwa_pattern(DWA(9, pattern).mask), 9) == rows


@pytest.mark.parametrize(
    "pattern",
    ["last0", "last", "10:0", "4:5", "0:0", "4:", "1x1+", "+", "4:0,", "last4x5", "0x1", "1x0"],
)
def test_patterns_that_are_refused(pattern):
    with pytest.raises(ValueError, match="dwa"):
        DWA(9, pattern)


def test_a_row_without_its_own_x_starts_with_the_newest_that_it_reads():
    assert DWA(3, "2:0,1+3:0").weights().tolist() == [[0, 1, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0]]


@pytest.mark.parametrize(
    ("pattern", "percent"),
    # Table 4 of the paper, and by definition. It gives 92% for 12x1, which is 1 - 1/(12 * 1);
    # counted, as the others are, it is 94%.
    [("last4", 84), ("connect-to-last", 96), ("4x5", 95), ("12x1", 94), ("1x1", 0), ("none", 100)],
)
def test_sparsity_is_the_papers(pattern, percent):
    assert f"{DWA(48, pattern).sparsity():.0%}" == f"{percent}%"


def test_number_of_parameters():
    for n_layer in (1, 2, 5, 48, 72):
        assert DWA(n_layer).num_params() == n_layer * (n_layer + 3) // 2  # paper, section 3
    assert DWA(24, "4x1").num_params() == 90  # a row with its diagonal alone has one weight

    # The paper's models are too big to build here, but all blocks have the same size.
    def params(n_layer):
        return DenseFormer(DenseFormerConfig(n_layer=n_layer, dwa="none")).num_params()

    one, two = params(1), params(2)
    for n_layer, millions in ((48, 378.45), (64, 491.72), (72, 548.35), (90, 675.78)):  # Table 1
        assert round((one + (n_layer - 1) * (two - one)) / 1e6, 2) == millions
    assert tiny("1x1").num_params() - tiny("none").num_params() == 9 * 12 // 2


# -----------------------------------------------------------------------------
# In place, used in every way that autograd allows. Each use trains a little network of 9 blocks
# with a given DWA; the right gradients are those of naive.


def network(dwa):
    torch.manual_seed(1)
    return nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(9)).double()


def run(dwa, blocks, x, watch=lambda i, y: None):
    depth = dwa(x)
    for i, block in enumerate(blocks, start=1):
        x = depth.step(i, x + block(x))
        watch(i, x)
    return x


def use_outputs(dwa, blocks, x):  # auxiliary losses, a Y_i used twice, one detached, one unused
    Y = {0: x}
    depth = dwa(x)
    for i, block in enumerate(blocks, start=1):
        y = Y[i - 1].detach() if i == 6 else Y[i - 1]
        Y[i] = depth.step(i, y + block(Y[4] if i == 8 else y))
    (Y[4].sin().sum() + Y[7].square().sum() + Y[9].cos().sum()).backward()


def use_early_exit(dwa, blocks, x):
    run(dwa, blocks[:7], x).square().sum().backward()


def use_frozen(*frozen):
    def use(dwa, blocks, x):
        modules = {"alpha": dwa, "block 1": blocks[0], "block 6": blocks[5]}
        for name in modules.keys() & frozen:
            modules[name].requires_grad_(False)
        run(dwa, blocks, x.detach() if "embedding" in frozen else x).square().sum().backward()

    return use


def use_two_forwards(dwa, blocks, x):
    a, b = run(dwa, blocks, x), run(dwa, blocks, 2 * x)
    with torch.no_grad():
        run(dwa, blocks, x[:1])
    (a * b).sum().backward()


def use_interleaved(dwa, blocks, x):
    other = DWA(9).double()
    other_depth, depth, y, z = other(x), dwa(x), x, x
    for i, block in enumerate(blocks, start=1):
        y, z = depth.step(i, y + block(y)), other_depth.step(i, block(z))
    z.sum().backward(inputs=[x])
    x.grad = None
    y.square().sum().backward()


def use_exception(dwa, blocks, x):
    depth, y = dwa(x), x
    for i, block in enumerate(blocks, start=1):
        if i == 5:
            with pytest.raises(ZeroDivisionError):
                depth.step(i, y / (1 // 0))
        y = depth.step(i, y + block(y))
    y.square().sum().backward()


def use_no_grad(*steps):
    def use(dwa, blocks, x):
        with torch.set_grad_enabled(0 not in steps):
            depth = dwa(x)
        for i, block in enumerate(blocks, start=1):
            with torch.set_grad_enabled(i not in steps):
                x = depth.step(i, x + block(x))
        x.square().sum().backward()

    return use


def use_checkpoint(dwa, blocks, x):
    run(
        dwa, [lambda x, b=b: checkpoint(b, x, use_reentrant=False) for b in blocks], x
    ).sum().backward()


def use_any_layout(dwa, blocks, x):
    x = x.transpose(0, 1)
    y = run(dwa, [lambda x, b=b: b(x.transpose(0, 1)).transpose(0, 1) for b in blocks], x)
    y.sum().backward()  # its gradient is one number, expanded


def use_blocks_in_place(dwa, blocks, x):
    depth, y = dwa(x), x
    for i, block in enumerate(blocks, start=1):
        y = depth.step(i, y + block(y))  # Y_i is the caller's: to modify it does not touch X_i
        y = y.mul_(1.5) if dwa.impl == "inplace" else y * 1.5
    y.square().sum().backward()


def use_empty_batch(dwa, blocks, x):
    run(dwa, blocks, x[:0]).sum().backward()


def use_one_vector(dwa, blocks, x):
    run(dwa, blocks, x[0, 0]).square().sum().backward()


USES = {
    "outputs": use_outputs,
    "early exit": use_early_exit,
    "frozen alphas": use_frozen("alpha"),
    "frozen embedding": use_frozen("embedding"),
    "frozen embedding and blocks": use_frozen("embedding", "block 1", "block 6"),
    "frozen embedding, block 1, alphas": use_frozen("embedding", "block 1", "alpha"),
    "two forwards": use_two_forwards,
    "interleaved": use_interleaved,
    "exception": use_exception,
    "no_grad first": use_no_grad(0, 1, 2, 3),
    "no_grad at times": use_no_grad(3, 5, 6, 8),
    "checkpoint": use_checkpoint,
    "any layout": use_any_layout,
    "blocks in place": use_blocks_in_place,
    "empty batch": use_empty_batch,
    "one vector": use_one_vector,
}


@pytest.mark.parametrize("pattern", ["1x1", "2x1", "last3+9:2,5", HOLES])
@pytest.mark.parametrize("use", USES.values(), ids=list(USES))
def test_inplace_gradients_are_naive_ones(use, pattern, monkeypatch):
    monkeypatch.setattr(denseformer, "TILE", 4)
    results = []
    for impl in ("inplace", "naive"):
        torch.manual_seed(0)
        dwa = DWA(9, pattern, impl).double()
        randomise(dwa)
        blocks, x = network(dwa), torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
        assert isinstance(dwa(x), denseformer.InPlacePass) == (impl == "inplace")
        use(dwa, blocks, x)
        results.append(
            gradients(nn.ModuleDict({"dwa": dwa, "blocks": blocks}))
            | {"x": torch.zeros_like(x) if x.grad is None else x.grad}
        )
    assert_same(*results)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_is_training_without_gradients(mode):
    model = tiny()
    logits, loss = model(IDX, IDX)
    with mode():
        assert_same(model(IDX, IDX), (logits.detach(), loss.detach()), 1e-12)


# -----------------------------------------------------------------------------
# Wrong use is one RuntimeError with a sentence, never a wrong number


def second_backward(dwa, blocks, x):
    loss = run(dwa, blocks, x).sum()
    loss.backward(retain_graph=True)
    loss.backward()


def second_other_backward(dwa, blocks, x):
    # The backward of blocks 5..9 stops at step 5; that of an auxiliary loss then begins at 4.
    Y = {}
    loss = run(dwa, blocks, x, Y.__setitem__).sum()
    torch.autograd.grad(loss, list(blocks[4:].parameters()), retain_graph=True)
    torch.autograd.grad(Y[4].sin().sum(), list(blocks[:4].parameters()))


def second_derivative(dwa, blocks, x):
    torch.autograd.functional.hvp(
        lambda x: run(dwa, blocks, x).square().sum(), x, torch.ones_like(x)
    )


def create_graph(dwa, blocks, x):
    torch.autograd.grad(run(dwa, blocks, x).square().sum(), dwa.alpha, create_graph=True)


def checkpoint_around_dwas(dwa, blocks, x):
    depth = dwa(x)

    def two(x, i):
        x = depth.step(i, blocks[i - 1](x))
        return depth.step(i + 1, blocks[i](x))

    for i in range(1, 9, 2):
        x = checkpoint(two, x, i, use_reentrant=False)
    x.sum().backward()


@torch.no_grad()
def skipped_step(dwa, blocks, x):
    depth = dwa(x)
    for i in (1, 2, 4, 5):
        x = depth.step(i, blocks[i - 1](x))


def too_many_steps(dwa, blocks, x):
    run(dwa, [*blocks, blocks[0]], x)


def other_shape(dwa, blocks, x):
    dwa(x).step(1, x[:1])


def x_modified_in_place(dwa, blocks, x):
    dwa = DWA(9, "4x5").double()  # where Y_i = X_i is one tensor
    run(dwa, [lambda x, b=b: x.add_(b(x.clone())) for b in blocks], x * 2)


WRONG = [second_backward, second_other_backward, second_derivative, create_graph]
WRONG += [checkpoint_around_dwas, skipped_step, too_many_steps, other_shape, x_modified_in_place]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
def test_wrong_use_is_a_runtime_error(wrong):
    dwa = DWA(9).double()
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"in-place DWA|X_") as error:
        wrong(dwa, network(dwa), x)
    assert len(str(error.value)) > 40
    if wrong in WRONG[:5]:  # the sentence's advice works
        dwa.impl = "naive"
        wrong(dwa, network(dwa), x)


# -----------------------------------------------------------------------------
# DWA in networks and tools that are not ours


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Conv2d(3, 3, 3, padding=1))
            for _ in range(6)
        )
        self.residual = True


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.ModuleList(copy.deepcopy(layer) for _ in range(6))
        self.residual = False  # the layers have skip connections of their own


@pytest.mark.parametrize("pattern", ["1x1", "2x1", "2x3"])
@pytest.mark.parametrize("network", [Convolutions, Encoder])
def test_dwa_in_another_network(network, pattern):
    torch.manual_seed(0)
    net = network().double()
    net.dwa = DWA(6, pattern).double()  # line 1
    randomise(net.dwa)
    alpha = net.dwa.alpha.detach().nan_to_num(0).requires_grad_()
    x0 = torch.randn((2, 3, 5, 7) if net.residual else (2, 5, 8), dtype=torch.float64)
    results = []
    for depth in (net.dwa(x0), Formula(pattern, alpha, x0)):  # line 2
        net.zero_grad()
        x = x0
        for i, block in enumerate(net.blocks, start=1):
            x = depth.step(i, x + block(x) if net.residual else block(x))  # line 3
        x.square().sum().backward()
        results.append([x, *(p.grad for p in net.blocks.parameters())])
    assert_same(*results)
    net.dwa.zero_grad()
    run(net.dwa, [lambda x, b=b: b(x) - (0 if net.residual else x) for b in net.blocks],
        x0).square().sum().backward()  # fmt: skip
    assert_same(net.dwa.alpha.grad, alpha.grad)


def test_what_is_masked_is_never_read_or_trained():
    model = tiny("2x3", n_layer=6).float()  # with nan outside the mask
    dwa = model.dwa
    loss = model(IDX, IDX)[1]
    assert loss.isfinite()
    loss.backward()
    assert dwa.alpha.grad.isfinite().all()
    expected = torch.zeros(6, 7, dtype=torch.bool)
    expected[2, [1, 3]] = expected[5, [0, 2, 4, 6]] = True
    assert (dwa.alpha.grad != 0).equal(expected)
    with torch.no_grad():
        dwa.alpha.copy_(dwa.weights())
    optimizers = model.configure_optimizers(1e-2, weight_decay=10.0)
    before = dwa.alpha.detach().clone()
    for _ in range(3):
        model(IDX, IDX)[1].backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    change = (dwa.alpha - before).abs()
    assert (change > 0).equal(expected)
    assert change.max() < 0.05  # a decay of 10 x 1e-2 x 3 steps would take a quarter of each


def test_pruning_and_parametrization_of_alpha():
    from torch.nn.utils import prune

    ours, naive = tiny(), tiny(dwa_impl="naive")
    for model in (ours, naive):
        with torch.no_grad():
            model.dwa.alpha.copy_(model.dwa.weights())
        prune.l1_unstructured(model.dwa, "alpha", amount=0.7)
        model(IDX, IDX)[1].backward()
    assert_same(gradients(ours), gradients(naive))
    kept = ours.dwa.alpha_mask.bool()
    assert (ours.dwa.alpha_orig.grad[~kept] == 0).all()
    assert (ours.dwa.alpha_orig.grad[kept] != 0).any()


def test_an_exported_model_trains_its_alphas():
    model = tiny(n_layer=3)
    exported = torch.export.export(model, (IDX, IDX)).module()
    for m in (model, exported):
        m(IDX, IDX)[1].backward()
    ours, theirs = dict(exported.named_parameters()), dict(model.named_parameters())
    assert_same(ours["dwa.alpha"].grad, theirs["dwa.alpha"].grad)
    assert_same(ours["wte.weight"].grad, theirs["wte.weight"].grad)


@pytest.mark.parametrize("to_empty", [True, False])
def test_a_model_built_on_the_meta_device(to_empty):
    model = tiny("2x1")
    with torch.device("meta"):
        loaded = DenseFormer(model.config)
    if to_empty:
        loaded.to_empty(device="cpu")
    loaded.load_state_dict(model.state_dict(), assign=True)
    results = []
    for m in (model, loaded):
        m(IDX, IDX)[1].backward()  # the embedding is still tied, or its gradient would be another
        results.append(gradients(m))
    assert_same(*results, 0)
    assert loaded.dwa.mask.equal(model.dwa.mask)


def test_default_dtype_and_device():
    torch.set_default_dtype(torch.float64)
    try:
        model = DenseFormer(tiny().config)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model(IDX, IDX)[1].dtype == torch.float64
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device("meta")
    try:
        model = DenseFormer(tiny().config)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert model.wte.weight.dtype == torch.bfloat16
    assert model.dwa.alpha.dtype == torch.float32
    assert model.dwa.alpha.is_meta
    assert not model.dwa._mask.is_meta


def test_loading_weights_changes_no_mask_and_no_frozen_alpha():
    model, plain = tiny("1x1"), tiny("none")
    model.dwa.alpha.requires_grad_(False)
    model.load_state_dict(plain.state_dict())
    assert not model.dwa.alpha.requires_grad
    assert model.dwa.num_params() == 9 * 12 // 2
    assert not any("mask" in name for name in model.state_dict())


def test_copies():
    model = tiny("2x1")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        results = []
        for m in (model, twin):
            m.zero_grad()
            m(IDX, IDX)[1].backward()
            results.append(gradients(m))
        assert_same(*results, 0)


def test_blocks_are_compiled_once_for_all():
    ours, naive = tiny(n_layer=12), tiny(n_layer=12, dwa_impl="naive")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    ours.compile(backend="aot_eager")
    for _ in range(2):
        for model in (ours, naive):
            model.zero_grad()
            model(IDX, IDX)[1].backward()
        assert_same(gradients(ours), gradients(naive))
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 2  # a block, the loss
    assert not counters["graph_break"]
    torch._dynamo.reset()
    ours = tiny(n_layer=3)
    whole, naive = torch.compile(ours, backend="aot_eager", fullgraph=True), tiny(n_layer=3)
    for model in (whole, naive):
        model(IDX, IDX)[1].backward()
    assert_same(gradients(ours), gradients(naive))
    torch._dynamo.reset()


def ddp_rank(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    for pattern in ("1x1", "4x5"):
        ours = tiny(pattern)
        model = nn.parallel.DistributedDataParallel(ours)
        idx = torch.load(f"{folder}/idx.pt")[rank]
        for _ in range(2):  # the second time in the buckets that DDP built anew
            ours.zero_grad()
            model(idx, idx)[1].backward()
        torch.save(gradients(ours), f"{folder}/{pattern}-{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # gloo's threads, in torch 2.13, may abort an interpreter that ends by itself


def test_distributed_data_parallel(tmp_path):
    idx = torch.randint(17, (2, 3, 8))
    torch.save(idx, tmp_path / "idx.pt")
    torch.multiprocessing.spawn(ddp_rank, (str(tmp_path),), nprocs=2)
    for pattern in ("1x1", "4x5"):
        naive = tiny(pattern, dwa_impl="naive")
        naive(idx.flatten(0, 1), idx.flatten(0, 1))[1].backward()
        for rank in (0, 1):
            assert_same(torch.load(tmp_path / f"{pattern}-{rank}.pt"), gradients(naive))


# -----------------------------------------------------------------------------
# Memory, traffic and precision


def test_the_buffer_is_freed(monkeypatch):
    buffers, init = [], denseformer.InPlaceBuffer.__init__

    def new(self, *args):
        buffers.append(weakref.ref(self))
        init(self, *args)

    monkeypatch.setattr(denseformer.InPlaceBuffer, "__init__", new)
    gc.disable()  # nothing may wait for the collector
    try:
        model = tiny()
        logits, loss = model(IDX, IDX)
        loss.backward(retain_graph=True)
        assert not hasattr(buffers[0](), "X")  # at the end of the backward pass
        del logits, loss
        model(IDX, IDX)  # never goes backward
        model.blocks[5].mlp.forward = lambda x: 1 / 0
        with pytest.raises(ZeroDivisionError):
            model(IDX, IDX)
        assert [ref() for ref in buffers] == [None, None, None]
    finally:
        gc.enable()


def test_memory_is_one_buffer_and_one_tile(monkeypatch):
    monkeypatch.setattr(denseformer, "TILE", 3)
    x = torch.randn(4, 64, 128, requires_grad=True)
    weights = torch.ones(24, 128)
    peak = {}
    for pattern in ("none", "1x1"):
        dwa = DWA(24, pattern)

        def forward(dwa=dwa):
            return all_outputs(dwa(x), x, weights)[-1]

        peak[pattern] = peak_memory(lambda f=forward: f().backward(x.detach()), x.device)
        with torch.no_grad():
            peak[pattern, "inference"] = peak_memory(forward, x.device)
    for kind in ("1x1", ("1x1", "inference")):
        plain = "none" if kind == "1x1" else ("none", "inference")
        more = (peak[kind] - peak[plain]) / x.nbytes
        assert 24 < more <= 25 + 3 + 3 + 0.5  # L + 1 + b rows, a tile of b


def test_traffic_and_launches():
    # Bytes of the activations' own dtype: a hidden float32 copy would show.
    (forward, backward), launches = count_traffic(DWA(48), torch.bfloat16)
    assert forward + backward <= 1500
    assert max(launches) <= 9 * 48


@pytest.mark.parametrize("impl", ["inplace", "naive"])
def test_bfloat16_is_within_a_percent_of_float64(impl):
    """At 48 blocks with alphas like trained ones: near the identity, with many small entries."""
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        torch.manual_seed(0)
        dwa = DWA(48, "1x1", impl if dtype == torch.bfloat16 else "naive")
        with torch.no_grad():
            dwa.alpha += 0.03 * torch.randn(48, 49) * dwa.mask
        dwa.to(torch.promote_types(dtype, torch.float32))
        X = torch.randn(49, 2, 32, 16).cumsum(0).bfloat16().to(dtype)
        X.requires_grad_()
        depth = dwa(X[0])
        Y = torch.stack([depth.step(i, X[i]) for i in range(1, 49)])
        (Y * torch.randn(Y.shape).bfloat16().to(dtype)).sum().backward()
        results.append([t.double() for t in (Y.detach(), X.grad, dwa.alpha.grad)])
    for ours, exact in zip(*results, strict=True):
        assert (ours - exact).norm() < 1e-2 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_stream_in_16_bits_and_alpha_in_float32(dtype):
    model, seen = tiny().float(), []
    model.blocks[3].register_forward_hook(lambda m, i, o: seen.extend((i[0].dtype, o.dtype)))
    with torch.autocast("cpu", dtype):
        logits, loss = model(IDX, IDX)
        loss.backward()
    assert seen == [dtype, dtype]
    assert loss.dtype == model.dwa.alpha.grad.dtype == torch.float32
    torch.testing.assert_close(logits.float(), model(IDX, IDX)[0], rtol=0.1, atol=0.1)


@pytest.mark.parametrize("impl", ["inplace", "naive"])
def test_autocast_does_not_round_float32_activations(impl):
    torch.manual_seed(0)
    dwa, X, results = DWA(9, "1x1", impl), torch.randn(10, 2, 8, 16), []
    randomise(dwa)
    for enabled in (False, True):
        dwa.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            depth = dwa(X[0])
            Y = torch.stack([depth.step(i, X[i]) for i in range(1, 10)])
            Y.square().mean().backward()
        results.append((Y, dwa.alpha.grad))
    torch.testing.assert_close(*results)


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
            alphas = [w["dwa.alpha"][i - 1, j] * X[j] for j in terms(pattern, i)]
            y = sum(alphas) if alphas else X[i]
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
    idx = torch.randint(17, (2, 8))
    targets = torch.randint(17, (2, 8))
    expected = reference_logits(model, idx, pattern)
    logits, loss = model(idx, targets)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    p = expected.softmax(-1).gather(-1, targets[..., None])
    assert loss.item() == pytest.approx(-p.log().mean().item(), rel=1e-12)
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
        ({"n_embd": 6, "n_head": 2}, "n_head"),
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


def test_skips_with_gains():
    torch.manual_seed(0)
    plain, gains = tiny("none"), tiny("none", skip_gains=True)
    assert gains.num_params() == plain.num_params() + 2 * 9
    gains.load_state_dict(plain.state_dict(), strict=False)
    idx = torch.randint(17, (2, 8))
    assert torch.equal(plain(idx)[0], gains(idx)[0])  # the gains start at 1
    block = gains.blocks[2]
    with torch.no_grad():
        block.gains.copy_(torch.tensor([0.5, -2.0]))
    x = torch.randn(2, 8, 8).double()
    rotary = denseformer.rotary_angles(0, 8, 4, x)
    attended = 0.5 * x + block.attn(block.ln_1(x), rotary)
    torch.testing.assert_close(block(x, rotary), -2 * attended + block.mlp(block.ln_2(attended)))
    gains(idx, idx)[1].backward()
    assert all(b.gains.grad.abs().min() > 0 for b in gains.blocks)
    (adamw,) = gains.configure_optimizers(1e-3)
    decayed = {id(p) for g in adamw.param_groups if g["weight_decay"] for p in g["params"]}
    assert id(block.gains) not in decayed


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


def test_decay_is_for_the_matrices_and_the_embedding():
    model = tiny(bias=True)
    (adamw,) = model.configure_optimizers(1e-3, weight_decay=0.1)
    decayed = {id(p) for g in adamw.param_groups if g["weight_decay"] for p in g["params"]}
    for name, p in model.named_parameters():
        matrix = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight", "wte.weight"))
        assert (id(p) in decayed) == matrix, name
    groups = [p for g in adamw.param_groups for p in g["params"]]
    assert len({id(p) for p in groups}) == len(groups) == len(list(model.parameters()))


# -----------------------------------------------------------------------------
# Generation


@pytest.mark.parametrize("prompt", [1, 5, 8, 13])  # block_size is 8
@pytest.mark.parametrize("pattern", PATTERNS)
def test_cached_generation_is_the_full_context_recomputed(pattern, prompt):
    model = tiny(pattern).float()
    idx = torch.randint(17, (3, prompt))
    logits = []
    model.ln_f.register_forward_hook(lambda m, i, o: logits.append(model.lm_head(o)[:, -1]))
    ours = model.generate(idx, 12, temperature=0)
    cached, expected = logits[:], idx
    for t in range(12):
        full = model(expected[:, -8:])[0][:, -1]
        torch.testing.assert_close(cached[t], full, rtol=1e-4, atol=1e-5)
        expected = torch.cat((expected, full.argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(ours, expected)


@torch.no_grad()
def test_cache_takes_several_tokens_at_once():
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
