"""What every test of the data and of the scripts begins with."""

import numpy as np
import pytest

from tests.helpers import FAULTS


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DENSEFORMER_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "my.txt"
    words = np.random.default_rng(0).choice(["to ", "be ", "or ", "not\n", "that "], 2000)
    file.write_text("".join(words))
    return str(file)


def pytest_terminal_summary(terminalreporter):
    if FAULTS:
        terminalreporter.section("faults tried and survived; a failed test is one that was not")
        for what, times in FAULTS.items():
            terminalreporter.line(f"{times:6,}  {what}")
