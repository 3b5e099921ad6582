"""The mathematics of denseformer.py: pytest test_denseformer.py

Runs with denseformer.py, torch, numpy and pytest alone. The references are the paper's formula,
arithmetic, and a Transformer written separately in numpy, in float64.
tests/test_dwa.py tests DWA in other people's code.
"""

import math

import numpy as np
import pytest
import torch

import denseformer
from denseformer import DWA, DenseFormer, DenseFormerConfig, KVCache, dwa_rows, sample_token

PATTERNS = ["none", "1x1", "2x1", "4x5", "3x2"]
DATA = [[], [0, 1], [], [0, 2], [1], [0, 1, 2, 3], [2, 6], [], [3, 8], [0, 5, 9]]  # as if pruned
IDX = torch.randint(17, (2, 8), generator=torch.Generator().manual_seed(0))


def tiny(dwa="1x1", n_layer=9, **flags):
    """Return a small float64 model with alphas far from the identity, as after training."""
    torch.manual_seed(0)
    flags = {"vocab_size": 17, "block_size": 8, "n_head": 2, "n_embd": 8} | flags
    model = DenseFormer(DenseFormerConfig(n_layer=n_layer, dwa=dwa, **flags)).double()
    randomize(model.dwa)
    return model


@torch.no_grad()
def randomize(dwa):
    """Set alpha to random values, small enough that activations keep their size over depth, and to
    nan where no DWA reads it, but for row 0."""
    noise = torch.randn(dwa.alpha.shape, dtype=dwa.alpha.dtype) / (1 + dwa.n_layer**0.5)
    dwa.alpha[1:] = math.nan
    for i, row in enumerate(dwa.rows):
        dwa.alpha[i, row] = noise[i, row]


def terms(pattern, i):
    """Return the j of the sum for Y_i, by the paper's definition of k x p; [] for Y_i = X_i."""
    if pattern == "none" or i == 0:
        return []
    if not isinstance(pattern, str):
        return pattern[i]
    k, p = map(int, pattern.split("x"))
    return [j for j in range(i + 1) if j % k == i % k] if i % p == 0 else []


def gradients(model):
    """Return all gradients, with zeros for None."""
    return {
        n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()
    }


def assert_same(ours, reference, tolerance=1e-9):
    torch.testing.assert_close(ours, reference, rtol=tolerance, atol=tolerance)


# -----------------------------------------------------------------------------
# DWA against the formula


class Paper:
    """The paper's formula, from its definition of k x p."""

    def __init__(self, pattern, alpha, x):
        self.pattern, self.alpha, self.X = pattern, alpha, [x]

    def step(self, i, x):
        self.X.append(x)
        y = torch.zeros_like(x)
        for j in terms(self.pattern, i):
            y = y + self.alpha[i, j] * self.X[j]
        return y if terms(self.pattern, i) else x


def all_outputs(depth, x, weights):
    """Return Y_1..Y_L for a stack of blocks B_i(y) = tanh(w_i * y)."""
    Y = []
    for i, w in enumerate(weights, start=1):
        x = depth.step(i, torch.tanh(w * x))
        Y.append(x)
    return torch.stack(Y)


def assert_dwa_is_the_formula(dwa, device="cpu", dtype=torch.float64, tolerance=1e-11):
    """Compare outputs and all gradients of a DWA with the formula in float64."""
    torch.manual_seed(0)
    randomize(dwa)
    L, read = dwa.n_layer, dwa.alpha.isfinite().cpu()
    read[0] = False
    alpha = dwa.alpha.detach().cpu().double().nan_to_num(0).requires_grad_()
    x, weights, seed = torch.randn(2, 3, 4), torch.randn(L, 4), torch.randn(L, 2, 3, 4)

    def result(begin, alpha, device, dtype):
        inputs = [t.to(device, dtype).requires_grad_() for t in (x, weights)]
        Y = all_outputs(begin(inputs[0]), *inputs)
        inputs += [alpha] if alpha.requires_grad and read.any() else []
        grads = torch.autograd.grad(Y, inputs, seed.to(device, dtype))
        return [t.double().cpu() for t in (Y, *grads)]

    dwa.to(device, dtype)
    ours = result(dwa, dwa.alpha, device, dtype)
    paper = result(lambda x: Paper(dwa.pattern, alpha, x), alpha, "cpu", torch.float64)
    assert_same(ours, paper, tolerance)
    if read.any():
        assert not ours[-1][~read].any()  # an alpha that no DWA reads has the gradient 0


@pytest.mark.parametrize("impl", ["naive", "inplace"])
@pytest.mark.parametrize(
    ("pattern", "n_layer"),
    [("1x1", 1), ("1x1", 2), ("1x1", 5), ("1x1", 48), ("3x2", 5), ("3x2", 48), ("none", 5),
     ("4x5", 48), (DATA, 9)],
)  # fmt: skip
def test_dwa_is_the_formula_of_the_paper(pattern, n_layer, impl):
    dwa = DWA(n_layer, pattern, impl)
    in_place = impl == "inplace" and pattern == "1x1"
    assert isinstance(dwa(torch.zeros(3)), denseformer.InPlace) == in_place
    assert_dwa_is_the_formula(dwa)


@pytest.mark.parametrize("n_layer", [5, 48])
@pytest.mark.parametrize("pattern", [*PATTERNS, "1x5", "12x1"])
def test_rows_are_the_papers_definition(pattern, n_layer):
    rows = [terms(pattern, i) for i in range(n_layer + 1)]
    assert dwa_rows(pattern, n_layer) == rows
    assert pattern == "none" or dwa_rows(rows, n_layer) == rows
    assert DWA(n_layer, pattern).alpha.equal(torch.eye(n_layer + 1))


def test_rows_of_examples():
    # k = p = 4 (section 3.2): DWA_8 sees X_0, X_4, X_8, never X_5, the first to have used Y_4.
    assert dwa_rows("4x4", 8)[8] == [0, 4, 8]
    assert dwa_rows("4x5", 10)[10] == [2, 6, 10]
    assert dwa_rows("last2", 4) == [[], [0, 1], [0, 1, 2], [0, 2, 3], [0, 3, 4]]
    assert dwa_rows("connect-to-last", 3) == [[], [], [], [0, 1, 2, 3]]
    # A row without its own X_i starts with the newest that it reads.
    dwa = DWA(3, [[], [], [0, 1], [0]])
    assert dwa.alpha.tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0]]


@pytest.mark.parametrize(
    "pattern",
    ["last0", "last", "1x1x1", "-1x1", "last4x5", "0x1", "1x0", "", "1x1 ", "4x12", "dense",
     [[]] * 9, [[0], *[[]] * 9], [[], [2], *[[]] * 8], [[]] * 10],
)  # fmt: skip
def test_patterns_that_are_refused(pattern):
    with pytest.raises(ValueError, match="dwa"):  # 4x12 and [[]] * 10 have no DWA in 9 blocks
        DWA(9, pattern)


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

    def turn(x):  # (T, hs): by angles t * theta, channel 2m with channel 2m + 1
        angles = np.arange(T)[:, None] * 10000.0 ** (-2 * np.arange(hs // 2) / hs)
        even, odd = x[:, ::2], x[:, 1::2]
        turned = np.empty_like(x)
        turned[:, ::2] = even * np.cos(angles) - odd * np.sin(angles)
        turned[:, 1::2] = even * np.sin(angles) + odd * np.cos(angles)
        return turned

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
            alphas = [w["dwa.alpha"][i, j] * X[j] for j in terms(pattern, i)]
            y = sum(alphas) if alphas else X[i]
        logits.append(norm(y, "ln_f") @ w["wte.weight"].T)
    return torch.from_numpy(np.stack(logits))


@pytest.mark.parametrize(("pattern", "bias"), [("none", False), ("1x1", True), ("3x2", False)])
def test_model_is_the_reference(pattern, bias, monkeypatch):
    if pattern == "3x2":  # rotary positions without complex numbers, as on a GPU
        monkeypatch.setattr(denseformer, "is_compiling", lambda: True)
    model = tiny(pattern, bias=bias)
    with torch.no_grad():
        for p in model.parameters():
            if p is not model.dwa.alpha:
                p.add_(torch.randn_like(p) * 0.2)  # norms and biases too
    idx = torch.randint(17, (2, 8))
    targets = torch.randint(17, (2, 8))
    expected = reference_logits(model, idx, pattern)
    targets[0, 5:] = -1  # these do not count
    logits, loss = model(idx, targets)
    assert_same(logits, expected)
    p = expected.softmax(-1).gather(-1, targets[..., None].clamp(min=0))[targets >= 0]
    assert loss.item() == pytest.approx(-p.log().mean().item(), rel=1e-12)
    last, none = model(idx)
    assert none is None
    assert_same(last, expected[:, -1:])


def test_initialization_is_gpt2s():
    torch.manual_seed(0)
    model = DenseFormer(DenseFormerConfig(vocab_size=512, n_layer=8, n_head=4, n_embd=256))
    for name, p in model.named_parameters():
        if name.endswith("c_proj.weight"):
            assert p.std().item() == pytest.approx(0.02 / 4, rel=0.02), name  # sqrt(2 * 8) = 4
        elif p.dim() == 2 and name != "dwa.alpha":
            assert p.std().item() == pytest.approx(0.02, rel=0.02), name
    idx = torch.randint(512, (4, 64))
    logits, loss = model(idx, idx.roll(1))
    assert loss.item() == pytest.approx(math.log(512), abs=0.1)
    for pattern in PATTERNS:  # each starts as the plain Transformer, "none"
        model.dwa = DWA(8, pattern)
        assert model(idx, idx)[0].equal(logits)


@pytest.mark.parametrize("prompt", [1, 5, 13])  # block_size is 8
@pytest.mark.parametrize("pattern", ["none", "1x1", "3x2"])
def test_cached_generation_is_the_full_context_recomputed(pattern, prompt, monkeypatch):
    cached = []

    def watch(logits, *args, **kwargs):
        cached.append(logits.clone())
        return sample_token(logits, *args, **kwargs)

    monkeypatch.setattr(denseformer, "sample_token", watch)
    model = tiny(pattern)
    idx = torch.randint(17, (3, prompt))
    ours, expected = model.generate(idx, 12, temperature=0), idx
    for logits in cached:
        full = model(expected[:, -8:])[0][:, -1]
        assert_same(logits, full)
        expected = torch.cat((expected, full.argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(ours, expected)
    assert len(cached) == 12


@torch.no_grad()
def test_cache_takes_several_tokens_at_once():
    model, idx = tiny(), torch.randint(17, (2, 8))
    cache = KVCache(model.config, 2, idx.device, torch.float64)
    for part in idx.split((3, 1, 4), dim=1):
        logits, _ = model(part, cache=cache)
    assert_same(logits, model(idx)[0])


def test_sample_token():
    p = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    logits = p.log().repeat(20000, 1)
    generator = torch.Generator().manual_seed(0)

    def frequencies(**options):
        ids = sample_token(logits, **options, generator=generator)
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


def test_invalid_arguments_are_rejected():
    for name, options in (
        ("n_embd", {"n_embd": 10, "n_head": 3}), ("n_head", {"n_embd": 6, "n_head": 2}),
        ("n_layer", {"n_layer": 0}), ("dropout", {"dropout": 1.0}), ("dwa", {"dwa": "dense"}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=name):
            DenseFormerConfig(**options)
    for name, options in (
        ("temperature", {"temperature": -1}), ("temperature", {"temperature": math.inf}),
        ("top_k", {"top_k": 0}), ("top_p", {"top_p": 0}), ("top_p", {"top_p": 1.5}),
        ("prompt", {"idx": torch.zeros(1, 0)}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=name):
            tiny().generate(**{"idx": IDX, "max_new_tokens": 1} | options)
    with pytest.raises(ValueError, match="block_size"):
        tiny()(torch.zeros(1, 9).long())
