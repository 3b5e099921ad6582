"""The optimizers, against the singular value decomposition and the formulas of Muon and AdamW."""

import pytest
import torch

from denseformer import DenseFormer
from lib.optim import NARROW, WIDE, Muon, configure_optimizers, orthogonalize, set_lr
from test_denseformer import tiny


def apply(steps, s):
    for a, b, c in steps:
        s = a * s + b * s**3 + c * s**5
    return s


def test_orthogonalize_changes_only_singular_values_and_no_steps_bring_them_closer_to_1():
    for steps, m, low, worst in ((NARROW, 12, 5e-3, 0.502), (WIDE, 130, 3e-3, 0.208)):
        G = torch.randn(6, m, 3 * m, generator=torch.Generator().manual_seed(0)).double() * 1e-3
        U, S, Vh = torch.linalg.svd(G, full_matrices=False)
        scale = U.mT @ orthogonalize(G) @ Vh.mT  # diagonal, with the new singular values
        new = apply(steps, S / torch.linalg.matrix_norm(G).unsqueeze(-1))
        torch.testing.assert_close(scale, torch.diag_embed(new), atol=1e-10, rtol=0)
        s, best = torch.linspace(low, 1.02, 100_000).double(), torch.tensor(steps).double()
        changes = torch.eye(best.numel()).view(-1, *best.shape) / 100
        others = (best * (1 + change) for change in (*changes, *-changes))
        errors = [(apply(tried, s) - 1).abs().max() for tried in (best, *others)]
        assert min(errors) == errors[0] < worst


def test_muon_is_its_formula():
    """For matrices that are square, tall, wide, and two in one; tall and wide are one batch."""
    torch.manual_seed(0)
    shapes = [(8, 8), (24, 8), (8, 24), (16, 8), (8, 24)]
    *params, unused = (torch.nn.Parameter(torch.randn(shape).double()) for shape in shapes)
    muon, before = Muon([*params, unused], 0.02, 0.3, stacked=params[3:]), unused.detach().clone()
    expected = [(p.detach().clone(), torch.zeros(p.shape)) for p in params]
    for _ in range(3):
        for i, (p, (w, m)) in enumerate(zip(params, expected, strict=True)):
            p.grad = g = torch.randn(p.shape).double()  # `unused` has none, so it is skipped
            m = 0.95 * m + 0.05 * g
            update = 0.05 * g + 0.95 * m
            rows = 8 if i == 3 else len(p)
            update = torch.cat([orthogonalize(part[None])[0] for part in update.split(rows)])
            expected[i] = w - 0.02 * (0.3 * w + 0.2 * max(rows, p.size(1)) ** 0.5 * update), m
        muon.step()
    for p, (w, _) in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach(), w)
    assert unused.equal(before)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_is_trained_once_and_the_alphas_at_their_own_rate(optimizer):
    model = DenseFormer(tiny(bias=True).config)
    model.wpe = torch.nn.Embedding(8, 4)  # a parameter that a user added is trained too
    optimizers = configure_optimizers(model, optimizer, weight_decay=0.1, dwa_lr_scale=3.0)
    set_lr(optimizers, 2e-3)
    groups = [group for each in optimizers for group in each.param_groups]
    found = {p: (group["weight_decay"], group["lr"]) for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(found)
    muon = {p: p in o.stacked for o in optimizers[:-1] for p in o.param_groups[0]["params"]}
    matrices = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    for name, p in model.named_parameters():
        decay = 0.1 if name.endswith((*matrices, "wte.weight", "wpe.weight")) else 0.0
        assert found[p] == (decay, 6e-3 if name == "dwa.alpha" else 2e-3), name
        assert (p in muon) == (optimizer == "muon" and name.endswith(matrices)), name
        assert muon.get(p, False) == (p in muon and "c_attn" in name), name
