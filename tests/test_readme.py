"""Every command and all code in the README, with short settings."""

import importlib
import re
import shlex
import subprocess
import sys

import pytest
import torch
from torch import nn

import denseformer
import sample
import train
from lab import analyze, bench
from tests.helpers import HERE, torchrun

README = (HERE / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def code(part):
    """Return the only Python block that contains this text."""
    (block,) = [block for block in blocks("python") if part in block]
    return block


def shorten(script, args):
    """Return the arguments, followed by others that shorten the run."""
    if script == "bench.py":
        return [*args, "--n_layer=5", "--n_embd=64", "--block_size=64", "--rounds=1"]
    if script == "sample.py":
        return [*args, "--max_new_tokens=10"]
    if script == "analyze.py":
        return [*args, "--tokens=200"]
    short = ["--max_iters=2", "--eval_iters=1"]
    if "--resume" in args:
        return [*args, "--max_iters=3"]
    if "--init_from" in args:
        return [*args, *short]
    short += ["--n_embd=16", "--n_head=2", "--block_size=16", "--batch_size=2"]
    short += [] if "--n_layer" in args else ["--n_layer=4"]
    return [*args, *short, "--dataset=my.txt"]


def test_the_commands_run(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    (tmp_path / "my.txt").write_text("ROMEO: to be, or not to be\n" * 100)
    (tmp_path / "prompt.txt").write_text("to be")
    packages = (HERE / "requirements-dev.txt").read_text().split()
    scripts = {"train.py": train, "sample.py": sample, "analyze.py": analyze, "bench.py": bench}
    commands = [shlex.split(line, comments=True) for line in "".join(blocks("sh")).splitlines()]
    assert len(commands) > 15
    for command in commands:
        program, *args = command
        if program == "pip":
            assert args[0] == "install"
            assert args[1:] == ["-r", "requirements.txt"] or set(args[1:]) <= set(packages)
        elif program == "torchrun":
            assert args[:3] == ["--standalone", "--nproc_per_node", "8"]
            run = torchrun(2, *shorten(args[3], args[4:]), "--device=cpu")
            assert run.returncode == 0, (command, run.stderr)
        else:
            assert program == "python"
            script, *args = args
            assert not scripts[script].main([*shorten(script, args), "--device=cpu"]), command
    for name in ("out/alpha.png", "out/pruned.pt", "out-pruned/last.pt"):
        assert (tmp_path / name).exists(), name


def test_the_three_lines_make_a_denseformer():
    namespace = {"nn": nn, "Block": lambda: nn.Linear(8, 8)}
    exec(code("class Network"), namespace)
    network, x = namespace["Network"](8), torch.randn(2, 3, 8)
    plain = x
    for block in network.blocks:
        plain = block(plain)
    torch.testing.assert_close(network(x), plain)  # initially the same network
    network(x).sum().backward()
    assert (network.dwa.alpha.grad != 0).equal(network.dwa.mask)


def test_the_optimizer_does_not_decay_alpha():
    network = nn.ModuleDict({"dwa": denseformer.DWA(3), "block": nn.Linear(4, 4)})
    namespace = {"torch": torch, "network": network}
    exec(code("torch.optim"), namespace)
    before = [p.clone() for p in network.parameters()]
    for p in network.parameters():
        p.grad = torch.zeros_like(p)
    namespace["optimizer"].step()  # decay alone changes parameters
    changed = [not p.equal(q) for p, q in zip(network.parameters(), before, strict=True)]
    assert changed == [False, True, True]  # alpha, weight, bias


def test_the_model_in_other_code():
    namespace = {"idx": torch.zeros(1, 3, dtype=torch.long), "targets": torch.ones(1, 3).long()}
    exec(code("DenseFormerConfig("), namespace)
    assert namespace["idx"].shape == (1, 103)


def test_the_recipe_for_a_new_pattern(tmp_path, monkeypatch):
    recipe = code('part == "powers"')
    source, end = (HERE / "denseformer.py").read_text(), '        elif pattern != "none":\n'
    assert source.count(end) == 1
    (tmp_path / "denseformer_with_powers.py").write_text(source.replace(end, recipe + end))
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("denseformer_with_powers")
    assert module.dwa_rows("powers", 9)[8] == [1, 5, 7, 8, 9]
    assert module.dwa_rows("4x5", 9) == denseformer.dwa_rows("4x5", 9)


def test_the_model_needs_only_torch():
    source = (HERE / "denseformer.py").read_text()
    names = set(re.findall(r"^ *(?:import|from) (\w+)", source, re.M))
    assert names - sys.stdlib_module_names == {"torch", "triton"}


def test_the_bench_needs_nothing_for_data(tmp_path):
    program = f"import sys; sys.path.insert(0, {str(HERE)!r}); import bench; print(*sys.modules)"
    command = [sys.executable, "-c", program]
    imported = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert not {"requests", "filelock", "data"} & set(imported.stdout.split())
