"""What runs differently on a GPU: CUDA graphs, 16-bit training, signals. Skipped without one."""

import signal

import pytest
import torch

import train
from tests.helpers import SMALL, close, flags, signal_in

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize(
    "setting",
    ["--dwa=none", "--dwa=1x1", "--dwa=[[],[],[],[0,1]]", "--gradient_accumulation_steps=2"],
)
def test_graphs_train_as_eager_mode_does(text, tmp_path, setting):
    same = flags(**SMALL | {"device": "cuda", "dwa_start_iter": 3}, dataset=text, dtype="float32")
    for run in ("True", "False"):
        assert train.main([*same, setting, f"--out_dir={tmp_path / run}", f"--compile={run}"]) == 0
    close(tmp_path / "True", tmp_path / "False", rel=1e-2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_run_that_resumes_goes_on_with_the_same_masks(text, tmp_path, dtype):
    same = flags(**SMALL | {"device": "cuda"}, dataset=text, dtype=dtype, dropout=0.2)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train.main([*same, f"--out_dir={whole}"]) == 0
    signal_in(12, signal.SIGINT)
    assert train.main([*same, f"--out_dir={parts}"]) == 128 + signal.SIGINT
    assert train.main(["--resume", f"--out_dir={parts}"]) == 0
    close(parts, whole, rel=1e-2)
