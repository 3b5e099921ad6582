"""Command-line flags, and the entry point shared by all scripts.

The fields of a settings dataclass are the flags of a script:

    @dataclass
    class TrainConfig:
        n_layer: int = flag(8, "number of blocks", low=1)
        ...

    flags = parse_flags(TrainConfig, argv, __doc__)     {name: value} of the flags given
    config = TrainConfig(**flags)
"""

import argparse
import math
import os
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import Field, field, fields
from pathlib import Path
from typing import Any, NoReturn, get_args

import torch

from lib.files import UserError


class UsageError(UserError):
    """A wrong command line. The exit status is 2."""


def flag(default, help: str, low=None, below=math.inf, choices=None, read=None):
    """Return a dataclass field that becomes a flag, with low <= value < below if low is given.

    read converts the text of the flag, in place of the type of the field.
    """
    metadata = {"help": help, "low": low, "below": below, "choices": choices, "read": read}
    return field(default=default, metadata=metadata)


def path(text: str) -> str:
    """Return a path with the home folder for ~, which no shell replaces in --flag=~/folder."""
    return os.path.expanduser(text)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message.removeprefix('argument ')}; --help lists the flags")


def parse_flags(
    settings: type, argv: list[str] | None, description: str, epilog: str = ""
) -> dict[str, Any]:
    """Return {name: value} of the flags in argv, or of the command line if argv is None.

    Raises UsageError, in one sentence, for an unknown flag or a wrong value.
    """
    program = getattr(sys.modules["__main__"].__spec__, "name", sys.argv[0])  # of python -m, or not
    parser = Parser(
        description=description, epilog=epilog, allow_abbrev=False,
        usage=f"{program} [--flag value] [--flag=value] ...",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=38, width=100
        ),
    )  # fmt: skip
    for f in fields(settings):
        help, choices = f.metadata["help"].replace("%", "%%"), f.metadata["choices"]
        read = reader(f)
        options: dict[str, Any] = {"metavar": "|".join(choices or [read.__name__.upper()])}
        if bool in (f.type, *get_args(f.type)):  # --compile, --compile=False and --compile false
            options |= {"nargs": "?", "const": True}
        parser.add_argument(
            f"--{f.name}", type=read, choices=choices, default=argparse.SUPPRESS, **options,
            help=help if f.default is None else f"{help} (default: {f.default})",
        )  # fmt: skip
    return vars(parser.parse_args(argv))


def reader(f: Field) -> Callable[[str], Any]:
    """Return a function that converts the text of a flag and checks its range."""
    low, below = f.metadata["low"], f.metadata["below"]
    kind = f.metadata["read"] or (get_args(f.type) or (f.type,))[0]

    def read(text: str):
        if not text:
            raise argparse.ArgumentTypeError("is empty; omit the flag to use its default")
        value = bool(("false", "true").index(text.lower())) if kind is bool else kind(text)
        if low is not None and not low <= value < below:
            limits = f"at least {low}" + (f" and below {below}" if below < math.inf else "")
            raise argparse.ArgumentTypeError(f"must be {limits}, not {text}")
        return value

    read.__name__ = kind.__name__  # argparse: "invalid int value: '1.5'"
    return read


def run_cli(main: Callable[[], int | None]) -> NoReturn:
    """Run main() and exit with its status.

    Errors that users can cause are reported in one sentence, without a traceback.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # see the first lines of a script
    if int(os.environ.get("RANK", 0)) > 0:  # under torchrun, only rank 0 prints
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if "inline" in os.environ.get("MPLBACKEND", "") and "ipykernel" not in sys.modules:
        del os.environ["MPLBACKEND"]  # `!python` in a notebook: only its kernel may have this
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # its encoding may not cover the text
            stream.reconfigure(errors="replace")
    status, message = 1, ""
    try:
        status = main() or 0
        sys.stdout.flush()
    except UserError as error:
        status, message = (2 if isinstance(error, UsageError) else 1), str(error)
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:  # stdout was closed, as by `| head`: do not flush it again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        message = f"{error.filename or 'cannot read or write a file'}: {error.strerror or error}"
    except (MemoryError, RuntimeError) as error:
        message = advice(error)
        if not message:
            raise
    if message:
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(status)


def advice(error: Exception) -> str:
    """Return what to do about an error of torch or numpy, or "" for an unknown one."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    if isinstance(error, kinds) or "can't allocate memory" in str(error):  # the latter on a CPU
        return (
            "out of memory: use a smaller batch (in train.py, lower --batch_size and raise "
            "--gradient_accumulation_steps by the same factor)"
        )
    if "loading state_dict" in str(error):
        return "the weights are of another model: only lab/variants.py loads those that it trained"
    if re.search(r"C(\+\+)? compiler", str(error)):
        return (
            "torch.compile and Triton need a C compiler: install one, or use --compile=False "
            "--dwa_impl inplace"
        )
    return ""
