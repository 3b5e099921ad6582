"""Show what the alphas of a trained DenseFormer learned: print tables, plot into the run's folder.

python -m lab.analyze                             the run in out/
python -m lab.analyze --plain out-plain           compare with a plain Transformer on the same data
python -m lab.analyze --prune 0.8                 drop the smallest 80% of the alphas: out/pruned.pt
python train.py --init_from out/pruned.pt --learning_rate 1.5e-3 --out_dir out-pruned
                                                  and train on, at a tenth of the run's rate

alpha.png        the alphas as a heat map                                     (the paper's Figure 5)
alpha-steps.png  the alphas during training                                   (Figure 10)
cosine.png       cosine similarity of each Y_i to the embedding X_0           (Figure 6)
dropped.png      perplexity without the smallest alphas                       (Figure 7)
singular.png     singular values of the weights, averaged over the blocks     (Figure 13)
"""

import json
import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import data
from data.dataset import eval_offsets, stack_windows, sum_losses
from denseformer import DWA, Rows
from lib.checkpoint import load_model, save_checkpoint
from lib.device import find_device
from lib.figures import new_figure, text_heat_map
from lib.files import UserError
from lib.flags import UsageError, flag, parse_flags, path, run_cli

B = 8  # sequences per batch
KINDS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")  # the weight matrices of a block


@dataclass
class AnalyzeConfig:
    out_dir: str = flag("out", "folder of the run", read=path)
    plain: str | None = flag(None, "folder of a plain Transformer's run to compare with", read=path)
    dataset: str | None = flag(None, "where the data is now, if it has moved", read=path)
    prune: float = flag(0.0, "drop this fraction of the alphas: pruned.pt", low=0, below=1)
    tokens: int = flag(50_000, "maximum number of validation tokens to use", low=1)
    device: str = flag("auto", "cpu, cuda, cuda:1, mps...; auto prefers cuda, then mps")


# -----------------------------------------------------------------------------
# Measuring


class Run:
    """The model in a run's best.pt, and batches of validation tokens to measure it on."""

    def __init__(self, out_dir: str, config: AnalyzeConfig):
        device, best = find_device(config.device), Path(out_dir) / "best.pt"
        self.model, tokenizer, self.checkpoint = load_model(best, device)
        train, shape = self.checkpoint["train_config"], self.model.config
        name, T = config.dataset or train["dataset"], shape.block_size
        dataset = data.load(name, T, tokenizer, train["shards"])
        if dataset.fingerprint() != self.checkpoint["fingerprint"]:
            raise UserError(f"{name} is not the data that {best} was trained on; see --dataset")
        if self.checkpoint["step"] == 0:
            print(f"{best} is from step 0, before training")
        offsets = eval_offsets(dataset.val, T, max(1, config.tokens // T))
        self.batches = [  # x and y, (B, T): tokens and those that follow, -1 after the end
            stack_windows(dataset.val, offsets[n : n + B], (B, T), device)
            for n in range(0, len(offsets), B)
        ]

    def perplexity(self) -> float:
        loss_sum, n = sum_losses(self.model, self.batches)
        return math.exp(loss_sum / n)

    @torch.no_grad()
    def cosines(self) -> list[float]:
        """Return the cosine similarity of Y_i to X_0 for i = 0..L, averaged over the tokens."""
        Y: list[Tensor] = []
        readers = [*self.model.blocks, self.model.ln_f]  # what reads Y_0..Y_L
        hooks = [r.register_forward_pre_hook(lambda _, args: Y.append(args[0])) for r in readers]
        total, n = torch.zeros(len(readers)), 0
        for x, y in self.batches:
            Y.clear()
            self.model(x, y)
            cosines = F.cosine_similarity(Y[0].float(), torch.stack(Y).float(), dim=-1)
            total += (cosines * (y >= 0)).sum((1, 2)).cpu()
            n += int((y >= 0).sum())
        for hook in hooks:
            hook.remove()
        return (total / n).tolist()

    def dropped(self, percents: Iterable[int]) -> list[float]:
        """Return the perplexity without these percentages of the alphas, the smallest ones."""
        dwa, perplexities = self.model.dwa, []
        for percent in percents:
            self.model.dwa = prune(dwa, percent / 100)
            perplexities.append(self.perplexity())
        self.model.dwa = dwa
        return perplexities

    @torch.no_grad()
    def singular_values(self) -> dict[str, Tensor]:
        """Return {matrix: singular values in decreasing order, averaged over the blocks}."""
        blocks = [dict(block.named_parameters()) for block in self.model.blocks]
        return {
            kind: torch.linalg.svdvals(torch.stack([b[f"{kind}.weight"] for b in blocks])).mean(0)
            for kind in KINDS
        }


@torch.no_grad()
def prune(dwa: DWA, fraction: float) -> DWA:
    """Return the DWA without this fraction of its alphas, the smallest, but with one at least; an
    empty row has no DWA."""
    pairs = [(i, j) for i, row in enumerate(dwa.rows) for j in row]
    pairs.sort(key=lambda pair: abs(dwa.alpha[pair].item()), reverse=True)
    kept = pairs[: max(1, round((1 - fraction) * len(pairs)))]
    rows = [[j for j in row if (i, j) in kept] for i, row in enumerate(dwa.rows)]
    pruned = DWA(dwa.n_layer, rows).to(dwa.alpha)
    for pair in kept:
        pruned.alpha[pair] = dwa.alpha[pair]
    return pruned


def save_pruned(run: Run, fraction: float, out_dir: Path):
    """Save the model without this fraction of its alphas as pruned.pt."""
    before, after = run.model.dwa, prune(run.model.dwa, fraction)
    run.model.dwa = after
    config = run.checkpoint["model_config"] | {"dwa": after.rows}
    changed = {"model": run.model.state_dict(), "model_config": config}
    save_checkpoint(out_dir / "pruned.pt", run.checkpoint | changed)
    print(
        f"\n{out_dir}/pruned.pt has {after.num_params():,} of {before.num_params():,} alphas: "
        f"validation perplexity {run.perplexity():.3f}"
    )


def read_snapshots(log: Path, last: int) -> dict[str, Tensor]:
    """Return {"step N": alpha} as train.py logged them, up to step `last`."""
    found = {}
    for line in log.read_text().splitlines() if log.exists() else ():
        with suppress(ValueError):  # a killed run may have written half a line
            entry = json.loads(line)
            if "alpha" in entry and entry["step"] <= last:
                found[f"step {entry['step']:,}"] = torch.tensor(entry["alpha"])
    return found


def print_table(title: str, columns: dict[str, Iterable]):
    """Print {head: entries}, down to the end of the shortest column."""
    print(f"\n{title}")
    for line in zip(*([head, *entries] for head, entries in columns.items()), strict=False):
        cells = (f"{x:.3f}" if isinstance(x, float) else str(x) for x in line)
        print(
            "  ".join(x.rjust(max(11, len(head))) for x, head in zip(cells, columns, strict=True))
        )


# -----------------------------------------------------------------------------
# Plots


def plot_alphas(alphas: dict[str, Tensor], rows: Rows, width: float, height: float):
    """Draw each of {title: alpha}; above 0.01, equal steps of color are equal factors. What no DWA
    reads is gray."""
    from matplotlib.colors import SymLogNorm

    n, L = len(alphas), len(rows) - 1
    figure, all_axes = new_figure((n * width, height), 1, n, sharey=True, squeeze=False)
    read = torch.zeros(L + 1, L + 1, dtype=torch.bool)
    for i, row in enumerate(rows):
        read[i, row] = True
    limit = max(alpha[read].abs().max().item() for alpha in alphas.values())
    norm = SymLogNorm(0.01, vmin=-limit, vmax=limit)
    for axes, (title, alpha) in zip(all_axes[0], alphas.items(), strict=True):
        shown = alpha.masked_fill(~read, torch.nan)[1:]
        extent = (-0.5, L + 0.5, L + 0.5, 0.5)  # row i is Y_i, from 1 on
        image = axes.imshow(shown.numpy(), cmap="RdBu_r", norm=norm, extent=extent)
        axes.set_facecolor("0.9")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("$j$ (output $X_j$; $X_0$: embedding)")
        axes.locator_params(integer=True)
    all_axes[0, 0].set_ylabel("$i$ (DWA output $Y_i$)")
    figure.colorbar(image, ax=all_axes, label=r"$\alpha_{i,j}$", shrink=0.85)
    return figure


def plot_lines(lines: dict[str, list[float]], dx: int, **labels):
    """Draw each of {name: y} over x = 0, dx, 2 dx..."""
    figure, axes = new_figure((6.5, 3.8))
    for name, y in lines.items():
        axes.plot([dx * n for n in range(len(y))], y, "o-", label=name, markersize=3.5)
    axes.set(**labels)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def plot_singular_values(values: dict[str, dict[str, Tensor]]):
    figure, all_axes = new_figure((8, 5.4), 2, 2)
    for (name, of_kind), style in zip(values.items(), ("-", "--"), strict=False):
        for axes, (kind, s) in zip(all_axes.flat, of_kind.items(), strict=True):
            axes.plot(range(1, len(s) + 1), s.cpu(), style, label=name)
            axes.set_title(kind, fontsize=10)
            axes.grid(alpha=0.3)
    figure.supxlabel("index of the singular value", fontsize=10)
    figure.supylabel("mean over the blocks", fontsize=10)
    all_axes[0, 0].legend()
    return figure


# -----------------------------------------------------------------------------


def main(argv=None):
    config = AnalyzeConfig(**parse_flags(AnalyzeConfig, argv, __doc__))
    out_dir, run, plots = Path(config.out_dir), Run(config.out_dir, config), {}
    dwa = run.model.dwa
    if config.prune and not dwa.num_params():
        raise UsageError(f"--prune: the model in {out_dir} has no alphas")
    name = f"DenseFormer {dwa.pattern if isinstance(dwa.pattern, str) else 'pruned'}"
    runs = {name if dwa.num_params() else "Transformer": run}
    if config.plain:
        plain = runs["plain Transformer"] = Run(config.plain, config)
        if plain.model.dwa.num_params():
            raise UsageError(f"--plain: the model in {config.plain} is a DenseFormer")

    if dwa.num_params():
        alpha, step = dwa.alpha.detach().cpu(), run.checkpoint["step"]
        print(text_heat_map(alpha, dwa.rows))
        last = {f"{name}, step {step:,}": alpha}
        plots["alpha"] = partial(plot_alphas, last, dwa.rows, 7, 6)
        if snapshots := read_snapshots(out_dir / "log.jsonl", step):
            plots["alpha-steps"] = partial(plot_alphas, snapshots, dwa.rows, 2.3, 2.6)
        percents = range(0, 55, 5)
        lines = {"perplexity": run.dropped(percents)}
        print_table(
            "validation perplexity without the smallest alphas", {"% dropped": percents} | lines
        )
        labels = {"xlabel": "smallest alphas dropped (%)", "ylabel": "validation perplexity"}
        plots["dropped"] = partial(plot_lines, lines, 5, **labels)

    cosines = {name: run.cosines() for name, run in runs.items()}
    print_table(
        "cosine similarity of Y_i to the embedding X_0", {"i": range(dwa.n_layer + 1)} | cosines
    )
    labels = {"xlabel": "$i$ (after block $i$)", "ylabel": "cosine similarity of $Y_i$ to $X_0$"}
    plots["cosine"] = partial(plot_lines, cosines, 1, **labels)

    values = {name: run.singular_values() for name, run in runs.items()}
    means = {name: [s.mean().item() for s in v.values()] for name, v in values.items()}
    print_table("mean singular value of each weight matrix, over all blocks", {"": KINDS} | means)
    plots["singular"] = partial(plot_singular_values, values)

    try:
        for file, plot in plots.items():
            plot().savefig(out_dir / f"{file}.png", dpi=150)
        print(f"\nsaved in {out_dir}: {', '.join(f'{file}.png' for file in plots)}")
    except ImportError:
        print("\nfor the plots: pip install matplotlib")
    if config.prune:
        save_pruned(run, config.prune, out_dir)


if __name__ == "__main__":
    run_cli(main)
