"""Helpers that run the scripts and read their output."""

import json
import os
import signal
import socket
import subprocess
import sys
from multiprocessing.pool import ThreadPool
from pathlib import Path

import pytest

import train
from lib.checkpoint import load_checkpoint

HERE = Path(__file__).parent.parent

SMALL = {
    "n_layer": 3, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 4, "device": "cpu",
    "max_iters": 40, "eval_interval": 10, "log_interval": 5, "learning_rate": 1e-2,
    "warmup_iters": 5,
}  # fmt: skip


def flags(**settings):
    return [f"--{name}={value}" for name, value in settings.items()]


def script(*args, **options):
    command = [sys.executable, *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, **options)


def spawn(n, settings, program, **environment):
    """Run a program, and then train.py with these settings, in n processes without a launcher,
    which would end all if one fails."""
    imports = "import atexit, gc, os, signal, sys, time, train\nfrom lib import flags, processes"
    start = f"settings = {settings}\n{program}\nflags.run_cli(lambda: train.main(settings))"
    with socket.create_server(("localhost", 0)) as free:
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    same = os.environ | address | {"PYTHONPATH": str(HERE), "WORLD_SIZE": str(n)} | environment

    def run(rank):
        return script("-c", f"{imports}\n{start}", env=same | {"RANK": str(rank)})

    with ThreadPool(n) as pool:
        return pool.map(run, range(n))


def weights(out_dir):
    return load_checkpoint(out_dir / "last.pt")["model"]


def signal_in(step, number):
    """Send this process a signal in that step of training."""

    def get_lr(now, config, real=train.get_lr):
        if now == step:
            signal.raise_signal(number)
        return real(now, config)

    train.get_lr = get_lr


def log(out_dir):
    return [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]


def losses(out_dir):
    """Return (step, training loss or None, validation loss or None) for lines of the log."""
    kinds = {"loss", "val_loss"}
    return [(e["step"], e.get("loss"), e.get("val_loss")) for e in log(out_dir) if kinds & e.keys()]


def close(run, expected, rel=1e-3):
    for ours, theirs in zip(losses(run), losses(expected), strict=True):
        assert [x for x in ours if x] == pytest.approx([x for x in theirs if x], rel=rel)
