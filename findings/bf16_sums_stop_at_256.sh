#!/usr/bin/env bash
# Versions: torch 2.13.0 (CPU), Python 3.11.
#
# A model kept in bfloat16 is trained on the CPU, as a small GPT is: a token embedding, LayerNorm
# with a bias, Linear with a bias. 4096 positions hold the same token and each sends the gradient 1.
#
# Expected: every gradient that adds the 4096 positions is 4096. A sum of that length loses its
#   digits in bfloat16, so kernels add in float32 and round once; mm, sum, cumsum and the bias of
#   Linear do.
# Seen: the embedding's weight and LayerNorm's bias add in bfloat16, one position after another.
#   256 + 1 is 256 there, so they stop: 256 for the embedding and 256 per thread for the bias.
#   Of two spellings of one lookup, w[idx] stops as well and w.index_select(0, idx) does not.
#   With the token frequencies of text (Zipf, 65 tokens, 16384 positions) and gradients of both
#   signs the embedding's gradient is off by more than half of its length, index_select's by 0.2%.
# Autocast is not affected, since it leaves the weights and their gradients in float32.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --disable-pip-version-check torch==2.13.0 numpy==2.4.6

cat > "$work/check.py" <<'PY'
import torch
import torch.nn.functional as F

POSITIONS, WIDTH = 4096, 64
BF16 = torch.bfloat16
same = torch.zeros(POSITIONS, dtype=torch.long)
x = torch.randn(POSITIONS, WIDTH, dtype=BF16)
ones = torch.ones(WIDTH, dtype=BF16)


def total(f, shape):
    """Returns the first entry of the gradient of `f`, whose outputs all get the gradient 1."""
    w = torch.zeros(shape, dtype=BF16, requires_grad=True)
    y = f(w)
    y.backward(torch.ones_like(y))
    return int(w.grad.flatten()[0])


table = (3, WIDTH)
seen = {}
for threads in 1, 2:
    torch.set_num_threads(threads)
    seen[threads] = {
        "F.embedding": total(lambda w: F.embedding(same, w), table),
        "w[idx]": total(lambda w: w[same], table),
        "w.index_select": total(lambda w: w.index_select(0, same), table),
        "layer_norm bias": total(lambda b: F.layer_norm(x, (WIDTH,), ones, b), WIDTH),
        "linear bias": total(lambda b: F.linear(x, torch.eye(WIDTH, dtype=BF16), b), WIDTH),
    }
    print(f"{threads} thread(s): gradient of {POSITIONS} ones:", seen[threads])

torch.manual_seed(0)
text = torch.multinomial(1 / torch.arange(1.0, 66), 16384, replacement=True)
grad = (torch.randn(65, WIDTH)[text] + torch.randn(16384, WIDTH)).to(BF16)


def text_grad(lookup, dtype):
    w = torch.zeros(65, WIDTH, dtype=dtype, requires_grad=True)
    lookup(w).backward(grad.to(dtype))
    return w.grad.double()


exact = text_grad(lambda w: F.embedding(text, w), torch.float64)
error = {}
for name, lookup in {
    "F.embedding": lambda w: F.embedding(text, w),
    "w.index_select": lambda w: w.index_select(0, text),
}.items():
    error[name] = ((text_grad(lookup, BF16) - exact).norm() / exact.norm()).item()
    print(f"{name}: relative error of the gradient on Zipf tokens {error[name]:.4f}")

for threads in 1, 2:
    assert list(seen[threads].values()) == [256, 256, 4096, 256 * threads, 4096]
assert error["F.embedding"] > 0.5 and error["w.index_select"] < 0.01
PY
"$work/venv/bin/python" "$work/check.py"
