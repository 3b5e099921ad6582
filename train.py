"""Train a DenseFormer.

python train.py                                      Tiny Shakespeare, for this machine
python train.py --resume                             go on where a run was stopped
python train.py --dataset my.txt --out_dir out-mine  your own text
python train.py --dwa none --out_dir out-plain       the plain Transformer, to compare with
python train.py --dwa 2x1 --out_dir out-2x1          another sparsity pattern
python train.py --init_from out/best.pt --dwa 2x1 --out_dir out-more    from its weights on
torchrun --nproc_per_node 8 train.py                 the same run on 8 GPUs
"""

import contextlib
import json
import math
import os
import signal
import sys
import textwrap
import time
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C ends it at once, also while torch is imported; see on_signal
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
from common import (
    Parser,
    Stop,
    find_device,
    find_dtype,
    flag,
    load_checkpoint,
    peak_flops,
    save_checkpoint,
    side_by_side,
    start,
    understood,
    windows,
)
from denseformer import DWA, DenseFormer, DenseFormerConfig

# -----------------------------------------------------------------------------
# Settings. The defaults are for a CPU; a preset changes some, and any flag overrides both.


@dataclass
class TrainConfig:
    # input and output
    out_dir: str = flag("out", "folder for checkpoints, logs and the loss curve")
    dataset: str | None = flag(
        None, "shakespeare, pydoc, openwebtext, or a path: a UTF-8 text, a folder of .txt files, "
        "or a folder with nanoGPT's train.bin and val.bin "
        "(default: shakespeare, or pydoc where it cannot be downloaded)", type=str,
    )  # fmt: skip
    tokenizer: str | None = flag(
        None, "char, byte or gpt2 (default: gpt2 for openwebtext; of another text char where it "
        "has at most 256 different ones, else byte)", choices=("char", "byte", "gpt2"), type=str,
    )  # fmt: skip
    shards: int = flag(1, "how many of openwebtext's 80, each some 113 million tokens", low=1)
    preset: str = flag(
        "auto", "auto is what suits the device, cpu or gpu; see below",
        choices=("auto", "cpu", "gpu", "paper-48", "paper-72", "paper-small"),
    )  # fmt: skip
    resume: bool = flag(False, "go on from out_dir's last checkpoint")
    init_from: str | None = flag(
        None, "checkpoint whose weights to start with; the shape of the model is then its own, "
        "and DWAs and data too unless flags say otherwise", type=str,
    )  # fmt: skip
    overwrite: bool = flag(False, "begin anew although out_dir holds a run")
    # model
    n_layer: int = flag(3, "blocks", low=1)
    n_head: int = flag(2, "attention heads of a block", low=1)
    n_embd: int = flag(128, "channels", low=1)
    block_size: int = flag(128, "tokens of context", low=1)
    dropout: float = flag(0.0, "dropout probability", low=0.0)
    bias: bool = flag(False, "biases in linear layers and norms")
    dwa: str = flag(
        "1x1", "depth-weighted averages: dilation x period as in 4x5; last4, the last 4 outputs "
        "and the embedding; connect-to-last; rows as in 8:0,4,8; joined by + as in last2+12x1; "
        "or none"
    )  # fmt: skip
    dwa_impl: str = flag(
        "inplace", "inplace is the fast way, naive the formula itself: the same result",
        choices=("inplace", "naive"),
    )  # fmt: skip
    dwa_start_iter: int = flag(0, "step until which the alphas stay at the identity", low=0)
    skip_gains: bool = flag(False, "a learned scale on each skip connection")
    # optimization
    max_iters: int = flag(1000, "steps of the optimizer", low=1)
    batch_size: int = flag(12, "sequences of a step, on all GPUs together", low=1)
    gradient_accumulation_steps: int | None = flag(
        None, "parts that each GPU takes its sequences in, to save memory; the result is the same "
        "(default: as few as its memory allows)", low=1, type=int,
    )  # fmt: skip
    optimizer: str = flag(
        "muon", "muon leaves embedding, norms, alphas to adamw", choices=("adamw", "muon")
    )
    learning_rate: float = flag(1.5e-2, "highest learning rate", low=0.0)
    min_lr: float = flag(0.0, "learning rate at the end", low=0.0)
    warmup_iters: int = flag(60, "steps of rising learning rate; then it falls as a cosine", low=0)
    weight_decay: float = flag(0.3, "of matrices and embedding; the alphas have none", low=0.0)
    beta1: float = flag(0.9, "AdamW's decay of the gradient's mean", low=0.0)
    beta2: float = flag(0.95, "AdamW's decay of the squared gradient's mean", low=0.0)
    grad_clip: float = flag(1.0, "largest norm of the gradient; 0 does not clip", low=0.0)
    # evaluation and logs
    eval_interval: int = flag(250, "steps from one validation and checkpoint to the next", low=1)
    eval_iters: int = flag(
        200,
        "times batch_size sequences at most in a validation; a smaller split is read whole",
        low=1,
    )
    log_interval: int = flag(20, "steps from one log line to the next", low=1)
    # system
    device: str = flag("auto", "cuda, cuda:1, mps, cpu; auto takes the first of them that is here")
    dtype: str = flag(
        "auto", "of activations; auto is bfloat16 where the hardware has it, else float32",
        choices=("auto", "float32", "bfloat16", "float16"),
    )  # fmt: skip
    compile: bool | None = flag(None, "torch.compile the model (default: on cuda only)", type=bool)
    seed: int = flag(1337, "of weights, batches and dropout", low=0)

    def __post_init__(self):
        for name in ("beta1", "beta2"):
            if getattr(self, name) >= 1:
                raise ValueError(f"--{name} must be below 1, not {getattr(self, name)}")
        if self.min_lr > self.learning_rate:
            raise ValueError(f"--min_lr {self.min_lr} (a preset's, unless you gave it) is above "
                             f"--learning_rate {self.learning_rate}")  # fmt: skip
        if self.optimizer == "muon" and not hasattr(torch.optim, "Muon"):
            raise ValueError(f"--optimizer muon needs torch 2.9; this is {torch.__version__}")
        if self.dtype == "float16" and self.optimizer == "muon":
            raise ValueError("--dtype float16 needs --optimizer adamw: its gradients are scaled, "
                             "for one optimizer")  # fmt: skip


# The setting of the paper's experiments; the learning rate's end is nanoGPT's.
PAPER = {
    "dataset": "openwebtext", "shards": 40, "n_layer": 48, "n_head": 12, "n_embd": 768,
    "block_size": 256, "max_iters": 40_000, "batch_size": 400, "optimizer": "adamw",
    "learning_rate": 1e-3, "min_lr": 1e-4, "warmup_iters": 2000, "weight_decay": 0.1,
    "eval_interval": 1000, "log_interval": 10,
}  # fmt: skip

PRESETS = {
    # fun within two minutes on two cores; torch before 2.9 has no Muon
    "cpu": {} if hasattr(torch.optim, "Muon") else {"optimizer": "adamw", "learning_rate": 4e-3},
    # nanoGPT's small model, 10.7M parameters, as a DenseFormer
    "gpu": {
        "n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "dropout": 0.2,
        "max_iters": 5000, "batch_size": 64, "optimizer": "adamw", "learning_rate": 1e-3,
        "min_lr": 1e-4, "warmup_iters": 100, "weight_decay": 0.1, "beta2": 0.99,
    },
    # the paper's models, and a small one to try the way with
    "paper-48": PAPER,
    "paper-72": PAPER | {"n_layer": 72},
    "paper-small": PAPER | {
        "shards": 1, "n_layer": 6, "n_head": 4, "n_embd": 256, "max_iters": 1000, "batch_size": 32,
        "warmup_iters": 50, "eval_interval": 250,
    },
}  # fmt: skip

# What a resumed run cannot change: it would not be the same model, data or order of batches.
FIXED = ["n_layer", "n_head", "n_embd", "block_size", "bias", "dwa", "dataset", "preset", "seed"]
FIXED += ["optimizer", "batch_size", "shards", "tokenizer", "skip_gains", "dwa_start_iter"]
FIXED += ["init_from"]

# What a model started from the weights of another has from it, and what it has unless told else.
SHAPE = ["n_layer", "n_head", "n_embd", "bias", "skip_gains"]
DATA = ["dataset", "tokenizer", "shards"]


# -----------------------------------------------------------------------------
# Several GPUs


class Ranks:
    """The processes that torchrun started, one a GPU. Without torchrun: this one alone."""

    def __init__(self):
        self.rank, self.n = (int(os.environ.get(k, v)) for k, v in (("RANK", 0), ("WORLD_SIZE", 1)))
        self.local = int(os.environ.get("LOCAL_RANK", 0))
        if self.n > 1:
            if torch.cuda.is_available() and self.local < torch.cuda.device_count():
                torch.cuda.set_device(self.local)
            distributed.init_process_group("cpu:gloo,cuda:nccl" if has_nccl() else "gloo")
            # What rank 0 does alone, such as a download, may take long.
            self.patient = distributed.new_group(backend="gloo", timeout=timedelta(days=7))
            if self.rank > 0:
                sys.stdout = open(os.devnull, "w")  # noqa: SIM115

    def first(self, function, *args):
        """function(*args) of rank 0, for all ranks; they wait. Where it fails, all of them end."""
        if self.n == 1:
            return function(*args)
        box = [None]
        try:
            if self.rank == 0:
                box = [(function(*args),)]
        finally:
            distributed.broadcast_object_list(box, 0, group=self.patient)
        if box[0] is None:
            sys.exit(1)
        return box[0][0]

    def device(self, device):
        """The device of this rank, where all of them were told `device`."""
        if self.n == 1 or device.type != "cuda":
            return device
        if self.local >= torch.cuda.device_count():
            raise Stop(f"torchrun: more processes than the {torch.cuda.device_count()} GPUs here")
        return torch.device("cuda", self.local)

    def parallel(self, model):
        """The model, with gradients that are averaged over the ranks."""
        if self.n == 1:
            return model
        # Some patterns leave out a whole block: nothing reads its output.
        rows = model.dwa.rows
        read = set().union(*rows)
        unread = any(row and i not in read for i, row in enumerate(rows, start=1))
        return DistributedDataParallel(
            model, gradient_as_bucket_view=True, broadcast_buffers=False,
            find_unused_parameters=unread,
        )  # fmt: skip

    def most(self, number):
        """The largest of the ranks' numbers, an int."""
        if self.n == 1:
            return number
        largest = torch.tensor(number)
        distributed.all_reduce(largest, distributed.ReduceOp.MAX)
        return largest.item()

    def any(self, flag):
        """Whether `flag` is true in any rank."""
        return bool(self.most(int(bool(flag))))

    def sum(self, tensor):
        """The sum of the ranks' tensors, in place."""
        if self.n > 1:
            distributed.all_reduce(tensor)
        return tensor

    def wait(self):
        if self.n > 1:
            distributed.barrier(group=self.patient)

    def leave(self):
        self.wait()
        if self.n > 1:
            distributed.destroy_process_group()


def has_nccl():
    return torch.cuda.is_available() and distributed.is_nccl_available()


# -----------------------------------------------------------------------------
# Steps


def get_batch(dataset, config, step, ranks, parts, device):
    """This rank's share of a step's random windows, as `parts` batches.

    Which windows a step has depends on seed and step alone: the same for any number of GPUs and
    parts, and for a resumed run.
    """
    rng = np.random.default_rng((config.seed, step))
    starts = rng.integers(len(dataset.train) - config.block_size, size=config.batch_size)
    batches = np.array_split(starts[ranks.rank :: ranks.n], parts)
    shape, V = (len(batches[0]), config.block_size), dataset.tokenizer.vocab_size
    return [windows(dataset.train, starts, shape, device, V) for starts in batches]


@torch.no_grad()
def evaluate(model, tokens, config, ranks, B, device, autocast, stop):
    """Mean loss on a split, the same tokens every time; None if `stop` interrupts it.

    Each token counts once; of a split of more than eval_iters batches, only that many evenly
    spaced windows. B windows go through the model at once.
    """
    starts = side_by_side(tokens, config.block_size, config.eval_iters * config.batch_size)
    total = torch.zeros(2, dtype=torch.float64)  # the sum of the losses, the number of tokens
    total = total.to(device, torch.float32 if device.type == "mps" else torch.float64)
    model.eval()
    for i in range(0, math.ceil(len(starts) / ranks.n), B):
        mine = starts[ranks.rank :: ranks.n][i : i + B]
        if len(mine):
            x, y = windows(tokens, mine, (B, config.block_size), device, model.config.vocab_size)
            with autocast:
                _, loss = model(x, y)
            n = (y >= 0).sum()
            total += torch.stack((loss.to(total.dtype) * n, n))
        if ranks.any(stop):
            return None
    model.train()
    loss, count = ranks.sum(total).tolist()
    return loss / count


def learning_rate(config, step):
    """Linear warm-up, then half a cosine down to min_lr at the last step."""
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / config.warmup_iters
    progress = (step - config.warmup_iters) / max(1, config.max_iters - config.warmup_iters)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.min_lr + (config.learning_rate - config.min_lr) * cosine


def compile_model(model, batch, autocast):
    """Compile the model, and try it; where the compiler fails, go on without."""
    model.compile()
    try:
        with autocast:
            model(*batch)[1].backward()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        torch.compiler.set_stance("force_eager")
        print(f"going on without torch.compile, which fails here: {first_line(error)}", flush=True)
    model.zero_grad(set_to_none=True)


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# -----------------------------------------------------------------------------
# A run


def read_settings(argv, stack):
    """The settings of this run, and the checkpoint that it goes on from, or None.

    Until `stack` is closed no other run can write into the same out_dir.
    """
    presets = "".join(
        textwrap.fill(f"--preset {name}: " + " ".join(f"--{k}={v}" for k, v in preset.items()))
        + "\n"
        for name, preset in PRESETS.items()
        if preset
    )
    parser = Parser(TrainConfig, __doc__, f"--preset cpu is the defaults above.\n{presets}")
    given = parser.given(argv)
    if given.get("dataset"):  # books/ is books
        given["dataset"] = str(Path(given["dataset"]))
    out_dir = Path(given.get("out_dir", TrainConfig.out_dir))
    last = out_dir / "last.pt"
    checkpoint, base, step = None, {}, 0
    try:
        if given.get("resume"):
            if given.get("overwrite"):
                parser.error("--resume and --overwrite contradict each other")
            checkpoint = load_checkpoint(last)
            with understood(last):
                begun = asdict(TrainConfig(**checkpoint["train_config"]))
                step = int(checkpoint["step"])
            base = begun | {"out_dir": str(out_dir)}
            for name in FIXED:
                if given.get(name, base[name]) != base[name]:
                    parser.error(
                        f"--{name} {given[name]}: the run in {out_dir} was begun with "
                        f"{base[name]}, and a resumed run cannot change it"
                    )
        elif last.exists() and not given.get("overwrite"):
            raise Stop(
                f"{out_dir} holds a run already: go on with it (--resume), replace it "
                f"(--overwrite), or keep both (--out_dir elsewhere)"
            )
        else:
            preset = given.get("preset", "auto")
            if preset == "auto":
                device = find_device(given.get("device", TrainConfig.device))
                preset = "cpu" if device.type == "cpu" else "gpu"
            base = PRESETS[preset] | {"preset": preset}
            given.pop("preset", None)
            if given.get("init_from"):
                path = Path(given["init_from"])
                other = load_checkpoint(path)
                with understood(path):
                    its_data = {name: other["train_config"][name] for name in DATA}
                    other = asdict(DenseFormerConfig(**other["model_config"]))
                    its_shape = {name: other[name] for name in (*SHAPE, "block_size", "dwa")}
                    base = its_data | base | its_shape
                for name in SHAPE:
                    if given.get(name, other[name]) != other[name]:
                        parser.error(f"--{name} {given[name]}: {given['init_from']} has "
                                     f"{other[name]}")  # fmt: skip
        config = TrainConfig(**(base | given))
        # To find fault before the download.
        find_device(config.device)
        model_config = DenseFormerConfig(**model_flags(config), vocab_size=1)
        dwa = DWA(model_config.n_layer, model_config.dwa)
        if config.dwa != "none" and not dwa.num_params():
            raise ValueError(f"--dwa {config.dwa} has no DWA in {config.n_layer} blocks: take more "
                             f"blocks, or --dwa none for the plain Transformer")  # fmt: skip
        if step > config.max_iters:
            raise ValueError(f"--max_iters {config.max_iters}: the run in {out_dir} is at step "
                             f"{step:,} already")  # fmt: skip
        n = int(os.environ.get("WORLD_SIZE", 1))
        if config.batch_size % n:
            raise ValueError(
                f"--batch_size {config.batch_size} does not divide among {n} processes"
            )
    except ValueError as error:
        parser.error(str(error))
    out_dir.mkdir(parents=True, exist_ok=True)
    try:
        stack.enter_context(FileLock(out_dir / ".lock", timeout=0))
    except Timeout:
        raise Stop(f"another run is training into {out_dir}: wait for it, or keep this one "
                   f"elsewhere (--out_dir)") from None  # fmt: skip
    return config, checkpoint


def load_data(config):
    return data.load(config.dataset, config.block_size, config.tokenizer, config.shards)


def model_flags(config):
    names = {f.name for f in fields(DenseFormerConfig)} & {f.name for f in fields(TrainConfig)}
    return {name: getattr(config, name) for name in names}


def memory(model, sequences, dtype):
    """About how many bytes a training step takes that many sequences through the model at once."""
    c = model.config
    # float32: each weight, its gradient and AdamW's two means. An activation is C numbers a token:
    # a block keeps about 20 of them, a DWA one a block. Of the logits there are four copies.
    L, C, V = c.n_layer, c.n_embd, c.vocab_size
    dwa = 1 if model.dwa.num_params() else 0
    token = (20 + dwa) * L * C * dtype.itemsize + V * (2 * dtype.itemsize + 8)
    return 16 * model.num_params() + sequences * c.block_size * token


def find_parts(model, share, dtype, device):
    """The fewest parts of a step's share of sequences that fit the memory, by estimate."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 8e9
    budget = max(0.8 * free, memory(model, 1, dtype))
    return next(
        p for p in range(1, share + 1) if memory(model, math.ceil(share / p), dtype) <= budget
    )


def plan(model, dataset, config, ranks, parts, dtype, device):
    """What the run is going to do, in a few lines."""
    tokens = config.max_iters * config.batch_size * config.block_size
    share = config.batch_size // ranks.n
    split = f" in {parts} parts" if parts > 1 else ""
    gpus = f"{ranks.n} processes, the first on {device}" if ranks.n > 1 else str(device)
    sparsity = f" (a sparsity of {model.dwa.sparsity():.1%})" if model.dwa.num_params() else ""
    return (
        f"{'Transformer' if config.dwa == 'none' else 'DenseFormer ' + config.dwa}: "
        f"{config.n_layer} blocks of {config.n_embd} channels, {model.num_params():,} parameters, "
        f"{model.dwa.num_params():,} of them alphas{sparsity}\n"
        f"{dataset.name}: {len(dataset.train):,} tokens to train on, {len(dataset.val):,} to "
        f"validate with, {dataset.tokenizer.vocab_size:,} different\n"
        f"on {gpus} in {str(dtype)[6:]}: {config.max_iters:,} steps of {config.batch_size} x "
        f"{config.block_size} tokens{split}\n"
        f"{tokens:,} tokens, {tokens / len(dataset.train):.1f} times the data; "
        f"{model.flops_per_token() * tokens:.1e} FLOPs; some "
        f"{memory(model, math.ceil(share / parts), dtype) / 1e9:.2g} GB of memory"
    )


def open_log(path, step):
    """log.jsonl, to append to; what a crashed run wrote beyond the checkpoint's step is dropped."""
    lines = path.read_text().splitlines() if step and path.exists() else []
    kept = []
    for line in lines:
        with contextlib.suppress(ValueError):  # a line that a crash cut short
            entry = json.loads(line)
            if entry["step"] < step or (entry["step"] == step and "loss" in entry):
                kept.append(line + "\n")
    part = path.with_name(f".{path.name}.part")
    part.write_text("".join(kept))
    os.replace(part, path)
    return path.open("a", buffering=1)


def start_from(model, config, dataset):
    """Give the model the weights of the checkpoint config.init_from, and of its alphas those that
    config.dwa has too. The others begin at 0, or at the identity where a row has none."""
    path = Path(config.init_from)
    other = load_checkpoint(path)
    with understood(path):
        if other["tokenizer"] != dataset.tokenizer.state():
            raise Stop(f"{path} has another tokenizer than {dataset.name} gets here")
        model.load_state_dict(other["model"])
    dwa, start = model.dwa, DWA(model.config.n_layer, model.config.dwa).to(model.dwa.alpha)
    with torch.no_grad():
        alpha = dwa.weights()
        dwa.alpha.copy_(torch.where(alpha.any(dim=1, keepdim=True), alpha, start.alpha))
    if config.dwa_start_iter and not torch.equal(dwa.alpha, start.alpha):
        raise Stop(
            f"--dwa_start_iter starts the alphas at the identity, and {config.init_from} has others"
        )


def main(argv=None):
    ranks = Ranks()
    with contextlib.ExitStack() as stack:
        return run(ranks, *ranks.first(read_settings, argv, stack))


def run(ranks, config, checkpoint):
    """Train from the beginning or the checkpoint on; returns the exit status."""
    device = ranks.device(find_device(config.device))
    # Rank 0 settles which data it is and gets it; another machine then gets its own copy.
    # It is stored by name: a resumed run does not choose between shakespeare and pydoc again.
    config.dataset = ranks.first(lambda: load_data(config).name)
    dataset = load_data(config)
    config.tokenizer = dataset.tokenizer.state()["kind"]
    ranks.wait()
    out_dir = Path(config.out_dir)
    where = "" if config.out_dir == TrainConfig.out_dir else f" --out_dir {out_dir}"

    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision("high")  # TensorFloat32, where the GPU has it
    model_config = DenseFormerConfig(**model_flags(config), vocab_size=dataset.tokenizer.vocab_size)
    model = DenseFormer(model_config).to(device)
    optimizers = model.configure_optimizers(
        config.learning_rate, config.weight_decay, (config.beta1, config.beta2), config.optimizer
    )
    dtype = find_dtype(config.dtype, device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    share = config.batch_size // ranks.n  # sequences of a step
    parts = config.gradient_accumulation_steps or find_parts(model, share, dtype, device)
    parts = ranks.most(min(parts, share))
    B = math.ceil(share / parts)  # sequences that go through the model at once
    step_tokens = config.batch_size * config.block_size
    print(plan(model, dataset, config, ranks, parts, dtype, device), flush=True)
    if config.compile or (config.compile is None and device.type == "cuda"):
        compile_model(model, get_batch(dataset, config, 0, ranks, parts, device)[0], autocast)
    if config.init_from and not checkpoint:
        start_from(model, config, dataset)
    step, best = 0, math.inf
    if checkpoint:
        with understood(out_dir / "last.pt"):
            if checkpoint["fingerprint"] != dataset.fingerprint():
                raise Stop(f"{dataset.name} is not the data that the run in {out_dir} began with")
            model.load_state_dict(checkpoint["model"])
            for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
                # What it remembers; weight decay and betas are those of this run's flags.
                groups = optimizer.state_dict()["param_groups"]
                optimizer.load_state_dict(state | {"param_groups": groups})
            if checkpoint["scaler"]:
                scaler.load_state_dict(checkpoint["scaler"])
            step, best = int(checkpoint["step"]), float(checkpoint["best"])
        print(f"going on from step {step:,}", flush=True)
    if step < config.dwa_start_iter:
        model.dwa.alpha.requires_grad_(False)
    ddp = ranks.parallel(model)

    def save(name):
        if not all(p.isfinite().all() for p in model.parameters()):
            diverged("a weight that is not finite")
        content = {
            "model": model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "scaler": scaler.state_dict(),
            "model_config": asdict(model_config),
            "train_config": asdict(config),
            "tokenizer": dataset.tokenizer.state(),
            "fingerprint": dataset.fingerprint(),
            "step": step,
            "best": best,
        }
        if ranks.rank == 0:
            save_checkpoint(out_dir / name, content)

    def diverged(what):
        raise Stop(
            f"the run has {what} at step {step:,}, so it ends here; {out_dir}/last.pt is from "
            f"before that. A lower --learning_rate or a longer --warmup_iters may help"
        )

    # A model that knows nothing has a loss of log(vocab_size): far above that, it is lost.
    worst = 2 * math.log(model_config.vocab_size)

    # From here on Ctrl-C and SIGTERM wait for the step to end; a second one does not.
    stop = []

    def on_signal(number, frame):
        stop.append(number)
        signal.signal(number, signal.SIG_DFL)

    handlers = {n: signal.signal(n, on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
    log = ranks.rank == 0 and open_log(out_dir / "log.jsonl", step)

    def write(**entry):
        if log:
            log.write(json.dumps(entry) + "\n")

    silent = True if ranks.rank else None
    bar = tqdm(total=config.max_iters, initial=step, unit="step", disable=silent)
    begin, first_step = time.time(), step
    train_time, steps_seen, loss_value = 0.0, 0, math.nan
    peak = peak_flops(device)
    snapshots = {config.max_iters * part // 16 for part in (1, 2, 4, 8, 16)}
    batches = get_batch(dataset, config, step, ranks, parts, device)
    model.train()
    while True:
        if step == config.dwa_start_iter > 0:
            model.dwa.alpha.requires_grad_(config.dwa != "none")
            ddp = ranks.parallel(model)
        if step in snapshots and model.dwa.alpha.requires_grad:
            write(step=step, alpha=[[round(a, 5) for a in row] for row in model.dwa.alpha.tolist()])
        if step % config.eval_interval == 0 or step == config.max_iters:
            val_loss = evaluate(model, dataset.val, config, ranks, B, device, autocast, stop)
            if val_loss is not None:
                if not math.isfinite(val_loss) or (step > first_step and val_loss > worst):
                    diverged(f"a validation loss of {val_loss:.3g}")
                write(step=step, val_loss=val_loss)
                print_line(bar, f"step {step:>6,}  validation loss {val_loss:.4f}")
                if val_loss < best:
                    best = val_loss
                    save("best.pt")
                save("last.pt")
        if ranks.any(stop) or step == config.max_iters:
            break

        begin_step = time.time()
        lr = learning_rate(config, step)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
        if config.dropout:  # the same in a resumed run
            torch.manual_seed(hash((config.seed, step, ranks.rank)))
        loss = torch.zeros((), device=device)
        for part, (x, y) in enumerate(batches, start=1):
            # Gradients are averaged over the GPUs once, after the last part.
            average = ranks.n == 1 or part == len(batches)
            with contextlib.nullcontext() if average else ddp.no_sync():
                with autocast:
                    # A part counts as much as it has sequences; rows of y = -1 only fill it up.
                    part_loss = ddp(x, y)[1] * ((y[:, 0] >= 0).sum() / share)
                scaler.scale(part_loss).backward()
            loss += part_loss.detach()
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        if config.grad_clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        for optimizer in optimizers:
            scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        scaler.update()
        step += 1
        bar.update()
        # A GPU is still at work on this step while the CPU gets the next batch.
        batches = get_batch(dataset, config, step, ranks, parts, device)

        steps_seen += 1
        if step % config.log_interval == 0:
            # This waits for the GPU, which is why it is not done each step.
            loss_value = ranks.sum(loss).item() / ranks.n
            if not math.isfinite(loss_value):
                diverged(f"a training loss of {loss_value}")
        train_time += time.time() - begin_step
        if step % config.log_interval == 0:
            speed = steps_seen * step_tokens / train_time
            left = train_time / steps_seen * (config.max_iters - step)
            entry = {"step": step, "loss": loss_value, "lr": lr, "tokens_per_second": round(speed)}
            text = f"loss {loss_value:.4f}  lr {lr:.1e}  {speed:,.0f} tokens/s"
            if peak:
                entry["mfu"] = speed * model.flops_per_token() / (peak * ranks.n)
                text += f"  MFU {entry['mfu']:.0%}"
            write(**entry)
            bar.set_postfix_str(text)
            if bar.disable:
                print(f"step {step:>6,}  {text}  {tqdm.format_interval(left)} left", flush=True)
            train_time, steps_seen = 0.0, 0
    bar.close()
    if log:
        log.close()
    if step < config.max_iters or val_loss is None:
        save("last.pt")
        print(f"\nstopped at step {step:,} and saved; to go on: python train.py --resume{where}")
        ranks.leave()
        return 128 + (stop or [signal.SIGTERM])[0]
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if ranks.rank == 0:
        finish(model, dataset, out_dir, where, device, time.time() - begin, val_loss, best)
    ranks.leave()
    return 0


def finish(model, dataset, out_dir, where, device, seconds, val_loss, best):
    """The end of a run for a person to see."""
    print(f"\n{seconds:.0f} seconds; validation loss {val_loss:.4f}, at best {best:.4f}")
    plot(out_dir)
    prompt = torch.tensor([dataset.tokenizer.start], device=device)
    with torch.compiler.set_stance("force_eager"), torch.random.fork_rng(devices=[]):
        ids = model.generate(prompt, 300, temperature=0.8)
    rule, text = "-" * 80, dataset.tokenizer.decode(ids[0, prompt.size(1) :].tolist()).strip()
    print(f"what it writes now:\n{rule}\n{text}\n{rule}\nmore of it: python sample.py{where}")


def print_line(bar, text):
    print(text, flush=True) if bar.disable else bar.write(text)


def plot(out_dir):
    """log.jsonl as the picture loss.png, where matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        print("for a picture of the losses: pip install matplotlib")
        return
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    entries = [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for key, label, style in (("loss", "training batch", "-"), ("val_loss", "validation", "o-")):
        points = [(e["step"], e[key]) for e in entries if key in e]
        if points:  # a run may end before it logs one
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4, linewidth=1)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out_dir / "loss.png", dpi=150)
    plt.close(figure)
    print(f"the losses are drawn in {out_dir}/loss.png")


if __name__ == "__main__":
    start(main)
