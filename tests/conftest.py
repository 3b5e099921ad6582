"""What every test of the data and of the scripts begins with."""

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DENSEFORMER_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "my.txt"
    words = np.random.default_rng(0).choice(["to ", "be ", "or ", "not\n", "that "], 2000)
    file.write_text("".join(words))
    return str(file)
