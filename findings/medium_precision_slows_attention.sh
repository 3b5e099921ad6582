#!/usr/bin/env bash
# Versions: torch 2.13.0 (CPU, oneDNN 3.12), Python 3.11, on an AMD EPYC (Zen 5: AVX-512 and
#   avx512_bf16, no AMX), two threads.
#
# torch.set_float32_matmul_precision("medium") lets float32 products use bfloat16 inside, "if a fast
# algorithm is available". One process uses "high", one "medium"; each multiplies matrices of a small
# GPT and runs its attention, (12, 2, 128, 40), forward and backward.
#
# Expected: products are faster and less exact. Attention is not slower.
# Seen: products are about twice as fast and still exact to float32: "medium" sends them from MKL to
#   oneDNN, which has no bfloat16 algorithm for float32 inputs here and multiplies in float32, with
#   AVX-512. But attention takes 3 times as long: its CPU kernel multiplies many small blocks,
#   and each of them becomes a oneDNN call, too.
# On a CPU without AVX-512 both settings are the same, and this script fails.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --disable-pip-version-check torch==2.13.0 numpy==2.4.6

cat > "$work/measure.py" <<'PY'
import json
import sys
import time

import torch
from torch.nn.functional import linear, scaled_dot_product_attention

torch.manual_seed(0)
torch.set_num_threads(2)
torch.set_float32_matmul_precision(sys.argv[1])
a, w = torch.randn(1536, 320), torch.randn(80, 320)
q, k, v = (torch.randn(12, 2, 128, 40, requires_grad=True) for _ in range(3))


def milliseconds(function):
    times = []
    for _ in range(60):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return 1e3 * sorted(times[10:])[25]


def attention():
    scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()


exact = linear(a.double(), w.double())
error = ((linear(a, w) - exact).norm() / exact.norm()).item()
print(json.dumps([error, milliseconds(lambda: linear(a, w)), milliseconds(attention)]))
PY
for precision in high medium; do
    "$work/venv/bin/python" "$work/measure.py" "$precision" > "$work/$precision"
    echo "$precision: relative error, ms of a product, ms of attention: $(cat "$work/$precision")"
done
"$work/venv/bin/python" - "$work" <<'PY'
import json
import sys
from pathlib import Path

high, medium = (json.loads((Path(sys.argv[1]) / name).read_text()) for name in ("high", "medium"))
assert high[0] < 1e-6 and medium[0] < 1e-6  # bfloat16 would be wrong by 2e-3
assert medium[1] < 0.8 * high[1], "products are not faster"
assert medium[2] > 1.5 * high[2], "attention is not slower"
PY
