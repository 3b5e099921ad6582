"""Train one of several models with train.py's loop, on the same blocks, from the same weights.

python -m lab.variants NAME [flags of train.py]

plain, 1x1, 4x5 ... as python train.py --dwa trains them
skip-gains          a learned scale on each skip connection, the paper's baseline
hyper-connections   4 residual streams (arXiv 2409.19606)    pip install hyper-connections==0.4.11
attn-res            block attention residuals (2603.15031)   pip install attn-res==0.1.0
diagonal-K          1x1, with the learning rate of alpha's diagonal times K, as diagonal-0.01

Only this module loads the checkpoints of skip-gains, hyper-connections and attn-res: use --resume.
"""

import re
import sys
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from denseformer import DenseFormer, DenseFormerConfig, KVCache
from lib.files import UserError
from lib.flags import run_cli
from lib.optim import configure_optimizers


def load_package(requirement: str) -> Any:
    """Return a package that the project does not depend on, such as "attn-res==0.1.0"."""
    try:
        return import_module(requirement.split("==")[0].replace("-", "_"))
    except ImportError as error:
        raise UserError(f"{error}: pip install {requirement}") from None


class SkipGains(DenseFormer):
    """The plain Transformer with a learned scale on each skip connection, 1 at first."""

    def __init__(self, config: DenseFormerConfig):
        super().__init__(config)
        self.blocks = nn.ModuleList(SkipGainsBlock(block) for block in self.blocks)


class SkipGainsBlock(nn.Module):
    def __init__(self, block: Any):
        super().__init__()
        self.block, self.gains = block, nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor, rotary: Tensor, cache: KVCache | None = None) -> Tensor:
        b, gains = self.block, self.gains
        x = gains[0] * x + b.attn(b.ln_1(x), rotary, cache)
        return gains[1] * x + b.mlp(b.ln_2(x))


class HyperConnections(DenseFormer):
    """4 residual streams: a sub-layer reads a mix of them, and its output is added to each.

    Between blocks, x is (4 B, T, C).
    """

    def __init__(self, config: DenseFormerConfig):
        super().__init__(config)
        package = load_package("hyper-connections==0.4.11")
        init, expand, reduce = package.get_init_and_expand_reduce_stream_functions(
            4, dim=config.n_embd
        )
        self.drop.register_forward_hook(lambda module, args, x: expand(x))
        self.blocks = nn.ModuleList(
            HyperBlock(block, init(layer_index=2 * i), init(layer_index=2 * i + 1))
            for i, block in enumerate(self.blocks)
        )
        self.ln_f.register_forward_pre_hook(lambda module, args: (reduce(args[0]),))


class HyperBlock(nn.Module):
    def __init__(self, block: Any, mix_1: nn.Module, mix_2: nn.Module):
        super().__init__()
        self.block, self.mix_1, self.mix_2 = block, mix_1, mix_2

    def forward(self, x: Tensor, rotary: Tensor, cache: KVCache | None = None) -> Tensor:
        b = self.block
        h, add = self.mix_1(x)
        h, add_2 = self.mix_2(add(b.attn(b.ln_1(h), rotary, cache)))
        return add_2(b.mlp(b.ln_2(h)))


class AttnRes(DenseFormer):
    """Block attention residuals: a sub-layer reads a sum, weighted by attention, over the embedding
    and the outputs of up to 8 groups of sub-layers."""

    def __init__(self, config: DenseFormerConfig):
        super().__init__(config)
        self.blocks = nn.ModuleList([AttnResBlocks(config, self.blocks)])


class AttnResBlocks(nn.Module):
    """All blocks, in the package's own loop over their sub-layers."""

    def __init__(self, config: DenseFormerConfig, blocks: Any):
        super().__init__()
        package, n, C = load_package("attn-res==0.1.0"), 2 * config.n_layer, config.n_embd
        self.run = package.AttnResTransformer._forward_block_attnres
        self.cfg = package.TransformerConfig(
            d_model=C, n_layers=n, n_heads=1, n_kv_heads=1, n_blocks=min(8, n)
        )
        pairs = [p for b in blocks for p in ((b.ln_1, b.attn), (b.ln_2, b.mlp))]
        self.layers = nn.ModuleList(
            AttnResLayer(package.AttnResOperator(C), norm, layer) for norm, layer in pairs
        )

    def forward(self, x: Tensor, rotary: Tensor, cache: KVCache | None = None) -> Tensor:
        return self.run(self, x, rotary, cache)


class AttnResLayer(nn.Module):
    def __init__(self, mix: nn.Module, norm: nn.Module, layer: nn.Module):
        super().__init__()
        self.mix, self.norm, self.layer = mix, norm, layer

    def forward(self, sources: Tensor, *rotary_and_cache) -> Tensor:
        """(sources, B, T, C) -> (B, T, C)"""
        is_attention = hasattr(self.layer, "c_attn")
        return self.layer(self.norm(self.mix(sources)), *rotary_and_cache * is_attention)


MODELS: dict[str, type[DenseFormer]] = {  # without DWA
    "plain": DenseFormer, "skip-gains": SkipGains, "hyper-connections": HyperConnections,
    "attn-res": AttnRes,
}  # fmt: skip


def scale_diagonal(optimizers: list[torch.optim.Optimizer], alpha: Tensor, k: float):
    """Multiply the learning rate of alpha's diagonal by k: shorten each of its steps to k times
    the optimizer's. (Scaling the gradient would not: Adam divides by its size.)"""
    diagonal = alpha.detach().diagonal()
    before = diagonal.clone()

    def remember(*_):
        before.copy_(diagonal)

    def shorten(*_):
        diagonal.copy_(before.lerp(diagonal, k))

    for optimizer in optimizers:
        optimizer.register_step_pre_hook(remember)
        optimizer.register_step_post_hook(shorten)


def main(argv=None):
    import train  # here, because lab/bench.py uses the models above without train.py

    name, *flags = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name == "--help":
        print(__doc__)
        return 0
    if name in MODELS:
        with patch.object(train, "DenseFormer", MODELS[name]):
            return train.main(["--dwa=none", *flags])
    if not (match := re.fullmatch(r"diagonal-(\d*\.?\d+)", name)):
        return train.main([f"--dwa={name}", *flags])

    def configure(model, *args, **kwargs):
        optimizers = configure_optimizers(model, *args, **kwargs)
        scale_diagonal(optimizers, model.dwa.alpha, float(match[1]))
        return optimizers

    with patch.object(train, "configure_optimizers", configure):
        return train.main(flags)


if __name__ == "__main__":
    run_cli(main)
