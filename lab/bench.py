"""Measure what depth-weighted averages cost on this machine.

python -m lab.bench                                            the model of python train.py
python -m lab.bench --n_layer 48 --n_head 6 --n_embd 384 --batch_size 4 --block_size 256
python -m lab.bench --rows "learned positions, plain, 1x1"     other rows
python -m lab.bench --rows "plain, 1x1, hyper-connections, attn-res"
python -m lab.bench --rows "gpt2, plain, 1x1"

A row is one of
    plain                       the model without DWA
    1x1, 4x5 ...                a DWA pattern, as train.py computes it; with a word behind it:
    1x1 naive                   the formula, with autograd
    1x1 inplace, 1x1 tiled      the DWA of denseformer.py, and of lib/tiled.py
    1x1 tensordot               the vectorized formula of the authors' package
    learned positions           plain without rotary positions: the operations of nanoGPT
    gpt2                        GPT-2 of the package transformers; decoding only
    1x1 compiled                the formula, with torch.compile of the whole model; training only
    skip-gains, attn-res ...    a model of lab/variants.py, but for diagonal-K

All rows take turns in each round. Times are medians over the rounds, ± half the interquartile
range. Ratios are medians of the ratios to the first row in the same round, so a temporary slowdown
of the machine affects all rows alike. A training step is one of AdamW. Decoding is of the last
quarter of the context, after a prompt of the rest. "DWA alone" is forward and backward between
blocks that do nothing, and "moved" how many activations it reads and writes on a CPU. Memory is the
peak of a training step.
"""

import copy
import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from denseformer import DWA, DenseFormer, DenseFormerConfig
from lab.variants import MODELS, load_package
from lib.device import describe_machine, find_device, keep_freed_memory
from lib.files import open_new, progress_bar
from lib.flags import UsageError, flag, parse_flags, path, run_cli
from lib.graphs import MicroBatchLoss, record, speed_up_decoding
from lib.tiled import make_dwa

Results = dict[str, dict[str, list[float]]]  # {column: {row: values}}

ROWS = "plain, 1x1 naive, 1x1 inplace, 1x1 tiled, 1x1 tensordot"


@dataclass
class BenchConfig:
    rows: str = flag(ROWS, "rows, separated by commas; the first is the base of the ratios")
    n_layer: int = flag(8, "blocks", low=1)
    n_head: int = flag(2, "attention heads per block", low=1)
    n_embd: int = flag(80, "channels", low=1)
    batch_size: int = flag(12, "sequences per batch", low=1)
    block_size: int = flag(128, "tokens per sequence", low=4)
    vocab_size: int = flag(65, "vocabulary size", low=1)
    dtype: str = flag("float32", "dtype of activations", choices=("float32", "bfloat16"))
    compile: bool = flag(False, "compile blocks and loss; on a GPU, record CUDA graphs")
    device: str = flag("auto", "cpu, cuda, cuda:1, mps...; auto prefers cuda, then mps")
    rounds: int = flag(15, "measurements of each row", low=1)
    json: str | None = flag(None, "file to write all times to", read=path)


# -----------------------------------------------------------------------------
# The rows


class TensordotDWA(DWA):
    """The vectorized DWA of the authors' package: the outputs are kept in a stack, Y_i is a
    tensordot of alpha with a slice of it, and autograd computes the gradients."""

    def forward(self, x):
        return TensordotPass(self.alpha.to(x.dtype), x)


class TensordotPass:
    def __init__(self, alpha, x):
        self.alpha, self.X = alpha, x.new_empty(len(alpha), *x.shape)
        self.seen = Append.apply(None, x, self.X, 0)

    def step(self, i, x):
        self.seen = Append.apply(self.seen, x, self.X, i)
        return torch.tensordot(self.alpha[i, : i + 1], self.seen, dims=1)


class Append(torch.autograd.Function):
    """Append X_i to X_0..X_{i-1} without copying them."""

    @staticmethod
    def forward(ctx, seen, x, X, i):
        X[i] = x
        return X.data[: i + 1]  # .data: later appends do not count as modifications of this view

    @staticmethod
    def backward(ctx, G):
        return G[:-1] if len(G) > 1 else None, G[-1], None, None


class LearnedPositions(DenseFormer):
    """The operations of nanoGPT; for training only."""

    def __init__(self, config: DenseFormerConfig):
        super().__init__(config)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop.register_forward_pre_hook(lambda module, args: (args[0] + self.wpe.weight,))
        for block in self.blocks:
            block.attn.forward = partial(attention, block.attn)  # type: ignore[union-attr]


def attention(self: Any, x: Tensor, *args) -> Tensor:
    """CausalSelfAttention.forward without rotary positions, as in nanoGPT."""
    B, T, C = x.shape
    q, k, v = self.c_attn(x).split(C, dim=2)
    q, k, v = (z.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for z in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))


def make_gpt2(c: BenchConfig) -> Any:
    package = load_package("transformers")
    config = package.GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.block_size, n_layer=c.n_layer, n_head=c.n_head,
        n_embd=c.n_embd, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return package.GPT2LMHeadModel(config)


def make_model(row: str, c: BenchConfig, device: torch.device) -> Any:
    """Return the model of a row. Raises UsageError, which names the row, if there is none."""
    if row == "gpt2":
        return make_gpt2(c).to(device).eval()
    classes = MODELS | {"learned positions": LearnedPositions}
    name, _, impl = (row, "", "") if row in classes else row.partition(" ")
    pattern = "none" if name in classes else name
    try:
        config = DenseFormerConfig(
            c.vocab_size, c.block_size, c.n_layer, c.n_head, c.n_embd, dwa=pattern
        )
        model = classes.get(name, DenseFormer)(config)
        if impl == "tensordot":
            model.dwa = TensordotDWA(c.n_layer, pattern)
        elif impl != "compiled":
            model.dwa = make_dwa(model.dwa, impl or "auto", device)
    except ValueError as error:
        raise UsageError(f"row {row!r}: {error}") from None
    model.to(device).eval()
    if impl == "compiled":
        return torch.compile(model)
    if c.compile:
        model.compile()
    return model


# -----------------------------------------------------------------------------
# Measuring


def measure(column: str, tasks: dict[str, Callable], rounds: int, device: torch.device) -> dict:
    """Return {row: milliseconds in each round} for the functions in {row: function}."""
    wait = (lambda: None) if device.type == "cpu" else torch.accelerator.synchronize
    times: dict[str, list[float]] = {row: [] for row in tasks}
    with progress_bar(column, rounds + 1, "round") as bar:
        for n in range(rounds + 1):
            # Alternate the order, so that no task always follows the same one.
            for row in list(tasks)[:: -1 if n % 2 else 1]:
                wait()
                begin = time.perf_counter()
                tasks[row]()
                wait()
                times[row].append(1000 * (time.perf_counter() - begin))
            bar.update()
    return {row: t[1:] for row, t in times.items()}  # the first round warms up


def peak_memory(function: Callable, device: torch.device) -> int:
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
    """Count the numbers that operations read and write, in tensors of at least N of them."""

    N, moved = 64 * 256, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        free = ("empty", "new_empty", "_unsafe_view", "resize")
        if not func.is_view and not name.startswith(free):
            reads = args[1:] if name in ("copy_", "fill_", "zero_", "new_zeros") else args
            for tensor in tree_leaves((reads, out)):
                if isinstance(tensor, Tensor) and tensor.numel() >= self.N:
                    self.moved += tensor.numel()
        return out


def run_dwa(dwa: DWA, x: Tensor):
    """Run the forward and backward passes of a DWA between blocks that do nothing."""
    depth, y = dwa(x), x
    for i in range(1, dwa.n_layer + 1):
        y = depth.step(i, y)
    y.backward(x.detach())
    x.grad = dwa.alpha.grad = None


def count_moved(dwa: DWA) -> float:
    """Return how many activations a DWA reads and writes on a CPU, forward and backward."""
    dwa, x = copy.deepcopy(dwa).cpu(), torch.randn(1, 64, 256, requires_grad=True)
    with Traffic() as traffic:
        run_dwa(dwa, x)
    return traffic.moved / traffic.N


def bench(c: BenchConfig, device: torch.device) -> Results:
    """Return all columns. A time has a number for each round, the others have one."""
    models = {row.strip(): make_model(row.strip(), c, device) for row in c.rows.split(",")}
    dtype = getattr(torch, c.dtype)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    idx, targets = torch.randint(c.vocab_size, (2, c.batch_size, c.block_size), device=device)
    x = torch.randn(*idx.shape, c.n_embd, device=device, dtype=dtype, requires_grad=True)
    new = c.block_size // 4  # decode the last quarter of the context

    def train(loss, optimizer):
        loss(idx, targets).backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def forward(model):
        with autocast:
            model(idx)

    def decode(generate, **options):
        # the length changes with every token, so compiling would not pay off
        with autocast, torch.compiler.set_stance("force_eager"):
            generate(idx[:1, :-new], max_new_tokens=new, **options)

    names = ("training step, ms", "forward, ms", f"decoding {new} tokens, ms", "DWA alone, ms")
    tasks: dict[str, dict[str, Callable]] = {name: {} for name in names}
    training, forwards, decoding, alone = tasks.values()
    moved, memory = {}, {}
    for row, model in models.items():
        if row == "gpt2":
            decoding[row] = partial(decode, model.generate, do_sample=False)
            continue
        optimizer = torch.optim.AdamW(model.parameters(), 1e-9, fused=True)
        loss: Callable = MicroBatchLoss(model, autocast)
        train(loss, optimizer)  # creates the optimizer's state
        memory[row] = [peak_memory(partial(train, loss, optimizer), device) / 1e6]
        if c.compile and device.type == "cuda" and "compiled" not in row:
            loss = record(loss, idx, targets)
        training[row] = partial(train, loss, optimizer)
        if "compiled" in row:
            continue  # of a whole model, compile no more than its training step
        forwards[row] = partial(forward, model)
        if row != "learned positions":
            decoder = copy.deepcopy(model)
            speed_up_decoding(decoder)
            if " " in row:
                decoder.dwa = model.dwa  # the implementation that the row names
            decoding[row] = partial(decode, decoder.generate, temperature=0)
        if model.dwa.num_params():
            alone[row] = partial(run_dwa, model.dwa, x)
            moved[row] = [count_moved(model.dwa)]
    results = {
        column: measure(column, of_row, c.rounds, device) for column, of_row in tasks.items()
    }
    return results | {"activations moved": moved, "memory of a training step, MB": memory}


# -----------------------------------------------------------------------------
# The table


def cell(values: list[float], base: list[float]) -> str:
    """Return "median ± half the interquartile range | ratio to the first row"."""
    middle, spread = statistics.median(values), ""
    if len(values) >= 4:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        spread = f" ± {(high - low) / 2:.2g}"
    ratio = statistics.median(a / b for a, b in zip(values, base, strict=True))
    return f"{middle:{'.3g' if middle < 1000 else ',.0f'}}{spread} | {ratio:.3f}"


def table(results: Results) -> str:
    """Return the columns that have an entry, in markdown."""
    results = {column: of_row for column, of_row in results.items() if of_row}
    head, lines = "| |", {row: f"| {row} |" for of_row in results.values() for row in of_row}
    for column, of_row in results.items():
        base = next(iter(of_row))
        head += f" {column} | x {base} |"
        for row in lines:
            lines[row] += f" {cell(of_row[row], of_row[base]) if row in of_row else '|'} |"
    return "\n".join([head, "|---" * (1 + 2 * len(results)) + "|", *lines.values()])


def main(argv=None):
    config = BenchConfig(**parse_flags(BenchConfig, argv, __doc__))
    device = find_device(config.device)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    keep_freed_memory()
    report = {"machine": describe_machine(device), "config": asdict(config)}
    # opened first: that it cannot be written is better known before measuring than after
    with open_new(Path(config.json)) if config.json else nullcontext() as file:
        results = bench(config, device)
        if file:
            file.write((json.dumps(report | results, indent=1) + "\n").encode())
    print(f"python -m lab.bench {shlex.join(sys.argv[1:] if argv is None else argv)}")
    print(f"{report['machine']}, {config.rounds} rounds\n\n{table(results)}")


if __name__ == "__main__":
    run_cli(main)
