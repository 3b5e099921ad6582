#!/usr/bin/env bash
# Versions: torch 2.13.0 (CPU), Python 3.11, Linux with glibc.
#
# An MLP of 12 Linear layers is trained on the CPU, step after step with tensors of the same sizes, 1
# to 4 MiB. The page faults of a step are counted in two fresh processes. They differ in one line: the
# second first allocates a block of 31 MiB and frees it untouched.
#
# Expected: the same number in both, and next to none after the first steps, since each step needs
#   just the memory that the last one has freed.
# Seen: without that line, every step returns much of its memory to the system and takes thousands
#   of page faults to get it back, zeroed: here 3,452, 5% of the time. With it, next to none.
#   torch takes its memory from malloc, and by default glibc's keeps 128 KiB at the top of the heap.
#   It raises this limit to twice the largest block that was ever mapped and freed, up to 64 MiB, so
#   that it depends on what the program happened to free before.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --disable-pip-version-check torch==2.13.0 numpy==2.4.6

cat > "$work/steps.py" <<'PY'
import resource
import sys
import time

import torch
from torch import nn

if sys.argv[1] == "free":
    torch.empty(31 << 20, dtype=torch.uint8)

layers = (nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256)) for _ in range(6))
model = nn.Sequential(*layers)
optimizer = torch.optim.SGD(model.parameters(), 1e-3)
x = torch.randn(1024, 256)


def steps(n):
    for _ in range(n):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


steps(5)
before, begin = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
steps(20)
after, end = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
faults = (after.ru_minflt - before.ru_minflt) // 20
system = (after.ru_stime - before.ru_stime) / 20
print(f"{faults} faults a step, {1e3 * system:.1f} of {1e3 * (end - begin) / 20:.1f} ms in the kernel")
sys.exit(not (faults > 1000 if sys.argv[1] == "plain" else faults < 100))
PY
for start in plain free; do
    echo -n "$start: "
    "$work/venv/bin/python" "$work/steps.py" "$start"
done
