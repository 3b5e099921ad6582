"""lib/hooks.py on small models of transformers, and what other libraries do to alpha."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import torch.nn as nn
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as wrapper

import denseformer
from lib.hooks import add_dwa, calls, remove_dwa

pytest.importorskip("transformers")
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

L = 10
IDX = torch.randint(1, 17, (2, 8), generator=torch.Generator().manual_seed(0))
NOISE = 0.3 * torch.randn(L + 1, L + 1, generator=torch.Generator().manual_seed(1)).tril()
PATTERNS = [("1x1", "inplace"), ("1x1", "naive"), ("4x5", "inplace")]
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


def small(model, config, **options):
    torch.manual_seed(0)
    sizes = {"vocab_size": 17, "max_position_embeddings": 32, "initializer_range": 0.3}
    sizes |= {"num_hidden_layers": L, "num_attention_heads": 2, "hidden_size": 8}
    return model(config(bos_token_id=0, eos_token_id=0, use_cache=False, **sizes | options))


gpt2 = partial(small, GPT2LMHeadModel, GPT2Config, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0)
llama = partial(small, LlamaForCausalLM, LlamaConfig, intermediate_size=16, num_key_value_heads=1)


@pytest.fixture(params=[gpt2, llama], ids=["gpt2", "llama"])
def plain(request):
    return request.param().eval()


def blocks_of(model):
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def hooked(model, pattern="1x1", impl="inplace", noise=NOISE):
    add_dwa(model, blocks_of(model), pattern, impl).alpha.data += noise
    return model


def use_formula(model, rows, alpha):
    """Make the blocks of a plain model return depth-weighted averages."""
    X = {}

    def forward(i, block, x, *args, **kwargs):
        X[0] = x if i == 1 else X[0]
        X[i] = block(x, *args, **kwargs)
        return sum(alpha[i, j] * X[j] for j in rows[i]) if rows[i] else X[i]

    for i, block in enumerate(blocks_of(model), start=1):
        block.forward = partial(forward, i, block.forward)


def run(model):
    """Return the logits and the gradients of two forward passes and one backward pass."""
    model.zero_grad()
    a, b = model(IDX).logits, model(IDX.flip(0, 1)[:, :5]).logits
    (a.sin().sum() + b.cos().sum()).backward()
    assert not calls.passes
    return [a, b, *(p.grad for p in model.parameters())]


close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("pattern", "impl"), PATTERNS)
def test_outputs_and_gradients_are_those_of_the_formula(plain, pattern, impl):
    plain(IDX, output_hidden_states=True)  # adds hooks of its own
    model = hooked(copy.deepcopy(plain), pattern, impl).double()
    rows, alpha = model.dwa.rows, model.dwa.alpha.detach().clone().requires_grad_()
    use_formula(plain.double(), rows, alpha)
    close(run(model), [*run(plain), alpha.grad])
    close(*(m(IDX, output_hidden_states=True).hidden_states for m in (model, plain)))


def wrap(model, **options):
    for i, block in enumerate(model.transformer.h):
        model.transformer.h[i] = wrapper.checkpoint_wrapper(block, **options)


def wrap_network(model):
    model.transformer = wrapper.checkpoint_wrapper(model.transformer)


@pytest.mark.parametrize(("pattern", "impl"), PATTERNS)
def test_checkpointing(pattern, impl):
    expected = run(hooked(gpt2().double(), pattern, impl))
    enable = GPT2LMHeadModel.gradient_checkpointing_enable
    own = [partial(enable, gradient_checkpointing_kwargs={"use_reentrant": r}) for r in (0, 1)]
    for way in (wrap, wrap_network, *own):
        model = hooked(gpt2().double().train(), pattern, impl)
        way(model)
        close(run(model), expected)
    model, first = hooked(gpt2(), pattern, impl), gpt2().double()
    for m in (model, first):
        wrap(m, checkpoint_impl=wrapper.CheckpointImpl.REENTRANT)
    close(run(hooked(first, pattern, impl)), expected)
    with pytest.raises(RuntimeError, match=r"^block \d+ .* use_reentrant=False, or wrap the"):
        run(model)


def test_compiling(monkeypatch):
    passes, cls = [], denseformer.InPlace
    monkeypatch.setattr(denseformer, "InPlace", lambda *args: passes.append(1) or cls(*args))
    model = hooked(gpt2(num_hidden_layers=4).double(), noise=0.1)
    expected = run(model)
    close(run(torch.compile(model, backend="eager", fullgraph=True)), expected)
    with_hooks = copy.deepcopy(model)
    for block in with_hooks.transformer.h:
        block.compile(backend="eager")
    close(run(with_hooks), expected)
    for block in model.transformer.h:
        block.forward = torch.compile(block.forward, backend="eager")
    close(run(model), expected)
    assert len(passes) == 4  # in place, as without compiling
    torch._dynamo.reset()


def test_threads(plain):
    model = hooked(plain)
    inputs = [IDX[:, : 2 + n % 7] for n in range(200)]
    with ThreadPoolExecutor(2) as pool:
        for idx, out in zip(inputs, pool.map(model, inputs), strict=True):
            assert out.logits.equal(model(idx).logits)


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_its_own_alpha(plain, twin):
    model = hooked(copy.deepcopy(plain))
    before, other = model(IDX).logits, twin(model)
    assert other(IDX).logits.equal(before)
    remove_dwa(other)
    assert other(IDX).logits.equal(plain(IDX).logits)
    assert model(IDX).logits.equal(before)


def test_generation_with_a_cache(plain):
    model, options = hooked(plain), {"max_new_tokens": 10, "do_sample": False}
    text = model.generate(IDX, use_cache=True, **options)
    assert text.equal(model.generate(IDX, use_cache=False, **options))


def test_added_once_and_removed(plain):
    model = copy.deepcopy(plain)
    assert add_dwa(model, blocks_of(model)) is model.dwa
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            assert model(IDX).logits.equal(plain(IDX).logits)
    with pytest.raises(RuntimeError, match=r"remove_dwa\(model\)"):
        add_dwa(model, blocks_of(model))
    model.dwa = hooked(copy.deepcopy(plain)).dwa  # acts at once
    assert not model(IDX).logits.allclose(plain(IDX).logits)
    remove_dwa(model)
    assert not hasattr(model, "dwa")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Block(nn.Linear):
    def forward(self, hidden_states):
        return super().forward(hidden_states), "weights"


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block(4, 4) for _ in range(4))

    def forward(self, x):
        for block in self.blocks:
            x, _ = block(hidden_states=x)
        return x


def test_blocks_with_named_arguments_that_return_tuples():
    model, x = Network(), torch.randn(2, 4)
    alpha = add_dwa(model, model.blocks, impl="naive").alpha
    alpha.data += torch.rand(5, 5)
    depth, y = model.dwa(x), x
    for i, block in enumerate(model.blocks, start=1):
        y = depth.step(i, nn.functional.linear(y, block.weight, block.bias))
    compiled = torch.compile(model.forward, backend="eager", fullgraph=True)
    for call in (model, model.forward, compiled):  # peft calls forward, without hooks around it
        assert call(x).allclose(y)
    assert not calls.passes
    y = model(x).sum()
    alpha.detach().mul_(2)
    with pytest.raises(RuntimeError, match="alpha changed"):
        y.backward()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(x[:, :3])
    assert not calls.passes
    model.blocks = model.blocks[1:]
    with pytest.raises(RuntimeError, match="without block 1"):
        model(x)


def train(model):
    """Train for 5 steps; return whether each alpha moved from the identity."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
    for _ in range(5):
        optimizer.zero_grad()
        model(input_ids=IDX, labels=IDX).loss.backward()
        optimizer.step()
    *_, alpha = (p for name, p in model.named_parameters() if "dwa." in name)  # peft's is the last
    return alpha != torch.eye(L + 1)


def test_peft(tmp_path):
    peft, new = pytest.importorskip("peft"), lambda: hooked(gpt2(), noise=0)
    config = {"target_modules": ["c_attn"], "task_type": "CAUSAL_LM"}
    lora = peft.LoraConfig(modules_to_save=["dwa"], **config)
    model = peft.get_peft_model(peft.prepare_model_for_kbit_training(new()), lora)
    assert train(model).sum() == 65
    logits = model.eval()(IDX).logits
    with model.disable_adapter():
        assert model(IDX).logits.equal(gpt2().eval()(IDX).logits)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(new(), tmp_path).eval()
    assert loaded(IDX).logits.equal(logits)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(IDX).logits, logits, rtol=1e-4, atol=1e-4)
    merged.dwa.reset_parameters()
    assert not merged(IDX).logits.allclose(logits, rtol=1e-3)


def test_alpha_is_float32_in_a_model_in_bfloat16():
    """Else AdamW would not move the diagonal, next to whose 1 bfloat16 has no number close by."""
    assert train(hooked(gpt2().bfloat16(), noise=0)).sum() == 65
