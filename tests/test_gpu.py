"""What runs differently on a GPU: CUDA graphs, 16-bit training, signals. Skipped without one."""

import signal

import pytest
import torch

import train
from lib.checkpoint import load_checkpoint
from tests.helpers import SMALL, flags, losses, weights

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("dwa", ["none", "1x1", "[[],[],[],[0,1]]"])  # block 2 is unused
def test_graphs_train_as_eager_mode_does(text, tmp_path, optimizer, dwa):
    same = SMALL | {"device": "cuda", "dtype": "float32"}
    same |= {"optimizer": optimizer, "dwa": dwa, "dwa_start_iter": 3}
    for name in ("graphs", "eager"):
        new = flags(**same, dataset=text, out_dir=tmp_path / name, compile=name == "graphs")
        assert train.main(new) == 0
    for ours, eager in zip(losses(tmp_path / "graphs"), losses(tmp_path / "eager"), strict=True):
        assert ours[0] == eager[0]
        assert [x for x in ours if x] == pytest.approx([x for x in eager if x], rel=1e-2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_run_that_resumes_goes_on_with_the_same_masks(text, tmp_path, signal_at, dtype):
    same = SMALL | {"device": "cuda", "dtype": dtype, "dropout": 0.2, "optimizer": "muon"}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train.main(flags(**same, dataset=text, out_dir=whole)) == 0
    signal_at(signal.SIGINT, "get_lr", 13)
    new = flags(**same, dataset=text, out_dir=parts)
    assert train.main(new) == 128 + signal.SIGINT
    assert load_checkpoint(parts / "last.pt")["step"] == 13
    assert train.main(["--resume", f"--out_dir={parts}"]) == 0
    for ours, expected in zip(losses(parts), losses(whole), strict=True):
        assert ours[0] == expected[0]
        assert [x for x in ours if x] == pytest.approx([x for x in expected if x], rel=1e-2)
    assert all(w.isfinite().all() for w in weights(parts).values())


def test_gradients_are_not_accumulated_in_the_memory_of_a_graph(text, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "record", lambda *args: 1 / 0)
    same = SMALL | {"device": "cuda", "max_iters": 1}
    with pytest.raises(ZeroDivisionError):
        train.main(flags(**same, dataset=text, out_dir=tmp_path / "one"))
    same |= {"gradient_accumulation_steps": 2}
    assert train.main(flags(**same, dataset=text, out_dir=tmp_path / "two")) == 0
