"""What the alphas of a trained DenseFormer learned: tables here, plots in the folder of the run.

python analyze.py                             of the run in out/
python analyze.py --plain out-plain           beside a plain Transformer of the same data
python analyze.py --prune 0.8                 drops the smallest 80% of the alphas: out/pruned.pt
python train.py --init_from out/pruned.pt --out_dir out-pruned      and trains on without them

alpha.png        the alphas as a heat map                                   (the paper's Figure 5)
alpha-steps.png  how they came to be, step by step                                     (Figure 10)
cosine.png       how alike each Y_i still is to the embedding X_0                       (Figure 6)
dropped.png      the perplexity when the smallest alphas are left out                   (Figure 7)
singular.png     the singular values of the weight matrices, averaged over the blocks  (Figure 13)
"""

import json
import math
import signal
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C ends it at once, also while torch is imported
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
from torch.nn import functional as F
from tqdm import tqdm

import data
from common import (
    CheckpointError,
    Parser,
    Stop,
    find_device,
    flag,
    load_model,
    save_checkpoint,
    side_by_side,
    start,
    understood,
    windows,
)
from denseformer import DWA, dwa_pattern


@dataclass
class AnalyzeConfig:
    out_dir: str = flag("out", "folder of the run")
    checkpoint: str = flag("best", "best or last", choices=("best", "last"))
    plain: str | None = flag(None, "folder of the run of a plain Transformer", type=str)
    prune: float = flag(0.0, "share of the alphas to drop, the smallest, into pruned.pt", low=0.0)
    tokens: int = flag(50_000, "of the validation split to measure on, at most", low=1)
    device: str = flag("auto", "cuda, cuda:1, mps, cpu; auto takes the first of them that is here")

    def __post_init__(self):
        if self.prune >= 1:
            raise ValueError(f"--prune must be below 1, not {self.prune}")


# -----------------------------------------------------------------------------
# Measuring


class Run:
    """A trained model, and the validation tokens to measure it on."""

    B = 8  # sequences that go through the model at once

    def __init__(self, path, tokens, device):
        self.device = device
        self.model, _, self.checkpoint = load_model(path, device)
        self.T = T = self.model.config.block_size
        with understood(path):
            train, fingerprint = self.checkpoint["train_config"], self.checkpoint["fingerprint"]
            name, tokenizer, shards = (train[k] for k in ("dataset", "tokenizer", "shards"))
        dataset = data.load(name, T, tokenizer, shards)
        if dataset.fingerprint() != fingerprint:
            raise CheckpointError(f"{name} is not the data that {path} was trained on")
        self.val, self.starts = dataset.val, side_by_side(dataset.val, T, max(1, tokens // T))

    @property
    def depth(self):
        return self.model.config.n_layer

    def batches(self):
        """Validation tokens and those that follow: x and y, (B, T); y is -1 behind the end."""
        V = self.model.config.vocab_size
        for n in range(0, len(self.starts), self.B):
            yield windows(self.val, self.starts[n : n + self.B], (self.B, self.T), self.device, V)

    @torch.no_grad()
    def perplexity(self):
        total = count = 0
        for x, y in self.batches():
            n = (y >= 0).sum().item()
            total, count = total + self.model(x, y)[1].item() * n, count + n
        return math.exp(total / count)

    @torch.no_grad()
    def cosines(self):
        """Cosine similarity of Y_i to X_0, i = 0..L, averaged over validation tokens: a list."""
        Y, readers = [], [*self.model.blocks, self.model.ln_f]  # what reads Y_0..Y_L
        hooks = [
            reader.register_forward_pre_hook(lambda module, args: Y.append(args[0].float()))
            for reader in readers
        ]
        total, count = torch.zeros(len(readers)), 0
        for x, y in self.batches():
            Y.clear()
            self.model(x, y)
            real = y >= 0
            for i, Y_i in enumerate(Y):
                total[i] += F.cosine_similarity(Y[0], Y_i, dim=-1)[real].sum().cpu()
            count += real.sum().item()
        for hook in hooks:
            hook.remove()
        return (total / count).tolist()

    def dropped(self, fractions):
        """The perplexity without these fractions of the alphas, the smallest: a list."""
        dwa, perplexities = self.model.dwa, []
        for fraction in tqdm(fractions, desc="dropping alphas", leave=False, disable=None):
            self.model.dwa = prune(dwa, fraction)
            perplexities.append(self.perplexity())
        self.model.dwa = dwa
        return perplexities

    def singular_values(self):
        """{matrix: its singular values, largest first, averaged over the blocks}."""
        kinds = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        weights = {
            kind: torch.stack([block.get_submodule(kind).weight for block in self.model.blocks])
            for kind in kinds
        }
        return {
            kind: torch.linalg.svdvals(w.detach().cpu().float()).mean(0)
            for kind, w in weights.items()
        }

    def snapshots(self, log):
        """{step: alpha} as train.py logged them, up to this checkpoint."""
        entries = map(json.loads, log.read_text().splitlines()) if log.exists() else ()
        found = {e["step"]: torch.tensor(e["alpha"]) for e in entries if "alpha" in e}
        return {step: a for step, a in found.items() if step <= self.checkpoint["step"]}


def kept(alpha, mask, fraction):
    """The mask without that fraction of its entries, those with the smallest alphas."""
    size = alpha.abs().masked_fill(~mask, -1).flatten()
    kept = torch.zeros_like(size, dtype=torch.bool)
    kept[size.argsort(descending=True)[: round((1 - fraction) * mask.sum().item())]] = True
    return kept.view_as(mask)


@torch.no_grad()
def prune(dwa, fraction):
    """The DWA without that fraction of the alphas; a row that loses all of them has no DWA."""
    mask = kept(dwa.alpha, dwa.mask, fraction)
    pruned = DWA(dwa.n_layer, dwa_pattern(mask), dwa.impl).to(dwa.alpha)
    pruned.alpha.copy_(dwa.alpha)
    pruned.alpha.copy_(pruned.weights())
    return pruned


def save_pruned(run, fraction, out_dir):
    """pruned.pt: the run's model with a mask of its largest alphas only."""
    all_alphas = run.model.dwa.num_params()
    dwa = run.model.dwa = prune(run.model.dwa, fraction)
    if not dwa.num_params():
        raise Stop(f"--prune {fraction} leaves no DWA of the {all_alphas:,} alphas: keep more")
    config = run.checkpoint["model_config"] | {"dwa": dwa.pattern}
    model = {name: tensor.cpu() for name, tensor in run.model.state_dict().items()}
    path = out_dir / "pruned.pt"
    save_checkpoint(path, run.checkpoint | {"model": model, "model_config": config})
    print(
        f"\n{path} has {dwa.num_params():,} of {all_alphas:,} alphas left, a sparsity of "
        f"{dwa.sparsity():.1%}: validation perplexity {run.perplexity():.3f}\n"
        f"to train on with them: python train.py --init_from {path} --out_dir {out_dir}-pruned\n"
        f"or from the start: --n_layer {run.depth} --dwa {dwa.pattern}"
    )


# -----------------------------------------------------------------------------
# In the terminal


def text_heat_map(alpha, mask):
    """The alphas as lines of text, a character each; wide enough for 48 blocks in 80 columns."""
    levels = (0.01, 0.03, 0.1, 0.3)
    lines = []
    for i, (row, there) in enumerate(zip(alpha.tolist(), mask.tolist(), strict=True), start=1):
        cells = (
            (" .-=#" if a < 0 else " ░▒▓█")[sum(abs(a) >= level for level in levels)] if m else " "
            for a, m in zip(row[: i + 1], there, strict=False)
        )
        lines.append(f"Y_{i:<3}|{''.join(cells)}|")
    key = "from 0.01, 0.03, 0.1, 0.3 on:  positive ░ ▒ ▓ █  negative . - = #"
    return "\n".join(["     X_0 ... X_i", *lines, key])


def table(head, rows):
    """Rows of numbers under their heads, as text."""
    lines = [head, *([f"{x:.3f}" if isinstance(x, float) else str(x) for x in r] for r in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(x.rjust(w) for x, w in zip(line, widths, strict=True)) for line in lines
    )


# -----------------------------------------------------------------------------
# Plots


def new_figure(*args, **kwargs):
    """A figure and its axes, of matplotlib, which is needed here only. Raises ImportError."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt.subplots(*args, layout="constrained", **kwargs)


def save(figure, path):
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(f"drawn: {path}")


def draw_alpha(axes, alpha, mask, limit):
    """alpha and mask, both (L, L + 1), on a symmetric-log scale up to `limit`; returns the image.

    Equal steps of colour are equal factors, above 0.01; what the mask leaves out is grey.
    """
    from matplotlib.colors import SymLogNorm
    from matplotlib.ticker import MaxNLocator

    L = len(alpha)
    axes.set_facecolor("0.9")
    image = axes.imshow(
        alpha.masked_fill(~mask, torch.nan).numpy(),
        cmap="RdBu_r",
        norm=SymLogNorm(0.01, vmin=-limit, vmax=limit),
        extent=(-0.5, L + 0.5, L + 0.5, 0.5),  # row i-1 is DWA i
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    return image


def plot_alpha(alpha, mask, title, path):
    L = len(alpha)
    width = min(9.0, max(4.5, 1.8 + 0.32 * L))
    figure, axes = new_figure(figsize=(width, 0.85 * width))
    limit = alpha.abs().max().item()
    image = draw_alpha(axes, alpha, mask, limit)
    if L <= 12:  # room for the numbers
        for i, j in mask.nonzero().tolist():
            value = alpha[i, j].item()
            color = "white" if abs(value) > 0.5 * limit else "black"
            axes.text(j, i + 1, f"{value:.2f}", ha="center", va="center", fontsize=8, color=color)
    axes.set_title(title)
    axes.set_xlabel("$j$, of block output $X_j$ ($X_0$: the embedding)")
    axes.set_ylabel("$i$, of DWA output $Y_i$")
    figure.colorbar(image, ax=axes, label=r"$\alpha_{i,j}$", shrink=0.85)
    save(figure, path)


def plot_snapshots(snapshots, mask, path):
    n = len(snapshots)
    figure, all_axes = new_figure(1, n, figsize=(2.1 * n + 0.8, 2.6), sharey=True, squeeze=False)
    limit = max(alpha.abs().max().item() for alpha in snapshots.values())
    for axes, (step, alpha) in zip(all_axes[0], snapshots.items(), strict=True):
        image = draw_alpha(axes, alpha, mask, limit)
        axes.set_title(f"step {step:,}", fontsize=10)
        axes.set_xlabel("$j$, of $X_j$")
    all_axes[0, 0].set_ylabel("$i$, of $Y_i$")
    figure.colorbar(image, ax=all_axes, label=r"$\alpha_{i,j}$")
    save(figure, path)


def plot_cosines(cosines, path):
    figure, axes = new_figure(figsize=(6.5, 3.8))
    for name, values in cosines.items():
        axes.plot(values, "o-", label=name, markersize=3.5)
    axes.axhline(0, color="0.6", linewidth=0.8)
    axes.set(xlabel="$i$, blocks so far", ylabel="cosine similarity of $Y_i$ to $X_0$")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, path)


def plot_dropped(fractions, perplexities, path):
    figure, axes = new_figure(figsize=(6.5, 3.8))
    axes.plot([100 * f for f in fractions], perplexities, "o-", markersize=4)
    axes.axhline(perplexities[0], color="0.6", linewidth=0.8)
    axes.set(xlabel="alphas dropped, the smallest (%)", ylabel="validation perplexity")
    if max(perplexities) > 10 * min(perplexities):
        axes.set_yscale("log")
    axes.grid(alpha=0.3, which="both")
    save(figure, path)


def plot_singular_values(values, path):
    figure, all_axes = new_figure(2, 2, figsize=(8, 5.4))
    for name, style in zip(values, ("-", "--"), strict=False):
        for axes, (kind, s) in zip(all_axes.flat, values[name].items(), strict=True):
            axes.plot(range(1, len(s) + 1), s, style, label=name)
            axes.set_title(kind, fontsize=10)
            axes.grid(alpha=0.3)
    for axes in all_axes[1]:
        axes.set_xlabel("rank of the singular value")
    for axes in all_axes[:, 0]:
        axes.set_ylabel("mean over the blocks")
    all_axes[0, 0].legend()
    save(figure, path)


# -----------------------------------------------------------------------------


def main(argv=None):
    parser = Parser(AnalyzeConfig, __doc__)
    try:
        config = AnalyzeConfig(**parser.given(argv))
        device = find_device(config.device)
    except ValueError as error:
        parser.error(str(error))
    out_dir = Path(config.out_dir)
    run = Run(out_dir / f"{config.checkpoint}.pt", config.tokens, device)
    alpha, mask = run.model.dwa.alpha.detach().cpu(), run.model.dwa.mask.cpu()
    pattern = run.checkpoint["model_config"]["dwa"]
    pattern = pattern if len(pattern) < 20 else f"{pattern[:16]}..."
    has_alphas = run.model.dwa.num_params() > 0
    if config.prune and not has_alphas:
        parser.error(f"--prune: the model in {out_dir} is a plain Transformer, without alphas")
    runs = {f"DenseFormer {pattern}" if has_alphas else "Transformer": run}
    if config.plain:
        plain = Run(Path(config.plain) / f"{config.checkpoint}.pt", config.tokens, device)
        if plain.model.dwa.num_params():
            parser.error(f"--plain: the model in {config.plain} has DWAs")
        if plain.checkpoint["fingerprint"] != run.checkpoint["fingerprint"]:
            parser.error(f"--plain: {config.plain} was trained on other data than {out_dir}")
        runs["plain Transformer"] = plain

    if has_alphas:
        print(text_heat_map(alpha, mask))
    cosines = {name: r.cosines() for name, r in runs.items()}
    depth = min(r.depth for r in runs.values())
    shown = sorted({round(depth * k / 8) for k in range(9)})
    print("\ncosine similarity of Y_i to the embedding X_0")
    print(table(["i", *cosines], [[i, *(c[i] for c in cosines.values())] for i in shown]))
    fractions = [0.05 * n for n in range(11)] if has_alphas else []
    perplexities = run.dropped(fractions)
    if has_alphas:
        print("\nvalidation perplexity when the smallest alphas are dropped")
        rows = zip((f"{f:.0%}" for f in fractions), perplexities, strict=True)
        print(table(["dropped", "perplexity"], list(rows)))
    values = {name: r.singular_values() for name, r in runs.items()}
    print("\nsingular values of the matrices, averaged over ranks and blocks")
    kinds = next(iter(values.values()))
    rows = [[kind, *(s[kind].mean().item() for s in values.values())] for kind in kinds]
    print(table(["", *values], rows))
    print()
    try:
        if has_alphas:
            title = f"DenseFormer {pattern}, step {run.checkpoint['step']:,}"
            plot_alpha(alpha, mask, title, out_dir / "alpha.png")
            if snapshots := run.snapshots(out_dir / "log.jsonl"):
                plot_snapshots(snapshots, mask, out_dir / "alpha-steps.png")
            plot_dropped(fractions, perplexities, out_dir / "dropped.png")
        plot_cosines(cosines, out_dir / "cosine.png")
        plot_singular_values(values, out_dir / "singular.png")
    except ImportError:
        print("for the plots: pip install matplotlib")
    if config.prune:
        save_pruned(run, config.prune, out_dir)


if __name__ == "__main__":
    start(main)
