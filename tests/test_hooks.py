"""lib/hooks.py on models of transformers, and what other libraries do to alpha.

The models are small and have random weights. The reference is the paper's formula, with the loop
over a plain model's blocks written out.
"""

import copy
import math
import pickle
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import torch.nn as nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.nn.utils import prune

import denseformer
from denseformer import DWA
from lib.hooks import add_dwa, calls, remove_dwa

transformers = pytest.importorskip("transformers")
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM  # noqa: E402

L = 10
IDX = torch.randint(1, 17, (2, 8), generator=torch.Generator().manual_seed(0))
NOISE = 0.3 * torch.randn(L + 1, L + 1, generator=torch.Generator().manual_seed(1)).tril()
PATTERNS = [("1x1", "inplace"), ("1x1", "naive"), ("4x5", "inplace")]
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")


def small(model, config, **options):
    torch.manual_seed(0)
    sizes = {"vocab_size": 17, "max_position_embeddings": 32, "initializer_range": 0.3}
    sizes |= {"num_hidden_layers": L, "num_attention_heads": 2, "hidden_size": 8}
    return model(config(bos_token_id=0, eos_token_id=0, pad_token_id=0, **sizes | options))


gpt2 = partial(small, GPT2LMHeadModel, GPT2Config, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0)
llama = partial(small, LlamaForCausalLM, LlamaConfig, intermediate_size=16, num_key_value_heads=1)


@pytest.fixture(params=[gpt2, llama], ids=["gpt2", "llama"])
def plain(request):
    return request.param().eval()


def blocks_of(model):
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def hooked(model, pattern="1x1", impl="inplace"):
    alpha = add_dwa(model, blocks_of(model), pattern, impl).alpha
    with torch.no_grad():
        alpha += NOISE[: len(alpha), : len(alpha)]
    return model


def formula(model, rows, alpha, idx):
    """Return the logits of a plain model whose blocks read depth-weighted averages."""
    positions = torch.arange(idx.shape[1])[None]
    if isinstance(model, GPT2LMHeadModel):
        norm, options = model.transformer.ln_f, {}
        x = model.transformer.wte(idx) + model.transformer.wpe(positions)
    else:
        norm, x = model.model.norm, model.model.embed_tokens(idx)
        options = {"position_embeddings": model.model.rotary_emb(x, positions)}
    X, y = [x], x
    for i, block in enumerate(blocks_of(model), start=1):
        X.append(block(y, **options))
        y = sum(alpha[i, j] * X[j] for j in rows[i]) if rows[i] else X[i]
    return model.lm_head(norm(y))


def run(model, logits=None):
    """Return the logits and the gradients of two forward passes and one backward pass."""
    logits = logits or (lambda idx: model(idx).logits)
    model.zero_grad()
    a, b = logits(IDX), logits(IDX.flip(0, 1)[:, :5])
    (a.sin().sum() + b.cos().sum()).backward()
    assert not calls.passes
    return [a, b, *(p.grad for p in model.parameters())]


close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_of_the_model_stay_the_same(plain, dtype):
    plain = plain.to(dtype)
    model = copy.deepcopy(plain)
    assert add_dwa(model, blocks_of(model)) is model.dwa
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            assert model(IDX).logits.equal(plain(IDX).logits)


@pytest.mark.parametrize(("pattern", "impl"), PATTERNS)
def test_outputs_and_gradients_are_those_of_the_formula(plain, pattern, impl):
    model = hooked(copy.deepcopy(plain), pattern, impl).double()
    rows, alpha = model.dwa.rows, model.dwa.alpha.detach().clone().requires_grad_()
    expected = run(plain.double(), partial(formula, plain, rows, alpha))
    close(run(model), [*expected, alpha.grad])


# -----------------------------------------------------------------------------
# Checkpointing, compiling, threads, copies


def wrap(model, impl=CheckpointImpl.NO_REENTRANT):  # as accelerate does with FSDP
    model.config.use_cache = False  # a reentrant checkpoint would write to the cache twice
    blocks, wrapper = set(blocks_of(model)), partial(checkpoint_wrapper, checkpoint_impl=impl)
    apply_activation_checkpointing(model, wrapper, check_fn=lambda module: module in blocks)


wrap_reentrant = partial(wrap, impl=CheckpointImpl.REENTRANT)


def wrap_network(model):
    model.config.use_cache = False
    model.transformer = checkpoint_wrapper(model.transformer)


class Pair(nn.Sequential):
    def forward(self, x, *args, **kwargs):
        return self[1](self[0](x, *args, **kwargs), *args, **kwargs)


def wrap_pairs(model):
    h = model.transformer.h
    pairs = (checkpoint_wrapper(Pair(h[i], h[i + 1])) for i in range(0, L, 2))
    model.transformer.h = nn.ModuleList(pairs)


def enable(model, reentrant=False):
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})


@pytest.mark.parametrize(("pattern", "impl"), PATTERNS)
def test_checkpointing(pattern, impl):
    expected = run(hooked(gpt2().double(), pattern, impl))
    for way in (wrap, wrap_network, enable, partial(enable, reentrant=True)):
        model = hooked(gpt2().double().train(), pattern, impl)
        way(model)
        close(run(model), expected)
    for way in (wrap_reentrant, wrap_pairs):
        model = hooked(gpt2().train(), pattern, impl)
        way(model)
        with pytest.raises(RuntimeError, match=r"^block \d+ .* use_reentrant=False, or wrap the"):
            run(model)
        assert not calls.passes
    model = gpt2().double().train()
    wrap_reentrant(model)  # first
    close(run(hooked(model, pattern, impl)), expected)


def test_compiling(monkeypatch):
    passes, cls = [], denseformer.InPlace
    monkeypatch.setattr(denseformer, "InPlace", lambda *args: passes.append(1) or cls(*args))
    model = hooked(gpt2(num_hidden_layers=3).double())
    expected = run(model)
    close(run(torch.compile(model, backend="eager", fullgraph=True)), expected)
    with_hooks = copy.deepcopy(model)
    for block in with_hooks.transformer.h:
        block.compile(backend="eager")
    close(run(with_hooks), expected)
    assert len(passes) == 2
    for block in model.transformer.h:
        block.forward = torch.compile(block.forward, backend="eager")
    close(run(model), expected)
    assert len(passes) == 4  # in place
    torch._dynamo.reset()


def test_threads(plain):
    model = hooked(plain)
    inputs = [IDX[:, : 2 + n % 7] for n in range(7)]
    expected = [model(idx).logits for idx in inputs]
    with ThreadPoolExecutor(2) as pool:
        for n, logits in enumerate(pool.map(lambda n: model(inputs[n % 7]).logits, range(200))):
            assert logits.equal(expected[n % 7])


@pytest.mark.parametrize(
    "twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_has_its_own_alpha(plain, twin):
    model = hooked(copy.deepcopy(plain))
    before = model(IDX).logits
    other = twin(model)
    assert other(IDX).logits.equal(before)
    remove_dwa(other)
    assert other(IDX).logits.equal(plain(IDX).logits)
    assert model(IDX).logits.equal(before)


def test_generation_with_a_cache(plain):
    model = hooked(copy.deepcopy(plain))
    mask = torch.ones_like(IDX)
    mask[0, :3] = 0
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    texts = [
        m.generate(IDX, attention_mask=mask, use_cache=cache, **options)
        for m, cache in ((model, True), (model, False), (plain, True))
    ]
    assert texts[0].equal(texts[1])
    assert not texts[0].equal(texts[2])


def test_an_exception_leaves_no_pass(plain):
    model = hooked(plain)
    before = model(IDX).logits
    hook = blocks_of(model)[5].mlp.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(IDX)
    assert not calls.passes
    hook.remove()
    assert model(IDX).logits.equal(before)


def test_added_once_and_removed(plain):
    model = hooked(copy.deepcopy(plain))
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"remove_dwa\(model\)"):
            add_dwa(model, blocks_of(model))
        if hasattr(model, "dwa"):
            del model.dwa  # its hooks are still there
    model.dwa = DWA(L)  # acts at once
    assert model(IDX).logits.equal(plain(IDX).logits)
    remove_dwa(model)
    assert not hasattr(model, "dwa")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Block(nn.Linear):
    def forward(self, hidden_states):
        return super().forward(hidden_states), "weights"


class Network(nn.Module):
    """Passes named arguments to blocks that return tuples, as some libraries do."""

    def __init__(self):
        super().__init__()
        self.blocks, self.first = nn.ModuleList(Block(4, 4) for _ in range(4)), 0

    def forward(self, x):
        for block in self.blocks[self.first :]:
            x, _ = block(hidden_states=x)
        return x


def test_other_blocks():
    model, x = Network(), torch.randn(2, 4)
    alpha = add_dwa(model, model.blocks, impl="naive").alpha
    with torch.no_grad():
        alpha += torch.rand(5, 5)
    X, y = [x], x
    for i, block in enumerate(model.blocks, start=1):
        X.append(nn.functional.linear(y, block.weight, block.bias))
        y = sum(alpha[i, j] * X[j] for j in range(i + 1))
    torch.testing.assert_close(model(x), y)
    torch.testing.assert_close(model.forward(x), y)  # as peft calls it, without hooks around it
    assert not calls.passes
    block = model.blocks[2]  # alone, a plain block
    assert block(x)[0].equal(nn.functional.linear(x, block.weight, block.bias))
    tracer = torch.fx.Tracer()
    tracer.is_leaf_module = lambda module, name: isinstance(module, DWA)
    assert torch.fx.GraphModule(model, tracer.trace(model))(x).equal(model(x))
    y = model(x).sum()
    with torch.no_grad():
        alpha *= 2
    with pytest.raises(RuntimeError, match="alpha changed"):
        y.backward()
    model.first = 1
    with pytest.raises(RuntimeError, match="without block 1"):
        model(x)


# -----------------------------------------------------------------------------
# What other libraries do to alpha


def train(model, n=5):
    """Train for n steps; return whether each alpha moved."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0)
    for _ in range(n):
        optimizer.zero_grad()
        model(input_ids=IDX, labels=IDX).loss.backward()
        optimizer.step()
    alpha = getattr(model.dwa, "modules_to_save", {"default": model.dwa})["default"].alpha
    return alpha != torch.eye(L + 1)


def with_dwa(**options):
    model = gpt2(**options)
    add_dwa(model, model.transformer.h)
    return model


def test_peft(tmp_path):
    peft = pytest.importorskip("peft")
    config = {"target_modules": ["c_attn"], "task_type": "CAUSAL_LM"}
    frozen = peft.get_peft_model(with_dwa(), peft.LoraConfig(**config))
    assert not train(frozen).any()
    assert not peft.prepare_model_for_kbit_training(with_dwa()).dwa.alpha.requires_grad
    lora = peft.LoraConfig(modules_to_save=["dwa"], **config)
    model = peft.get_peft_model(peft.prepare_model_for_kbit_training(with_dwa()), lora)
    assert train(model).sum() == 65
    logits = model.eval()(IDX).logits
    with model.disable_adapter():
        assert model(IDX).logits.equal(gpt2().eval()(IDX).logits)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(with_dwa(), tmp_path).eval()
    assert loaded(IDX).logits.equal(logits)
    forgotten = peft.PeftModel.from_pretrained(gpt2(), tmp_path).eval()
    assert not forgotten(IDX).logits.allclose(logits)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(IDX).logits, logits, rtol=1e-4, atol=1e-4)
    merged.dwa.reset_parameters()
    assert not merged(IDX).logits.allclose(logits, rtol=1e-3)


def test_transformers_decays_and_forgets_alpha(tmp_path):
    load_file = pytest.importorskip("safetensors.torch").load_file
    model = hooked(gpt2()).eval()
    model.save_pretrained(tmp_path)
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path)
    assert not hasattr(loaded, "dwa")
    add_dwa(loaded, loaded.transformer.h)
    loaded.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert loaded(IDX).logits.equal(model(IDX).logits)
    pytest.importorskip("accelerate")
    options = transformers.TrainingArguments(tmp_path, weight_decay=0.1, use_cpu=True)
    optimizer = transformers.Trainer(model, options).create_optimizer()
    (group,) = [g for g in optimizer.param_groups if any(p is model.dwa.alpha for p in g["params"])]
    assert group["weight_decay"] == 0.1


class Own(GPT2LMHeadModel):
    """Has a DWA, and leaves it to from_pretrained."""

    def __init__(self, config):
        super().__init__(config)
        self.dwa = DWA(config.n_layer)
        self.post_init()


class Resets(Own):
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, DWA):
            module.reset_parameters()


def test_a_class_with_a_dwa_must_initialize_it(tmp_path):
    gpt2().save_pretrained(tmp_path)
    torch.use_deterministic_algorithms(True)  # fills uninitialized memory with nan
    try:
        assert Own.from_pretrained(tmp_path).dwa.alpha.isnan().all()
        assert Resets.from_pretrained(tmp_path).dwa.alpha.equal(torch.eye(L + 1))
    finally:
        torch.use_deterministic_algorithms(False)


def test_bfloat16():
    model = with_dwa().bfloat16()
    moved = train(model, 100)
    assert (moved.diagonal().sum(), moved.tril(-1).sum()) == (0, 55)
    model = with_dwa().bfloat16()
    model.dwa.float()
    assert train(model).sum() == 65
    model = gpt2().bfloat16()
    assert add_dwa(model, model.transformer.h).alpha.dtype == torch.float32


def test_prune():
    dwa = hooked(gpt2()).dwa
    read = torch.ones(L + 1, L + 1).tril().bool()
    read[0] = False
    scores = torch.where(read, dwa.alpha.abs(), torch.inf)
    for options, n in (({}, 0), ({"importance_scores": scores}, 30)):
        mask = prune.l1_unstructured(copy.deepcopy(dwa), "alpha", amount=30, **options).alpha_mask
        assert (mask[read] == 0).sum() == n


def test_trl(tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"?": 0, "a": 1, "b": 2, "c": 3}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="?", eos_token="?"
    )
    gpt2().save_pretrained(tmp_path)
    model = hooked(GPT2LMHeadModel.from_pretrained(tmp_path)).eval()
    data = datasets.Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}] * 8)
    config = trl.DPOConfig(tmp_path, max_steps=1, logging_steps=1, use_cpu=True, bf16=False)
    for reference, right in ((None, False), (copy.deepcopy(model), True)):
        trainer = trl.DPOTrainer(
            copy.deepcopy(model), reference, config, train_dataset=data, processing_class=tokenizer
        )
        trainer.train()
        loss = trainer.state.log_history[0]["loss"]
        assert (abs(loss - math.log(2)) < 1e-5) == right
