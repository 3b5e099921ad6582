"""The optimizers: AdamW, and Muon for the matrices inside the blocks.

Muon (Jordan et al., kellerjordan.github.io/posts/muon) is SGD with momentum that replaces each
update matrix with the nearest orthogonal one, so that all directions are learned at equal speed.
The update is scaled so that AdamW's learning rate and weight decay suit it (arXiv 2502.16982).
"""

from collections import defaultdict

import torch
from torch import Tensor

from denseformer import DenseFormer

# a, b and c of the steps of orthogonalize, for matrices of up to 128 rows, and of more
NARROW = (8.1400, -23.0368, 16.3967), (3.9213, -2.9254, 0.5597), (3.1886, -2.3910, 0.4990)
WIDE = (
    (8.2218, -23.3469, 16.6338), (4.0474, -3.0142, 0.5698),
    (3.5169, -2.6350, 0.5267), (2.5036, -1.8457, 0.4381),
)  # fmt: skip


def configure_optimizers(
    model: DenseFormer,
    optimizer: str = "adamw",
    learning_rate: float = 1e-3,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
    dwa_lr_scale: float = 1.0,
) -> list[torch.optim.Optimizer]:
    """Return the optimizers of a model. optimizer is "adamw" or "muon".

    Weight decay applies to matrices and the embedding, not to norms, biases or alpha: decay would
    weaken the skip connection across depth, alpha's diagonal. (The authors did decay alpha.)
    A param group's `lr_scale` multiplies the learning rate: dwa_lr_scale for alpha, 1 for others.
    """
    others = dict(model.named_parameters())
    alphas = [others.pop(name) for name in list(others) if name.endswith("alpha")]
    decayed = {name: p for name, p in others.items() if p.dim() >= 2}
    optimizers: list[torch.optim.Optimizer] = []
    if optimizer == "muon":
        matrices = {name: decayed.pop(name) for name in list(decayed) if name.startswith("blocks.")}
        stacked = [p for name, p in matrices.items() if name.endswith("c_attn.weight")]
        optimizers.append(Muon(matrices.values(), learning_rate, weight_decay, stacked=stacked))
    undecayed = [p for p in others.values() if p.dim() < 2]
    groups = [
        {"params": list(decayed.values()), "weight_decay": weight_decay},
        {"params": undecayed, "weight_decay": 0.0},
        {"params": alphas, "weight_decay": 0.0, "lr_scale": dwa_lr_scale},
    ]
    fused = next(model.parameters()).device.type in ("cuda", "cpu")
    optimizers.append(torch.optim.AdamW(groups, learning_rate, betas, fused=fused))
    set_lr(optimizers, learning_rate)
    return optimizers


def set_lr(optimizers: list[torch.optim.Optimizer], lr: float):
    """Set the learning rate of every group, times its lr_scale if it has one."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)


class Muon(torch.optim.Optimizer):
    """Muon for matrices, in float32. (torch.optim.Muon multiplies in bfloat16, which most CPUs only
    emulate, and takes one matrix at a time.)

    Those in `stacked` hold several square matrices, one above the other: c_attn, of q, k and v.
    """

    def __init__(
        self, params, lr: float, weight_decay: float = 0.1, momentum: float = 0.95, stacked=()
    ):
        self.stacked = set(stacked)
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            batches = defaultdict(list)  # {(m, n): [(matrix, its update or the transposed)]}
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - momentum)
                update = p.grad.lerp(state["momentum"], momentum)  # Nesterov
                m = p.size(1) if p in self.stacked else p.size(0)
                for matrix, part in zip(p.split(m), update.split(m), strict=True):
                    wide = part if m <= p.size(1) else part.mT
                    batches[wide.shape].append((matrix, wide))
            for (_, n), batch in batches.items():
                scale = 0.2 * n**0.5  # gives the update an RMS of 0.2 lr, typical of AdamW
                matrices, updates = zip(*batch, strict=True)
                for p, update in zip(matrices, orthogonalize(torch.stack(updates)), strict=True):
                    p.mul_(1 - lr * group["weight_decay"])
                    p.add_(update if p.shape == update.shape else update.mT, alpha=-lr * scale)


def orthogonalize(G: Tensor) -> Tensor:
    """Return an approximation of U V^T for each matrix G = U S V^T of a batch, (B, m, n), m <= n.

    Each Newton-Schulz step applies a s + b s^3 + c s^5 to the singular values s of G / |G|. For m
    up to 128, three steps bring those from 0.005 to 1 to between 0.5 and 1.5. Larger matrices have
    smaller ones: four steps bring those from 0.003 to 1 to between 0.79 and 1.21. No other a, b, c
    bring them closer to 1 in as many steps ("Polar Express", arXiv 2505.16932). They hold up to
    s = 1.02, to allow for rounding.
    """
    X = G / G.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for a, b, c in NARROW if G.size(-2) <= 128 else WIDE:
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)  # b A + c A A
        X = torch.baddbmm(X, B, X, beta=a)  # a X + B X
    return X
