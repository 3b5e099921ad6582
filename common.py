"""What the scripts share: how they start, flags, device and dtype, batches, checkpoints."""

import argparse
import contextlib
import difflib
import math
import os
import re
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import field, fields
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from data.tokenizer import DataError, Tokenizer, from_state
from denseformer import DenseFormer, DenseFormerConfig


class Stop(Exception):
    """Why a program could not go on, in one sentence for the person who started it."""


def start(main: Callable[[], int | None]) -> NoReturn:
    """Run main() of a script; what its user can cause ends in a sentence and status 1."""
    name = Path(sys.argv[0]).name
    try:
        sys.exit(main())
    except (Stop, DataError) as error:
        sys.exit(f"{name}: {error}")
    except torch.OutOfMemoryError:
        sys.exit(f"{name}: out of memory; smaller batches take less, and in train.py more "
                 f"--gradient_accumulation_steps make the same step of less")  # fmt: skip
    except BrokenPipeError:  # whoever read the output has read enough
        sys.stderr.close()
        sys.exit(1)
    except OSError as error:
        sys.exit(f"{name}: {error.filename or 'a file'}: {error.strerror or error}")


# -----------------------------------------------------------------------------
# Flags: a dataclass says all there is to know of them


def flag(default, help: str, low=None, choices=None, type=None):
    """A field of a settings dataclass that is a flag; `type` where the default is None."""
    type = type or default.__class__
    return field(
        default=default, metadata={"help": help, "low": low, "choices": choices, "type": type}
    )


class Parser(argparse.ArgumentParser):
    """--name value or --name=value for each field of the dataclass `settings`.

    given() reads the command line into a dict of those flags that were on it. What is wrong with
    a flag ends the program with one sentence and status 2.
    """

    def __init__(self, settings: type, description: str, epilog: str = ""):
        super().__init__(
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            usage="python %(prog)s [--flag value] [--flag=value] ...",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.names = [f.name for f in fields(settings)]
        for f in fields(settings):
            kind = f.metadata["type"]
            options = {"type": float_ if kind is float else kind, "metavar": kind.__name__.upper()}
            if kind is bool:  # --compile, --compile=False and --compile false
                options = {"type": bool_, "nargs": "?", "const": True, "metavar": "True|False"}
            if choices := f.metadata["choices"]:
                options |= {"choices": choices, "metavar": "|".join(choices)}
            help = f.metadata["help"] + ("" if f.default is None else f" (default: {f.default})")
            help = help.replace("%", "%%")
            self.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=help, **options)
        self.lows = {f.name: f.metadata["low"] for f in fields(settings)}

    def given(self, argv: list[str] | None = None) -> dict[str, Any]:
        words = []
        for word in sys.argv[1:] if argv is None else argv:
            name, equals, value = word.partition("=")
            if name.startswith("--"):  # --max-iters is --max_iters
                name = "--" + name[2:].replace("-", "_")
            words.append(name + equals + value)
        flags, rest = self.parse_known_args(words)
        for word in rest:
            name = word.split("=")[0]
            if not word.startswith("--"):
                self.error(f"what is {word!r}? Every setting is a flag: --name value")
            near = difflib.get_close_matches(name.lstrip("-"), self.names, n=1)
            hint = f"did you mean --{near[0]}?" if near else "--help lists the flags"
            self.error(f"there is no flag {name}; {hint}")
        for name, value in vars(flags).items():
            if self.lows[name] is not None and value < self.lows[name]:
                self.error(f"--{name} must be at least {self.lows[name]}, not {value}")
        return vars(flags)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message.removeprefix('argument ')}\n")


def float_(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def bool_(text: str) -> bool:
    if text.lower() not in ("true", "1", "yes", "false", "0", "no"):
        raise ValueError
    return text.lower() in ("true", "1", "yes")


float_.__name__, bool_.__name__ = "float", "bool"  # argparse names the type in its errors


# -----------------------------------------------------------------------------
# Device and dtype


def find_device(name: str) -> torch.device:
    """The device of that name, or for "auto" the best one here: cuda, else mps, else cpu.

    Raises ValueError where torch has no such device.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ValueError(f"--device {name}: this machine, or this torch, has none") from None
    return device


def find_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of that name, or for "auto" bfloat16 where the hardware has it, else float32."""
    if name != "auto":
        return getattr(torch, name)
    has = False
    if device.type == "cuda":
        has = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # torch 2.10
        features = torch.cpu.get_capabilities()
        has = bool(features.get("avx512_bf16") or features.get("amx_bf16"))
    return torch.bfloat16 if has else torch.float32


# Dense bfloat16 FLOPs a second, from the makers' data sheets; the first name that fits counts.
PEAK_FLOPS = {
    "B200": 2250e12, "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12,
    "L40S": 362e12, "L40": 181e12, "L4": 121e12, "A10": 125e12, "RTX 5090": 209e12,
    "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip


def peak_flops(device: torch.device) -> float | None:
    """The most FLOPs a second that the GPU can do, where it is one that we know."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    fits = (peak for gpu, peak in PEAK_FLOPS.items() if re.search(rf"\b{gpu}\b", name))
    return next(fits, None)


# -----------------------------------------------------------------------------
# Batches


def windows(tokens, starts, shape, device, vocab_size):
    """x, the windows of `tokens` that begin at `starts`, and y, the tokens that follow: (B, T).

    Where the tokens end or the starts are too few, y is -1, which counts for nothing: a compiled
    model then never meets a second shape. Raises DataError for a token that is none of vocab_size.
    """
    B, T = shape
    x, y = np.zeros((B, T), dtype=np.int64), np.full((B, T), -1, dtype=np.int64)
    for row, s in enumerate(starts):
        window = tokens[s : s + T + 1]
        x[row, : len(window) - 1] = window[:-1]
        y[row, : len(window) - 1] = window[1:]
    if (largest := max(x.max(), y.max())) >= vocab_size:
        raise DataError(f"the data has a token {largest}, and the last of its tokenizer is "
                        f"{vocab_size - 1}: it is damaged, or made by another one")  # fmt: skip
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    if device.type == "cuda":  # a copy from pinned memory does not hold up the CPU
        x, y = x.pin_memory(), y.pin_memory()
    return x.to(device, non_blocking=True), y.to(device, non_blocking=True)


def side_by_side(tokens, block_size, most):
    """Where windows of block_size begin that predict each token once; `most` of them at most,
    evenly spaced: the same each time."""
    starts = np.arange(0, len(tokens) - 1, block_size)
    if len(starts) > most:
        starts = starts[np.linspace(0, len(starts) - 1, most).astype(int)]
    return starts


# -----------------------------------------------------------------------------
# Checkpoints

FORMAT = "denseformer-2"


class CheckpointError(Stop):
    """Why a checkpoint cannot be used."""


def save_checkpoint(path: Path, checkpoint: dict):
    """Write the file whole or not at all: a crash at any moment leaves the one before it."""
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            torch.save({"format": FORMAT, **checkpoint}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise CheckpointError(f"cannot write {path}: {error}") from None
    finally:
        part.unlink(missing_ok=True)


def load_checkpoint(path: Path) -> dict:
    """What save_checkpoint wrote, on the CPU. Never runs code from the file.

    Raises CheckpointError, with the reason, for a file that is missing, damaged or foreign.
    """
    try:
        # torch does not check the checksums that it writes, so do it here.
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():
                raise zipfile.BadZipFile
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(checkpoint, dict):
            raise TypeError
        written = checkpoint["format"]
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint {path}") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    except Exception:  # a damaged archive can fail in any way
        raise CheckpointError(f"{path} is damaged, or no checkpoint of DenseFormer") from None
    if written != FORMAT:
        raise CheckpointError(
            f"{path} has the format {written!r}, which another version of this program wrote, not "
            f"{FORMAT!r}: train the model again, or use that version"
        )
    return checkpoint


@contextlib.contextmanager
def understood(path: Path) -> Iterator[None]:
    """Where what is in a checkpoint makes no sense, CheckpointError says so in one sentence."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{path} does not hold a run of this version of DenseFormer: "
            f"{type(error).__name__}: {reason}"
        ) from None


def load_model(path: Path, device: torch.device) -> tuple[DenseFormer, Tokenizer, dict]:
    """The trained model in a checkpoint, in evaluation mode, its tokenizer, and all of it.

    Raises CheckpointError as load_checkpoint does.
    """
    checkpoint = load_checkpoint(path)
    with understood(path):
        model = DenseFormer(DenseFormerConfig(**checkpoint["model_config"]))
        model.load_state_dict(checkpoint["model"])
        tokenizer = from_state(checkpoint["tokenizer"])
    return model.to(device).eval(), tokenizer, checkpoint
