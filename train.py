"""Train a DenseFormer.

python train.py                                      Tiny Shakespeare; a small model on a CPU
python train.py --resume                             continue a run that was stopped
python train.py --dataset my.txt --out_dir out-mine  your own text
python train.py --dwa none --out_dir out-plain       the plain Transformer, for comparison
python train.py --dwa 2x1 --out_dir out-2x1          another sparsity pattern
python train.py --init_from out/best.pt --dwa 2x1 --out_dir out-more    from trained weights
torchrun --standalone --nproc_per_node 8 train.py --preset paper-48     several GPUs
"""

import math
import os
import shlex
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

# DDP imports this too, but later. Its functions then have the process group as default arguments
# and keep its threads alive until the interpreter exits, which can abort the process.
import torch.distributed.nn
from filelock import FileLock, Timeout
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
from data.dataset import eval_offsets, stack_windows, sum_losses
from denseformer import DenseFormer, DenseFormerConfig
from lib.checkpoint import Log, checkpoint_errors, load_checkpoint, load_weights, save_checkpoint
from lib.device import find_device, find_dtype, peak_flops
from lib.figures import plot_losses, text_heat_map
from lib.files import UserError, say
from lib.flags import UsageError, flag, parse_flags, run_cli
from lib.optim import MicroBatchLoss, configure_optimizers, set_lr

# set by torchrun in each process; without it there is a single process, of rank 0
RANK = int(os.environ.get("RANK", 0))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1

# -----------------------------------------------------------------------------
# Settings. The defaults suit a CPU; a preset changes some, and flags override both.

# The paper's experiments: 400 sequences per step. As in nanoGPT, min_lr is a tenth of the peak.
PAPER = {
    "dataset": "openwebtext", "shards": 40, "n_layer": 48, "n_head": 12, "n_embd": 768,
    "block_size": 256, "max_iters": 40_000, "batch_size": 50, "gradient_accumulation_steps": 8,
    "optimizer": "adamw", "learning_rate": 1e-3, "min_lr": 1e-4, "warmup_iters": 2000,
    "weight_decay": 0.1, "eval_interval": 1000, "log_interval": 10,
}  # fmt: skip

PRESETS = {
    # with the defaults below, two minutes on two cores; bfloat16 would be slower at this width
    "cpu": {"dwa_lr_scale": 3.0, "dtype": "float32"},
    # nanoGPT's Shakespeare model, 10.7M parameters, as a DenseFormer. More dropout than nanoGPT's
    # 0.2 and Muon lower the best validation loss from 1.47 to 1.45.
    "gpu": {
        "n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "dropout": 0.3,
        "max_iters": 1500, "batch_size": 64, "learning_rate": 4e-3, "warmup_iters": 100,
        "weight_decay": 0.1, "beta2": 0.99, "eval_interval": 250,
    },
    "paper-48": PAPER,
    "paper-72": PAPER | {"n_layer": 72},
    # the same pipeline at a small scale
    "paper-small": PAPER | {
        "shards": 1, "n_layer": 6, "n_head": 4, "n_embd": 256, "max_iters": 1000, "batch_size": 32,
        "gradient_accumulation_steps": 1, "warmup_iters": 50, "eval_interval": 250,
    },
}  # fmt: skip

DATASET_HELP = """shakespeare, pydoc, openwebtext, or a path: a UTF-8 text file, a folder of .txt
 files, or a folder with nanoGPT's train.bin and val.bin (default: shakespeare, or pydoc if
 offline)"""
TOKENIZER_HELP = """tokenizer (default: gpt2 for openwebtext and .bin files; otherwise char for
 text of at most 256 different characters, byte for other text)"""
DWA_HELP = """depth-weighted averages: dilation x period such as 4x5; last4, the last 4 outputs and
 the embedding; connect-to-last; single rows such as 8:0,4,8; several joined by +; or none"""
INIT_FROM_HELP = """start from the weights of this checkpoint; the model shape must match, and
 dwa, block_size and the data default to its own"""
COMPILE_HELP = """compile the blocks and the loss and, on a single GPU with one micro-batch per
 step, record CUDA graphs, which fix what Python code decides (default: with CUDA and Triton)"""
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class TrainConfig:
    # input and output
    out_dir: str = flag("out", "folder for checkpoints, logs and the loss curve", path=True)
    dataset: str | None = flag(None, DATASET_HELP, path=True)
    tokenizer: str | None = flag(None, TOKENIZER_HELP, choices=("char", "byte", "gpt2"))
    shards: int = flag(1, "shards of openwebtext, up to 80, of 113 million tokens each", low=1)
    preset: str = flag("auto", "see below; auto picks cpu or gpu", choices=("auto", *PRESETS))
    resume: bool = flag(False, "continue the run in out_dir")
    init_from: str | None = flag(None, INIT_FROM_HELP, path=True)
    overwrite: bool = flag(False, "replace the run in out_dir")
    # model
    n_layer: int = flag(8, "number of blocks", low=1)
    n_head: int = flag(2, "attention heads per block", low=1)
    n_embd: int = flag(80, "channels", low=1)
    block_size: int = flag(128, "context length in tokens", low=1)
    dropout: float = flag(0.0, "dropout probability", low=0)
    bias: bool = flag(False, "use biases in linear layers and norms")
    dwa: str = flag("1x1", DWA_HELP)
    dwa_impl: str = flag("inplace", "same result; inplace is faster", choices=("inplace", "naive"))
    dwa_start_iter: int = flag(0, "keep the alphas frozen until this step", low=0)
    skip_gains: bool = flag(False, "learn a scale for each skip connection")
    # optimization
    max_iters: int = flag(800, "training steps", low=1)
    batch_size: int = flag(12, "micro-batch size: sequences per forward pass", low=1)
    gradient_accumulation_steps: int = flag(1, "micro-batches per step, over all GPUs", low=1)
    optimizer: str = flag("muon", "muon: for the blocks' matrices only", choices=("adamw", "muon"))
    learning_rate: float = flag(1.5e-2, "peak learning rate", low=0)
    dwa_lr_scale: float = flag(1.0, "multiplies the learning rate of the alphas", low=0)
    min_lr: float = flag(0.0, "learning rate at the end of its cosine decay", low=0)
    warmup_iters: int = flag(60, "steps of linear warm-up", low=0)
    weight_decay: float = flag(0.3, "applied to matrices and the embedding", low=0)
    beta1: float = flag(0.9, "AdamW's first beta", low=0, below=1)
    beta2: float = flag(0.95, "AdamW's second beta", low=0, below=1)
    grad_clip: float = flag(1.0, "clip the gradient to this norm; 0 disables clipping", low=0)
    # evaluation and logs
    eval_interval: int = flag(200, "steps between evaluations; each saves a checkpoint", low=1)
    eval_iters: int = flag(200, "evaluate on at most this many steps' worth of tokens", low=1)
    log_interval: int = flag(20, "steps between log lines", low=1)
    # system
    device: str = flag("auto", "cpu, cuda, cuda:1, mps...; auto prefers cuda, then mps")
    dtype: str = flag("auto", "auto: bfloat16 if the hardware supports it", choices=DTYPES)
    compile: bool | None = flag(None, COMPILE_HELP)
    seed: int = flag(1337, "random seed for weights, batches and dropout", low=0)

    GROUPS: ClassVar = {
        "out_dir": "input and output", "n_layer": "model", "max_iters": "optimization",
        "eval_interval": "evaluation and logs", "device": "system",
    }  # fmt: skip


# --resume cannot change these, nor the number of sequences per step.
FIXED = ["n_layer", "n_head", "n_embd", "block_size", "bias", "skip_gains", "dwa", "preset", "seed"]
FIXED += ["optimizer", "shards", "tokenizer", "dwa_start_iter", "init_from"]
# --init_from takes these from the checkpoint; flags may change DATA, but not SHAPE.
SHAPE = ["n_layer", "n_head", "n_embd", "bias", "skip_gains"]
DATA = ["dataset", "tokenizer", "shards"]


def describe_presets():
    """Return the presets as a table, for --help."""
    rows = [["preset", *PRESETS]]
    for name in (f.name for f in fields(TrainConfig)):
        if any(name in preset for preset in PRESETS.values()):
            rows.append([name, *(str(preset.get(name, "")) for preset in PRESETS.values())])
    lines = "\n".join(
        f"  {row[0]:29}{row[1]:9}" + "".join(f"{cell:13}" for cell in row[2:]) for row in rows
    )
    return f"presets (empty cells are the defaults above):\n{lines}"


def load_config(argv):
    """Return the settings, and the checkpoint of --resume or --init_from, or None.

    Flags override the checkpoint (of --resume or --init_from), which overrides the preset, which
    overrides the defaults. Raises UserError for settings that contradict each other, or
    do not suit the checkpoint or this machine.
    """
    overrides = parse_flags(TrainConfig, argv, __doc__, describe_presets())
    out_dir = Path(overrides.get("out_dir", TrainConfig.out_dir))
    if overrides.get("resume"):
        return resume_config(overrides, out_dir)
    runs = [name for name in ("last.pt", "best.pt") if (out_dir / name).exists()]
    if runs and not overrides.get("overwrite"):
        resume = "--resume to continue it, " if runs[0] == "last.pt" else ""
        raise UserError(
            f"{out_dir} already contains a run ({runs[0]}): use {resume}--overwrite to replace it, "
            f"or another --out_dir to keep it"
        )
    preset = overrides.get("preset", "auto")
    if preset == "auto":
        device = find_device(overrides.get("device", "auto"))
        preset = "cpu" if device.type == "cpu" else "gpu"
    inherited, checkpoint = {}, None
    if path := overrides.get("init_from"):
        checkpoint = load_checkpoint(Path(path))
        with checkpoint_errors(Path(path)):
            shape = asdict(DenseFormerConfig(**checkpoint["model_config"]))
            inherited = {name: checkpoint["train_config"][name] for name in DATA}
        inherited |= {name: shape[name] for name in (*SHAPE, "block_size", "dwa")}
        check_kept(overrides, {name: shape[name] for name in SHAPE}, path)
    config = TrainConfig(**(PRESETS[preset] | inherited | overrides | {"preset": preset}))
    check(config)
    return config, checkpoint


def resume_config(overrides, out_dir):
    """Return the settings and the checkpoint of the run in out_dir."""
    if overrides.get("overwrite"):
        raise UsageError("--resume and --overwrite contradict each other")
    checkpoint = load_checkpoint(out_dir / "last.pt")
    if "optimizers" not in checkpoint:
        raise UserError(
            f"{out_dir}/last.pt lacks the optimizers' state, as best.pt does: --init_from starts "
            f"from its weights"
        )
    with checkpoint_errors(out_dir / "last.pt"):
        base = asdict(TrainConfig(**checkpoint["train_config"]))
        sequences = base["batch_size"] * base["gradient_accumulation_steps"]
        step = int(checkpoint["step"])
    check_kept(overrides, {name: base[name] for name in FIXED}, f"the run in {out_dir}")
    config = TrainConfig(**(base | overrides))
    check(config)
    if step > config.max_iters:
        raise UsageError(f"--max_iters {config.max_iters}: {out_dir} is already at step {step}")
    if config.batch_size * config.gradient_accumulation_steps != sequences:
        raise UsageError(
            f"--batch_size x --gradient_accumulation_steps must stay at {sequences} sequences per "
            f"step, as in the run in {out_dir}"
        )
    return config, checkpoint


def check_kept(overrides, kept, owner):
    """Raise UsageError for a flag that would change a setting of `owner` that must be kept."""
    for name, value in kept.items():
        if overrides.get(name, value) != value:
            raise UsageError(f"--{name} {overrides[name]} contradicts {owner}, which has {value}")


def check(config):
    """Raise UsageError for settings that do not fit together; parse_flags checks each range."""
    if config.min_lr > config.learning_rate:
        raise UsageError(
            f"--min_lr {config.min_lr} (from a preset if you did not set it) is above "
            f"--learning_rate {config.learning_rate}"
        )
    try:
        DenseFormerConfig(**model_settings(config), vocab_size=1)
    except ValueError as error:
        raise UsageError(f"--{error}") from None
    if config.gradient_accumulation_steps % WORLD_SIZE:
        raise UsageError(
            f"--gradient_accumulation_steps {config.gradient_accumulation_steps} must be "
            f"divisible by the {WORLD_SIZE} processes that share it; lower --batch_size to keep "
            f"the number of tokens per step"
        )


def model_settings(config):
    """Return the fields of DenseFormerConfig that are flags."""
    names = [f.name for f in fields(DenseFormerConfig) if f.name != "vocab_size"]
    return {name: getattr(config, name) for name in names}


def resume_flags(out_dir):
    """Return the --out_dir flag that makes a script use this run, or "" for the default."""
    return "" if str(out_dir) == TrainConfig.out_dir else f" --out_dir {shlex.quote(str(out_dir))}"


# -----------------------------------------------------------------------------
# Parts of the run


def all_reduce(number, op=distributed.ReduceOp.SUM):
    """Return the sum, or another reduction, of a number over all processes."""
    if WORLD_SIZE == 1:
        return number
    result = torch.tensor(number, dtype=torch.float64)
    distributed.all_reduce(result, op)
    return result.item()


class StopSignals:
    """Between install() and restore(), SIGINT and SIGTERM only ask the loop to save and stop.

    A second signal ends the program at once, but is ignored within 3 seconds of the first: a
    scheduler may signal torchrun and its workers, and torchrun then signals the workers again.
    """

    def __init__(self):
        self.received, self.time, self.previous = 0, 0.0, {}

    def install(self):
        if threading.current_thread() is threading.main_thread():  # no other thread may do this
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, self.handle)

    def restore(self):
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}

    def handle(self, number, frame):
        if not self.received:
            self.received, self.time = int(number), time.monotonic()
        elif time.monotonic() - self.time > 3:
            sys.exit(128 + number)

    def any(self):
        """Return the number of a signal that any process has received, or 0."""
        return int(all_reduce(self.received, distributed.ReduceOp.MAX))


def load_dataset(config):
    """Return the data set and its fingerprint; store its name and its tokenizer in the config."""
    # One process downloads and tokenizes while the others wait for its lock.
    try:
        dataset = data.load(config.dataset, config.block_size, config.tokenizer, config.shards)
    except UserError as error:
        hint = "; if the data has moved, add --dataset" if config.resume else ""
        raise UserError(f"{error}{hint}") from None
    # --resume needs the name, since the default depends on whether the download works.
    config.dataset = config.dataset or dataset.name
    config.tokenizer = dataset.tokenizer.state()["kind"]
    fingerprint = dataset.fingerprint()  # reads up to 256 MB, so only once
    if WORLD_SIZE > 1:
        fingerprints = [None] * WORLD_SIZE
        distributed.all_gather_object(fingerprints, fingerprint)
        if len(set(fingerprints)) > 1:
            raise UserError(f"{dataset.name} differs between processes: {fingerprints}")
    return dataset, fingerprint


def get_batch(dataset, config, step, micro_batch, device):
    """Return one micro-batch of random windows, x and y, (B, T).

    They depend only on the seed, the step and the position in the step, so a run sees the same
    windows after a resume, on any number of GPUs, and with 8 x 1 or 4 x 2 sequences per step.
    """
    B, T = config.batch_size, config.block_size
    rng = np.random.default_rng((config.seed, step))
    offsets = rng.integers(len(dataset.train) - T, size=B * config.gradient_accumulation_steps)
    offsets = offsets[micro_batch * B : (micro_batch + 1) * B]
    return stack_windows(dataset.train, offsets, (B, T), dataset.tokenizer.vocab_size, device)


def evaluate(model, tokens, config, device, autocast, signals):
    """Return the mean loss over a split, or None if a signal interrupts it.

    Each token is predicted once. If the split has more windows than eval_iters steps would read,
    that many evenly spaced ones are used, the same every time.
    """
    B, T = config.batch_size, config.block_size
    limit = config.eval_iters * B * config.gradient_accumulation_steps
    offsets = eval_offsets(tokens, T, limit)

    def batches():
        for i in range(0, len(offsets), B * WORLD_SIZE):
            if signals.any():
                return
            mine = offsets[i + RANK * B : i + (RANK + 1) * B]
            yield stack_windows(tokens, mine, (B, T), model.config.vocab_size, device)

    model.eval()
    with autocast:
        loss_sum, count = sum_losses(model, batches())
    if signals.any():
        return None
    model.train()
    return all_reduce(loss_sum) / all_reduce(count)


def get_lr(step, config):
    """Return the learning rate: linear warm-up, then cosine decay to min_lr at the last step."""
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / config.warmup_iters
    decay = (step - config.warmup_iters) / (config.max_iters - config.warmup_iters)  # 0 to 1
    cosine = 0.5 * (1 + math.cos(math.pi * decay))
    return config.min_lr + cosine * (config.learning_rate - config.min_lr)


def check_finite(loss, parameters, step, out_dir):
    """Raise UserError if the loss or a parameter is not finite."""
    if not (math.isfinite(loss) and all(p.isfinite().all() for p in parameters)):
        raise UserError(
            f"training has diverged at step {step}: a loss or a weight is not finite. "
            f"{out_dir}/last.pt is still good; try a lower --learning_rate or more --warmup_iters"
        )


def describe_run(model, dataset, config, device, dtype):
    """Return a description of the run, in a few lines."""
    alphas = model.dwa.num_params()
    name = f"DenseFormer {config.dwa}" if alphas else "Transformer"
    accumulation, B, T = config.gradient_accumulation_steps, config.batch_size, config.block_size
    tokens = config.max_iters * accumulation * B * T
    return (
        f"{name}: {config.n_layer} blocks of {config.n_embd} channels, {model.num_params():,} "
        f"parameters{f', {alphas:,} of them alphas' if alphas else ''}\n"
        f"{dataset.name}: {len(dataset.train):,} tokens for training, {len(dataset.val):,} for "
        f"validation, vocabulary of {dataset.tokenizer.vocab_size:,}\n"
        f"{config.max_iters:,} steps of {accumulation * B * T:,} tokens ({accumulation} x {B} "
        f"sequences of {T}), {tokens / len(dataset.train):.1f} epochs\n"
        f"{model.flops_per_token() * tokens:.1e} FLOPs on {WORLD_SIZE} x {device}, {dtype}"
    )


def show_run(model, tokenizer, config, device):
    """Plot the losses, and print the learned alphas and a sample."""
    out_dir, dwa, rule = Path(config.out_dir), model.dwa, "-" * 80
    try:
        plot_losses(out_dir / "log.jsonl", out_dir / "loss.png")
        say(f"loss curve: {out_dir}/loss.png")
    except ImportError:
        say(f"to plot the loss curve: pip install matplotlib; python train.py --resume"
            f"{resume_flags(out_dir)}")  # fmt: skip
    except Exception as error:  # the sample matters more
        say(f"no loss curve: {error}")
    if dwa.num_params():
        say("\nlearned alphas: row Y_i holds the weights of the average that block i + 1 reads")
        say(text_heat_map(dwa.weights().detach().cpu(), dwa.mask.cpu(), max_rows=12))
    prompt = torch.tensor([tokenizer.start], device=device)
    generator = torch.Generator().manual_seed(config.seed)
    with torch.compiler.set_stance("force_eager"):  # compiling every new length would take long
        ids = model.generate(prompt, 300, temperature=0.8, generator=generator)
    text = tokenizer.decode(ids[0, prompt.size(1) :].tolist()).strip()
    say(f"\na sample:\n{rule}\n{text}\n{rule}\nfor more: python sample.py{resume_flags(out_dir)}")


# -----------------------------------------------------------------------------
# The run


def main(argv=None):
    """Train with the flags in argv or on the command line; return the exit status."""
    # 1. Settings
    if WORLD_SIZE > 1 and torch.cuda.device_count() > LOCAL_RANK:
        torch.cuda.set_device(LOCAL_RANK)  # before load_config tries the device
    config, checkpoint = load_config(argv)
    device, out_dir = find_device(config.device), Path(config.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    if WORLD_SIZE > 1:
        backend = "gloo"
        if device.type == "cuda" and distributed.is_nccl_available():
            backend = "cpu:gloo,cuda:nccl"
            device = find_device(f"cuda:{LOCAL_RANK}")
        # The timeout is long because the others wait while one process downloads.
        distributed.init_process_group(backend, timeout=timedelta(days=7))
    lock, signals, status = FileLock(out_dir / ".lock"), StopSignals(), None
    try:
        if RANK == 0:
            lock.acquire(timeout=0)
        status = train(config, checkpoint, device, signals)
        if WORLD_SIZE > 1:
            distributed.barrier()  # wait until rank 0 has saved
        return status
    except Timeout:
        raise UserError(
            f"another run is training in {out_dir}: wait for it, or use another --out_dir"
        ) from None
    finally:
        signals.restore()
        lock.release()
        # After an error, NCCL would wait here for other processes, which wait for this one.
        if WORLD_SIZE > 1 and (status is not None or device.type != "cuda"):
            distributed.destroy_process_group()


def train(config, checkpoint, device, signals):
    """Train, from the beginning or from the checkpoint of load_config; return the exit status."""
    out_dir = Path(config.out_dir)

    # 2. Data
    dataset, fingerprint = load_dataset(config)
    tokenizer = dataset.tokenizer

    # 3. Model and optimizers
    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision("high")  # TF32, where the GPU has it
    model_config = DenseFormerConfig(**model_settings(config), vocab_size=tokenizer.vocab_size)
    model = DenseFormer(model_config).to(device)
    optimizers = configure_optimizers(
        model, config.optimizer, config.learning_rate, config.weight_decay,
        (config.beta1, config.beta2), config.dwa_lr_scale,
    )  # fmt: skip
    dtype = find_dtype(config.dtype, device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    say(describe_run(model, dataset, config, device, dtype))

    # 4. Resume, or start from the weights of another run
    step, best_val_loss = 0, math.inf
    if config.resume:
        with checkpoint_errors(out_dir / "last.pt"):
            if checkpoint["fingerprint"] != fingerprint:
                raise UserError(f"{dataset.name} is not the data that {out_dir} was trained on")
            model.load_state_dict(checkpoint["model"])
            for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
                # keep weight decay and betas from the flags, not from the checkpoint
                groups = optimizer.state_dict()["param_groups"]
                optimizer.load_state_dict(state | {"param_groups": groups})
            if checkpoint["scaler"]:
                scaler.load_state_dict(checkpoint["scaler"])
            step, best_val_loss = int(checkpoint["step"]), float(checkpoint["best_val_loss"])
        end = "; it has ended, and a larger --max_iters trains on" * (step == config.max_iters)
        say(f"resuming from step {step}{end}")
    elif config.init_from:
        load_weights(checkpoint, Path(config.init_from), model, tokenizer)
    if checkpoint:
        checkpoint.clear()  # free its memory

    # 5. Compile, DDP, CUDA graphs
    has_triton = device.type == "cuda" and find_spec("triton") is not None  # not on Windows
    compiled = has_triton if config.compile is None else config.compile
    if compiled:
        model.compile()
    ddp_model = model
    if WORLD_SIZE > 1:
        # Some sparse patterns skip a whole block, whose gradients DDP would wait for.
        rows, used = model.dwa.rows, model.dwa.used
        unread = any(row and i not in used for i, row in enumerate(rows, start=1))
        ddp_model = DistributedDataParallel(
            model, gradient_as_bucket_view=True, find_unused_parameters=unread
        )
    micro_batch_loss = MicroBatchLoss(ddp_model, autocast)
    # The gradients of a graph lie in memory that its next replay overwrites, so that a second
    # micro-batch could not be added to them.
    single = WORLD_SIZE == config.gradient_accumulation_steps == 1
    if compiled and device.type == "cuda" and single:
        micro_batch_loss = micro_batch_loss.record((config.batch_size, config.block_size), device)

    # 6. The loop
    micro_batches = range(RANK, config.gradient_accumulation_steps, WORLD_SIZE)  # of this process
    tokens_per_step = config.gradient_accumulation_steps * config.batch_size * config.block_size
    snapshots = {config.max_iters * n // 16 for n in (1, 2, 4, 8, 16)}  # of the alphas
    log = Log(out_dir / "log.jsonl", step) if RANK == 0 and step > 0 else None
    bar = tqdm(total=config.max_iters, initial=step, unit="step", leave=False, disable=RANK or None)
    peak = peak_flops(device)
    start = time.perf_counter()
    timer, timed_from = start, step  # for tokens/s
    signals.install()  # until here, Ctrl-C ends the program at once
    model.train()
    while True:
        if step in snapshots and step >= config.dwa_start_iter and model.dwa.num_params() and log:
            alpha = model.dwa.weights().cpu().double().round(decimals=5).tolist()
            log.write(step=step, alpha=alpha)

        # evaluate and save; if a signal asks to stop, only save
        if signals.any() or step % config.eval_interval == 0 or step == config.max_iters:
            val_loss = evaluate(model, dataset.val, config, device, autocast, signals)
            check_finite(val_loss or 0.0, model.parameters(), step, out_dir)
            is_best = val_loss is not None and val_loss < best_val_loss
            best_val_loss = val_loss if is_best else best_val_loss
            if RANK == 0:
                best = {
                    "model": model.state_dict(),
                    "model_config": asdict(model_config),
                    "train_config": asdict(config),
                    "tokenizer": tokenizer.state(),
                    "fingerprint": fingerprint,
                    "step": step,
                    "best_val_loss": best_val_loss,
                }
                last = best | {  # what only --resume needs, twice the size of the model
                    "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                    "scaler": scaler.state_dict(),
                }
                # So far --overwrite has changed nothing; from here on the old run is replaced.
                if is_best or step == 0:
                    save_checkpoint(out_dir / "best.pt", best)
                save_checkpoint(out_dir / "last.pt", last)
                log = log or Log(out_dir / "log.jsonl", step)
            if val_loss is None:  # a signal has interrupted the evaluation
                command = f"python train.py --resume{resume_flags(out_dir)}"
                say(f"stopped at step {step} and saved; to continue: {command}")
                return 128 + signals.any()
            if log:
                log.write(step=step, val_loss=val_loss)
            say(f"step {step}: val loss {val_loss:.4f}")
            if step == config.max_iters:
                break
            timer, timed_from = time.perf_counter(), step  # do not count the evaluation

        # accumulate the gradients of the micro-batches
        loss_sum = torch.zeros((), device=device)
        for micro_batch in micro_batches:
            x, y = get_batch(dataset, config, step, micro_batch, device)
            if config.dropout:  # so that a resumed run draws the same masks
                torch.manual_seed(hash((config.seed, step, micro_batch)))
            if WORLD_SIZE > 1:  # average the gradients once, after the last micro-batch
                ddp_model.require_backward_grad_sync = micro_batch == micro_batches[-1]
            loss = micro_batch_loss(x, y) / len(micro_batches)
            scaler.scale(loss).backward()
            loss_sum += loss.detach()

        # clip and step
        lr = get_lr(step, config)
        set_lr(optimizers, lr)
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        if step < config.dwa_start_iter:
            model.dwa.alpha.grad = None  # still frozen
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
        # GradScaler.step would decide for each optimizer whether to skip a step that overflowed in
        # float16, but one norm clips the gradients of all, so all skip it or none does.
        if not scaler.is_enabled() or norm.isfinite():
            for optimizer in optimizers:
                optimizer.step()
        model.zero_grad(set_to_none=True)
        scaler.update()
        step += 1
        bar.update()

        # log
        if step % config.log_interval == 0:
            loss_mean = all_reduce(loss_sum.item()) / WORLD_SIZE  # .item() waits for the GPU
            check_finite(loss_mean, [], step, out_dir)
            seconds = max(time.perf_counter() - timer, 1e-9)
            speed = (step - timed_from) * tokens_per_step / seconds
            mfu = speed * model.flops_per_token() / (peak * WORLD_SIZE) if peak else None
            say(f"step {step}: loss {loss_mean:.4f}, lr {lr:.1e}, {speed:,.0f} tokens/s"
                f"{f', mfu {mfu:.1%}' if mfu else ''}")  # fmt: skip
            if log:
                log.write(step=step, loss=loss_mean, lr=lr, tokens_per_second=round(speed), mfu=mfu)
            timer, timed_from = time.perf_counter(), step

    # 7. The end
    signals.restore()
    bar.close()
    elapsed = time.perf_counter() - start
    say(f"\n{elapsed:.0f} seconds; val loss {val_loss:.4f}, best {best_val_loss:.4f}")
    if RANK == 0:
        show_run(model, tokenizer, config, device)
    return 0


if __name__ == "__main__":
    run_cli(main)
