"""Runs on disk: checkpoints, saved atomically and loaded without running code, and a log."""

import contextlib
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from data.tokenizer import Tokenizer, from_state
from denseformer import DenseFormer, DenseFormerConfig
from lib.files import UserError, open_new

FORMAT = "denseformer-2"


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
        with zipfile.ZipFile(path) as archive:  # torch writes checksums but does not check them
            if archive.testzip():
                raise zipfile.BadZipFile
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        found = checkpoint["format"]
    except FileNotFoundError:
        raise UserError(f"no checkpoint found at {path}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except Exception:  # a damaged archive can fail in any way
        raise UserError(f"{path} is damaged or not a DenseFormer checkpoint") from None
    if found != FORMAT:
        raise UserError(
            f"{path} has format {found!r}, but this version reads only {FORMAT!r}: retrain the "
            f"model, or use the version that saved it"
        )
    return checkpoint


@contextlib.contextmanager
def checkpoint_errors(path: Path) -> Iterator[None]:
    """Convert errors from malformed checkpoints into UserError."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path} cannot be used with this version of DenseFormer: {type(error).__name__}: "
            f"{reason}"
        ) from None


def load_model(path: Path, device: torch.device) -> tuple[DenseFormer, Tokenizer, dict[str, Any]]:
    """Return the model in a checkpoint, in evaluation mode, its tokenizer, and the checkpoint
    without what only --resume needs.

    Raises UserError as load_checkpoint does.
    """
    checkpoint = load_checkpoint(path)
    for name in ("optimizers", "scaler"):
        checkpoint.pop(name, None)
    with checkpoint_errors(path):
        model = DenseFormer(DenseFormerConfig(**checkpoint["model_config"]))
        model.load_state_dict(checkpoint["model"])
        tokenizer = from_state(checkpoint["tokenizer"])
    return model.to(device).eval(), tokenizer, checkpoint


def load_weights(checkpoint: dict[str, Any], path: Path, model: DenseFormer, tokenizer: Tokenizer):
    """Load the weights of a checkpoint whose DWA pattern may differ from the model's.

    Alphas that only the model has start at 0, or, in rows where the checkpoint has none, at the
    identity. Raises UserError, which names the path, for another shape or tokenizer.
    """
    with checkpoint_errors(path):
        if checkpoint["tokenizer"] != tokenizer.state():
            raise UserError(f"{path} has a different tokenizer than the data")
        model.load_state_dict(checkpoint["model"])
    dwa = model.dwa
    with torch.no_grad():
        alpha = dwa.alpha.masked_fill(~dwa.mask, 0)
        dwa.alpha.copy_(torch.where(alpha.any(dim=1, keepdim=True), alpha, dwa.initial))


class Log:
    """log.jsonl: one JSON object per line."""

    def __init__(self, path: Path, step: int):
        """Open the log to append, dropping entries later than the checkpoint at `step`."""
        kept = []
        for line in path.read_text().splitlines() if step and path.exists() else []:
            with contextlib.suppress(ValueError, TypeError, KeyError):  # skip a truncated line
                entry = json.loads(line)
                if entry["step"] < step or (entry["step"] == step and "loss" in entry):
                    kept.append(line + "\n")
        with open_new(path) as file:
            file.write("".join(kept).encode())
        self.path = path

    def write(self, **entry):
        with self.path.open("a") as file:
            file.write(json.dumps({k: v for k, v in entry.items() if v is not None}) + "\n")
