"""How the tests run the scripts, and read what they left."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np

import common

HERE = Path(__file__).parent.parent

SMALL = {
    "n_layer": 3, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 4, "device": "cpu",
    "max_iters": 40, "eval_interval": 10, "log_interval": 5, "learning_rate": 3e-3,
}  # fmt: skip


def write_text(file):
    """A text to train on; returns its path."""
    words = np.random.default_rng(0).choice(["to ", "be ", "or ", "not\n", "that "], 2000)
    file.write_text("".join(words))
    return str(file)


def flags(**settings):
    return [f"--{name}={value}" for name, value in settings.items()]


def script(*args, **options):
    """A script as its own process, as a user runs it, from a folder that is not its own."""
    command = [sys.executable, str(HERE / args[0]), *args[1:]]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def weights(out_dir):
    return common.load_checkpoint(Path(out_dir) / "last.pt")["model"]


def losses(out_dir):
    lines = [json.loads(line) for line in (Path(out_dir) / "log.jsonl").read_text().splitlines()]
    return [(e["step"], e.get("loss"), e.get("val_loss")) for e in lines if "alpha" not in e]


FAULTS = Counter()


def survived(what):
    """Count a fault that was tried and did no harm, for the table at the end of the tests."""
    FAULTS[what] += 1
