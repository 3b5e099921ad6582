#!/usr/bin/env bash
# Versions: torch 2.13.0 (CPU), Python 3.11.
#
# A block of a transformer, x + mlp(x), runs under torch.utils.checkpoint (not reentrant, as is
# recommended). Hooks on its modules keep a stack of names, as timers, memory profilers and module
# tracers do: the forward pre-hook pushes, the forward hook pops.
#
# Expected: the backward pass runs the block again, so each hook runs twice and the stack is empty
#   after the step, as it is without checkpointing.
# Seen: the second run ends as soon as the last tensor that the backward pass needs has been saved,
#   by an exception inside the last layer. The hooks of every module that is open at that point
#   have begun and never end: three names stay on the stack after each step (block, mlp, layer),
#   and a module's hooks count 2 calls or 1, depending on what comes after it. With always_call=True
#   the hook does run, and gets None for the output. With use_reentrant=True, or within
#   set_checkpoint_early_stop(False), begin and end match.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --disable-pip-version-check torch==2.13.0 numpy==2.4.6

cat > "$work/check.py" <<'PY'
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))

    def forward(self, x):
        return x + self.mlp(x)


def step(reentrant, early_stop=True, always_call=False):
    """Runs one step; returns the names left on the stack, calls ended per name, None outputs."""
    block, stack, ended, empty = Block(), [], {}, []
    for name, module in block.named_modules():
        name = name or "block"

        def push(module, args, name=name):
            stack.append(name)

        def pop(module, args, output, name=name):
            ended[name] = ended.get(name, 0) + 1
            empty.extend([name] if output is None else [])
            if name in stack:
                stack.remove(name)

        module.register_forward_pre_hook(push)
        module.register_forward_hook(pop, always_call=always_call)
    x = torch.randn(4, 8, requires_grad=True)
    with set_checkpoint_early_stop(early_stop):
        y = block(x) if reentrant is None else checkpoint(block, x, use_reentrant=reentrant)
        y.sum().backward()
    return stack, ended, empty


twice = {name: 2 for name in ("mlp.0", "mlp.1", "mlp.2", "mlp", "block")}
once = {name: 1 for name in twice}
open_at_end = ["block", "mlp", "mlp.2"]
for title, arguments, wanted in (
    ("no checkpoint", (None,), ([], once, [])),
    ("reentrant", (True,), ([], twice, [])),
    ("not reentrant, no early stop", (False, False), ([], twice, [])),
    ("not reentrant", (False,), (open_at_end, once | {"mlp.0": 2, "mlp.1": 2}, [])),
    ("not reentrant, always_call", (False, True, True), ([], twice, open_at_end[::-1])),
):
    left, ended, empty = seen = step(*arguments)
    print(f"{title}: left on the stack {left}, calls ended {ended}, output None {empty}")
    assert seen == wanted
PY
"$work/venv/bin/python" "$work/check.py"
