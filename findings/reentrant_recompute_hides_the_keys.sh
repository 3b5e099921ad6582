#!/usr/bin/env bash
# Versions: torch 2.13.0 (CPU), transformers 5.24.0, Python 3.11.
#
# The blocks of a GPT-2 and of a Llama are wrapped by torch's checkpoint_wrapper, as trainers that
# know only torch.nn.Module wrap them (transformers' own gradient_checkpointing_enable is not used).
# Each model runs once in training mode and once backward. use_cache keeps its default, True.
#
# Expected: checkpointing changes memory and time, not gradients; at worst an error.
# Seen: with CheckpointImpl.REENTRANT the loss is equal to the bit, there is no warning, and the
#   gradients of all weights of keys and values are 0; most others are off, by 8 to 68 percent. The
#   recomputation appends its keys and values to the cache, which the forward pass has filled
#   without gradients. For T queries under a causal mask, transformers' attention then keeps the
#   first T of the 2 T keys: the cached ones. With use_cache=False, or with
#   CheckpointImpl.NO_REENTRANT, all gradients are right.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --disable-pip-version-check torch==2.13.0 transformers==5.24.0

cat > "$work/check.py" <<'PY'
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    checkpoint_wrapper,
)
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

DROPOUT = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}


def gpt2():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=32, n_layer=3, n_head=2, **DROPOUT))
    return model, model.transformer.h


def llama():
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=3, num_attention_heads=2))
    return model, model.model.layers


def train(make, wrap=None, **options):
    """Returns the loss and the gradients, by name."""
    torch.manual_seed(0)
    model, blocks = make()
    for i in range(len(blocks) if wrap else 0):
        blocks[i] = checkpoint_wrapper(blocks[i], wrap)
    ids = torch.arange(32).view(2, 16)
    loss = model.train()(ids, labels=ids, **options).loss
    loss.backward()
    names = [name.replace("_checkpoint_wrapped_module.", "") for name, _ in model.named_parameters()]
    return loss.item(), {n: p.grad for n, p in zip(names, model.parameters())}


def keys_and_values(name, grad):
    """The part of a gradient that belongs to keys and values, or None."""
    if "c_attn" in name:  # GPT-2: query, key and value side by side
        return grad.chunk(3, dim=-1)[1:]
    return [grad] if "k_proj" in name or "v_proj" in name else None


for make in gpt2, llama:
    loss, right = train(make)
    for wrap in CheckpointImpl.REENTRANT, CheckpointImpl.NO_REENTRANT:
        for options in {}, {"use_cache": False}:
            same, grads = train(make, wrap, **options)
            parts = [keys_and_values(n, g) for n, g in grads.items()]
            zero = all(not g.any() for part in parts if part for g in part)
            off = {n: ((grads[n] - g).norm() / g.norm()).item() for n, g in right.items()}
            others = [e for (n, e), part in zip(off.items(), parts) if not part and 1e-5 < e < 0.99]
            print(
                f"{make.__name__}, {wrap.name}, {options or 'default cache'}: loss "
                f"{'equal' if same == loss else 'differs'}, gradients of keys and values "
                f"{'all 0' if zero else 'not 0'}, {len(others)} of the other gradients off"
                f"{f' by {min(others):.0%} to {max(others):.0%}' if others else ''}"
            )
            surprise = wrap is CheckpointImpl.REENTRANT and not options
            assert same == loss
            assert zero == surprise
            assert bool(others) == surprise and (surprise or max(off.values()) < 1e-5)
PY
"$work/venv/bin/python" "$work/check.py"
