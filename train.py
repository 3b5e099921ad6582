"""Train a DenseFormer.

python train.py                                      Tiny Shakespeare; a small model on a CPU
python train.py --resume                             continue a run that was stopped
python train.py --dataset my.txt --out_dir out-mine  your own text
python train.py --dwa none --out_dir out-plain       the plain Transformer, for comparison
python train.py --dwa 2x1 --out_dir out-2x1          another sparsity pattern
python train.py --init_from out/best.pt --dwa 2x1 --out_dir out-more    from trained weights
torchrun --standalone --nproc_per_node 8 train.py --preset paper-48     several GPUs

--dataset is shakespeare, pydoc or openwebtext, or the path of a UTF-8 text file, a folder of .txt
or .parquet files, or a folder with nanoGPT's train.bin and val.bin. The default is shakespeare, or
pydoc if it cannot be downloaded. A preset replaces the defaults below, and your flags replace both.

--dwa is dilation x period, such as 4x5; last4, the last 4 outputs and the embedding;
connect-to-last; none; or the rows of alpha as data: for each block, and 0, the list of the X_j that
its DWA reads, such as "[[],[0,1],[1,2]]" for 2 blocks.
"""

import os
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is imported: no traceback
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # no C++ frames if another process fails

import json
import math
import shlex
import sys
import time
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
from data.dataset import eval_offsets, stack_windows, sum_losses
from data.tokenizer import from_state
from denseformer import DenseFormer, DenseFormerConfig
from lib.checkpoint import Run, load_checkpoint, load_state, load_weights, lock_folder
from lib.device import find_device, find_dtype, keep_freed_memory
from lib.figures import plot_losses, text_heat_map
from lib.files import UserError, say
from lib.flags import UsageError, flag, parse_flags, path, run_cli
from lib.graphs import MicroBatchLoss, record, speed_up_decoding
from lib.optim import configure_optimizers, set_lr
from lib.processes import RANK, WORLD_SIZE, StopSignals, all_reduce, process_group, receive, send
from lib.tiled import make_dwa

DTYPES = ("auto", "float32", "bfloat16", "float16")
IMPLS = ("auto", "naive", "inplace", "tiled")

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
    # the defaults below: under two minutes on two cores; bfloat16 is no faster at this width
    "cpu": {"dwa_lr_scale": 3.0, "eval_iters": 20, "dtype": "float32"},
    # nanoGPT's Shakespeare model, 10.6M parameters, as a DenseFormer. More dropout than nanoGPT's
    # 0.2 and Muon lower the best validation loss from 1.47 to 1.45.
    "gpu": {
        "n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "dropout": 0.3,
        "max_iters": 1500, "batch_size": 64, "learning_rate": 4e-3, "warmup_iters": 100,
        "weight_decay": 0.1, "beta2": 0.99,
    },
    "paper-48": PAPER,
    "paper-72": PAPER | {"n_layer": 72},
    # the same pipeline at a small scale
    "paper-small": PAPER | {
        "shards": 1, "n_layer": 6, "n_head": 4, "n_embd": 256, "max_iters": 1000, "batch_size": 32,
        "gradient_accumulation_steps": 1, "warmup_iters": 50, "eval_interval": 250,
    },
}  # fmt: skip


def pattern(text):
    """Return the value of --dwa: the name of a pattern, or rows as data."""
    return [[*row] for row in json.loads(text)] if text.startswith("[") else text


@dataclass
class TrainConfig:
    # input and output
    out_dir: str = flag("out", "folder for checkpoints, logs and the loss curve", read=path)
    dataset: str | None = flag(None, "a name or a path, see above", read=path)
    tokenizer: str | None = flag(None, "default: by the data", choices=("char", "byte", "gpt2"))
    shards: int = flag(1, "shards of openwebtext, up to 80, of 113 million tokens each", low=1)
    preset: str = flag("auto", "see below; auto picks cpu or gpu", choices=("auto", *PRESETS))
    resume: bool = flag(False, "continue the run in out_dir")
    init_from: str | None = flag(None, "start from the weights of this checkpoint", read=path)
    overwrite: bool = flag(False, "replace the run in out_dir")
    # model
    n_layer: int = flag(8, "number of blocks", low=1)
    n_head: int = flag(2, "attention heads per block", low=1)
    n_embd: int = flag(80, "channels", low=1)
    block_size: int = flag(128, "context length in tokens", low=1)
    dropout: float = flag(0.0, "dropout probability", low=0, below=1)
    bias: bool = flag(False, "use biases in linear layers and norms")
    dwa: str = flag("1x1", "depth-weighted averages, see above", read=pattern)
    dwa_impl: str = flag("auto", "how DWA is computed; the results are the same", choices=IMPLS)
    dwa_start_iter: int = flag(0, "keep the alphas frozen until this step", low=0)
    # optimization
    max_iters: int = flag(700, "training steps", low=1)
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
    eval_interval: int = flag(250, "steps between evaluations; each saves a checkpoint", low=1)
    eval_iters: int = flag(200, "evaluate on at most this many steps' worth of tokens", low=1)
    final_eval_iters: int = flag(200, "the same, for the loss that is shown at the end", low=1)
    log_interval: int = flag(20, "steps between log lines", low=1)
    # system
    device: str = flag("auto", "cpu, cuda, cuda:1, mps...; auto prefers cuda, then mps")
    dtype: str = flag("auto", "auto: bfloat16 if the hardware supports it", choices=DTYPES)
    compile: bool | None = flag(None, "compile the blocks and the loss (default: on CUDA)")
    seed: int = flag(1337, "random seed for weights, batches and dropout", low=0, below=2**63)


SHAPE = ["n_layer", "n_head", "n_embd", "bias", "tokenizer"]  # --init_from cannot change these
INHERITED = [*SHAPE, "block_size", "dwa", "shards"]  # it takes these, and dataset, if not given
# --resume cannot change these, nor the number of sequences per step
FIXED = [*INHERITED, "preset", "seed", "optimizer", "init_from", "dwa_start_iter", "eval_iters"]


def load_config(argv):
    """Return the settings, and the checkpoint of --resume or --init_from, or None.

    Flags override the checkpoint, which overrides the preset, which overrides the defaults. Raises
    UserError for settings that contradict each other, the checkpoint or this machine.
    """
    values = {name: [f"--{k} {v}" for k, v in preset.items()] for name, preset in PRESETS.items()}
    presets = "\n".join(f"  {name:12} {' '.join(flags)}" for name, flags in values.items())
    flags = parse_flags(TrainConfig, argv, __doc__, f"presets:\n{presets}")
    out_dir, resume = Path(flags.get("out_dir", TrainConfig.out_dir)), flags.get("resume")
    preset = flags.get("preset", "auto")
    if preset == "auto":
        device = find_device(flags.get("device", "auto"))
        preset = "cpu" if device.type == "cpu" else "gpu"
    base, checkpoint = PRESETS[preset] | {"preset": preset}, None
    if resume and flags.get("overwrite"):
        raise UsageError("--resume and --overwrite contradict each other")
    exists = any((out_dir / name).exists() for name in ("last.pt", "best.pt"))
    if exists and not (resume or flags.get("overwrite")):
        raise UserError(
            f"{out_dir} already contains a run: use --resume to continue it, --overwrite to "
            f"replace it, or another --out_dir to keep it"
        )
    if source := out_dir / "last.pt" if resume else flags.get("init_from"):
        checkpoint = load_checkpoint(Path(source))
        saved = checkpoint["train_config"] | checkpoint["model_config"]  # the latter may be pruned
        for name in FIXED if resume else SHAPE:
            if flags.get(name, saved[name]) != saved[name]:
                value = "none" if saved[name] is None else saved[name]
                raise UsageError(f"--{name} {flags[name]} contradicts {source}, which has {value}")
        names = asdict(TrainConfig()) if resume else [*INHERITED, "dataset"]
        base |= {name: saved[name] for name in names}
    config = TrainConfig(**(base | flags | {"out_dir": str(out_dir)}))  # the folder may have moved
    check(config)
    if resume:
        check_resume(config, checkpoint)
    return config, checkpoint


def check(config):
    """Raise UsageError for settings that do not fit together; parse_flags checks each range."""
    if config.min_lr > config.learning_rate:
        raise UsageError(f"--min_lr {config.min_lr} exceeds --learning_rate {config.learning_rate}")
    if config.dwa_start_iter >= config.max_iters:
        raise UsageError("--dwa_start_iter is not below --max_iters: no alpha would be trained")
    if config.gradient_accumulation_steps % WORLD_SIZE:
        raise UsageError(
            f"--gradient_accumulation_steps {config.gradient_accumulation_steps} must be "
            f"divisible by the {WORLD_SIZE} processes that share it"
        )
    try:
        model_config(config, vocab_size=1)
    except ValueError as error:
        raise UsageError(f"--{error}") from None


def check_resume(config, checkpoint):
    """Raise UsageError if a run cannot go on with these settings."""
    step, saved = checkpoint["step"], TrainConfig(**checkpoint["train_config"])
    if step > config.max_iters:
        raise UsageError(f"--max_iters {config.max_iters}: the run is already at step {step}")
    if sequences_per_step(config) != (old := sequences_per_step(saved)):
        raise UsageError(f"--batch_size x --gradient_accumulation_steps must stay at {old}")


def sequences_per_step(config):
    return config.batch_size * config.gradient_accumulation_steps


def model_config(config, vocab_size):
    """Return the config of the model. Raises ValueError if it is impossible."""
    names = [f.name for f in fields(DenseFormerConfig) if f.name != "vocab_size"]
    return DenseFormerConfig(vocab_size, **{name: getattr(config, name) for name in names})


def out_dir_flag(out_dir):
    """Return the --out_dir flag that makes a script use this run, or "" for the default."""
    return "" if str(out_dir) == TrainConfig.out_dir else f" --out_dir {shlex.quote(str(out_dir))}"


# -----------------------------------------------------------------------------
# Parts of the run


def load_dataset(config, checkpoint):
    """Return the data set and its fingerprint; store its name and its tokenizer in the config.

    The tokenizer of a checkpoint is kept. Rank 0 prepares the data while the others wait.
    """
    if RANK > 0:
        config.dataset, expected = receive("dataset")
    tokenizer = from_state(checkpoint["tokenizer"]) if checkpoint else config.tokenizer
    dataset = data.load(config.dataset, config.block_size, tokenizer, config.shards)
    # --resume needs the name, since the default depends on whether the download works.
    config.dataset = config.dataset or dataset.name
    config.tokenizer = dataset.tokenizer.state()["kind"]
    fingerprint = dataset.fingerprint()  # reads up to 256 MB, so only once
    if RANK == 0:
        send("dataset", [config.dataset, fingerprint])
    elif fingerprint != expected:
        raise UserError(f"{dataset.name} of rank {RANK} differs from that of rank 0")
    return dataset, fingerprint


def get_batch(dataset, config, step, micro_batch, device):
    """Return one micro-batch of windows, x and y, (B, T).

    Window n begins n golden ratios, modulo 1, after a random place in the text. Such windows cover
    it evenly: in the first epoch they reach 86% of it, where random ones would reach 63%. They
    depend only on the seed, the step and the position in the step, so a run sees the same windows
    after a resume, on any number of GPUs, and with 8 x 1 or 4 x 2 sequences per step.
    """
    B, T = config.batch_size, config.block_size
    n = step * sequences_per_step(config) + micro_batch * B + np.arange(B)
    place = (np.random.default_rng(config.seed).random() + n * (5**0.5 - 1) / 2) % 1
    offsets = (place * (len(dataset.train) - T)).astype(np.int64)
    return stack_windows(dataset.train, offsets, (B, T), device)


def get_lr(step, config):
    """Return the learning rate: linear warm-up, then cosine decay to min_lr at the last step."""
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / config.warmup_iters
    decay = (step - config.warmup_iters) / (config.max_iters - config.warmup_iters)  # 0 to 1
    cosine = 0.5 * (1 + math.cos(math.pi * decay))
    return config.min_lr + cosine * (config.learning_rate - config.min_lr)


def evaluate(model, tokens, iters, config, autocast, stop):
    """Return the mean loss over a split, or None as soon as a signal asks to stop.

    Each token is predicted once. If the split has more windows than `iters` steps would read, that
    many evenly spaced ones are used, the same every time.
    """
    B, T, device = config.batch_size, config.block_size, model.wte.weight.device
    offsets = eval_offsets(tokens, T, iters * sequences_per_step(config))

    def batches():
        for i in range(0, len(offsets), B * WORLD_SIZE):
            if stop.any():
                return
            mine = offsets[i + RANK * B : i + (RANK + 1) * B]
            yield stack_windows(tokens, mine, (B, T), device)

    model.eval()
    with autocast:
        loss_sum, count = sum_losses(model, batches())
    model.train()
    return None if stop.any() else all_reduce(loss_sum) / all_reduce(count)


def compile_loss(model, config, device, autocast):
    """Return a function from a micro-batch to its loss: of all processes, compiled and recorded
    where the settings and the device allow it."""
    has_triton = device.type == "cuda" and find_spec("triton") is not None  # not on Windows
    compiled = has_triton if config.compile is None else config.compile
    if compiled:
        model.compile()
    if WORLD_SIZE > 1:
        # Rows as data may leave out a whole block, for whose gradients DDP would wait.
        unused = not isinstance(model.dwa.pattern, str)
        model = DistributedDataParallel(
            model, gradient_as_bucket_view=True, find_unused_parameters=unused
        )
    loss = MicroBatchLoss(model, autocast)
    # The gradients of a graph lie in memory that its next replay overwrites, so that a second
    # micro-batch could not be added to them.
    if compiled and device.type == "cuda" and WORLD_SIZE == config.gradient_accumulation_steps == 1:
        ids = torch.zeros(2, config.batch_size, config.block_size, dtype=torch.long, device=device)
        return record(loss, *ids)
    return loss


def training_step(model, batch_loss, optimizers, scaler, dataset, step, lr, config):
    """Update the weights with the mean gradient of the micro-batches; return the mean loss of those
    of this process, without waiting for the GPU."""
    micro_batches = range(RANK, config.gradient_accumulation_steps, WORLD_SIZE)
    device, loss_sum = model.wte.weight.device, 0.0
    for n in micro_batches:
        x, y = get_batch(dataset, config, step, n, device)
        if config.dropout:  # so that a resumed run draws the same masks
            torch.manual_seed(config.seed + step * config.gradient_accumulation_steps + n)
        if WORLD_SIZE > 1:  # average the gradients once, after the last micro-batch
            batch_loss.model.require_backward_grad_sync = n == micro_batches[-1]
        loss = batch_loss(x, y) / len(micro_batches)
        scaler.scale(loss).backward()
        loss_sum += loss.detach()

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
    return loss_sum


def describe_run(model, dataset, config, device, dtype):
    """Print what is trained on what, in a few lines."""
    tokens = config.max_iters * sequences_per_step(config) * config.block_size
    say(
        f"{config.n_layer} blocks of {config.n_embd} channels: {model.num_params():,} parameters, "
        f"{model.dwa.num_params():,} of them alphas\n"
        f"{dataset.name}: {len(dataset.train):,} tokens for training, {len(dataset.val):,} for "
        f"validation, vocabulary of {dataset.tokenizer.vocab_size:,}\n"
        f"{config.max_iters:,} steps of {tokens // config.max_iters:,} tokens, "
        f"{tokens / len(dataset.train):.1f} epochs, {model.flops_per_token() * tokens:.1e} FLOPs "
        f"on {WORLD_SIZE} x {device}, {dtype}"
    )
    if config.warmup_iters >= config.max_iters:
        say(f"the learning rate only warms up: --warmup_iters is {config.warmup_iters}")


def show_run(model, tokenizer, config, device):
    """Plot the losses, and print the learned alphas and a sample."""
    out_dir, rule = Path(config.out_dir), "-" * 80
    try:
        plot_losses(out_dir / "log.jsonl", out_dir / "loss.png")
        say(f"loss curve: {out_dir}/loss.png")
    except ImportError:
        say("no loss curve without matplotlib: pip install it, and run this again with --resume")
    if model.dwa.num_params():
        say("\nlearned alphas: row Y_i is what block i + 1 reads, and the last what the head reads")
        say(text_heat_map(model.dwa.alpha.detach().cpu(), model.dwa.rows, max_rows=12))
    prompt = torch.tensor([tokenizer.start], device=device)
    generator = torch.Generator().manual_seed(config.seed)
    model.eval()
    speed_up_decoding(model)
    with torch.compiler.set_stance("force_eager"):  # compiling every new length would take long
        ids = model.generate(prompt, 300, temperature=0.8, generator=generator)
    text = tokenizer.decode(ids[0, prompt.size(1) :].tolist()).strip()
    say(f"\na sample:\n{rule}\n{text}\n{rule}\nfor more: python sample.py{out_dir_flag(out_dir)}")


# -----------------------------------------------------------------------------
# The run


def main(argv=None):
    """Train with the flags in argv or on the command line; return the exit status."""
    with process_group():
        config, checkpoint = load_config(argv)
        with lock_folder(Path(config.out_dir)):
            return train(config, checkpoint, find_device(config.device))


def train(config, checkpoint, device):
    """Train, from the beginning or from the checkpoint of load_config; return the exit status."""
    # data, model and optimizers
    dataset, fingerprint = load_dataset(config, checkpoint)
    keep_freed_memory()
    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision("high")  # TF32, where the GPU has it
    model = DenseFormer(model_config(config, dataset.tokenizer.vocab_size))
    model.dwa = make_dwa(model.dwa, config.dwa_impl, device)
    model.to(device)
    optimizers = configure_optimizers(
        model, config.optimizer, config.learning_rate, config.weight_decay,
        (config.beta1, config.beta2), config.dwa_lr_scale,
    )  # fmt: skip
    dtype = find_dtype(config.dtype, device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    describe_run(model, dataset, config, device, dtype)
    run = Run(config, model, dataset.tokenizer, fingerprint)

    # resume, or start from the weights of another run
    step, val_loss = 0, None  # the validation loss at this step, once known
    if config.resume:
        if checkpoint["fingerprint"] != fingerprint:
            raise UserError(f"{dataset.name} is not the data of the run in {config.out_dir}")
        step, val_loss = checkpoint["step"], checkpoint["val_loss"]
        load_state(checkpoint, model, optimizers, scaler)
        run.resume(checkpoint)
        say(f"resuming from step {step} of {config.max_iters}")
    elif checkpoint:
        load_weights(model, checkpoint["model"])
    if checkpoint:
        checkpoint.clear()  # free its memory
    batch_loss = compile_loss(model, config, device, autocast)

    snapshots = {config.max_iters * n // 16 for n in (1, 2, 4, 8, 16)}  # of the alphas
    hidden = RANK > 0 or not sys.stderr.isatty()
    bar = tqdm(total=config.max_iters, initial=step, unit="step", leave=False, disable=hidden)
    start = time.perf_counter()
    run.start_clock()
    with bar, StopSignals() as stop:  # until here, Ctrl-C ends the program at once
        while True:
            # evaluate and save; if a signal asks to stop, only save
            is_due = step % config.eval_interval == 0 or step == config.max_iters
            if stop.any() or (is_due and val_loss is None):
                val_loss = evaluate(model, dataset.val, config.eval_iters, config, autocast, stop)
                run.save(step, val_loss, optimizers, scaler)
                if val_loss is None:
                    break
                best = "" if val_loss > run.best_val_loss else ", the lowest so far"
                say(f"step {step}: val loss {val_loss:.4f}{best}")
                run.start_clock()  # do not count the evaluation
            if step == config.max_iters:
                break

            lr = get_lr(step, config)
            loss = training_step(model, batch_loss, optimizers, scaler, dataset, step, lr, config)
            step, val_loss = step + 1, None
            run.tokens += sequences_per_step(config) * config.block_size
            bar.update()

            if step in snapshots and step >= config.dwa_start_iter and model.dwa.num_params():
                run.write(step, alpha=model.dwa.alpha.tolist())
            if step % config.log_interval == 0:
                run.log(step, loss, lr)

        if val_loss is not None and config.final_eval_iters > config.eval_iters:
            val_loss = evaluate(model, dataset.val, config.final_eval_iters, config, autocast, stop)
            run.write(step, final_val_loss=val_loss)
        if val_loss is None:
            say(f"stopped at step {step} and saved; to continue: python train.py --resume"
                f"{out_dir_flag(config.out_dir)}")  # fmt: skip
            return 128 + stop.any()
    say(f"\n{time.perf_counter() - start:.0f} seconds; val loss {val_loss:.4f}")
    if RANK == 0:
        show_run(model, dataset.tokenizer, config, device)
    return 0


if __name__ == "__main__":
    run_cli(main)
