"""Figures of a run: the alphas as a text heat map, and matplotlib plots."""

import json
from pathlib import Path

import numpy as np
from torch import Tensor

LEVELS = (0.01, 0.03, 0.1, 0.3)  # the smallest |alpha| of each shade


def text_heat_map(alpha: Tensor, rows: list[list[int]], max_rows: int | None = None) -> str:
    """Return alpha, (L + 1, L + 1), as text: one line per DWA and one character per alpha, which is
    blank where rows, the lists of the j that each DWA reads, do not have it.

    A model deeper than max_rows is shown by that many evenly spaced rows.
    """
    L = len(rows) - 1
    lines = []
    for i in np.linspace(1, L, min(L, max_rows or L)).round().astype(int).tolist():
        if not rows[i]:
            lines.append(f"Y_{i:<3}= X_{i}")
            continue
        cells = [" "] * (i + 1)
        for j in rows[i]:
            a = alpha[i, j].item()
            cells[j] = (" .-=#" if a < 0 else " ░▒▓█")[sum(abs(a) >= level for level in LEVELS)]
        lines.append(f"Y_{i:<3}|{''.join(cells)}|")
    key = "|alpha| at least 0.01, 0.03, 0.1, 0.3:  positive ░ ▒ ▓ █  negative . - = #"
    return "\n".join(["     X_0 ... X_i", *lines, key])


def new_figure(size, *args, **kwargs):
    """Return a matplotlib figure of a size in inches, and its axes; other arguments are those of
    Figure.subplots. Raises ImportError without matplotlib.

    Avoids pyplot, which would choose a backend for a program that imports this module.
    """
    from matplotlib.figure import Figure

    figure = Figure(size, layout="constrained")
    return figure, figure.subplots(*args, **kwargs)


def plot_losses(log: Path, picture: Path):
    """Plot the losses in log.jsonl. Raises ImportError without matplotlib."""
    figure, axes = new_figure((7, 4))
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    for key, label, style in (("loss", "training batch", "-"), ("val_loss", "validation", "o-")):
        points = [(entry["step"], entry[key]) for entry in entries if key in entry]
        if points:  # a short run logs no training loss
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4, linewidth=1)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=150)
