"""Helpers that run the scripts and read their output."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

from lib.checkpoint import load_checkpoint

HERE = Path(__file__).parent.parent
SHARED = HERE.parent / "shared" / "data"  # real texts, where available

SMALL = {
    "n_layer": 3, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 4, "device": "cpu",
    "max_iters": 40, "eval_interval": 10, "log_interval": 5, "learning_rate": 3e-3,
}  # fmt: skip


def write_text(file):
    """Write a text to train on, and return its path."""
    words = np.random.default_rng(0).choice(["to ", "be ", "or ", "not\n", "that "], 2000)
    file.write_text("".join(words))
    return str(file)


def flags(**settings):
    return [f"--{name}={value}" for name, value in settings.items()]


def script(*args, **options):
    """Run a script in its own process, in the current directory."""
    command = [sys.executable, str(HERE / args[0]), *args[1:]]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def write_program(file, settings, *lines):
    """Write a program that runs these lines, then train.py with these settings, and at its exit
    prints the names of its threads."""
    file.write_text("\n".join([
        "import atexit, datetime, os, pathlib, signal, sys, time",
        f"sys.path.insert(0, {str(HERE)!r})",
        "import train",
        "from lib import checkpoint, flags, processes",
        "def show_threads():",
        "    names = (file.read_text() for file in pathlib.Path('/proc/self/task').glob('*/comm'))",
        "    print('threads:', *names, file=sys.stderr)",
        "atexit.register(show_threads)",
        f"settings = {settings!r}",
        *lines,
        "flags.run_cli(lambda: train.main(settings))",
    ]))  # fmt: skip
    return file


def torchrun(n, *args, program=HERE / "train.py"):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={n}", str(program), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def run_ranks(n, program):
    """Run a program in n processes, without a launcher that ends all if one fails. Return
    (status, stderr) of each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    same = os.environ | {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(n)}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(program)], env=same | {"RANK": str(rank)}, text=True,
            stderr=subprocess.PIPE,
        )
        for rank in range(n)
    ]  # fmt: skip
    try:
        return [(rank.wait(120), rank.stderr.read()) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


def weights(out_dir):
    return load_checkpoint(Path(out_dir) / "last.pt")["model"]


def log(out_dir):
    return [json.loads(line) for line in (Path(out_dir) / "log.jsonl").read_text().splitlines()]


def losses(out_dir):
    """Return (step, training loss or None, validation loss or None) of each line of the log."""
    kinds = {"loss", "val_loss"}
    return [(e["step"], e.get("loss"), e.get("val_loss")) for e in log(out_dir) if kinds & e.keys()]


def same_weights(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)
