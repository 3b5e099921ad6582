"""Command-line flags, and the entry point shared by all scripts.

The fields of a settings dataclass are the flags of a script:

    @dataclass
    class TrainConfig:
        n_layer: int = flag(3, "number of blocks", low=1)
        ...

    overrides = parse_flags(TrainConfig, argv, __doc__)     {name: value} of the flags given
    config = TrainConfig(**overrides)
"""

import argparse
import contextlib
import difflib
import io
import math
import os
import sys
from collections.abc import Callable
from dataclasses import field, fields
from pathlib import Path
from typing import Any, NoReturn, get_args

import torch

from lib.files import UserError


class UsageError(UserError):
    """A wrong command line. The exit status is 2."""


# -----------------------------------------------------------------------------
# Flags


def flag(default, help: str, low=None, below=None, choices=None, path=False):
    """Return a dataclass field that becomes a flag, with low <= value < below.

    In a path, ~ becomes the home folder, since no shell does that in --flag=~/folder.
    """
    metadata = {"help": help, "low": low, "below": below, "choices": choices, "path": path}
    return field(default=default, metadata=metadata)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if message.endswith("expected one argument"):
            message += "; a value that begins with a dash needs the form --flag=VALUE"
        raise UsageError(message.removeprefix("argument "))


def parse_flags(
    settings: type, argv: list[str] | None, description: str, epilog: str = ""
) -> dict[str, Any]:
    """Return {name: value} of the flags in argv, or of the command line if argv is None.

    settings.GROUPS, if it exists, gives groups to --help: {first flag of the group: title}.
    Raises UsageError, in one sentence, for an unknown flag or a wrong value.
    """
    parser = Parser(
        description=description, epilog=epilog, allow_abbrev=False,
        usage=f"python {sys.argv[0]} [--flag value] [--flag=value] ...",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=38, width=100
        ),
    )  # fmt: skip
    group: Any = parser
    known = {f.name: f for f in fields(settings)}
    for f in known.values():
        if title := getattr(settings, "GROUPS", {}).get(f.name):
            group = parser.add_argument_group(title)
        kind, choices = (get_args(f.type) or (f.type,))[0], f.metadata["choices"]
        convert = os.path.expanduser if f.metadata["path"] else TYPES[kind]
        options = {"type": convert, "metavar": "|".join(choices or [kind.__name__.upper()])}
        if kind is bool:  # --compile, --compile=False and --compile false
            options |= {"nargs": "?", "const": True, "metavar": "BOOL"}
        unset = f.default is None or f.default is False or f.default == ""
        default = "" if unset else f" (default: {f.default})"
        help = f.metadata["help"] + default
        group.add_argument(
            f"--{f.name}", default=argparse.SUPPRESS, choices=choices,
            help=help.replace("%", "%%"), **options,
        )  # fmt: skip

    def normalize(word: str) -> str:  # --max-iters=3 is --max_iters=3; values stay as they are
        name, equals, value = word.partition("=")
        name = name[2:].replace("-", "_")
        return f"--{name}{equals}{value}" if word.startswith("--") and name in known else word

    flags, rest = parser.parse_known_args(
        [normalize(word) for word in (sys.argv[1:] if argv is None else argv)]
    )
    if rest:
        name = rest[0].split("=")[0]
        if not name.startswith("--"):
            raise UsageError(f"unexpected argument {rest[0]!r}: flags have the form --name value")
        near = difflib.get_close_matches(name[2:].replace("-", "_"), known, n=1)
        hint = f"did you mean --{near[0]}?" if near else "--help lists the flags"
        raise UsageError(f"unknown flag {name}; {hint}")
    for name, value in vars(flags).items():
        low, below = known[name].metadata["low"], known[name].metadata["below"]
        if value == "":
            raise UsageError(f"--{name} is empty; omit it to use the default")
        if low is not None and value < low:
            raise UsageError(f"--{name} must be at least {low}, not {value}")
        if below is not None and value >= below:
            raise UsageError(f"--{name} must be below {below}, not {value}")
    return vars(flags)


# argparse shows the names of these functions: "invalid integer value: '1.5'"


def integer(text: str) -> int:
    if abs(value := int(text)) >= 1 << 63:
        raise ValueError
    return value


def number(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError
    return value


def boolean(text: str) -> bool:
    if text.lower() not in ("true", "1", "yes", "false", "0", "no"):
        raise ValueError
    return text.lower() in ("true", "1", "yes")


TYPES: dict[type, Any] = {int: integer, float: number, bool: boolean, str: str}


# -----------------------------------------------------------------------------
# Entry point


def run_cli(main: Callable[[], int | None]) -> NoReturn:
    """Run main() and exit with its status.

    Errors that users can fix are reported in one sentence, without a traceback.
    """
    rank = int(os.environ.get("RANK", 0))
    with open(os.devnull, "w") as nowhere:
        # under torchrun, only rank 0 prints; a stream that was closed, as by >&-, is None
        sys.stdout = nowhere if rank > 0 else sys.stdout or nowhere
        sys.stderr = sys.stderr or nowhere
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # its encoding may not cover the text
                stream.reconfigure(errors="replace")
        # `!python` in a notebook inherits a backend that works only there
        os.environ["MPLBACKEND"] = "agg"
        status, message = 1, ""
        try:
            status = main() or 0
        except UserError as error:
            status, message = (2 if isinstance(error, UsageError) else 1), str(error)
        except KeyboardInterrupt:
            status = 130
        except BrokenPipeError:  # stdout was closed, as by `| head`
            pass
        except OSError as error:
            what = error.filename or "cannot read or write a file"
            message = f"{what}: {error.strerror or error}"
        except (MemoryError, RuntimeError) as error:
            message = explain(error)
            if not message:
                raise
        with contextlib.suppress(OSError):
            if message and (rank == 0 or status == 1):  # a wrong flag is reported by rank 0 only
                print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:  # otherwise the interpreter flushes again at exit and prints the error
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)


def explain(error: BaseException) -> str:
    """Return advice on an error from torch or numpy, or "" for an unknown one."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    if isinstance(error, kinds) or "can't allocate memory" in str(error):  # the latter on a CPU
        return (
            "out of memory: use a smaller batch (in train.py, lower --batch_size and raise "
            "--gradient_accumulation_steps by the same factor)"
        )
    if "captur" in str(error):
        reason = str(error).splitlines()[0]
        return f"a CUDA graph cannot record this: {reason} (train.py --compile=False uses none)"
    if "Failed to find C compiler" in str(error):
        return "Triton found no C compiler: install one, or use --compile=False --dwa_impl naive"
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        reason = " ".join(line.strip() for line in str(error).splitlines()[:2]).strip()
        return f"torch.compile failed: {reason}; --compile=False runs without it"
    return ""
