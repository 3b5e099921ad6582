"""What the CPU recipe owes to each of its choices: python results/recipe.py [out_dir]

Runs train.py with its defaults and with one choice changed, each for about the same time on a
machine with 2 cores, one after the other, and writes results/recipe.md.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent

VARIANTS = [
    ("as it is", ""),
    ("plain Transformer", "--dwa none --max_iters 1040"),
    ("AdamW", "--optimizer adamw --learning_rate 4e-3 --max_iters 1200"),
    ("float32", "--dtype float32 --max_iters 620"),
    ("shorter context", "--block_size 64 --batch_size 16 --max_iters 1300"),
    ("longer context", "--block_size 256 --batch_size 6 --max_iters 950"),
    ("less weight decay", "--weight_decay 0.1"),
    ("more weight decay", "--weight_decay 1.0"),
    ("higher learning rate", "--learning_rate 2.5e-2"),
    ("lower learning rate", "--learning_rate 8e-3"),
    ("four blocks", "--n_layer 4 --max_iters 800"),
    ("deeper and narrower", "--n_layer 8 --n_embd 96 --n_head 3 --max_iters 500"),
]


def main():
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "out-recipe")
    rows = []
    for name, flags in VARIANTS:
        out_dir = out / name.replace(" ", "-")
        command = [sys.executable, "train.py", *flags.split()]
        command += ["--overwrite", f"--out_dir={out_dir}"]
        begin = time.time()
        subprocess.run(command, cwd=HERE.parent, check=True, stdout=subprocess.DEVNULL)
        seconds = time.time() - begin
        log = [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]
        last = log[-1]
        rows.append(
            f"| {name} | {flags} | {last['step']:,} | {seconds:.0f} | {last['val_loss']:.3f} |"
        )
        print(rows[-1], flush=True)
    text = (
        "Made by `python results/recipe.py` in one run, on 2 cores of an AMD EPYC (Zen 4) virtual "
        "machine,\ntorch 2.13: Tiny Shakespeare, `python train.py` and one choice changed, with "
        "the steps set so\nthat each takes about as long. Seconds are of the whole command. One "
        "seed each: differences\nbelow 0.01 say nothing.\n\n"
        "| | flags | steps | seconds | validation loss |\n|---|---|---|---|---|\n"
    )
    (HERE / "recipe.md").write_text(text + "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
