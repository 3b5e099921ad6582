"""Fixtures for the tests of the data and of the scripts."""

import itertools
import os
import re
import shutil
import signal
import sys

import pytest
import torch

import train
from lib.flags import run_cli
from tests.helpers import SMALL, flags, write_text

# Models this small gain nothing from threads, which wait for each other on a busy machine. Scripts
# that run in their own process read the environment variable.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Run each test in a folder of its own: the checkout's may contain a user's runs and data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DENSEFORMER_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def quick_end(monkeypatch):
    """Skip the plot and the sample at the end of a run, which take longer than the run."""
    monkeypatch.setattr(train, "show_run", lambda *args: None)


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path / "my.txt")


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with my.txt and two finished runs, dense and plain. Do not change it."""
    folder = tmp_path_factory.mktemp("trained")
    same = SMALL | {"dataset": write_text(folder / "my.txt"), "dtype": "float32"}
    for name, dwa in (("dense", "1x1"), ("plain", "none")):
        assert train.main(flags(**same, out_dir=folder / name, dwa=dwa)) == 0
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the run dense, to damage or to resume."""
    return shutil.copytree(trained / "dense", tmp_path / "run")


@pytest.fixture
def signal_at(monkeypatch):
    """signal_at(number, name, n) sends this process a signal at the n-th call of train.name."""

    def arm(number, name, n):
        real, calls = getattr(train, name), itertools.count(1)

        def interrupted(*args):
            if next(calls) == n:
                signal.raise_signal(number)
            return real(*args)

        monkeypatch.setattr(train, name, interrupted)

    return arm


@pytest.fixture
def fails(monkeypatch, capsys):
    """Call a script's main as from the command line. It must end with this status, and with one
    sentence on stderr in which each of these regular expressions is found."""

    def call(script, *args, says=(), status=1):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, args)])
        with pytest.raises(SystemExit) as exit:
            run_cli(script.main)
        words = capsys.readouterr().err
        assert exit.value.code == status, (args, words)
        assert words.count("\n") == 1, (args, words)
        assert len(words) > 20, (args, words)
        for part in says:
            assert re.search(part, words), (args, words)

    return call
