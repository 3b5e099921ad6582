"""What the alphas of a trained DenseFormer learned.

python analyze.py                      the heat map out/alpha.png, the paper's Figure 5
python analyze.py --out_dir elsewhere
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from common import CheckpointError, Parser, flag, load_checkpoint


@dataclass
class AnalyzeConfig:
    out_dir: str = flag("out", "folder of the run")
    checkpoint: str = flag("best", "best or last", choices=("best", "last"))


def prune(alpha, mask, fraction):
    """The mask without that fraction of its entries, those whose alphas are the smallest.

    A row that loses all of them is no DWA any more, and gets its diagonal back.
    """
    size = alpha.abs().masked_fill(~mask, -1).flatten()
    kept = torch.zeros_like(size, dtype=torch.bool)
    kept[size.argsort(descending=True)[: round((1 - fraction) * mask.sum().item())]] = True
    kept = kept.view_as(mask)
    diagonal = torch.eye(len(mask) + 1, dtype=torch.bool)[1:]
    return kept | (diagonal & ~kept.any(dim=1, keepdim=True))


def plot_alpha(alpha, mask, title, path):
    """alpha and mask, both (n_layer, n_layer + 1), as a heat map on a symmetric-log scale.

    Equal steps of colour are equal factors, above 0.01; what the mask leaves out is grey.
    """
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    n_layer = len(alpha)
    width = min(9.0, max(4.5, 1.8 + 0.32 * n_layer))
    figure, axes = plt.subplots(figsize=(width, 0.85 * width), layout="constrained")
    axes.set_facecolor("0.9")
    limit = alpha.abs().max().item()
    image = axes.imshow(
        alpha.masked_fill(~mask, torch.nan),
        cmap="RdBu_r",
        norm=matplotlib.colors.SymLogNorm(0.01, vmin=-limit, vmax=limit),
        extent=(-0.5, n_layer + 0.5, n_layer + 0.5, 0.5),  # row i-1 is DWA i
    )
    if n_layer <= 12:  # room for the numbers
        for i, j in mask.nonzero().tolist():
            value = alpha[i, j].item()
            color = "white" if abs(value) > 0.5 * limit else "black"
            axes.text(j, i + 1, f"{value:.2f}", ha="center", va="center", fontsize=8, color=color)
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    axes.set_title(title)
    axes.set_xlabel("$j$, of block output $X_j$ ($X_0$: the embedding)")
    axes.set_ylabel("$i$, of DWA output $Y_i$")
    figure.colorbar(image, ax=axes, label=r"$\alpha_{i,j}$", shrink=0.85)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv=None):
    config = AnalyzeConfig(**Parser(AnalyzeConfig, __doc__).given(argv))
    out_dir = Path(config.out_dir)
    checkpoint = load_checkpoint(out_dir / f"{config.checkpoint}.pt")
    alpha, mask = (checkpoint["model"][name] for name in ("dwa.alpha", "dwa.mask"))
    title = f"{checkpoint['model_config']['dwa']} DenseFormer, step {checkpoint['step']:,}"
    try:
        plot_alpha(alpha, mask, title, out_dir / "alpha.png")
    except ImportError:
        sys.exit("analyze.py: the plot needs matplotlib: pip install matplotlib")
    print(f"the alphas are drawn in {out_dir}/alpha.png")


if __name__ == "__main__":
    try:
        main()
    except CheckpointError as error:
        sys.exit(f"analyze.py: {error}")
