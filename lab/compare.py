"""Compare DenseFormers with the plain Transformer, as the paper's tables do, with smaller models.

python -m lab.compare --train=--max_iters=1000       Tiny Shakespeare, 24 blocks of 48 channels
python -m lab.compare --name books --dataset FOLDER --train=--tokenizer=byte
python -m lab.compare --name gpu --dataset FOLDER --jobs 1 \\
    --variants "plain,1x1,4x5,plain deeper" \\
    --train="--preset=gpu --n_layer=48 --n_embd=768 --n_head=12 --dtype=bfloat16 --compile=True"

Each variant is trained with train.py on several seeds, at the learning rate that is best for it on
the first seed. Models of equal depth and seed start from the same weights and see the same batches,
so their losses are compared seed by seed. Losses are measured on the whole validation split at the
end of training.

Finished runs are kept in OUT_DIR/NAME, so the script can be stopped and restarted. It writes
lab/NAME.md, NAME.png, and NAME.json with the loss of every run.
"""

import ast
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

RESULTS = Path(__file__).parent
ROOT = RESULTS.parent
from denseformer import DWA, DenseFormer, DenseFormerConfig
from lab.analyze import sparsity
from lib.checkpoint import load_checkpoint
from lib.device import describe_machine, find_device
from lib.figures import new_figure
from lib.files import UserError
from lib.flags import UsageError, flag, parse_flags, run_cli


@dataclass
class RunConfig:
    name: str = flag("shakespeare", "name of the files in lab/")
    dataset: str = flag("shakespeare", "as in train.py", path=True)
    variants: str = flag("all", "comma-separated names in VARIANTS, in this file")
    seeds: str = flag("1,2,3,4", "comma-separated random seeds")
    sweep: str = flag("8e-3,1.6e-2", "learning rates to try for each variant, on the first seed")
    jobs: int = flag(os.cpu_count() or 1, "runs in parallel; they share the cores", low=1)
    out_dir: str = flag("out-results", "folder for the runs", path=True)
    train: str = flag("", 'extra flags for train.py: "--name=value --name=value"')


# Flags of all runs. Warm-up is a tenth of the steps, and min_lr a tenth of the learning rate.
COMMON = {
    "n_layer": 24, "n_head": 2, "n_embd": 48, "block_size": 128, "batch_size": 8,
    "preset": "cpu", "max_iters": 2000, "optimizer": "adamw", "weight_decay": 0.1,
    "dtype": "float32", "dwa_lr_scale": 1.0,
}  # fmt: skip

# The flags of each variant. "deeper" multiplies the depth; a pattern may depend on the depth L.
VARIANTS = {
    "plain": {"dwa": "none"},
    "skips with gains": {"dwa": "none", "skip_gains": True},
    "1x1": {"dwa": "1x1"},
    "4x1": {"dwa": "4x1"},
    "4x5": {"dwa": "4x5"},
    "last4": {"dwa": "last4"},
    "connect-to-last": {"dwa": "connect-to-last"},
    "X_0 and X_1": {"dwa": lambda L: "last1+" + "+".join(f"{i}:1" for i in range(1, L + 1))},
    "pruned as 4x5": {},  # the largest alphas of a 1x1 run, as sparse as 4x5; see prune_like
    "plain deeper": {"dwa": "none", "deeper": 1.5},
}


class Runs:
    """The runs of train.py, each done only once. done.json holds {flags: validation loss}."""

    def __init__(self, config):
        self.config = config
        self.common = COMMON | {"dataset": config.dataset} | parse_words(config.train)
        self.out_dir = Path(config.out_dir).absolute() / config.name
        self.out_dir.mkdir(parents=True, exist_ok=True)
        self.file = self.out_dir / "done.json"
        self.done = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.lock = threading.Lock()

    def flags(self, variant, seed, rate, **changes):
        """Return {flag: value} of a run."""
        flags = self.common | variant | changes
        flags["n_layer"] = int(flags["n_layer"] * flags.pop("deeper", 1))
        if callable(flags["dwa"]):
            flags["dwa"] = flags["dwa"](flags["n_layer"])
        flags |= {"seed": seed, "learning_rate": rate, "min_lr": rate / 10}
        flags |= {"warmup_iters": flags["max_iters"] // 10, "eval_interval": flags["max_iters"]}
        return flags | {"eval_iters": 10**6}

    def folder(self, flags):
        """Return the folder of the run with these flags."""
        name = f"{flags['dwa'][:20]}-{flags['n_layer']}-{flags['seed']}-{flags['learning_rate']}"
        name = re.sub(r"[^\w.-]+", "-", name) + f"-{zlib.crc32(key(flags).encode()):08x}"
        return self.out_dir / name

    def tried(self, variant, seed):
        """Return {learning rate: loss} of the finished runs of this variant and seed."""
        rates = {float(re.search(r"--learning_rate=(\S+)", k)[1]) for k in self.done}
        keys = {rate: key(self.flags(variant, seed, rate)) for rate in sorted(rates)}
        return {rate: self.done[k] for rate, k in keys.items() if k in self.done}

    def best_rate(self, variant, seed):
        """Return the learning rate with the lowest loss of those tried."""
        losses = self.tried(variant, seed)
        return min(losses, key=losses.get)

    def train(self, todo):
        """Train with each of these flags, `jobs` at a time; return the validation losses."""
        threads = str(max(1, os.cpu_count() // self.config.jobs))

        def run(flags):
            if key(flags) not in self.done:
                folder = self.folder(flags)
                words = [*words_of(flags), "--overwrite", f"--out_dir={folder}"]
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
    """Run a script of this project. Raises UserError, with its stderr, if it fails."""
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=os.environ | environment,
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise UserError(f"{' '.join(words)}\n{done.stderr}")


def parse_words(text):
    """Return {name: value} of "--name=value --name=value", with numbers and booleans converted."""
    flags = {}
    for word in text.split():
        name, equals, value = word.removeprefix("--").partition("=")
        if not (equals and word.startswith("--")):
            raise UsageError(f"--train: {word!r} does not have the form --name=value")
        try:
            flags[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            flags[name] = value
    return flags


def words_of(flags):
    return [f"--{name}={value}" for name, value in flags.items()]


def key(flags):
    """Return the name of a run in done.json and lab/NAME.json."""
    return " ".join(words_of(flags))


def prune_like(runs, pattern, rate, seed):
    """Train a short 1x1 run; return the pattern of its largest alphas, as sparse as `pattern`."""
    flags = runs.flags(VARIANTS["1x1"], seed, rate, max_iters=runs.common["max_iters"] // 4)
    runs.train([flags])
    folder, L = runs.folder(flags), flags["n_layer"]
    dense, like = DWA(L, "1x1"), DWA(L, pattern)
    earlier = round((1 - sparsity(like)) * L * (L + 1) / 2)  # alphas off the diagonal
    fraction = 1 - (L + earlier) / dense.num_params()
    words = [f"--out_dir={folder}", "--checkpoint=last", f"--prune={fraction!r}", "--tokens=1"]
    run_script("analyze.py", *words)
    return load_checkpoint(folder / "pruned.pt")["model_config"]["dwa"]


# -----------------------------------------------------------------------------
# Reports


def mean_and_error(losses):
    """Return the mean and its standard error."""
    error = statistics.stdev(losses) / len(losses) ** 0.5 if len(losses) > 1 else float("nan")
    return statistics.mean(losses), error


def plot(losses, dense, path):
    """Plot the losses, one line per variant: mean, standard error, and every seed."""
    figure, axes = new_figure((7.5, 4.2))
    names = list(losses)[::-1]
    for y, name in enumerate(names):
        mean, error = mean_and_error(losses[name])
        color = "C0" if name in dense else "0.35"
        axes.errorbar(mean, y, xerr=error, fmt="o", color=color, capsize=4, markersize=6)
        axes.plot(losses[name], [y] * len(losses[name]), "|", color=color, alpha=0.6)
    if "plain" in losses:
        axes.axvline(statistics.mean(losses["plain"]), color="0.35", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("validation loss (nats per token): mean, standard error, every seed")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=150)


def main(argv=None):
    config = RunConfig(**parse_flags(RunConfig, argv, __doc__))
    names = list(VARIANTS) if config.variants == "all" else config.variants.split(",")
    if unknown := set(names) - set(VARIANTS):
        raise UsageError(f"--variants: unknown {', '.join(unknown)}; have {', '.join(VARIANTS)}")
    try:
        seeds = [int(seed) for seed in config.seeds.split(",")]
        rates = [float(rate) for rate in config.sweep.split(",")]
    except ValueError as error:
        raise UsageError(f"--seeds and --sweep take numbers separated by commas: {error}") from None
    runs = Runs(config)

    # Learning rates
    variants = {name: dict(VARIANTS[name]) for name in names}
    for name in names:
        if name.startswith("pruned as "):
            runs.train([runs.flags(VARIANTS["1x1"], seeds[0], rate) for rate in rates])
            rate = runs.best_rate(VARIANTS["1x1"], seeds[0])
            pattern = name.removeprefix("pruned as ")
            variants[name]["dwa"] = prune_like(runs, pattern, rate, seeds[0] + 1000)
    runs.train([runs.flags(v, seeds[0], rate) for v in variants.values() for rate in rates])

    # All variants of one seed, then the next seed
    best = {name: runs.best_rate(variant, seeds[0]) for name, variant in variants.items()}
    flags = {
        name: [runs.flags(variant, seed, best[name]) for seed in seeds]
        for name, variant in variants.items()
    }
    runs.train([each for of_seed in zip(*flags.values(), strict=True) for each in of_seed])
    losses = {name: runs.train(each) for name, each in flags.items()}
    models = {}
    for name, each in flags.items():
        checkpoint = load_checkpoint(runs.folder(each[-1]) / "last.pt")
        models[name] = DenseFormer(DenseFormerConfig(**checkpoint["model_config"]))
    tried = {name: runs.tried(variant, seeds[0]) for name, variant in variants.items()}
    report(losses, models, tried, runs, sys.argv[1:] if argv is None else argv)


def report(losses, models, tried, runs, argv):
    """Write lab/NAME.md, NAME.json and NAME.png, and print NAME.md."""
    text = [
        f"Made by `python -m lab.compare {shlex.join(argv)}`",
        f"on {describe_machine(find_device('auto'))}.\n",
        "| model | blocks | parameters | alphas | sparsity | validation loss | minus plain |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, model in models.items():
        mean, error = mean_and_error(losses[name])
        dwa, difference = model.dwa, ""
        alphas = f"{dwa.num_params():,} | {sparsity(dwa):.1%}" if dwa.num_params() else "|"
        if "plain" in losses and name != "plain":
            pairs = zip(losses[name], losses["plain"], strict=True)
            difference = "{:+.4f} ± {:.4f}".format(*mean_and_error([a - b for a, b in pairs]))
        text.append(
            f"| {name} | {dwa.n_layer} | {model.num_params():,} | {alphas} | "
            f"{mean:.4f} ± {error:.4f} | {difference} |"
        )
    rates = sorted(set().union(*tried.values()))
    text.append("\nLearning rates tried, on the first seed:\n")
    text.append("| | " + " | ".join(f"{rate:g}" for rate in rates) + " |")
    text.append("|---" * (len(rates) + 1) + "|")
    for name, of_rate in tried.items():
        cells = [f"{of_rate[rate]:.4f}" if rate in of_rate else "" for rate in rates]
        text.append(f"| {name} | " + " | ".join(cells) + " |")
    for name, model in models.items():
        if name.startswith("pruned"):
            text.append(f"\n{name}: `--dwa {model.dwa.pattern}`")
    text.append(f"\nFlags of all runs: `{key(runs.common)}`")
    file = RESULTS / runs.config.name
    file.with_suffix(".md").write_text("\n".join(text) + "\n")
    file.with_suffix(".json").write_text(json.dumps(runs.done, indent=1) + "\n")
    plot(losses, {n for n, m in models.items() if m.dwa.num_params()}, file.with_suffix(".png"))
    print("\n".join(text))


if __name__ == "__main__":
    run_cli(main)
