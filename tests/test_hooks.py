"""The README's hooks, which put a DWA into models of the transformers library.

The models are small and have random weights. The reference is the paper's formula, with the loop
over a plain model's blocks written out.
"""

import copy
import pickle
import textwrap

import pytest
import torch

from denseformer import DWA
from tests.test_readme import code

transformers = pytest.importorskip("transformers")
from transformers import (  # noqa: E402
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

L = 10  # more than one tile of the in-place pass
IDX = torch.randint(1, 17, (2, 8), generator=torch.Generator().manual_seed(0))
COMMON = {
    "vocab_size": 17, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    "initializer_range": 0.3,  # large, so that alpha matters
}  # fmt: skip
DEFINITION, HOOKS = code("register_forward_hook").rsplit("\n\n\n", 1)
exec(DEFINITION)  # HookedDWA, here, where pickle finds it


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=L, n_head=2, n_embd=8, n_positions=32, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0,
        **COMMON,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=L, num_attention_heads=2, num_key_value_heads=1, hidden_size=8,
        intermediate_size=16, **COMMON,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def hooked(model):
    """Run the README's code on a model."""
    hooks = HOOKS
    if isinstance(model, LlamaForCausalLM):  # as the README says
        hooks = hooks.replace("transformer.h", "model.layers").replace(".transformer", ".model")
    exec(hooks, globals() | {"model": model})
    return model


@torch.no_grad()
def randomize(model):
    torch.manual_seed(1)
    model.dwa.alpha += 0.3 * torch.randn(L, L + 1)
    return model


def formula(model, alpha, idx):
    """Return the logits of a plain model whose blocks read depth-weighted averages."""
    positions = torch.arange(idx.shape[1])[None]
    if isinstance(model, GPT2LMHeadModel):
        blocks, norm, options = model.transformer.h, model.transformer.ln_f, {}
        x = model.transformer.wte(idx) + model.transformer.wpe(positions)
    else:
        blocks, norm, x = model.model.layers, model.model.norm, model.model.embed_tokens(idx)
        options = {"position_embeddings": model.model.rotary_emb(x, positions)}
    X, y = [x], x
    for i, block in enumerate(blocks):
        X.append(block(y, **options))
        y = sum(alpha[i, j] * X[j] for j in range(i + 2))
    return model.lm_head(norm(y))


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(params=[gpt2, llama])
def plain(request):
    return request.param().eval()


def test_outputs_of_the_model_stay_the_same(plain):
    model = hooked(copy.deepcopy(plain))
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            assert model(IDX).logits.equal(plain(IDX).logits)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_outputs_and_gradients_are_those_of_the_formula(plain):
    model = randomize(hooked(copy.deepcopy(plain))).double()
    plain, alpha = plain.double(), model.dwa.alpha.detach().clone().requires_grad_()
    other = IDX.flip(0, 1)[:, :5]
    ours = model(IDX).logits, model(other).logits  # two forward passes, then one backward pass
    reference = formula(plain, alpha, IDX), formula(plain, alpha, other)
    torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-9)
    for a, b in (ours, reference):
        (a.sin().sum() + b.cos().sum()).backward()
    expected = gradients(plain) | {"dwa.alpha": alpha.grad}
    torch.testing.assert_close(gradients(model), expected, rtol=1e-9, atol=1e-9)
    # and with gradient checkpointing
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model.train()
    (model(IDX).logits.sin().sum() + model(other).logits.cos().sum()).backward()
    torch.testing.assert_close(gradients(model), expected, rtol=1e-9, atol=1e-9)


def test_training_moves_alpha():
    model = hooked(gpt2())
    namespace = {"torch": torch, "network": model}
    exec(code("torch.optim"), namespace)
    optimizer, losses = namespace["optimizer"], []
    decay = {p: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decay.keys() == set(model.parameters())
    assert [p for p in decay if decay[p] == 0] == [model.dwa.alpha]
    for _ in range(5):
        loss = model(IDX, labels=IDX).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert (model.dwa.alpha != torch.eye(L + 1)[1:]).equal(model.dwa.mask)


@pytest.mark.parametrize(
    "twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_has_its_own_alpha(plain, twin):
    model = randomize(hooked(plain))
    before = model(IDX).logits  # with gradients: a pass left on the module could not be copied
    other = twin(model)
    assert other(IDX).logits.equal(before)
    with torch.no_grad():
        other.dwa.alpha *= 0.5
    assert model(IDX).logits.equal(before)
    assert not other(IDX).logits.allclose(before)
    other(IDX).logits.sum().backward()
    assert (other.dwa.alpha.grad != 0).any()
    assert model.dwa.alpha.grad is None


def test_generation_with_a_cache(plain):
    model = randomize(hooked(copy.deepcopy(plain)))
    settings = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    mask = torch.ones_like(IDX)
    mask[0, :3] = 0
    texts = [
        m.generate(IDX, attention_mask=mask, use_cache=cache, **settings)
        for m, cache in ((model, True), (model, False), (plain, True))
    ]
    assert texts[0].equal(texts[1])
    assert not texts[0].equal(texts[2])


def test_an_exception_leaves_no_pass(plain):
    model = randomize(hooked(plain))
    before = model(IDX).logits
    mlp = [m for name, m in model.named_modules() if name.endswith("mlp")][5]
    hook = mlp.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(IDX)
    hook.remove()
    for m in (copy.deepcopy(model), model):
        assert m(IDX).logits.equal(before)


def test_a_compiled_model():
    model = randomize(hooked(gpt2()))
    results = []
    for forward in (model, torch.compile(model, backend="eager", fullgraph=True)):
        for _ in range(2):
            model.zero_grad()
            logits = forward(IDX).logits
            logits.sin().sum().backward()
        results.append((logits, gradients(model)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


class Contains(GPT2LMHeadModel):
    """A model whose class has a DWA."""

    def __init__(self, config):
        super().__init__(config)
        self.dwa = DWA(config.n_layer)
        self.post_init()


class Initializes(Contains):
    def _init_weights(self, module):
        super()._init_weights(module)
        exec(textwrap.dedent(code("reset_parameters")), {"DWA": DWA, "module": module})


@pytest.fixture
def nan_in_empty():
    torch.use_deterministic_algorithms(True)  # fills uninitialized memory with nan
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("nan_in_empty")
def test_from_pretrained_initializes_a_missing_alpha(tmp_path):
    gpt2().save_pretrained(tmp_path)
    assert Contains.from_pretrained(tmp_path).dwa.alpha.isnan().all()
    assert Initializes.from_pretrained(tmp_path).dwa.alpha.equal(torch.eye(L + 1)[1:])


@pytest.mark.usefixtures("nan_in_empty")
def test_from_pretrained_keeps_a_saved_alpha(tmp_path):
    model = randomize(Initializes(gpt2().config))
    model.save_pretrained(tmp_path)
    loaded = Initializes.from_pretrained(tmp_path)
    assert loaded.dwa.alpha.equal(model.dwa.alpha)
    assert loaded.dwa.mask.equal(model.dwa.mask)


def test_hooks_on_a_loaded_model(tmp_path):
    model = randomize(hooked(gpt2())).eval()
    model.save_pretrained(tmp_path)
    torch.save(model.dwa.state_dict(), tmp_path / "dwa.pt")
    loaded = hooked(GPT2LMHeadModel.from_pretrained(tmp_path))
    assert loaded.dwa.alpha.equal(torch.eye(L + 1)[1:])
    loaded.dwa.load_state_dict(torch.load(tmp_path / "dwa.pt"))
    assert loaded(IDX).logits.equal(model(IDX).logits)
