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
sys.path.insert(0, str(HERE.parent))

from bench import machine  # noqa: E402
from config import find_device  # noqa: E402

VARIANTS = [
    ("as it is", ""),
    ("plain Transformer", "--dwa none --max_iters 1090"),
    ("AdamW", "--optimizer adamw --learning_rate 4e-3 --max_iters 1280"),
    ("float32", "--dtype float32 --max_iters 920"),
    ("shorter context", "--block_size 64 --batch_size 16 --max_iters 1380"),
    ("longer context", "--block_size 256 --batch_size 6 --max_iters 950"),
    ("less weight decay", "--weight_decay 0.1"),
    ("more weight decay", "--weight_decay 1.0"),
    ("higher learning rate", "--learning_rate 2.5e-2"),
    ("lower learning rate", "--learning_rate 8e-3"),
    ("four blocks", "--n_layer 4 --max_iters 800"),
    ("deeper and narrower", "--n_layer 8 --n_embd 96 --n_head 3 --max_iters 500"),
]


def run(flags, out_dir):
    """Train with these flags, unless that was done; returns steps, seconds, validation loss."""
    result = out_dir / "recipe.json"
    if not result.exists() or json.loads(result.read_text())["flags"] != flags:
        command = [sys.executable, "train.py", *flags.split()]
        command += ["--overwrite", f"--out_dir={out_dir.absolute()}"]
        begin = time.time()
        subprocess.run(command, cwd=HERE.parent, check=True, stdout=subprocess.DEVNULL)
        result.write_text(json.dumps({"flags": flags, "seconds": time.time() - begin}))
    last = json.loads((out_dir / "log.jsonl").read_text().splitlines()[-1])
    return last["step"], json.loads(result.read_text())["seconds"], last["val_loss"]


def main():
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "out-recipe")
    rows = []
    for name, flags in VARIANTS:
        steps, seconds, loss = run(flags, out / name.replace(" ", "-"))
        rows.append(f"| {name} | {flags} | {steps:,} | {seconds:.0f} | {loss:.3f} |")
        print(rows[-1], flush=True)
    text = (
        f"Made by `python results/recipe.py` on {machine(find_device('auto'))}:\n"
        "Tiny Shakespeare, `python train.py` and one choice changed, with the steps set so that "
        "each takes\nabout as long. Seconds are of the whole command. One seed each: differences "
        "below 0.01 say nothing.\n\n"
        "| | flags | steps | seconds | validation loss |\n|---|---|---|---|---|\n"
    )
    (HERE / "recipe.md").write_text(text + "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
