"""What every test of the data and of the scripts begins with."""

import pytest

from tests.helpers import FAULTS, write_text


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DENSEFORMER_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path / "my.txt")


def pytest_terminal_summary(terminalreporter):
    if FAULTS:
        terminalreporter.section("faults tried and survived; a failed test is one that was not")
        for what, times in FAULTS.items():
            terminalreporter.line(f"{times:6,}  {what}")
