"""Does depth-weighted averaging help? The paper's comparison, in small, on your machine.

python results/run.py --train=--max_iters=1000       Tiny Shakespeare, 24 blocks of 48 channels
python results/run.py --name books --dataset FOLDER --train=--tokenizer=byte
python results/run.py --name gpu --dataset FOLDER --jobs 1 --variants "plain,1x1,4x5,plain deeper" \
    --train="--preset=gpu --n_layer=48 --n_embd=768 --n_head=12 --dtype=bfloat16 --compile=True"

Trains every variant with train.py on several seeds, each at the learning rate that is the best for
it on the first seed, of all that were tried. Models of one depth and seed begin with the same
weights and see the same batches, so their losses are compared seed by seed.
The losses are of the whole validation split at the end of the run. What was done is kept in
OUT_DIR/NAME, so that the script can be stopped and goes on; the result is results/NAME.md and .png,
and NAME.json with the loss of each training.
"""

import ast
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

RESULTS = Path(__file__).parent
ROOT = RESULTS.parent
sys.path.insert(0, str(ROOT))

from checkpoint import load_checkpoint  # noqa: E402
from config import UsageError, find_device, find_dtype, flag, parse_flags, run_cli  # noqa: E402
from data.errors import UserError  # noqa: E402
from denseformer import DWA, DenseFormer, DenseFormerConfig  # noqa: E402
from optim import configure_optimizers  # noqa: E402


@dataclass
class RunConfig:
    name: str = flag("shakespeare", "of the files in results/")
    dataset: str = flag("shakespeare", "as for train.py")
    variants: str = flag("all", "names from the table, with commas between")
    seeds: str = flag("1,2,3", "with commas between")
    sweep: str = flag("8e-3,1.6e-2", "learning rates to try for each variant, on the first seed")
    warmup: int = flag(10, "one part in this many of the steps is warm-up", low=1)
    jobs: int = flag(os.cpu_count() or 1, "trainings at a time; they share the cores", low=1)
    out_dir: str = flag("out-results", "folder for the runs")
    train: str = flag("", "further flags for train.py, as --name=value, in one pair of quotes")


# The flags of every run, and what each variant changes. L is the depth.
COMMON = {
    "n_layer": 24, "n_head": 2, "n_embd": 48, "block_size": 128, "batch_size": 8,
    "max_iters": 2000, "optimizer": "adamw", "weight_decay": 0.1, "dtype": "float32",
}  # fmt: skip
VARIANTS = {
    "plain": {"dwa": "none"},
    "skips with gains": {"dwa": "none", "skip_gains": True},
    "1x1": {"dwa": "1x1"},
    "4x1": {"dwa": "4x1"},
    "4x5": {"dwa": "4x5"},
    "last4": {"dwa": "last4"},
    "last1": {"dwa": "last1"},
    "connect-to-last": {"dwa": "connect-to-last"},
    "last2+12x1": {"dwa": "last2+12x1"},
    "pruned as 4x1": {"dwa": "pruned as 4x1"},
    "pruned as 4x5": {"dwa": "pruned as 4x5"},
    "1x1 from 1/4 on": {"dwa": "1x1", "late": 0.25},
    "plain deeper": {"dwa": "none", "deeper": 1.5},
}


class Runs:
    """Trainings, each done once: {their flags: validation loss} in OUT_DIR/NAME/done.json."""

    def __init__(self, config):
        self.config = config
        self.common = COMMON | {"dataset": config.dataset} | parse_words(config.train)
        self.out_dir = Path(config.out_dir).absolute() / config.name
        self.out_dir.mkdir(parents=True, exist_ok=True)
        self.file = self.out_dir / "done.json"
        self.done = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.lock = threading.Lock()

    def flags(self, variant, seed, rate, **changes):
        flags = self.common | variant | changes
        flags |= {"n_layer": int(flags["n_layer"] * flags.pop("deeper", 1))}
        flags |= {"seed": seed, "learning_rate": rate, "min_lr": rate / 10}
        steps = flags["max_iters"]
        if late := flags.pop("late", 0):
            flags |= {"dwa_start_iter": int(late * steps)}
        flags |= {"warmup_iters": steps // self.config.warmup, "eval_interval": steps}
        return flags | {"eval_iters": 10**6}

    def folder(self, flags):
        """Where the run with these flags is."""
        name = f"{flags['dwa'][:20]}-{flags['n_layer']}-{flags['seed']}-{flags['learning_rate']}"
        name = re.sub(r"[^\w.-]+", "-", name) + f"-{zlib.crc32(key(flags).encode()):08x}"
        return self.out_dir / name

    def tried(self, variant, seed):
        """{learning rate: loss} of the trainings of this variant and seed that are done."""
        rates = {float(re.search(r"--learning_rate=(\S+)", k)[1]) for k in self.done}
        keys = {rate: key(self.flags(variant, seed, rate)) for rate in sorted(rates)}
        return {rate: self.done[k] for rate, k in keys.items() if k in self.done}

    def best(self, variant, seed, rates=()):
        """The learning rate that is the best for it, of `rates` and of those that were tried."""
        self.train([self.flags(variant, seed, rate) for rate in rates])
        losses = self.tried(variant, seed)
        return min(losses, key=losses.get)

    def train(self, todo):
        """The validation losses of runs, `jobs` at a time."""
        threads = str(max(1, os.cpu_count() // self.config.jobs))

        def run(flags):
            if key(flags) not in self.done:
                folder = self.folder(flags)
                words = [*command_line(flags), "--overwrite", f"--out_dir={folder}"]
                run_script("train.py", *words, OMP_NUM_THREADS=threads)
                last = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
                with self.lock:
                    self.done[key(flags)] = last["val_loss"]
                    self.file.write_text(json.dumps(self.done, indent=1) + "\n")
            bar.update()
            return self.done[key(flags)]

        bar = tqdm(total=len(todo), unit="run")
        with bar, ThreadPoolExecutor(self.config.jobs) as pool:
            return list(pool.map(run, todo))


def run_script(*words, **environment):
    """Run a script of this project. Raises UserError, with what it said, if it fails."""
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=os.environ | environment,
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise UserError(f"{' '.join(words)}\n{done.stderr}")


def parse_words(text):
    """Return {name: value} of "--name=value --name=value", numbers and booleans as such."""
    flags = {}
    for word in text.split():
        name, equals, value = word.removeprefix("--").partition("=")
        if not (equals and word.startswith("--")):
            raise UsageError(f"--train: {word!r} is not of the form --name=value")
        try:
            flags[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            flags[name] = value
    return flags


def command_line(flags):
    return [f"--{name}={value}" for name, value in flags.items()]


def key(flags):
    """What a training is called in results/NAME.json."""
    return " ".join(command_line(flags))


def prune_like(runs, pattern, rate, seed):
    """The pattern of the largest alphas of a short 1x1 run, as sparse as `pattern`."""
    flags = runs.flags(VARIANTS["1x1"], seed, rate, max_iters=runs.common["max_iters"] // 4)
    runs.train([flags])
    folder, L = runs.folder(flags), flags["n_layer"]
    dense, like = DWA(L, "1x1"), DWA(L, pattern)
    earlier = round((1 - like.sparsity()) * L * (L + 1) / 2)  # and all of the diagonal
    fraction = 1 - (L + earlier) / dense.num_params()
    words = [f"--out_dir={folder}", "--checkpoint=last", f"--prune={fraction!r}", "--tokens=1"]
    run_script("analyze.py", *words)
    return load_checkpoint(folder / "pruned.pt")["model_config"]["dwa"]


def step_times(models, flags, rounds=15):
    """Training steps of all models by turns: {name: [seconds of each round]}."""
    device = find_device(flags.get("device", "auto"))
    dtype = find_dtype(flags["dtype"], device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    def task(model):
        shape = (flags["batch_size"], flags["block_size"])
        idx, targets = torch.randint(model.config.vocab_size, (2, *shape), device=device)
        optimizers = configure_optimizers(model.to(device), flags["optimizer"], 1e-9)
        if flags.get("compile", device.type == "cuda"):
            model.compile()

        def step():
            with autocast:
                loss = model(idx, targets)[1]
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

        return step

    tasks = {name: task(model) for name, model in models.items()}
    times = {name: [] for name in tasks}
    for round in tqdm(range(-1, rounds), desc="step times"):  # round -1 warms up
        for name, step in tasks.items():
            begin = time.perf_counter()
            step()
            if device.type != "cpu":
                torch.accelerator.synchronize()
            if round >= 0:
                times[name].append(time.perf_counter() - begin)
    return times


def ratio(times, name, base="plain"):
    """Return the median of the ratios to the base model, round by round; nan without it."""
    if base not in times:
        return math.nan
    return statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))


def machine():
    """Return the name of the processor or GPU, and torch's version."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}; torch {torch.__version__}"
    name = platform.processor() or platform.machine()
    if (file := Path("/proc/cpuinfo")).exists():
        lines = file.read_text().splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} threads; torch {torch.__version__}"


def mean_and_error(losses):
    """Mean and its standard error."""
    error = statistics.stdev(losses) / len(losses) ** 0.5 if len(losses) > 1 else float("nan")
    return statistics.mean(losses), error


def against_plain(rows, name):
    """Mean and standard error of the loss less that of plain, seed by seed."""
    pairs = zip(rows[name]["losses"], rows["plain"]["losses"], strict=True)
    return mean_and_error([ours - plain for ours, plain in pairs])


def plot(rows, path):
    """The validation losses, a variant a line: mean, standard error, and each seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    names = list(rows)[::-1]
    for y, name in enumerate(names):
        mean, error = mean_and_error(rows[name]["losses"])
        color = "C0" if rows[name]["alphas"] else "0.35"
        axes.errorbar(mean, y, xerr=error, fmt="o", color=color, capsize=4, markersize=6)
        axes.plot(
            rows[name]["losses"], [y] * len(rows[name]["losses"]), "|", color=color, alpha=0.6
        )
    if "plain" in rows:
        plain = mean_and_error(rows["plain"]["losses"])[0]
        axes.axvline(plain, color="0.35", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("validation loss (nats per token); mean, standard error, and each seed")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=150)


def main(argv=None):
    config = RunConfig(**parse_flags(RunConfig, argv, __doc__))
    names = list(VARIANTS) if config.variants == "all" else config.variants.split(",")
    if unknown := set(names) - set(VARIANTS):
        raise UsageError(f"--variants: {', '.join(unknown)} is none of {', '.join(VARIANTS)}")
    seeds = [int(seed) for seed in config.seeds.split(",")]
    runs = Runs(config)

    rates = [float(rate) for rate in config.sweep.split(",")]
    variants = {name: dict(VARIANTS[name]) for name in names}
    for name in names:
        if name.startswith("pruned as "):
            pattern = name.removeprefix("pruned as ")
            rate = runs.best(VARIANTS["1x1"], seeds[0], rates)
            variants[name]["dwa"] = prune_like(runs, pattern, rate, seeds[0] + 1000)
    runs.train([runs.flags(v, seeds[0], rate) for v in variants.values() for rate in rates])
    best = {name: runs.best(variant, seeds[0]) for name, variant in variants.items()}
    todo = {
        name: [runs.flags(variant, seed, best[name]) for seed in seeds]
        for name, variant in variants.items()
    }
    # By seeds, so that what there is when it is stopped is something of everything.
    runs.train([flags for of_seed in zip(*todo.values(), strict=True) for flags in of_seed])

    configs = {
        name: load_checkpoint(runs.folder(flags[-1]) / "last.pt")["model_config"]
        for name, flags in todo.items()
    }
    models = {name: DenseFormer(DenseFormerConfig(**c)) for name, c in configs.items()}
    times = step_times(models, runs.common)
    rows = {}
    for name, flags in todo.items():
        rows[name] = {
            "blocks": flags[0]["n_layer"], "parameters": models[name].num_params(),
            "alphas": models[name].dwa.num_params(), "sparsity": models[name].dwa.sparsity(),
            "losses": runs.train(flags), "time": ratio(times, name),
        }  # fmt: skip
    tried = {name: runs.tried(variant, seeds[0]) for name, variant in variants.items()}
    report(rows, tried, runs, config, variants, sys.argv[1:] if argv is None else argv)


def report(rows, tried, runs, config, variants, argv):
    """results/NAME.md and results/NAME.png."""
    text = [
        f"Made by `{' '.join(['python results/run.py', *map(quoted, argv)])}`",
        f"on {machine()}.\n",
        "| model | blocks | parameters | alphas | sparsity | validation loss | minus plain's "
        "| step, x plain |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        mean, error = mean_and_error(row["losses"])
        alphas = f"{row['alphas']:,} | {row['sparsity']:.1%}" if row["alphas"] else "|"
        less = ""
        if "plain" in rows and name != "plain":
            less = "{:+.4f} ± {:.4f}".format(*against_plain(rows, name))
        text.append(
            f"| {name} | {row['blocks']} | {row['parameters']:,} | {alphas} | "
            f"{mean:.4f} ± {error:.4f} | {less} | {row['time']:.3f} |"
        )
    rates = sorted(set().union(*tried.values()))
    text.append("\nLearning rates tried, on the first seed:\n")
    text.append("| | " + " | ".join(f"{rate:g}" for rate in rates) + " |")
    text.append("|---" * (len(rates) + 1) + "|")
    for name, losses in tried.items():
        cells = [f"{losses[rate]:.4f}" if rate in losses else "" for rate in rates]
        text.append(f"| {name} | " + " | ".join(cells) + " |")
    for name, variant in variants.items():
        if name.startswith("pruned"):
            text.append(f"\n{name}: `--dwa {variant['dwa']}`")
    text.append(f"\nFlags of all runs: `{' '.join(f'--{k}={v}' for k, v in runs.common.items())}`")
    (RESULTS / f"{config.name}.md").write_text("\n".join(text) + "\n")
    (RESULTS / f"{config.name}.json").write_text(json.dumps(runs.done, indent=1) + "\n")
    plot(rows, RESULTS / f"{config.name}.png")
    print("\n".join(text))


def quoted(word):
    return f'"{word}"' if " " in word else word


if __name__ == "__main__":
    run_cli(main)
