"""Show what the alphas of a trained DenseFormer learned: print tables, plot into the run's folder.

python -m lab.analyze                             the run in out/
python -m lab.analyze --plain out-plain           compare with a plain Transformer on the same data
python -m lab.analyze --prune 0.8                 drop the smallest 80% of the alphas: out/pruned.pt
python train.py --init_from out/pruned.pt --learning_rate 1.5e-3 --out_dir out-pruned
                                          and continue without them, at a tenth of the rate

alpha.png        the alphas as a heat map                                     (the paper's Figure 5)
alpha-steps.png  the alphas during training                                   (Figure 10)
cosine.png       cosine similarity of each Y_i to the embedding X_0           (Figure 6)
dropped.png      perplexity without the smallest alphas                       (Figure 7)
singular.png     singular values of the weights, averaged over the blocks     (Figure 13)
"""

import json
import math
import shlex
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F
from tqdm import tqdm

import data
from data.dataset import eval_offsets, stack_windows, sum_losses
from denseformer import DWA
from lib.checkpoint import checkpoint_errors, load_model, save_checkpoint
from lib.device import find_device
from lib.figures import new_figure, text_heat_map
from lib.files import UserError
from lib.flags import UsageError, flag, parse_flags, run_cli

BATCH_SIZE = 8


@dataclass
class AnalyzeConfig:
    out_dir: str = flag("out", "folder of the run", path=True)
    checkpoint: str = flag("best", "which checkpoint of the run", choices=("best", "last"))
    plain: str | None = flag(None, "folder of a plain Transformer's run to compare with", path=True)
    prune: float = flag(0.0, "drop this fraction of the alphas, smallest first: pruned.pt", 0, 1)
    tokens: int = flag(50_000, "maximum number of validation tokens to use", low=1)
    device: str = flag("auto", "cpu, cuda, cuda:1, mps...; auto prefers cuda, then mps")


# -----------------------------------------------------------------------------
# Measuring


class Run:
    """A trained model and the validation tokens to measure it on."""

    def __init__(self, path, tokens, device):
        self.device = device
        self.model, _, self.checkpoint = load_model(path, device)
        self.T = T = self.model.config.block_size
        with checkpoint_errors(path):
            train, fingerprint = self.checkpoint["train_config"], self.checkpoint["fingerprint"]
            name, tokenizer, shards = (train[k] for k in ("dataset", "tokenizer", "shards"))
        dataset = data.load(name, T, tokenizer, shards)
        if dataset.fingerprint() != fingerprint:
            raise UserError(f"{name} is not the data that {path} was trained on")
        self.val = dataset.val
        self.offsets = eval_offsets(dataset.val, T, max(1, tokens // T))

    def batches(self):
        """Yield x and y, (B, T): validation tokens and the tokens that follow, -1 after the end."""
        B, V = BATCH_SIZE, self.model.config.vocab_size
        for n in range(0, len(self.offsets), B):
            yield stack_windows(self.val, self.offsets[n : n + B], (B, self.T), V, self.device)

    def perplexity(self):
        """Return the perplexity on the validation tokens."""
        loss_sum, count = sum_losses(self.model, self.batches())
        return math.exp(loss_sum / count)

    @torch.no_grad()
    def cosines(self):
        """Return the cosine similarity of Y_i to X_0 for i = 0..L, averaged over the tokens."""
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
        """Return the perplexity after dropping each fraction of the alphas, smallest first."""
        dwa, perplexities = self.model.dwa, []
        for fraction in tqdm(fractions, desc="dropping alphas", leave=False, disable=None):
            self.model.dwa = prune(dwa, fraction)
            perplexities.append(self.perplexity())
        self.model.dwa = dwa
        return perplexities

    def singular_values(self):
        """Return {matrix: singular values in decreasing order, averaged over the blocks}."""
        values = {}
        for kind in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
            weights = [block.get_submodule(kind).weight for block in self.model.blocks]
            w = torch.stack(weights).detach().cpu().float()
            values[kind] = torch.linalg.svdvals(w).mean(0)
        return values

    def snapshots(self, log):
        """Return {step: alpha} as train.py logged them, up to this checkpoint."""
        entries = map(json.loads, log.read_text().splitlines()) if log.exists() else ()
        found = {e["step"]: torch.tensor(e["alpha"]) for e in entries if "alpha" in e}
        return {step: a for step, a in found.items() if step <= self.checkpoint["step"]}


def sparsity(dwa):
    """Return the fraction of pairs (i, j), j < i, not in the mask: 0 for 1x1, 1 for none."""
    earlier = sum(j < i for i, row in enumerate(dwa.rows, start=1) for j in row)
    return 1 - earlier / (dwa.n_layer * (dwa.n_layer + 1) // 2)


def dwa_pattern(mask):
    """Return the pattern string of a mask, (L, L + 1), row by row, as in 5:1,5+10:2,6,10."""
    rows = [",".join(str(j) for j, read in enumerate(row) if read) for row in mask.tolist()]
    return "+".join(f"{i}:{row}" for i, row in enumerate(rows, start=1) if row) or "none"


@torch.no_grad()
def prune(dwa, fraction):
    """Return the DWA without this fraction of its alphas, the smallest; an empty row has no DWA."""
    number = round((1 - fraction) * dwa.num_params())
    size = dwa.alpha.abs().masked_fill(~dwa.mask, -1).flatten()
    mask = torch.zeros_like(size, dtype=torch.bool)
    mask[size.argsort(descending=True)[:number]] = True
    mask = mask.view_as(dwa.alpha)
    pruned = DWA(dwa.n_layer, dwa_pattern(mask), dwa.impl).to(dwa.alpha)
    pruned.alpha.copy_(torch.where(mask, dwa.alpha, pruned.alpha))
    return pruned


def save_pruned(run, fraction, out_dir):
    """Save the model without this fraction of its alphas as pruned.pt."""
    all_alphas = run.model.dwa.num_params()
    dwa = run.model.dwa = prune(run.model.dwa, fraction)
    if not dwa.num_params():
        raise UserError(f"--prune {fraction} drops all {all_alphas:,} alphas; drop fewer")
    config = run.checkpoint["model_config"] | {"dwa": dwa.pattern}
    model = {name: tensor.cpu() for name, tensor in run.model.state_dict().items()}
    path, rate = out_dir / "pruned.pt", run.checkpoint["train_config"]["learning_rate"]
    save_checkpoint(path, run.checkpoint | {"model": model, "model_config": config})
    print(
        f"\n{path} has {dwa.num_params():,} of {all_alphas:,} alphas (off the diagonal, "
        f"{sparsity(dwa):.1%} are dropped): validation perplexity {run.perplexity():.3f}\n"
        f"to continue training: python train.py --init_from {shlex.quote(str(path))} "
        f"--out_dir {shlex.quote(f'{out_dir}-pruned')} --learning_rate {rate / 10:g}, a tenth of "
        f"the run's\n"
        f"to train this pattern from scratch: --n_layer {dwa.n_layer} --dwa {dwa.pattern}"
    )


def table(head, rows):
    """Return a text table of rows under a header line."""
    lines = [head, *([f"{x:.3f}" if isinstance(x, float) else str(x) for x in r] for r in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(x.rjust(w) for x, w in zip(line, widths, strict=True)) for line in lines
    )


# -----------------------------------------------------------------------------
# Plots


def save(figure, path):
    figure.savefig(path, dpi=150)
    print(f"saved {path}")


def draw_alpha(axes, alpha, mask, limit):
    """Draw alpha, (L, L + 1), on a symmetric-log scale up to `limit`, and return the image.

    Above 0.01, equal color steps are equal factors. Entries outside the mask are gray.
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
    figure, axes = new_figure((width, 0.85 * width))
    limit = alpha.abs().max().item()
    image = draw_alpha(axes, alpha, mask, limit)
    if L <= 12:  # room for the numbers
        for i, j in mask.nonzero().tolist():
            value = alpha[i, j].item()
            color = "white" if abs(image.norm(value) - 0.5) > 0.3 else "black"
            axes.text(j, i + 1, f"{value:.2f}", ha="center", va="center", fontsize=8, color=color)
    axes.set_title(title)
    axes.set_xlabel("$j$ (block output $X_j$; $X_0$ is the embedding)")
    axes.set_ylabel("$i$ (DWA output $Y_i$)")
    figure.colorbar(image, ax=axes, label=r"$\alpha_{i,j}$", shrink=0.85)
    save(figure, path)


def plot_snapshots(snapshots, mask, path):
    n = len(snapshots)
    figure, all_axes = new_figure((2.1 * n + 0.8, 2.6), 1, n, sharey=True, squeeze=False)
    limit = max(alpha.abs().max().item() for alpha in snapshots.values())
    for axes, (step, alpha) in zip(all_axes[0], snapshots.items(), strict=True):
        image = draw_alpha(axes, alpha, mask, limit)
        axes.set_title(f"step {step:,}", fontsize=10)
        axes.set_xlabel("$j$ (of $X_j$)")
    all_axes[0, 0].set_ylabel("$i$ (of $Y_i$)")
    figure.colorbar(image, ax=all_axes, label=r"$\alpha_{i,j}$")
    save(figure, path)


def plot_cosines(cosines, path):
    figure, axes = new_figure((6.5, 3.8))
    for name, values in cosines.items():
        axes.plot(values, "o-", label=name, markersize=3.5)
    axes.axhline(0, color="0.6", linewidth=0.8)
    axes.set(xlabel="$i$ (after block $i$)", ylabel="cosine similarity of $Y_i$ to $X_0$")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, path)


def plot_dropped(fractions, perplexities, path):
    figure, axes = new_figure((6.5, 3.8))
    axes.plot([100 * f for f in fractions], perplexities, "o-", markersize=4)
    axes.axhline(perplexities[0], color="0.6", linewidth=0.8)
    axes.set(xlabel="smallest alphas dropped (%)", ylabel="validation perplexity")
    if max(perplexities) > 10 * min(perplexities):
        axes.set_yscale("log")
    else:
        axes.ticklabel_format(useOffset=False)
    axes.grid(alpha=0.3, which="both")
    save(figure, path)


def plot_singular_values(values, path):
    figure, all_axes = new_figure((8, 5.4), 2, 2)
    for name, style in zip(values, ("-", "--"), strict=False):
        for axes, (kind, s) in zip(all_axes.flat, values[name].items(), strict=True):
            axes.plot(range(1, len(s) + 1), s, style, label=name)
            axes.set_title(kind, fontsize=10)
            axes.grid(alpha=0.3)
    for axes in all_axes[1]:
        axes.set_xlabel("index of the singular value")
    for axes in all_axes[:, 0]:
        axes.set_ylabel("mean over the blocks")
    all_axes[0, 0].legend()
    save(figure, path)


# -----------------------------------------------------------------------------


def main(argv=None):
    config = AnalyzeConfig(**parse_flags(AnalyzeConfig, argv, __doc__))
    device = find_device(config.device)
    out_dir = Path(config.out_dir)
    run = Run(out_dir / f"{config.checkpoint}.pt", config.tokens, device)
    dwa = run.model.dwa
    alpha, mask, has_alphas = dwa.weights().detach().cpu(), dwa.mask.cpu(), dwa.num_params() > 0
    if config.prune and not has_alphas:
        raise UsageError(f"--prune: the model in {out_dir} is a plain Transformer without alphas")
    pattern = dwa.pattern if len(dwa.pattern) < 20 else f"{dwa.pattern[:16]}..."
    runs = {f"DenseFormer {pattern}" if has_alphas else "Transformer": run}
    if config.plain:
        plain = Run(Path(config.plain) / f"{config.checkpoint}.pt", config.tokens, device)
        if plain.model.dwa.num_params():
            raise UsageError(f"--plain: the model in {config.plain} is a DenseFormer")
        if plain.checkpoint["fingerprint"] != run.checkpoint["fingerprint"]:
            raise UsageError(
                f"--plain: {config.plain} and {out_dir} were trained on different data"
            )
        runs["plain Transformer"] = plain

    # Tables
    if has_alphas:
        print(text_heat_map(alpha, mask))
    cosines = {name: r.cosines() for name, r in runs.items()}
    depth = min(map(len, cosines.values())) - 1
    print("\ncosine similarity of Y_i to the embedding X_0")
    shown = sorted({round(depth * k / 8) for k in range(9)})
    print(table(["i", *cosines], [[i, *(c[i] for c in cosines.values())] for i in shown]))
    fractions = [0.05 * n for n in range(11)] if has_alphas else []
    perplexities = run.dropped(fractions)
    if has_alphas:
        print("\nvalidation perplexity without the smallest alphas")
        rows = zip((f"{f:.0%}" for f in fractions), perplexities, strict=True)
        print(table(["dropped", "perplexity"], list(rows)))
    values = {name: r.singular_values() for name, r in runs.items()}
    print("\nmean singular value of each weight matrix, over all blocks")
    kinds = next(iter(values.values()))
    rows = [[kind, *(s[kind].mean().item() for s in values.values())] for kind in kinds]
    print(table(["", *values], rows), end="\n\n")

    # Plots
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
    run_cli(main)
