"""The mathematics of denseformer.py: pytest test_denseformer.py

The references are the paper's formula, finite differences, arithmetic, and a Transformer written
separately in numpy, in float64. tests/test_dwa.py tests DWA in other people's code.
"""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import denseformer
from denseformer import DWA, DenseFormer, DenseFormerConfig, KVCache, dwa_rows
from denseformer import sample as draw
from lab.analyze import dwa_pattern, sparsity

PATTERNS = ["none", "1x1", "2x1", "4x1", "4x5", "3x2", "1x5", "12x1"]

# Where the grids run, and how close they must come to float64. On a GPU, the Triton kernel takes
# every dtype but float64.
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
PLACES = [
    pytest.param("cpu", torch.float64, 1e-11, id="cpu"),
    pytest.param("cuda", torch.float64, 1e-11, marks=NEEDS_GPU, id="cuda-float64"),
    pytest.param("cuda", torch.float32, 1e-4, marks=NEEDS_GPU, id="cuda-float32"),
]
everywhere = pytest.mark.parametrize(("device", "dtype", "tolerance"), PLACES)


def tiny(dwa="1x1", n_layer=9, **flags):
    """Return a small float64 model with alphas far from the identity, as after training."""
    torch.manual_seed(0)
    flags = {"vocab_size": 17, "block_size": 8, "n_head": 2, "n_embd": 8} | flags
    model = DenseFormer(DenseFormerConfig(n_layer=n_layer, dwa=dwa, **flags)).double()
    randomize(model.dwa)
    return model


@torch.no_grad()
def randomize(dwa):
    """Set alpha to random values in the mask, small enough that activations keep their size over
    depth, and to nan outside it, where alpha must never be read."""
    noise = torch.randn(dwa.alpha.shape, dtype=dwa.alpha.dtype)
    dwa.alpha.copy_((noise / (1 + dwa.n_layer**0.5)).masked_fill(~dwa.mask, math.nan))


def terms(pattern, i):
    """Return the j of the sum for Y_i, by the paper's definition of k x p; [] for Y_i = X_i."""
    if pattern == "none":
        return []
    k, p = map(int, pattern.split("x"))
    return [j for j in range(i + 1) if j % k == i % k] if i % p == 0 else []


def is_empty(pattern, n_layer):
    """Is there no DWA, although the pattern has some in deeper models?"""
    return pattern != "none" and not any(terms(pattern, i) for i in range(1, n_layer + 1))


IDX = torch.randint(17, (2, 8), generator=torch.Generator().manual_seed(0))


def gradients(model):
    """Return all gradients, with zeros for None."""
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
    """Return Y_1..Y_L for a stack of blocks B_i(y) = tanh(w_i * y)."""
    Y = []
    for i, w in enumerate(weights, start=1):
        x = depth.step(i, torch.tanh(w * x))
        Y.append(x)
    return torch.stack(Y)


# Tiles of one row, of sizes that divide the depth and that do not, and of all rows.
@everywhere
@pytest.mark.parametrize("impl", ["naive", 1, 3, 4, 8, 99])
@pytest.mark.parametrize(
    ("pattern", "n_layer"),
    [(p, L) for p in PATTERNS for L in (1, 2, 5, 48) if not is_empty(p, L)],
)
def test_dwa_is_the_formula_of_the_paper(
    pattern, n_layer, impl, device, dtype, tolerance, monkeypatch
):
    torch.manual_seed(0)
    dwa = DWA(n_layer, pattern)
    randomize(dwa)
    alpha = dwa.alpha.detach().nan_to_num(0)
    x, weights = torch.randn(2, 3, 4), torch.randn(n_layer, 4)
    seed = torch.randn(n_layer, 2, 3, 4)
    if impl != "naive":  # in place for every pattern, even where DWA would choose naive
        monkeypatch.setattr(denseformer, "TILE", impl)
    monkeypatch.setattr(denseformer, "suits_inplace", lambda dwa, x: impl != "naive")
    dwa.to(device, dtype)

    def result(begin, alpha, device, dtype):
        """Return the outputs and the gradients with respect to x, the weights and the alphas."""
        inputs = [t.to(device, dtype).requires_grad_() for t in (x, weights)]
        Y = all_outputs(begin(inputs[0]), *inputs)
        inputs += [alpha] if dwa.num_params() else []  # are there alphas to train?
        grads = torch.autograd.grad(Y, inputs, seed.to(device, dtype))
        return [t.double().cpu() for t in (Y, *grads)]

    alpha = alpha.double().requires_grad_()
    paper = result(lambda x: Formula(pattern, alpha, x), alpha, "cpu", torch.float64)
    assert_same(result(dwa, dwa.alpha, device, dtype), paper, tolerance)


@pytest.mark.parametrize("impl", ["naive", "inplace"])
def test_gradients_are_finite_differences(impl):
    torch.manual_seed(0)
    dwa = DWA(4, "1x1", impl).double()
    randomize(dwa)
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
    if is_empty(pattern, n_layer):
        with pytest.raises(ValueError, match=f"no DWA in {n_layer} blocks"):
            DWA(n_layer, pattern)
        return
    assert dwa_rows(pattern, n_layer) == rows
    dwa = DWA(n_layer, pattern)
    assert [row.nonzero().flatten().tolist() for row in dwa.mask] == rows
    # the map is the identity at initialization
    assert dwa.weights().equal(torch.eye(n_layer + 1)[1:])
    assert dwa_rows(dwa_pattern(dwa.mask), n_layer) == rows


def test_mask_of_the_papers_example():
    # k = p = 4 (section 3.2): DWA_8 sees X_0, X_4, X_8, never X_5, the first to have used Y_4.
    assert dwa_rows("4x4", 8)[7] == [0, 4, 8]
    assert dwa_rows("4x5", 10)[9] == [2, 6, 10]
    assert dwa_rows(" 4x5 + 1x2", 10) == dwa_rows("4x5+1x2", 10)  # blanks do not matter


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
    ["last0", "last", "10:0", "4:5", "0:0", "4:", "1x1+", "+", "4:0,", "last4x5", "0x1", "1x0", "",
     "none+1x1", "none+4x12", "4x12", "8x10+1x11"],  # the last two have no DWA in 9 blocks
)  # fmt: skip
def test_patterns_that_are_refused(pattern):
    with pytest.raises(ValueError, match="dwa"):
        DWA(9, pattern)


def test_a_row_without_its_own_x_starts_with_the_newest_that_it_reads():
    assert DWA(3, "2:0,1+3:0").weights().tolist() == [[0, 1, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0]]


@pytest.mark.parametrize(
    ("pattern", "percent"),
    # The paper's Table 4, and 1x1 and none by definition. For 12x1 the table has 92%, which is
    # 1 - 1/(12 * 1); by counting, as for the others, it is 94%.
    [("last4", 84), ("connect-to-last", 96), ("4x5", 95), ("12x1", 94), ("1x1", 0), ("none", 100)],
)
def test_sparsity_is_the_papers(pattern, percent):
    assert f"{sparsity(DWA(48, pattern)):.0%}" == f"{percent}%"


def test_number_of_parameters():
    for n_layer in (1, 2, 5, 48, 72):
        assert DWA(n_layer).num_params() == n_layer * (n_layer + 3) // 2  # paper, section 3
    assert DWA(24, "4x1").num_params() == 90  # a row with only its diagonal has one weight

    # The paper's models are too big to build here, but all blocks have the same size.
    def params(n_layer):
        return DenseFormer(DenseFormerConfig(n_layer=n_layer, dwa="none")).num_params()

    one, two = params(1), params(2)
    for n_layer, millions in ((48, 378.45), (64, 491.72), (72, 548.35), (90, 675.78)):  # Table 1
        assert round((one + (n_layer - 1) * (two - one)) / 1e6, 2) == millions
    assert tiny("1x1").num_params() - tiny("none").num_params() == 9 * 12 // 2


# -----------------------------------------------------------------------------
# The model, against a Transformer written separately


def reference_logits(model, idx, pattern):
    """Return all logits, computed in numpy from the model's weights with textbook formulas."""
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
def test_at_initialization_it_is_the_plain_transformer(pattern):
    config = {"vocab_size": 17, "block_size": 8, "n_head": 2, "n_embd": 8, "n_layer": 5}
    model = DenseFormer(DenseFormerConfig(**config, dwa=pattern))
    plain = DenseFormer(DenseFormerConfig(**config, dwa="none"))
    weights = {k: v for k, v in model.state_dict().items() if not k.startswith("dwa.")}
    plain.load_state_dict(weights, strict=False)
    idx = torch.randint(17, (3, 8))
    assert torch.equal(model(idx, idx)[0], plain(idx, idx)[0])


def test_initialization_is_gpt2s():
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
        ({"vocab_size": 0}, "vocab_size"),
        ({"block_size": 0}, "block_size"),
        ({"n_layer": 0}, "n_layer"),
        ({"n_head": 0}, "n_head"),
        ({"n_embd": 0}, "n_embd"),
        ({"dropout": 1.0}, "dropout"),
        ({"dwa": "0x1"}, "dwa"),
        ({"dwa": "1x0"}, "dwa"),
        ({"dwa": "dense"}, "dwa"),
        ({"dwa": "1x1x1"}, "dwa"),
        ({"dwa": "-1x1"}, "dwa"),
    ],
)
def test_invalid_config_is_rejected(flags, names):
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
    rotary = denseformer.rotary_angles(torch.arange(8), 4, x.dtype)
    attended = 0.5 * x + block.attn(block.ln_1(x), rotary)
    torch.testing.assert_close(block(x, rotary), -2 * attended + block.mlp(block.ln_2(attended)))
    gains(idx, idx)[1].backward()
    assert all(b.gains.grad.abs().min() > 0 for b in gains.blocks)


# -----------------------------------------------------------------------------
# Generation


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
@pytest.mark.parametrize("prompt", [1, 5, 8, 13])  # block_size is 8
@pytest.mark.parametrize("pattern", PATTERNS)
def test_cached_generation_is_the_full_context_recomputed(pattern, prompt, device, monkeypatch):
    cached = []

    def watch(logits, *args, **kwargs):
        cached.append(logits.clone())
        return draw(logits, *args, **kwargs)

    monkeypatch.setattr(denseformer, "sample", watch)
    model = tiny(pattern).float().to(device)
    idx = torch.randint(17, (3, prompt)).to(device)
    ours, expected = model.generate(idx, 12, temperature=0), idx
    for logits in cached:
        full = model(expected[:, -8:])[0][:, -1]
        torch.testing.assert_close(logits, full, rtol=1e-4, atol=1e-5)
        expected = torch.cat((expected, full.argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(ours, expected)
    assert len(cached) == 12


@torch.no_grad()
def test_cache_takes_several_tokens_at_once():
    model = tiny()
    idx = torch.randint(17, (2, 8))
    cache = KVCache(model.config, 2, idx.device, torch.float64)
    for part in idx.split((3, 1, 4), dim=1):
        logits, _ = model(part, cache=cache)
    torch.testing.assert_close(logits, model(idx)[0], rtol=1e-9, atol=1e-9)


def test_stream_draws_token_by_token_and_leaves_each_module_in_its_mode():
    model = tiny(dropout=0.5).train()
    model.blocks[1].eval()
    modes = [module.training for module in model.modules()]
    idx = torch.randint(17, (2, 4))
    options = {"temperature": 0.7, "top_k": 5, "top_p": 0.9}
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    expected = idx
    for token in model.stream(idx, 6, **options, generator=generators[0]):
        assert [module.training for module in model.modules()] == modes
        with denseformer.evaluating(model):
            logits = model(expected[:, -8:])[0][:, -1]
        assert token.equal(draw(logits, **options, generator=generators[1]))
        expected = torch.cat((expected, token), dim=1)
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
    for greedy in ({"temperature": 0.0}, {"temperature": 1e-30}, {"top_k": 1}, {"top_p": 1e-50}):
        assert frequencies(**greedy).tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize(
    ("options", "names"),
    [({"temperature": -1}, "temperature"), ({"temperature": math.inf}, "temperature"),
     ({"top_k": 0}, "top_k"), ({"top_p": 0}, "top_p"), ({"top_p": 1.5}, "top_p"),
     ({"idx": torch.zeros(1, 0).long()}, "prompt")],
)  # fmt: skip
def test_generate_rejects_invalid_arguments(options, names):
    options = {"idx": torch.zeros(1, 1).long(), "max_new_tokens": 1} | options
    with pytest.raises(ValueError, match=names):
        tiny().generate(**options)
