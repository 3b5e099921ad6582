"""Measure what depth-weighted averaging costs on this machine.

python -m lab.bench                          a deep model, with each kind of DWA and without any
python -m lab.bench --dwa_only               DWA alone, between blocks that do nothing; takes seconds
python -m lab.bench --n_layer 6 --rounds 9   another shape; --help lists the flags
python -m lab.bench --json lab/b.json    also write the numbers to a file

All variants share one set of weights and take turns in each round. Times are medians over the
rounds. Ratios are medians of the ratios to the plain Transformer in the same round, so a temporary
slowdown of the machine affects all variants alike. For shapes in GOALS, the last lines say which
goals were met; the exit status is 1 if any was missed.
"""

import copy
import json
import math
import os
import re
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from denseformer import DWA, DenseFormer, DenseFormerConfig
from lib.device import describe_machine, find_device
from lib.flags import UsageError, flag, parse_flags, run_cli
from lib.optim import MicroBatchLoss

COMPILE_MODEL_HELP = """also train the whole model under torch.compile, plain and with the formula;
 compiling 48 blocks takes minutes"""


@dataclass
class BenchConfig:
    patterns: str = flag("1x1,4x1,4x5", "DWA patterns to compare with the plain model")
    n_layer: int = flag(48, "blocks", low=1)
    n_embd: int = flag(384, "channels, a multiple of 64; 64 per head", low=64)
    batch_size: int = flag(4, "sequences per batch", low=1)
    block_size: int = flag(256, "tokens per sequence", low=64)
    vocab_size: int = flag(256, "vocabulary size", low=1)
    dtype: str = flag("float32", "dtype of activations", choices=("float32", "bfloat16"))
    compile: bool = flag(False, "compile blocks and loss; on a GPU, also record CUDA graphs")
    compile_model: bool = flag(False, COMPILE_MODEL_HELP)
    device: str = flag("auto", "cpu, cuda, cuda:1, mps...; auto prefers cuda, then mps")
    rounds: int = flag(5, "measurements of each variant", low=1)
    dwa_only: bool = flag(False, "measure DWA alone, without the model")
    decode: bool = flag(True, "also measure token-by-token generation")
    json: str | None = flag(None, "file to write the numbers to", path=True)


# Defaults on a GPU: the paper's model.
GPU = {"n_embd": 768, "batch_size": 64, "vocab_size": 50304, "dtype": "bfloat16", "compile": True}

# Goals by device, depth and width: the largest ratio to the plain Transformer, or the smallest
# speed-up of the in-place 1x1 over a baseline.
GOALS = {
    ("cpu", 48, 384): {
        "1x1 train": 1.03, "4x5 train": 1.01, "1x1 forward": 1.05, "tensordot": 8.0, "naive": 2.5,
    },
    ("cpu", 6, 384): {"1x1 decode": 1.05, "recompute": 5.0},
    ("cuda", 48, 768): {
        "1x1 train": 1.08, "4x5 train": 1.02, "1x1 forward": 1.12, "4x5 forward": 1.02,
        "compiled": 1.0,
    },
}  # fmt: skip


# -----------------------------------------------------------------------------
# The baseline


class TensordotDWA(DWA):
    """The obvious vectorized DWA, as in the authors' package.

    Keeps the outputs in a preallocated stack, computes Y_i as a tensordot of alpha with a slice of
    it, and leaves the gradients to autograd.
    """

    def forward(self, x):
        return TensordotPass(self.alpha.to(x.dtype), x)


class TensordotPass:
    def __init__(self, alpha, x):
        self.alpha, self.X = alpha, x.new_empty(len(alpha) + 1, *x.shape)
        self.seen = Append.apply(None, x, self.X, 0)

    def step(self, i, x):
        self.seen = Append.apply(self.seen, x, self.X, i)
        return torch.tensordot(self.alpha[i - 1, : i + 1], self.seen, dims=1)


class Append(torch.autograd.Function):
    """Append X_i to X_0..X_{i-1} without copying them."""

    @staticmethod
    def forward(ctx, seen, x, X, i):
        X[i] = x
        return X.data[: i + 1]  # .data: later appends do not count as modifications of this view

    @staticmethod
    def backward(ctx, G):
        return G[:-1] if len(G) > 1 else None, G[-1], None, None


def replace(model, **modules):
    """Return a model that shares all modules of this one but these."""
    twin = copy.copy(model)
    twin._modules = model._modules | modules
    return twin


BASELINES = ("1x1 naive", "1x1 tensordot")
COMPILED = ("plain", "1x1 naive")  # the rows of which --compile_model compiles the whole model


def make_dwas(config, device):
    """Return {row of the table: DWA}, "plain" first."""

    def make(pattern, impl="inplace", kind=DWA):
        dwa = kind(config.n_layer, pattern, impl)
        with torch.no_grad():
            dwa.alpha += dwa.mask * 0.01 * torch.randn(dwa.alpha.shape)
        return dwa.to(device)

    dwas = {"plain": make("none")}
    # a comma inside a row, as in 8:0,4,8, does not separate patterns
    patterns = re.split(r",(?!\d+(?![\dx:]))", config.patterns.replace(" ", ""))
    dwas |= {pattern: make(pattern) for pattern in patterns}
    return dwas | {
        "1x1 naive": make("1x1", "naive"),
        "1x1 tensordot": make("1x1", "naive", TensordotDWA),
    }


# -----------------------------------------------------------------------------
# Measuring


def clock(function, device):
    """Return the seconds that function() takes."""
    wait = (lambda: None) if device.type == "cpu" else torch.accelerator.synchronize
    wait()
    begin = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - begin


def measure(tasks, rounds, device, title):
    """Time each function in {name: function}; return {name: [seconds in each round]}."""
    for function in tasks.values():
        function()  # warm up
    times = {name: [] for name in tasks}
    for round in tqdm(range(rounds), title, leave=False, disable=None):
        # Alternate the order, so that no task always follows the same one.
        for name in list(tasks)[:: -1 if round % 2 else 1]:
            times[name].append(clock(tasks[name], device))
    return times


def peak_memory(function, device):
    """Return the peak memory of function() in bytes, beyond what was allocated before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    os.environ["KINETO_LOG_LEVEL"] = "6"  # else the profiler prints when it starts and stops
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


class Traffic(TorchDispatchMode):
    """Count the operations on tensors of at least N elements, and the bytes they read and write."""

    def __init__(self, N):
        super().__init__()
        self.N, self.bytes, self.operations = N, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        if not func.is_view and not name.startswith(
            ("empty", "new_empty", "_unsafe_view", "resize")
        ):
            reads = [a for arg in args for a in (arg if isinstance(arg, list | tuple) else [arg])]
            if name in ("copy_", "fill_", "zero_"):
                reads = reads[1:]
            moved = 0
            for tensor in (*reads, *(out if isinstance(out, list | tuple) else [out])):
                if isinstance(tensor, Tensor):
                    # an expanded tensor is stored once
                    shape = zip(tensor.shape, tensor.stride(), strict=True)
                    numbers = math.prod(size for size, stride in shape if stride)
                    moved += numbers * tensor.itemsize if numbers >= self.N else 0
            self.bytes += moved
            self.operations += moved > 0
        return out


def count_traffic(dwa, dtype):
    """Return how many activations a DWA moves on a CPU, and in how many operations, each as
    (forward, backward), counted with a small activation of `dtype`."""
    x = torch.randn(1, 64, 256).to(dtype).requires_grad_()
    cpu = type(dwa)(dwa.n_layer, dwa.pattern, dwa.impl)
    with Traffic(x.numel()) as forward:
        y = dwa_forward(cpu, x)
    with Traffic(x.numel()) as backward:
        y.backward(x.detach())
    both = (forward, backward)
    return [t.bytes / x.nbytes for t in both], [t.operations for t in both]


def dwa_forward(dwa, x):
    """Run the DWA alone: every block is the identity."""
    depth, y = dwa(x), x
    for i in range(1, dwa.n_layer + 1):
        y = depth.step(i, y)
    return y


def dwa_pass(dwa, x):
    """Run the forward and backward passes of the DWA alone."""
    dwa_forward(dwa, x).backward(x.detach())
    x.grad = dwa.alpha.grad = None


def bandwidth(device):
    """Return the bytes per second that a copy reads and writes."""
    source = torch.ones(1 << (30 if device.type == "cuda" else 26), device=device)
    target = torch.empty_like(source)
    times = measure({"copy": lambda: target.copy_(source)}, 9, device, "copy")
    return 2 * source.nbytes / min(times["copy"])


def matmul_peak(device, dtype):
    """Return the FLOPs per second of a large matrix product."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    times = measure({"matmul": lambda: a @ b}, 9, device, "matrix product")
    return 2 * n**3 / min(times["matmul"])


# -----------------------------------------------------------------------------
# The whole model


def make_tasks(model, uncompiled, dwas, config, device, numbers):
    """Return {column: {row: function}} for the columns train, forward, decode and recompute, and
    the number of tokens that each of the last two decodes, {column: number}."""
    dtype = getattr(torch, config.dtype)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    shape = (config.batch_size, config.block_size)
    idx, targets = torch.randint(config.vocab_size, (2, *shape), device=device)
    parameters = [*model.parameters(), *(dwa.alpha for dwa in dwas.values())]
    optimizer = torch.optim.AdamW(parameters, 1e-9, fused=True)
    new = config.block_size // 4  # decode the last quarter of the context

    def train(micro_batch_loss):
        micro_batch_loss(idx, targets).backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def forward(model):
        with autocast:
            model(idx)

    def eager():  # the shape changes with every token, so compiling would not pay off
        return torch.compiler.set_stance("force_eager")

    def decode(model):
        with autocast, eager():
            model.generate(idx[:1, :-new], new, temperature=0)

    @torch.no_grad()
    def recompute(model, tokens=8):
        with autocast, eager():
            for t in range(tokens):
                model(idx[:1, : config.block_size - tokens + t])

    models = {row: replace(model, dwa=dwa) for row, dwa in dwas.items()}
    tasks = {"train": {}, "forward": {row: partial(forward, m) for row, m in models.items()}}
    if config.decode:  # but not with the baselines, which are for training only
        decoders = {row: m for row, m in models.items() if row not in BASELINES}
        tasks["decode"] = {row: partial(decode, m) for row, m in decoders.items()}
        if "1x1" in models:
            tasks["recompute"] = {"1x1": partial(recompute, models["1x1"])}
    for row in COMPILED if config.compile_model else ():
        models[f"{row}, compiled"] = torch.compile(replace(uncompiled, dwa=dwas[row]))
    pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
    for row, m in models.items():
        loss = MicroBatchLoss(m, autocast)
        numbers[f"first step {row}"] = clock(partial(train, loss), device)
        numbers[f"memory train {row}"] = peak_memory(partial(train, loss), device)
        tasks["train"][row] = partial(train, loss)
    if config.compile and device.type == "cuda":
        for row, m in models.items():
            loss = MicroBatchLoss(m, autocast).record(shape, device, pool)
            tasks["train"][row] = partial(train, loss)
    return tasks, {"decode": new, "recompute": 8}


# -----------------------------------------------------------------------------
# Reports


def ratio(times, row, base="plain"):
    return statistics.median(a / b for a, b in zip(times[row], times[base], strict=True))


def cell(times, row):
    """Return "median time ± half the interquartile range | ratio to plain", in ms."""
    ms = [1000 * t for t in times[row]]
    low, _, high = statistics.quantiles(ms, n=4) if len(ms) > 1 else ms * 3
    return f"{statistics.median(ms):.1f} ± {(high - low) / 2:.1f} | {ratio(times, row):.3f}"


def main(argv=None):
    gpu = " ".join(f"--{name}={value}" for name, value in GPU.items())
    epilog = f"On a GPU the defaults are the paper's model: {gpu}"
    overrides = parse_flags(BenchConfig, argv, __doc__, epilog)
    device = find_device(overrides.get("device", BenchConfig.device))
    config = BenchConfig(**((GPU if device.type == "cuda" else {}) | overrides))
    if config.n_embd % 64:
        raise UsageError(f"--n_embd must be a multiple of 64, not {config.n_embd}")
    if config.compile_model:  # measure the seconds of a first compilation
        os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
    torch.manual_seed(0)
    try:
        dwas = make_dwas(config, device)
    except ValueError as error:
        raise UsageError(f"--patterns: {error}") from None
    torch.set_float32_matmul_precision("high")
    dtype = getattr(torch, config.dtype)
    report = {
        "machine": describe_machine(device),
        "config": asdict(config),
        "times": {},
        "numbers": {},
    }
    numbers = report["numbers"]
    # Freeing a 31 MiB block raises glibc's mmap threshold, so that later large blocks are reused.
    torch.empty(31 << 20, dtype=torch.uint8)
    print(
        f"python -m lab.bench {' '.join(argv or sys.argv[1:])}\n{report['machine']}\n"
        f"{config.n_layer} blocks, activations of ({config.batch_size}, {config.block_size}, "
        f"{config.n_embd}) in {config.dtype}, {config.rounds} rounds\n"
    )

    # DWA alone
    x = torch.randn(config.batch_size, config.block_size, config.n_embd, device=device)
    x = x.to(dtype).requires_grad_()
    tasks = {row: partial(dwa_pass, dwa, x) for row, dwa in dwas.items() if row != "plain"}
    times = report["times"]["dwa"] = measure(tasks, config.rounds, device, "DWA alone")
    copy = numbers["copy_bandwidth"] = bandwidth(device)
    print(
        "| DWA alone | forward + backward, ms | x naive | activations moved, on a CPU "
        "| operations per block, forward + backward |\n"
        "|---|---|---|---|---|"
    )
    for row in tasks:
        moved, operations = count_traffic(dwas[row], dtype)
        numbers[f"moved {row}"], numbers[f"operations {row}"] = moved, operations
        milliseconds = 1000 * statistics.median(times[row])
        against = ratio(times, row, "1x1 naive")
        forward, backward = (n / config.n_layer for n in operations)
        print(
            f"| {row} | {milliseconds:.1f} | {against:.3f} | {sum(moved):,.0f} "
            f"| {forward:.1f} + {backward:.1f} |"
        )
    print(
        f"a copy of an activation takes {2000 * x.nbytes / copy:.2f} ms, "
        f"at {copy / 1e9:,.0f} GB/s\n"
    )
    reached = {}
    if "1x1" in dwas:
        for other in ("naive", "tensordot"):
            reached[other] = ratio(times, f"1x1 {other}", "1x1")

    if not config.dwa_only:
        reached |= bench_model(config, device, dwas, report)
    missed = print_goals(GOALS.get((device.type, config.n_layer, config.n_embd), {}), reached)
    if config.json:
        report["reached"] = reached
        Path(config.json).write_text(json.dumps(report, indent=1) + "\n")
    return int(missed > 0)


def bench_model(config, device, dwas, report):
    """Print the table of the whole model; return {name in GOALS: value}."""
    times, numbers, reached = report["times"], report["numbers"], {}
    names = ("vocab_size", "block_size", "n_layer", "n_embd")
    shape = {name: getattr(config, name) for name in names} | {"n_head": config.n_embd // 64}
    model = DenseFormer(DenseFormerConfig(**shape, dwa="none")).to(device)
    blocks = torch.nn.ModuleList(copy.copy(block) for block in model.blocks)
    uncompiled = replace(model, blocks=blocks, loss=copy.copy(model.loss))
    if config.compile:
        model.compile()
    tasks, tokens = make_tasks(model, uncompiled, dwas, config, device, numbers)
    for column in tasks:
        times[column] = measure(tasks[column], config.rounds, device, column)
    for row, task in tasks["forward"].items():
        numbers[f"memory forward {row}"] = peak_memory(task, device)

    print(
        "| whole model | training step, ms | x plain | forward, ms | x plain | decoding, tokens/s "
        "| time, x plain | memory of a step, MB | over plain, activations | of a forward, MB |\n"
        "|---|---|---|---|---|---|---|---|---|---|"
    )
    activation = config.batch_size * config.block_size * config.n_embd
    activation *= getattr(torch, config.dtype).itemsize
    for row in times["train"]:
        decode = forward = "| "
        if row in times.get("decode", {}):
            speed = tokens["decode"] / statistics.median(times["decode"][row])
            decode = f"{speed:.1f} | {ratio(times['decode'], row):.3f}"
        memory = numbers[f"memory train {row}"]
        more = (memory - numbers["memory train plain"]) / activation
        last = ""
        if row in times["forward"]:  # not measured under torch.compile
            forward = cell(times["forward"], row)
            last = f"{numbers[f'memory forward {row}'] / 1e6:,.0f}"
        print(
            f"| {row} | {cell(times['train'], row)} | {forward} | {decode} "
            f"| {memory / 1e6:,.0f} | {more:.1f} | {last} |"
        )
        for column in ("train", "forward", "decode"):
            if row in times.get(column, {}):
                reached[f"{row} {column}"] = ratio(times[column], row)

    flops = model.flops_per_token() * config.batch_size * config.block_size
    flops /= statistics.median(times["train"]["plain"])
    peak = numbers["matmul_peak"] = matmul_peak(device, getattr(torch, config.dtype))
    numbers["model_flops"] = flops
    print(
        f"plain training: {flops / 1e12:.2f} TFLOP/s, {flops / peak:.0%} of the "
        f"{peak / 1e12:.2f} TFLOP/s of a large matrix product"
    )
    if config.compile_model:
        for row in COMPILED:
            seconds = numbers[f"first step {row}, compiled"]
            print(f"torch.compile of the whole model, {row}: {seconds:.0f} s for a training step")
        if "1x1" in dwas:
            reached["compiled"] = ratio(times["train"], "1x1 naive, compiled", "1x1")
    if "recompute" in times:
        each = statistics.median(times["recompute"]["1x1"]) / tokens["recompute"]
        reached["recompute"] = each / statistics.median(times["decode"]["1x1"]) * tokens["decode"]
        print(
            f"decoding without a cache: {1 / each:.1f} tokens/s with 1x1; the cache makes it "
            f"{reached['recompute']:.1f} times as fast"
        )
    print()
    return reached


def print_goals(goals, reached):
    """Print a line for each goal that this run measured; return how many were missed."""
    missed = 0
    for name in [name for name in goals if name in reached]:
        goal, value = goals[name], reached[name]
        if name in ("naive", "tensordot", "compiled", "recompute"):
            met, text = value >= goal, f"1x1 at least {goal:.1f}x as fast as {name}"
        else:
            met, text = value <= goal, f"{name} at most {goal:.2f}x plain"
        missed += not met
        print(f"{'met   ' if met else 'MISSED'} {value:6.3f}  {text}")
    return missed


if __name__ == "__main__":
    run_cli(main)
