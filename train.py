"""Train a DenseFormer.

python train.py                            Tiny Shakespeare; a model that suits this machine
python train.py --dataset my.txt           your own text
python train.py --dwa 4x5 --out_dir out45  another sparsity pattern, kept elsewhere
python train.py --dwa none                 the plain Transformer, to compare with
python train.py --resume                   go on where a run was stopped
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
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
from common import (
    CheckpointError,
    Parser,
    find_device,
    find_dtype,
    flag,
    load_checkpoint,
    save_checkpoint,
)
from denseformer import DenseFormer, DenseFormerConfig

# -----------------------------------------------------------------------------
# Settings. The defaults are for a CPU; a preset changes some, and any flag overrides both.


@dataclass
class TrainConfig:
    # input and output
    out_dir: str = flag("out", "folder for checkpoints, logs and the loss curve")
    dataset: str | None = flag(
        None, "shakespeare, pydoc, or the path of a UTF-8 text file "
        "(default: shakespeare, or pydoc where it cannot be downloaded)", type=str,
    )  # fmt: skip
    preset: str = flag("auto", "what suits the device; see below", choices=("auto", "cpu", "gpu"))
    resume: bool = flag(False, "go on from out_dir's last checkpoint")
    overwrite: bool = flag(False, "begin anew although out_dir holds a run")
    # model
    n_layer: int = flag(3, "blocks", low=1)
    n_head: int = flag(2, "attention heads of a block", low=1)
    n_embd: int = flag(128, "channels", low=1)
    block_size: int = flag(128, "tokens of context", low=1)
    dropout: float = flag(0.0, "dropout probability", low=0.0)
    bias: bool = flag(False, "biases in linear layers and norms")
    dwa: str = flag("1x1", "depth-weighted averages: dilation x period as in 4x5, or none")
    dwa_impl: str = flag("inplace", "or naive, the formula itself", choices=("inplace", "naive"))
    # optimization
    max_iters: int = flag(1000, "steps of the optimizer", low=1)
    batch_size: int = flag(12, "sequences that go through the model at once", low=1)
    gradient_accumulation_steps: int = flag(1, "times batch_size that make a step", low=1)
    optimizer: str = flag(
        "muon", "muon leaves embedding, norms, alphas to adamw", choices=("adamw", "muon")
    )
    learning_rate: float = flag(1.5e-2, "at its highest", low=0.0)
    min_lr: float = flag(0.0, "at the end", low=0.0)
    warmup_iters: int = flag(60, "steps of rising learning rate; then it falls as a cosine", low=0)
    weight_decay: float = flag(0.3, "of matrices and embedding; the alphas have none", low=0.0)
    beta1: float = flag(0.9, "AdamW's decay of the gradient's mean", low=0.0)
    beta2: float = flag(0.95, "AdamW's decay of its square's mean", low=0.0)
    grad_clip: float = flag(1.0, "largest norm of the gradient; 0 does not clip", low=0.0)
    # evaluation and logs
    eval_interval: int = flag(250, "steps from one validation and checkpoint to the next", low=1)
    eval_iters: int = flag(
        200, "batches of a validation at most; a smaller split is used whole", low=1
    )
    log_interval: int = flag(20, "steps from one log line to the next", low=1)
    # system
    device: str = flag("auto", "cuda, cuda:1, mps, cpu; auto takes the first of them that is here")
    dtype: str = flag(
        "auto", "of activations; auto is bfloat16 where the hardware has it, else float32",
        choices=("auto", "float32", "bfloat16", "float16"),
    )  # fmt: skip
    compile: bool | None = flag(None, "torch.compile the blocks (default: on cuda only)", type=bool)
    seed: int = flag(1337, "of weights, batches and dropout", low=0)

    def __post_init__(self):
        for name in ("beta1", "beta2"):
            if getattr(self, name) >= 1:
                raise ValueError(f"--{name} must be below 1, not {getattr(self, name)}")
        if self.min_lr > self.learning_rate:
            raise ValueError(f"--min_lr is above --learning_rate {self.learning_rate}")


PRESETS = {
    # fun within two minutes on two cores; torch before 2.9 has no Muon
    "cpu": {} if hasattr(torch.optim, "Muon") else {"optimizer": "adamw", "learning_rate": 4e-3},
    # nanoGPT's small model, 10.7M parameters, as a DenseFormer
    "gpu": {
        "n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "dropout": 0.2,
        "max_iters": 5000, "batch_size": 64, "optimizer": "adamw", "learning_rate": 1e-3,
        "min_lr": 1e-4, "warmup_iters": 100, "weight_decay": 0.1, "beta2": 0.99,
    },
}  # fmt: skip

# What a resumed run cannot change: it would not be the same model, data or order of batches.
FIXED = ["n_layer", "n_head", "n_embd", "block_size", "bias", "dwa", "dataset", "preset", "seed"]
FIXED += ["optimizer", "batch_size", "gradient_accumulation_steps"]


class Stop(Exception):
    """The end of a run that could not go on, in one sentence."""


# -----------------------------------------------------------------------------
# Steps


def windows(tokens, starts, shape, device):
    """x, the windows of `tokens` that begin at `starts`, and y, the tokens that follow: (B, T).

    Where the tokens end or the starts are too few, y is -1, which counts for nothing: a compiled
    model then never meets a second shape.
    """
    B, T = shape
    x, y = np.zeros((B, T), dtype=np.int64), np.full((B, T), -1, dtype=np.int64)
    for row, s in enumerate(starts):
        window = tokens[s : s + T + 1]
        x[row, : len(window) - 1] = window[:-1]
        y[row, : len(window) - 1] = window[1:]
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    if device.type == "cuda":  # a copy from pinned memory does not hold up the CPU
        x, y = x.pin_memory(), y.pin_memory()
    return x.to(device, non_blocking=True), y.to(device, non_blocking=True)


def get_batch(tokens, config, step, micro_step, device):
    """Random windows; which ones depends on seed and step alone, so a resumed run sees the same."""
    rng = np.random.default_rng((config.seed, step, micro_step))
    starts = rng.integers(len(tokens) - config.block_size, size=config.batch_size)
    return windows(tokens, starts, (config.batch_size, config.block_size), device)


@torch.no_grad()
def evaluate(model, tokens, config, device, autocast, stop):
    """Mean loss on a split, the same tokens every time; None if `stop` interrupts it.

    The split is cut into windows of block_size side by side, so that each token is predicted
    once. Of more than eval_iters batches of them, that many are taken, evenly spaced.
    """
    B, T = config.batch_size, config.block_size
    starts = np.arange(0, len(tokens) - 1, T)
    if len(starts) > config.eval_iters * B:
        starts = starts[np.linspace(0, len(starts) - 1, config.eval_iters * B).astype(int)]
    total, count = 0.0, 0
    model.eval()
    for i in range(0, len(starts), B):
        x, y = windows(tokens, starts[i : i + B], (B, T), device)
        with autocast:
            _, loss = model(x, y)
        n = (y >= 0).sum()
        total, count = total + loss.double() * n, count + n
        if stop:
            return None
    model.train()
    return (total / count).item()


def learning_rate(config, step):
    """Linear warm-up, then half a cosine down to min_lr at the last step."""
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / config.warmup_iters
    progress = (step - config.warmup_iters) / max(1, config.max_iters - config.warmup_iters)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.min_lr + (config.learning_rate - config.min_lr) * cosine


def compile_blocks(model, batch, autocast):
    """Compile the blocks, and try them; where the compiler fails, go on without it."""
    for block in model.blocks:
        block.compile()
    try:
        with autocast:
            model(*batch)[1].backward()
    except Exception as error:
        torch.compiler.set_stance("force_eager")
        print(f"going on without torch.compile, which fails here: {first_line(error)}", flush=True)
    model.zero_grad(set_to_none=True)


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# -----------------------------------------------------------------------------
# A run


def read_settings(argv):
    """The settings of this run, and the checkpoint that it goes on from, or None."""
    gpu = textwrap.fill(" ".join(f"--{k}={v}" for k, v in PRESETS["gpu"].items()))
    parser = Parser(
        TrainConfig, __doc__, f"--preset cpu is the defaults above, --preset gpu\n{gpu}"
    )
    given = parser.given(argv)
    out_dir = Path(given.get("out_dir", TrainConfig.out_dir))
    last = out_dir / "last.pt"
    checkpoint, base = None, {}
    try:
        device = find_device(given.get("device", TrainConfig.device))
        if given.get("resume"):
            if given.get("overwrite"):
                parser.error("--resume and --overwrite contradict each other")
            checkpoint = load_checkpoint(last)
            base = checkpoint["train_config"] | {"out_dir": str(out_dir)}
            for name in FIXED:
                if given.get(name, base[name]) != base[name]:
                    parser.error(
                        f"--{name} {given[name]}: the run in {out_dir} was begun with "
                        f"{base[name]}, and a resumed run cannot change it"
                    )
            # Where it runs is asked anew: it may be another machine.
            base |= {name: getattr(TrainConfig, name) for name in ("device", "dtype", "compile")}
        elif last.exists() and not given.get("overwrite"):
            raise Stop(
                f"{out_dir} holds a run already: go on with it (--resume), replace it "
                f"(--overwrite), or keep both (--out_dir elsewhere)"
            )
        else:
            preset = given.get("preset", "auto")
            if preset == "auto":
                preset = "cpu" if device.type == "cpu" else "gpu"
            base = PRESETS[preset] | {"preset": preset}
            given.pop("preset", None)
        config = TrainConfig(**(base | given))
        DenseFormerConfig(**model_flags(config), vocab_size=1)  # to find fault before the download
    except ValueError as error:
        parser.error(str(error))
    return config, device, checkpoint


def model_flags(config):
    names = {f.name for f in fields(DenseFormerConfig)} & {f.name for f in fields(TrainConfig)}
    return {name: getattr(config, name) for name in names}


def open_log(path, step):
    """log.jsonl, to append to; what a crashed run wrote beyond the checkpoint's step is dropped."""
    lines = path.read_text().splitlines() if step else []
    kept = []
    for line in lines:
        with contextlib.suppress(ValueError):  # a line that a crash cut short
            entry = json.loads(line)
            if entry["step"] < step or (entry["step"] == step and "val_loss" not in entry):
                kept.append(line + "\n")
    part = path.with_name(f".{path.name}.part")
    part.write_text("".join(kept))
    os.replace(part, path)
    return path.open("a", buffering=1)


def main(argv=None):
    config, device, checkpoint = read_settings(argv)
    dataset = data.load(config.dataset, config.block_size)
    config.dataset = dataset.name  # a resumed run shall not choose again
    out_dir = Path(config.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
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
    print(
        f"{'Transformer' if config.dwa == 'none' else 'DenseFormer ' + config.dwa}: "
        f"{config.n_layer} blocks of {config.n_embd} channels, {model.num_params():,} parameters, "
        f"{model.dwa.num_params():,} of them alphas\n"
        f"{dataset.name}: {len(dataset.train):,} tokens to train on, {len(dataset.val):,} to "
        f"validate with, {dataset.tokenizer.vocab_size} different\n"
        f"on {device} in {str(dtype)[6:]}: {config.max_iters:,} steps of "
        f"{config.gradient_accumulation_steps * config.batch_size} x {config.block_size} tokens",
        flush=True,
    )
    if config.compile or (config.compile is None and device.type == "cuda"):
        compile_blocks(model, get_batch(dataset.train, config, 0, 0, device), autocast)

    step, best = 0, math.inf
    if checkpoint:
        if checkpoint["fingerprint"] != dataset.fingerprint():
            raise Stop(f"{dataset.name} is not the data that the run in {out_dir} was begun with")
        model.load_state_dict(checkpoint["model"])
        for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        scaler.load_state_dict(checkpoint["scaler"])
        torch.set_rng_state(checkpoint["rng"]["cpu"])
        if device.type == "cuda" and "cuda" in checkpoint["rng"]:
            torch.cuda.set_rng_state(checkpoint["rng"]["cuda"], device)
        step, best = checkpoint["step"], checkpoint["best"]
        print(f"going on from step {step:,}", flush=True)

    def save(name):
        if not all(p.isfinite().all() for p in model.parameters()):
            diverged("a weight that is not finite")
        rng = {"cpu": torch.get_rng_state()}
        if device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(device)
        content = {
            "model": model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "scaler": scaler.state_dict(),
            "rng": rng,
            "model_config": asdict(model_config),
            "train_config": asdict(config),
            "tokenizer": dataset.tokenizer.state(),
            "fingerprint": dataset.fingerprint(),
            "step": step,
            "best": best,
        }
        save_checkpoint(out_dir / name, content)

    def diverged(what):
        raise Stop(
            f"the run has {what} at step {step:,}, so it ends here; {out_dir}/last.pt is from "
            f"before that. A lower --learning_rate or a longer --warmup_iters may help"
        )

    # From here on Ctrl-C and SIGTERM wait for the step to end; a second one does not.
    stop = []

    def on_signal(number, frame):
        stop.append(number)
        signal.signal(number, signal.default_int_handler)

    handlers = {n: signal.signal(n, on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
    log = open_log(out_dir / "log.jsonl", step)
    bar = tqdm(total=config.max_iters, initial=step, unit="step", disable=None)
    begin, first_step = time.time(), step
    train_time, tokens_seen, loss_value = 0.0, 0, math.nan
    model.train()
    while True:
        if step % config.eval_interval == 0 or step == config.max_iters:
            val_loss = evaluate(model, dataset.val, config, device, autocast, stop)
            if val_loss is not None:
                if not math.isfinite(val_loss):
                    diverged(f"a validation loss of {val_loss}")
                log.write(json.dumps({"step": step, "val_loss": val_loss}) + "\n")
                bar.write(f"step {step:>6,}  validation loss {val_loss:.4f}")
                if val_loss < best:
                    best = val_loss
                    save("best.pt")
                save("last.pt")
        if stop or step == config.max_iters:
            break

        begin_step = time.time()
        lr = learning_rate(config, step)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
        loss = torch.zeros((), device=device)
        for micro_step in range(config.gradient_accumulation_steps):
            x, y = get_batch(dataset.train, config, step, micro_step, device)
            with autocast:
                micro_loss = model(x, y)[1] / config.gradient_accumulation_steps
            scaler.scale(micro_loss).backward()
            loss += micro_loss.detach()
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

        tokens_seen += x.numel() * config.gradient_accumulation_steps
        if step % config.log_interval == 0:
            loss_value = loss.item()  # waits for the GPU, which is why it is not done each step
            if not math.isfinite(loss_value):
                diverged(f"a training loss of {loss_value}")
        train_time += time.time() - begin_step
        if step % config.log_interval == 0:
            speed = tokens_seen / train_time
            left = (time.time() - begin) / (step - first_step) * (config.max_iters - step)
            entry = {"step": step, "loss": loss_value, "lr": lr, "tokens_per_second": round(speed)}
            log.write(json.dumps(entry) + "\n")
            text = f"loss {loss_value:.4f}  lr {lr:.1e}  {speed:,.0f} tokens/s"
            bar.set_postfix_str(text)
            if bar.disable:
                print(f"step {step:>6,}  {text}  {tqdm.format_interval(left)} left", flush=True)
            train_time, tokens_seen = 0.0, 0
    bar.close()
    log.close()
    if stop and step < config.max_iters:
        save("last.pt")
        print(f"\nstopped at step {step:,} and saved; to go on: python train.py --resume{where}")
        return 128 + stop[0]
    for number, handler in handlers.items():
        signal.signal(number, handler)

    seconds = time.time() - begin
    print(f"\n{seconds:.0f} seconds; validation loss {val_loss:.4f}, at best {best:.4f}")
    plot(out_dir)
    prompt = torch.from_numpy(dataset.tokenizer.encode(dataset.tokenizer.prompt).astype(np.int64))
    with torch.compiler.set_stance("force_eager"), torch.random.fork_rng(devices=[]):
        ids = model.generate(prompt[None].to(device), 300, temperature=0.8)
    rule, text = "-" * 80, dataset.tokenizer.decode(ids[0].tolist()).strip()
    print(f"what it writes now:\n{rule}\n{text}\n{rule}\nmore of it: python sample.py{where}")
    return 0


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
        axes.plot(*zip(*points, strict=True), style, label=label, markersize=4, linewidth=1)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out_dir / "loss.png", dpi=150)
    plt.close(figure)
    print(f"the losses are drawn in {out_dir}/loss.png")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (Stop, CheckpointError, data.DataError) as error:
        sys.exit(f"train.py: {error}")
    except torch.OutOfMemoryError:
        sys.exit("train.py: out of memory; a smaller --batch_size with more "
                 "--gradient_accumulation_steps makes the same step of less")  # fmt: skip
    except OSError as error:
        sys.exit(f"train.py: {error.filename or 'a file'}: {error.strerror}")
    except KeyboardInterrupt:
        sys.exit(130)
