"""The optimizers, against the singular value decomposition and the formulas of Muon and AdamW."""

import pytest
import torch

from denseformer import DenseFormer
from lib.optim import Muon, configure_optimizers, orthogonalize, set_lr
from test_denseformer import tiny


@pytest.mark.parametrize("shape", [(1, 8, 8), (2, 8, 32), (6, 12, 12)])
def test_orthogonalize_keeps_the_singular_vectors(shape):
    torch.manual_seed(0)
    G = torch.randn(shape).double() * 1e-3
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    scale = U.mT @ orthogonalize(G) @ Vh.mT  # diagonal, with the new singular values
    new = scale.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(scale, torch.diag_embed(new), atol=1e-10, rtol=0)
    large = 0.05 * torch.linalg.matrix_norm(G).unsqueeze(-1) < S
    assert large.any()
    assert new[large].min() > 0.65
    assert new[large].max() < 1.25
    assert new.min() > 0


def test_muon_is_its_formula():
    """For matrices that are square, tall, and wide; the last two are one batch."""
    torch.manual_seed(0)
    shapes = [(8, 8), (24, 8), (8, 24), (8, 24)]
    *params, unused = (torch.nn.Parameter(torch.randn(shape).double()) for shape in shapes)
    muon, before = Muon([*params, unused], 0.02, weight_decay=0.3), unused.detach().clone()
    expected = [(p.detach().clone(), torch.zeros(p.shape)) for p in params]
    for _ in range(3):
        for i, (p, (w, m)) in enumerate(zip(params, expected, strict=True)):
            p.grad = g = torch.randn(p.shape).double()  # `unused` has none, so it is skipped
            m = 0.95 * m + 0.05 * g
            update = 0.05 * g + 0.95 * m
            wide = update if len(p) <= 8 else update.mT
            update = orthogonalize(wide[None])[0]
            update = update if len(p) <= 8 else update.mT
            expected[i] = w - 0.02 * (0.3 * w + 0.2 * max(p.shape) ** 0.5 * update), m
        muon.step()
    for p, (w, _) in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach(), w)
    assert len(muon.state) == 3
    assert unused.equal(before)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_is_trained_once_and_the_matrices_decay(optimizer):
    model = DenseFormer(tiny(bias=True).config)
    model.wpe = torch.nn.Embedding(8, 4)  # a parameter that a user added is trained too
    optimizers = configure_optimizers(model, optimizer, 1e-3, weight_decay=0.1)
    groups = [group for each in optimizers for group in each.param_groups]
    ids = [id(p) for group in groups for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    ends = ("c_attn.weight", "c_proj.weight", "c_fc.weight", "wte.weight", "wpe.weight")
    for name, p in model.named_parameters():
        assert (id(p) in decayed) == name.endswith(ends), name
    if optimizer == "muon":
        in_muon = {id(p) for p in optimizers[0].param_groups[0]["params"]}
        for name, p in model.named_parameters():
            assert (id(p) in in_muon) == (name.startswith("blocks.") and p.dim() == 2), name


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_the_alphas_have_a_learning_rate_of_their_own(scale):
    model = DenseFormer(tiny().config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizers = configure_optimizers(model, "muon", 1e-3, 0.0, dwa_lr_scale=scale)
    set_lr(optimizers, 2e-3)
    model(*torch.randint(17, (2, 2, 8)))[1].backward()
    for each in optimizers:
        each.step()
    # AdamW's first step changes every entry by the learning rate
    change = {name: (p - before[name]).abs().max().item() for name, p in model.named_parameters()}
    assert change["dwa.alpha"] == pytest.approx(2e-3 * scale, rel=1e-3)
    assert change["wte.weight"] == pytest.approx(2e-3, rel=1e-3)
