"""Fixtures for the tests of the data and of the scripts."""

import os
import re
import shutil
import sys

import numpy as np
import pytest
import torch

import train
from lib.flags import run_cli
from tests.helpers import SMALL, flags

# Models this small gain nothing from threads. Processes of their own read the variable.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
train.show_run = lambda *args: None  # the plot and the sample take longer than the run


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Run each test in a folder of its own: the checkout's may contain a user's runs and data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DENSEFORMER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(train, "get_lr", train.get_lr)  # undo signal_in


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with my.txt and two finished runs, dense and plain. Do not change it."""
    folder = tmp_path_factory.mktemp("trained")
    words = np.random.default_rng(0).choice(["to ", "be ", "or ", "not\n", "that "], 2000)
    (folder / "my.txt").write_text("".join(words))
    same = SMALL | {"dataset": folder / "my.txt"}
    for name, dwa in (("dense", "1x1"), ("plain", "none")):
        assert train.main(flags(**same, out_dir=folder / name, dwa=dwa)) == 0
    return folder


@pytest.fixture
def text(trained, tmp_path):
    return str(shutil.copy(trained / "my.txt", tmp_path))


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the run dense, to damage or to resume."""
    return shutil.copytree(trained / "dense", tmp_path / "run")


@pytest.fixture
def fails(monkeypatch, capsys):
    """Call a script's main, which must end with this status and one sentence: it contains says."""

    def call(script, *args, says, status=1):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, args)])
        with pytest.raises(SystemExit) as exit:
            run_cli(script.main)
        words = capsys.readouterr().err
        assert (exit.value.code, words.count("\n")) == (status, 1), (args, words)
        assert re.search(says, words), (args, words)

    return call
