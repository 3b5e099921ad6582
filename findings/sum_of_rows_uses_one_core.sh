#!/usr/bin/env bash
# Versions: torch 2.13.0 (CPU, with MKL), Python 3.11; seen on an AMD EPYC (AVX2), two cores.
#
# The weighted sum of 13 rows of 524,288 numbers, 27 MB, in float32: bound by memory, and easily
# split between cores. How many cores each spelling keeps busy, of the two that torch may use:
#
# Expected: two, as for a sum over all rows or a product of two large matrices.
# Seen: one, for torch.mv, @, einsum and tensordot, which all become one matrix product with a
#   single row, and for the dot products of the rows with one vector. The same numbers cut into 16
#   slices, as a batch, keep both cores busy with torch.bmm, and it takes about half the time; of
#   the two ways to write the dots so, only the one with the vector on the left is fast.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --disable-pip-version-check torch==2.13.0 numpy==2.4.6

cat > "$work/check.py" <<'PY'
import os
import sys
import time

import torch

if len(os.sched_getaffinity(0)) < 2:
    sys.exit("this needs two cores")
torch.set_num_threads(2)
torch.manual_seed(0)
r, n, S = 13, 1 << 19, 16
X, a, g = torch.randn(r, n), torch.randn(r), torch.randn(n)
slices = X.view(r, S, n // S).transpose(0, 1)  # (S, r, n / S), the same memory
G = g.view(S, 1, n // S)

SUMS = {
    "torch.mv(X.T, a)": lambda: torch.mv(X.T, a),
    "a @ X": lambda: a @ X,
    "einsum": lambda: torch.einsum("r,rn->n", a, X),
    "tensordot": lambda: torch.tensordot(a, X, dims=1),
    "bmm over slices": lambda: torch.bmm(a.expand(S, 1, r), slices).view(n),
}
DOTS = {
    "torch.mv(X, g)": lambda: torch.mv(X, g),
    "bmm over slices": lambda: torch.bmm(G, slices.mT).sum(0)[0],
    "bmm, vector on the right": lambda: torch.bmm(slices, G.mT).sum(0)[:, 0],
}


def measure(f):
    """Return milliseconds per call and busy cores, both of the best of seven rounds."""
    times, busy = [], []
    for _ in range(7):
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(40):
            f()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        times.append(wall / 40 * 1000)
        busy.append(cpu / wall)
    return min(times), max(busy)


seen = {}
for title, calls in ("weighted sum of the rows", SUMS), ("dots of the rows", DOTS):
    print(title)
    expected = next(iter(calls.values()))()
    for name, f in calls.items():
        torch.testing.assert_close(f(), expected, rtol=1e-3, atol=1e-2)
        ms, cores = seen[title, name] = measure(f)
        print(f"  {name:26}{ms:6.2f} ms, {cores:.2f} cores busy")

one = [cores for (_, name), (_, cores) in seen.items() if not name.startswith("bmm")]
two = [cores for (_, name), (_, cores) in seen.items() if name == "bmm over slices"]
if max(one) > 1.4 or min(two) < 1.6:
    sys.exit("changed: all of these use one core, or two")
print("as described: one product with a single row uses one core")
PY
"$work/venv/bin/python" "$work/check.py"
