"""The README: every command, with short settings, all code, and the budgets."""

import importlib
import re
import shlex
import sys

import pytest
import torch
from torch import nn

import denseformer
import sample
import train
from lab import analyze, bench
from tests.helpers import HERE, script

README = (HERE / "README.md").read_text()
SCRIPTS = {"train.py": train, "sample.py": sample, "lab.analyze": analyze, "lab.bench": bench}
SHORT = {
    "train.py": ["--max_iters=2", "--warmup_iters=1", "--eval_iters=1", "--final_eval_iters=1"],
    "sample.py": ["--max_new_tokens=10"],
    "lab.analyze": ["--tokens=200"],
    "lab.bench": ["--rounds=1", "--n_layer=5", "--n_embd=16", "--batch_size=1"],
}


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def code(part):
    """Return the only Python block that contains this text."""
    (block,) = [block for block in blocks("python") if part in block]
    return block


def shorten(script, args):
    """Return the arguments, followed by others that shorten the run."""
    if "--resume" in args:
        return [*args, "--max_iters=3"]
    new = [*args, *SHORT[script]]
    if script == "train.py" and "--init_from" not in args:
        new += ["--n_embd=16", "--n_head=2", "--block_size=16", "--batch_size=2"]
        new += ["--dataset=my.txt"] + ([] if "--n_layer" in args else ["--n_layer=4"])
    return new


def test_the_commands_run(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "my.txt").write_text("ROMEO: to be, or not to be\n" * 100)
    (tmp_path / "prompt.txt").write_text("to be")
    packages = " ".join((HERE / f"requirements{end}.txt").read_text() for end in ("", "-dev"))
    first, *others = blocks("sh")  # .ci/run runs the first block as it stands
    assert first.count("\n") == 2
    train.main([*shorten("train.py", []), "--device=cpu"])  # which it begins with
    commands = [shlex.split(line, comments=True) for line in "".join(others).splitlines()]
    assert len(commands) >= 10
    for program, *args in commands:
        if program == "pip":
            assert args[0] == "install"
            assert all(name in packages for name in args[1:])
        elif program == "torchrun":
            assert args[:3] == ["--standalone", "--nproc_per_node", "8"]
            two = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
            run = script(*two, HERE / args[3], *shorten(args[3], args[4:]), "--device=cpu")
            assert run.returncode == 0, run.stderr
        else:
            assert program == "python"
            name, *args = args[args[0] == "-m" :]
            assert not SCRIPTS[name].main([*shorten(name, args), "--device=cpu"]), args
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
    assert (network.dwa.alpha.grad != 0)[1:].equal(torch.ones(9, 9, dtype=torch.bool).tril()[1:])


def test_the_model_and_the_hooks_in_other_code(monkeypatch):
    namespace = {"idx": torch.zeros(1, 3, dtype=torch.long), "targets": torch.ones(1, 3).long()}
    exec(code("DenseFormerConfig("), namespace)
    assert namespace["idx"].shape == (1, 103)
    transformers = pytest.importorskip("transformers")
    gpt2 = transformers.GPT2LMHeadModel
    small = transformers.GPT2Config(vocab_size=17, n_layer=2, n_head=2, n_embd=8)
    monkeypatch.setattr(gpt2, "from_pretrained", lambda name: gpt2(small))
    namespace = {"GPT2LMHeadModel": gpt2}
    exec(code("add_dwa"), namespace)
    assert namespace["model"](torch.zeros(1, 3, dtype=torch.long)).logits.shape == (1, 3, 17)
    assert namespace["model"].dwa.n_layer == 2


def test_the_recipe_for_a_new_pattern(tmp_path, monkeypatch):
    recipe = code('pattern == "powers"')
    source, end = (HERE / "denseformer.py").read_text(), '    elif pattern != "none":\n'
    assert source.count(end) == 1
    (tmp_path / "denseformer_with_powers.py").write_text(source.replace(end, recipe + end))
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("denseformer_with_powers")
    assert module.dwa_rows("powers", 9)[9] == [1, 5, 7, 8, 9]
    assert module.dwa_rows("4x5", 9) == denseformer.dwa_rows("4x5", 9)


def count(source):
    """Return the lines of code: no blanks, comments and docstrings."""
    source = re.sub(r'^ *""".*?"""', "", source, flags=re.M | re.S)
    return len(re.findall(r"^ *[^#\s]", source, re.M))


def test_the_budgets():
    files = {str(p.relative_to(HERE)): p.read_text() for p in HERE.rglob("*.py")}
    files = {name: text for name, text in files.items() if not name.startswith((".", "venv"))}
    tests = [text for name, text in files.items() if "test" in name]
    code = {name: count(text) for name, text in files.items() if "test" not in name}
    model = files["denseformer.py"]
    sections = re.split("^# -+\n", model, flags=re.M)
    found = [
        code["denseformer.py"],
        sum(count(part) for part in sections if re.match("# Depth-weighted|# In place", part)),
        code["train.py"],
        sum(n for name, n in code.items() if name.startswith("data/")),
        sum(code.values()),
        len(README.splitlines()),
        sum(len(text.splitlines()) for text in tests),
    ]
    (text,) = re.findall(r"Budgets, in lines of code: (.*?)\. A test", README, re.S)
    budgets = [int(n.replace(",", "")) for n in re.findall(r"\b(\d[\d,]*)\b", text)]
    assert len(budgets) == len(found)
    assert all(n <= budget for n, budget in zip(found, budgets, strict=True)), (found, budgets)
    assert sorted(name for name in files if "/" not in name) == [
        "denseformer.py", "sample.py", "test_denseformer.py", "train.py"
    ]  # fmt: skip
    names = set(re.findall(r"^ *(?:import|from) (\w+)", model, re.M))
    assert names - sys.stdlib_module_names == {"torch"}
