"""The folder of a run: checkpoints, saved atomically and loaded without running code, and a log."""

import contextlib
import json
import math
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from data.tokenizer import Tokenizer, from_state
from denseformer import DenseFormer, DenseFormerConfig
from lib.device import peak_flops
from lib.files import UserError, open_new, say
from lib.processes import RANK, WORLD_SIZE, all_reduce

FORMAT = "denseformer-3"


def save_checkpoint(path: Path, checkpoint: dict[str, Any]):
    """Save a checkpoint. A crash at any moment leaves the previous one intact.

    Raises UserError if it cannot be written.
    """
    try:
        with open_new(path) as file:
            torch.save({"format": FORMAT, **checkpoint}, file)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    except RuntimeError:  # torch reports a full disk as an internal C++ error
        raise UserError(f"cannot write {path}: is the disk full?") from None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Return the contents of a checkpoint, with all tensors on the CPU.

    Raises UserError if the file is missing, damaged, or of another format.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except Exception:  # a damaged archive can fail in any way
        raise UserError(f"{path} is damaged or not a DenseFormer checkpoint") from None
    found = checkpoint.get("format") if isinstance(checkpoint, dict) else None
    if found != FORMAT:
        raise UserError(
            f"{path} has the format {found}, but this version reads only {FORMAT}: retrain the "
            f"model, or use the version that saved it"
        )
    return checkpoint


def load_model(path: Path, device: torch.device) -> tuple[DenseFormer, Tokenizer, dict[str, Any]]:
    """Return the model in a checkpoint, in evaluation mode, its tokenizer, and the checkpoint
    without what only --resume needs.

    Raises UserError as load_checkpoint does.
    """
    checkpoint = load_checkpoint(path)
    for name in ("optimizers", "scaler"):
        checkpoint.pop(name, None)
    model = DenseFormer(DenseFormerConfig(**checkpoint["model_config"]))
    model.load_state_dict(checkpoint["model"])
    return model.to(device).eval(), from_state(checkpoint["tokenizer"]), checkpoint


@torch.no_grad()
def load_weights(model: DenseFormer, weights: dict[str, Any]):
    """Load the weights of a model whose DWA pattern may differ.

    A row of alpha of which the other model has no entry stays as initialized; in other rows, the
    alphas that only this model has are 0.
    """
    alpha = model.dwa.alpha
    initial = alpha.clone()
    model.load_state_dict(weights)
    for i, row in enumerate(model.dwa.rows):
        kept = alpha[i, row].clone()
        alpha[i] = initial[i]
        if kept.any():
            alpha[i, row] = kept


def load_state(checkpoint: dict[str, Any], model: DenseFormer, optimizers: list, scaler: Any):
    """Load what --resume needs. Weight decay and betas stay those of the flags.

    Raises UserError for a best.pt, which does not have it.
    """
    if "optimizers" not in checkpoint:
        raise UserError("--resume needs a last.pt; from a best.pt, use --init_from")
    model.load_state_dict(checkpoint["model"])
    for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict(state | {"param_groups": groups})
    if checkpoint["scaler"]:
        scaler.load_state_dict(checkpoint["scaler"])


def lock_folder(out_dir: Path) -> contextlib.AbstractContextManager:
    """Make the folder, if necessary, and return a context that keeps other runs out of it. Raises
    UserError if another run is training there."""
    out_dir.mkdir(parents=True, exist_ok=True)
    if RANK > 0:
        return contextlib.nullcontext()
    try:
        return FileLock(out_dir / ".lock").acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"another run is training in {out_dir}: wait for it, or use another --out_dir"
        ) from None


class Run:
    """What a run writes: best.pt, last.pt and log.jsonl. Only rank 0 writes.

    best.pt has the lowest validation loss. All evaluations read the same tokens, eval_iters steps'
    worth, the one at the last step too, so that their losses can be compared.
    """

    # what the scripts write beside these, and --overwrite removes
    OTHERS = ("loss.png", "pruned.pt", "alpha.png", "alpha-steps.png", "cosine.png", "dropped.png",
              "singular.png")  # fmt: skip

    def __init__(self, config: Any, model: DenseFormer, tokenizer: Tokenizer, fingerprint: str):
        self.out_dir, self.model = Path(config.out_dir), model
        self.best_val_loss: float = math.inf
        self.facts: dict[str, Any] = {
            "model_config": asdict(model.config), "train_config": asdict(config),
            "tokenizer": tokenizer.state(), "fingerprint": fingerprint,
        }  # fmt: skip

    def resume(self, checkpoint: dict[str, Any]):
        """Continue the run of this checkpoint, and its log."""
        self.best_val_loss = checkpoint["best_val_loss"]
        if RANK > 0:
            return
        trim_log(self.out_dir / "log.jsonl", checkpoint["step"])
        self.write(checkpoint["step"], val_loss=checkpoint["val_loss"])
        dataset = self.facts["train_config"]["dataset"]
        if dataset != checkpoint["train_config"]["dataset"]:  # it has moved
            files = [self.out_dir / name for name in ("best.pt", "last.pt")]
            for file in filter(Path.exists, files):
                content = load_checkpoint(file)
                content["train_config"]["dataset"] = dataset
                save_checkpoint(file, content)

    def save(self, step: int, val_loss: float | None, optimizers: list, scaler: Any):
        """Save last.pt; and best.pt, if the validation loss, where known, is the lowest so far.

        Raises UserError if the loss or a weight is not finite, or the disk is full.
        """
        losses = [] if val_loss is None else [val_loss]
        self.check_finite(step, [torch.tensor(losses), *self.model.parameters()])
        is_best = min(losses, default=math.inf) < self.best_val_loss
        self.best_val_loss = min([self.best_val_loss, *losses])
        if RANK > 0:
            return
        best = self.facts | {
            "model": self.model.state_dict(), "step": step, "val_loss": val_loss,
            "best_val_loss": self.best_val_loss,
        }  # fmt: skip
        states = [optimizer.state_dict() for optimizer in optimizers]  # twice the size of the model
        if is_best or step == 0:
            save_checkpoint(self.out_dir / "best.pt", best)
        last = best | {"optimizers": states, "scaler": scaler.state_dict()}
        save_checkpoint(self.out_dir / "last.pt", last)
        if step == 0:  # until here, --overwrite has kept the old run
            trim_log(self.out_dir / "log.jsonl", step)
            for name in self.OTHERS:
                (self.out_dir / name).unlink(missing_ok=True)
        self.write(step=step, val_loss=val_loss)

    def start_clock(self):
        self.time, self.tokens = time.perf_counter(), 0

    def log(self, step: int, loss: Tensor, lr: float):
        """Print and write the loss, and the speed since the clock was started, which counts
        self.tokens. Raises UserError if the loss is not finite."""
        mean = all_reduce(loss.item()) / WORLD_SIZE  # waits for the GPU
        self.check_finite(step, [torch.tensor(mean)])
        speed = self.tokens / max(time.perf_counter() - self.time, 1e-9)
        peak = peak_flops(loss.device)
        mfu = peak and speed * self.model.flops_per_token() / (peak * WORLD_SIZE)
        say(f"step {step}: loss {mean:.4f}, lr {lr:.1e}, {speed:,.0f} tokens/s"
            f"{f', mfu {mfu:.1%}' if mfu else ''}")  # fmt: skip
        self.write(step=step, loss=mean, lr=lr, tokens_per_second=round(speed), mfu=mfu)
        self.start_clock()

    def check_finite(self, step: int, tensors: Iterable[Tensor]):
        if not all(t.isfinite().all() for t in tensors):
            raise UserError(
                f"training has diverged at step {step}: a loss or a weight is not finite. "
                f"{self.out_dir}/last.pt is still good; try a lower --learning_rate or more "
                f"--warmup_iters"
            )

    def write(self, step: int, **entry: Any):
        """Append a line to log.jsonl, with what is not None."""
        known = {name: value for name, value in entry.items() if value is not None}
        if RANK == 0 and known:
            with (self.out_dir / "log.jsonl").open("a") as file:
                file.write(json.dumps({"step": step} | known) + "\n")


def trim_log(path: Path, step: int):
    """Drop what log.jsonl holds beyond a checkpoint at `step`, and validation losses at `step`."""
    kept = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, TypeError, KeyError):  # the last line may be cut short
            entry = json.loads(line)
            if entry["step"] < step or (entry["step"] == step and {"loss", "alpha"} & entry.keys()):
                kept.append(line + "\n")
    with open_new(path) as file:
        file.write("".join(kept).encode())
