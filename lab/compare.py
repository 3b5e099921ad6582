"""Compare models by their validation losses, seed by seed.

python -m lab.compare --rows "plain, 1x1"          Tiny Shakespeare, 24 blocks of 48 channels
python -m lab.compare --name books --rows "plain, 1x1, last1, skip-gains" --jobs 2 \\
    -- --dataset FOLDER --tokenizer byte
python -m lab.compare --rows "plain, plain --n_layer 36" -- --max_iters 1000

A row is a model of lab/variants.py, such as plain, 1x1 or skip-gains, and may have flags of
train.py behind it, which override all others. The flags after -- are for all runs, and override
SMALL, in this file.

Each row is trained on several seeds, at the learning rate that is best for it on the first seed.
Models of equal depth and seed start from the same weights and see the same batches, so losses are
compared in pairs: the table has the mean difference from the first row and the p-value of a paired
t-test (pip install scipy). Losses are those of the whole validation split at the end of training.

Writes the table to lab/NAME.md, and the loss and the machine of every run to lab/NAME.json. What is
in that file is not trained again, so the command can be stopped and repeated; with other data,
choose another NAME. The logs stay in OUT_DIR.
"""

import json
import os
import shlex
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from threading import Lock

from denseformer import dwa_rows
from lab.variants import load_package
from lib.checkpoint import load_checkpoint
from lib.device import describe_machine, find_device
from lib.files import UserError, open_new, progress_bar
from lib.flags import flag, parse_flags, path, run_cli

LAB = Path(__file__).parent
# Flags of all runs: a model of half the paper's depth that trains in minutes on a CPU.
SMALL = shlex.split(
    "--preset cpu --n_layer 24 --n_head 2 --n_embd 48 --block_size 128 --batch_size 8 "
    "--max_iters 2000 --warmup_iters 200 --optimizer adamw --weight_decay 0.1 --dwa_lr_scale 1 "
    "--eval_interval 1000000 --eval_iters 1 --final_eval_iters 1000000"
)


def numbers(text: str) -> tuple[float, ...]:
    return tuple(json.loads(f"[{text}]"))


@dataclass
class CompareConfig:
    name: str = flag("shakespeare", "name of the files in lab/")
    rows: str = flag("plain, 1x1", "rows, separated by commas; the first is the base")
    seeds: tuple = flag((1, 2, 3, 4), "random seeds, separated by commas", read=numbers)
    rates: tuple = flag((8e-3, 1.6e-2), "learning rates to try, on the first seed", read=numbers)
    jobs: int = flag(1, "runs in parallel; they share the cores", low=1)
    out_dir: str = flag("out-lab", "folder for the runs", read=path)


def command(shared: list[str], row: str, seed: int, rate: float) -> str:
    """Return the command that trains a row, without --out_dir; it is the name of the run."""
    name, *flags = shlex.split(row)
    rates = f"--seed {seed} --learning_rate {rate:g} --min_lr {rate / 10:g}"
    return f"lab.variants {name} {rates} {shlex.join([*shared, *flags])}"


class Runs:
    """The runs of train.py. `done` is {run: its loss, number of parameters, log and machine}."""

    lock = Lock()

    def __init__(self, config: CompareConfig):
        self.config, self.file = config, LAB / f"{config.name}.json"
        self.done = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.machine = f"{describe_machine(find_device('auto'))}; --jobs {config.jobs}"

    def train(self, todo: list[str]):
        """Train what is not done yet, --jobs runs at a time."""
        todo = [run for run in dict.fromkeys(todo) if run not in self.done]
        bar = progress_bar("training", len(todo), "run")
        with bar, ThreadPoolExecutor(self.config.jobs) as pool:
            for _ in pool.map(self.train_one, todo):
                bar.update()

    def train_one(self, run: str):
        name = f"{self.config.name}-{zlib.crc32(run.encode()):08x}"
        out_dir = Path(self.config.out_dir) / name
        call([*shlex.split(run), "--out_dir", str(out_dir), "--overwrite"], self.config.jobs)
        log = [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]
        checkpoint = load_checkpoint(out_dir / "last.pt")
        shape, weights = checkpoint["model_config"], checkpoint["model"]
        n = sum(map(len, dwa_rows(shape["dwa"], shape["n_layer"])))  # alphas
        n += sum(w.numel() for name, w in weights.items() if name != "dwa.alpha")
        loss = [e[key] for e in log for key in ("val_loss", "final_val_loss") if key in e][-1]
        with self.lock, open_new(self.file) as file:  # at once, whatever becomes of other runs
            entry = {"val_loss": loss, "parameters": n, "log": f"{out_dir}/log.jsonl"}
            self.done[run] = entry | {"machine": self.machine}
            file.write((json.dumps(self.done, indent=1) + "\n").encode())


def call(words: list[str], jobs: int):
    """Run a script of this project. Raises UserError, with its stderr, if it fails."""
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    environment = os.environ | {"OMP_NUM_THREADS": threads}
    words = [sys.executable, "-m", *words]
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise UserError(f"{shlex.join(words)}\n{done.stderr}")


def markdown(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def main(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    end = argv.index("--") if "--" in argv else len(argv)
    config = CompareConfig(**parse_flags(CompareConfig, argv[:end], __doc__))
    shared, runs, rates = [*SMALL, *argv[end + 1 :]], Runs(config), config.rates
    t_test = load_package("scipy").stats.ttest_rel
    rows, run = [*filter(None, map(str.strip, config.rows.split(",")))], partial(command, shared)

    # the better rate, on the first seed
    first = config.seeds[0]
    runs.train([run(row, first, rate) for rate in rates for row in rows])
    tried = {
        row: {rate: runs.done[run(row, first, rate)]["val_loss"] for rate in rates} for row in rows
    }
    best = {row: min(losses, key=losses.__getitem__) for row, losses in tried.items()}

    # all rows of one seed, then the next seed
    runs.train([run(row, seed, best[row]) for seed in config.seeds for row in rows])
    done = {row: [runs.done[run(row, seed, best[row])] for seed in config.seeds] for row in rows}
    losses = {row: [d["val_loss"] for d in of_seed] for row, of_seed in done.items()}

    seeds = [f"seed {seed}" for seed in config.seeds]
    text = [
        f"Made by `python -m lab.compare {shlex.join(argv)}`\n",
        markdown("model", "parameters", "rate", *seeds, "mean", f"minus {rows[0]}", "p"),
        "|---" * (len(seeds) + 6) + "|",
    ]
    for row in rows:
        ours, base, is_base = losses[row], losses[rows[0]], row == rows[0]
        p = "" if is_base or len(seeds) == 1 else f"{t_test(ours, base).pvalue:.2g}"
        text.append(
            markdown(
                row, f"{done[row][0]['parameters']:,}", f"{best[row]:g}",
                *(f"{loss:.4f}" for loss in (*ours, mean(ours))),
                "" if is_base else f"{mean(ours) - mean(base):+.4f}", p,
            )
        )  # fmt: skip
    text += ["\nLearning rates tried, on the first seed:\n", markdown("", *rates)]
    text += ["|---" * (len(rates) + 1) + "|"]
    text += [markdown(row, *(f"{x:.4f}" for x in tried[row].values())) for row in rows]
    text += [f"\nFlags of all runs: `{shlex.join(shared)}`\n"]
    (LAB / f"{config.name}.md").write_text("\n".join(text))
    print("\n".join(text))


if __name__ == "__main__":
    run_cli(main)
