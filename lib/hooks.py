"""
Make a DenseFormer of a pretrained model, without editing its source: forward hooks on its blocks.

    add_dwa(model, model.transformer.h)    # transformers' GPT-2
    add_dwa(model, model.model.layers)     # Llama, Mistral, Qwen, ...
    remove_dwa(model)                      # the plain model again

The outputs stay the same to the bit until training changes `model.dwa.alpha`. The hooks look
model.dwa up whenever they run, so whatever stands there acts: the DWA, a copy that peft trains, or
another DWA that you set.

- Compile after add_dwa: hooks added later are ignored without a word. torch.compile(model),
  block.compile() and accelerate's compile_regions take the hooks into their graphs, so the formula
  runs, with the same result. `block.forward = torch.compile(block.forward)` stays in place.
- transformers' gradient checkpointing works as always. Other checkpointing may wrap each block with
  use_reentrant=False, or in any way if it comes first and add_dwa gets the wrapped blocks.
- torch.fx needs a Tracer whose is_leaf_module is true for a DWA, nn.TransformerEncoder
  enable_nested_tensor=False. The model must not be an nn.Sequential, which calls model.dwa as its
  last layer, and several GPUs need a process each: nn.DataParallel's replicas lack the hooks.
- The hooks refer to the model, so its memory is freed by gc.collect(), not by `del model` alone.
"""

import threading
from collections.abc import Iterable

import torch
import torch.nn as nn
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from denseformer import DWA, Rows


class Calls(threading.local):
    """For each thread, {hooks: the pass of the call that is running, None before its block 1}.

    Not stored in the model, where threads would share it, and copies would find it.
    """

    def __init__(self):
        self.passes = {}


calls = Calls()


class Hooks:
    """The forward hooks of one model. Copies of the model get their own, which find their DWA."""

    def __init__(self, model: nn.Module, blocks: list[nn.Module]):
        self.model, self.blocks = model, blocks
        self.handles = [blocks[0].register_forward_pre_hook(self.begin, with_kwargs=True)]
        self.handles += [block.register_forward_hook(self.step, prepend=True) for block in blocks]
        # A call is a call of any module around the blocks: peft, for one, bypasses the outermost.
        for module in model.modules():
            if set(blocks) <= set(module.modules()) - {module}:
                self.handles.append(module.register_forward_pre_hook(self.enter))
                self.handles.append(module.register_forward_hook(self.leave, always_call=True))

    def enter(self, module, args):
        calls.passes[self] = None

    def begin(self, block, args, kwargs):
        """Begin a pass with X_0, the first argument of block 1, unless only this block runs again,
        in the backward pass of a checkpoint."""
        if self in calls.passes or not in_backward():
            calls.passes[self] = hide(self.model.dwa, (*args, *kwargs.values())[0])

    def step(self, block, args, output):
        """Replace X_i, the output of block i or the first of several, by Y_i."""
        i = self.blocks.index(block) + 1  # torch.compile would make a symbol of a stored number
        depth = calls.passes.get(self)
        if depth is None:
            if self in calls.passes or in_backward():
                raise RuntimeError(
                    f"block {i} of a model with a DWA ran again in a backward pass, or without "
                    f"block 1: checkpoint single blocks, with use_reentrant=False, or wrap the "
                    f"blocks first and give add_dwa the wrapped ones"
                )
            return output  # somebody calls a single block
        several = isinstance(output, tuple)
        y = hide(depth.step, i, output[0] if several else output)
        if i == len(self.blocks):  # free the X_j
            del calls.passes[self]
        return (y, *output[1:]) if several else y

    def leave(self, module, args, output):
        calls.passes.pop(self, None)  # after an exception too


def in_backward() -> bool:
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def hide(function, *args):
    """Call a function, hiding from a checkpoint around the block what autograd saves in it.

    A checkpoint runs a block again until it has seen all tensors that were saved in it. So it stops
    before the hooks, and they need not compute Y_i again.
    """
    if torch.compiler.is_compiling():  # checkpoints are then regions of the graph
        return function(*args)
    with saved_tensors_hooks(lambda x: (x, x._version), unpack):
        return function(*args)


def unpack(saved: tuple[Tensor, int]) -> Tensor:
    x, version = saved
    if x._version != version:  # autograd's own check, which saved_tensors_hooks switches off
        raise RuntimeError("alpha changed between the forward and the backward pass of a DWA")
    return x


def find_hooks(model: nn.Module) -> set[Hooks]:
    """Return the Hooks in a model, also if it was wrapped, or model.dwa was deleted, since."""
    hooks = (hook for m in model.modules() for hook in m._forward_pre_hooks.values())
    owners = (getattr(hook, "__self__", None) for hook in hooks)
    return {owner for owner in owners if isinstance(owner, Hooks)}


def add_dwa(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    pattern: str | Rows = "1x1",
    impl: str = "inplace",
) -> DWA:
    """Add a DWA after each of these blocks, which the model calls in order; return `model.dwa`.

    Block i takes Y_{i-1} as its first argument, and returns X_i or a tuple that begins with it.
    alpha is float32, on the device of block 1. Raises RuntimeError if the model has a DWA already.
    """
    blocks = list(blocks)
    if hasattr(model, "dwa") or find_hooks(model):
        raise RuntimeError(
            "the model has a DWA already; remove_dwa(model) removes what add_dwa added"
        )
    model.dwa = DWA(len(blocks), pattern, impl).to(next(blocks[0].parameters()).device)
    Hooks(model, blocks)
    return model.dwa


def remove_dwa(model: nn.Module):
    """Undo add_dwa."""
    for hooks in find_hooks(model):
        for handle in hooks.handles:
            handle.remove()
        calls.passes.pop(hooks, None)  # of a block 1 that somebody called alone
        if hasattr(hooks.model, "dwa"):
            del hooks.model.dwa
