"""DWA in other people's code: pytest tests/test_dwa.py

The references are the paper's formula and the naive DWA, which test_denseformer.py verifies.
"""

import copy
import gc
import os
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import denseformer
from bench import count_traffic, peak_memory
from denseformer import DWA, DenseFormer
from optim import configure_optimizers
from test_denseformer import IDX, Formula, all_outputs, assert_same, gradients, randomize, tiny

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
# The pattern of a pruned model: some rows do not read their own X_i.
HOLES = "3:0,2+4:1+5:0,1,2,3+6:2,6+7:0,1,4,5,6+8:1,3,5,6,7+9:0,1,5,7"


# -----------------------------------------------------------------------------
# The in-place DWA, used in every way that autograd allows. Each use runs a forward and backward
# pass of a small network of 9 blocks; its gradients must equal those of the naive DWA.


def network():
    torch.manual_seed(1)
    return nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(9)).double()


def run(dwa, blocks, x, watch=lambda i, y: None):
    depth = dwa(x)
    for i, block in enumerate(blocks, start=1):
        x = depth.step(i, x + block(x))
        watch(i, x)
    return x


def use_outputs(dwa, blocks, x):  # auxiliary losses, a Y_i used twice, one detached, one unused
    Y = {0: x}
    depth = dwa(x)
    for i, block in enumerate(blocks, start=1):
        y = Y[i - 1].detach() if i == 6 else Y[i - 1]
        Y[i] = depth.step(i, y + block(Y[4] if i == 8 else y))
    (Y[4].sin().sum() + Y[7].square().sum() + Y[9].cos().sum()).backward()


def use_early_exit(dwa, blocks, x):
    run(dwa, blocks[:7], x).square().sum().backward()


def use_frozen(*frozen):
    def use(dwa, blocks, x):
        modules = {"alpha": dwa, "block 1": blocks[0], "block 6": blocks[5]}
        for name in modules.keys() & frozen:
            modules[name].requires_grad_(False)
        run(dwa, blocks, x.detach() if "embedding" in frozen else x).square().sum().backward()

    return use


def use_two_forwards(dwa, blocks, x):
    a, b = run(dwa, blocks, x), run(dwa, blocks, 2 * x)
    with torch.no_grad():
        run(dwa, blocks, x[:1])
    (a * b).sum().backward()


def use_interleaved(dwa, blocks, x):
    other = DWA(9).double()
    other_depth, depth, y, z = other(x), dwa(x), x, x
    for i, block in enumerate(blocks, start=1):
        y, z = depth.step(i, y + block(y)), other_depth.step(i, block(z))
    z.sum().backward(inputs=[x])
    x.grad = None
    y.square().sum().backward()


def use_exception(dwa, blocks, x):
    depth, y = dwa(x), x
    for i, block in enumerate(blocks, start=1):
        if i == 5:
            with pytest.raises(ZeroDivisionError):
                depth.step(i, y / (1 // 0))
        y = depth.step(i, y + block(y))
    y.square().sum().backward()


def use_no_grad(*steps):
    def use(dwa, blocks, x):
        with torch.set_grad_enabled(0 not in steps):
            depth = dwa(x)
        for i, block in enumerate(blocks, start=1):
            with torch.set_grad_enabled(i not in steps):
                x = depth.step(i, x + block(x))
        x.square().sum().backward()

    return use


def use_no_grad_steps_of_trained_blocks(dwa, blocks, x):
    depth = dwa(x)
    for i, block in enumerate(blocks, start=1):
        x = x + block(x)
        with torch.set_grad_enabled(i not in (3, 4, 7)):  # Y_i is a constant, X_i is not
            x = depth.step(i, x)
    x.square().sum().backward()


def use_checkpoint(dwa, blocks, x):
    run(
        dwa, [lambda x, b=b: checkpoint(b, x, use_reentrant=False) for b in blocks], x
    ).sum().backward()


def use_any_layout(dwa, blocks, x):
    x = x.transpose(0, 1)
    y = run(dwa, [lambda x, b=b: b(x.transpose(0, 1)).transpose(0, 1) for b in blocks], x)
    y.sum().backward()  # its gradient is one number, expanded


def use_blocks_in_place(dwa, blocks, x):
    depth, y = dwa(x), x
    for i, block in enumerate(blocks, start=1):
        y = depth.step(i, y + block(y))  # the caller may modify Y_i without changing X_i
        y = y.mul_(1.5) if dwa.impl == "inplace" else y * 1.5
    y.square().sum().backward()


def use_empty_batch(dwa, blocks, x):
    run(dwa, blocks, x[:0]).sum().backward()


def use_one_vector(dwa, blocks, x):
    run(dwa, blocks, x[0, 0]).square().sum().backward()


USES = {
    "outputs": use_outputs,
    "early exit": use_early_exit,
    "frozen alphas": use_frozen("alpha"),
    "frozen embedding": use_frozen("embedding"),
    "frozen embedding and blocks": use_frozen("embedding", "block 1", "block 6"),
    "frozen embedding, block 1, alphas": use_frozen("embedding", "block 1", "alpha"),
    "two forwards": use_two_forwards,
    "interleaved": use_interleaved,
    "exception": use_exception,
    "no_grad first": use_no_grad(0, 1, 2, 3),
    "no_grad at times": use_no_grad(3, 5, 6, 8),
    "no_grad around steps": use_no_grad_steps_of_trained_blocks,
    "checkpoint": use_checkpoint,
    "any layout": use_any_layout,
    "blocks in place": use_blocks_in_place,
    "empty batch": use_empty_batch,
    "one vector": use_one_vector,
}


@pytest.mark.parametrize("pattern", ["1x1", "2x1", "last3+9:2,5", HOLES])
@pytest.mark.parametrize("use", USES.values(), ids=list(USES))
def test_inplace_gradients_are_naive_ones(use, pattern, monkeypatch):
    monkeypatch.setattr(denseformer, "TILE", 4)
    results = []
    for impl in ("inplace", "naive"):
        torch.manual_seed(0)
        dwa = DWA(9, pattern, impl).double()
        randomize(dwa)
        blocks, x = network(), torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
        assert isinstance(dwa(x), denseformer.InPlacePass) == (impl == "inplace")
        use(dwa, blocks, x)
        results.append(
            gradients(nn.ModuleDict({"dwa": dwa, "blocks": blocks}))
            | {"x": torch.zeros_like(x) if x.grad is None else x.grad}
        )
    assert_same(*results)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_is_training_without_gradients(mode):
    model = tiny()
    logits, loss = model(IDX, IDX)
    with mode():
        assert_same(model(IDX, IDX), (logits.detach(), loss.detach()), 1e-12)


# -----------------------------------------------------------------------------
# Misuse raises a RuntimeError that explains it, and never returns a wrong number


def second_backward(dwa, blocks, x):
    loss = run(dwa, blocks, x).sum()
    loss.backward(retain_graph=True)
    loss.backward()


def second_other_backward(dwa, blocks, x):
    # The backward of blocks 5..9 stops at step 5; that of an auxiliary loss then begins at 4.
    Y = {}
    loss = run(dwa, blocks, x, Y.__setitem__).sum()
    torch.autograd.grad(loss, list(blocks[4:].parameters()), retain_graph=True)
    torch.autograd.grad(Y[4].sin().sum(), list(blocks[:4].parameters()))


def second_derivative(dwa, blocks, x):
    torch.autograd.functional.hvp(
        lambda x: run(dwa, blocks, x).square().sum(), x, torch.ones_like(x)
    )


def create_graph(dwa, blocks, x):
    torch.autograd.grad(run(dwa, blocks, x).square().sum(), dwa.alpha, create_graph=True)


def checkpoint_around_dwas(dwa, blocks, x):
    depth = dwa(x)

    def two(x, i):
        x = depth.step(i, blocks[i - 1](x))
        return depth.step(i + 1, blocks[i](x))

    for i in range(1, 9, 2):
        x = checkpoint(two, x, i, use_reentrant=False)
    x.sum().backward()


@torch.no_grad()
def skipped_step(dwa, blocks, x):
    depth = dwa(x)
    for i in (1, 2, 4, 5):
        x = depth.step(i, blocks[i - 1](x))


def too_many_steps(dwa, blocks, x):
    run(dwa, [*blocks, blocks[0]], x)


def steps_from_zero(dwa, blocks, x):
    depth = dwa(x)
    for i, block in enumerate(blocks):
        x = depth.step(i, block(x))


def integers(dwa, blocks, x):
    dwa(torch.ones(2, 3, 8, dtype=torch.int64))


def integers_later(dwa, blocks, x):
    dwa(x).step(1, torch.ones(2, 3, 8, dtype=torch.int64))


def other_shape(dwa, blocks, x):
    dwa(x).step(1, x[:1])


def x_modified_in_place(dwa, blocks, x):
    dwa = DWA(9, "4x5").double()  # where Y_i = X_i is one tensor
    run(dwa, [lambda x, b=b: x.add_(b(x.clone())) for b in blocks], x * 2)


WRONG = [second_backward, second_other_backward, second_derivative, create_graph]
WRONG += [checkpoint_around_dwas, skipped_step, too_many_steps, steps_from_zero, other_shape]
WRONG += [integers, integers_later, x_modified_in_place]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
def test_wrong_use_is_a_runtime_error(wrong):
    dwa = DWA(9).double()
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"DWA|X_") as error:
        wrong(dwa, network(), x)
    assert len(str(error.value)) > 40
    if wrong in WRONG[:5]:  # the advice in the message works: use naive
        dwa.impl = "naive"
        wrong(dwa, network(), x)


# -----------------------------------------------------------------------------
# DWA in other networks and with other tools


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Conv2d(3, 3, 3, padding=1))
            for _ in range(6)
        )
        self.residual = True


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.ModuleList(copy.deepcopy(layer) for _ in range(6))
        self.residual = False  # the layers have skip connections of their own


@pytest.mark.parametrize("pattern", ["1x1", "2x1", "2x3"])
@pytest.mark.parametrize("network", [Convolutions, Encoder])
def test_dwa_in_another_network(network, pattern):
    torch.manual_seed(0)
    net = network().double()
    net.dwa = DWA(6, pattern).double()  # line 1
    randomize(net.dwa)
    alpha = net.dwa.alpha.detach().nan_to_num(0).requires_grad_()
    x0 = torch.randn((2, 3, 5, 7) if net.residual else (2, 5, 8), dtype=torch.float64)
    results = []
    for depth in (net.dwa(x0), Formula(pattern, alpha, x0)):  # line 2
        net.zero_grad()
        x = x0
        for i, block in enumerate(net.blocks, start=1):
            x = depth.step(i, x + block(x) if net.residual else block(x))  # line 3
        x.square().sum().backward()
        results.append([x, *(p.grad for p in net.blocks.parameters())])
    assert_same(*results)
    net.dwa.zero_grad()
    run(net.dwa, [lambda x, b=b: b(x) - (0 if net.residual else x) for b in net.blocks],
        x0).square().sum().backward()  # fmt: skip
    assert_same(net.dwa.alpha.grad, alpha.grad)


def test_what_is_masked_is_never_read_or_trained():
    model = tiny("2x3", n_layer=6).float()  # with nan outside the mask
    dwa = model.dwa
    loss = model(IDX, IDX)[1]
    assert loss.isfinite()
    loss.backward()
    assert dwa.alpha.grad.isfinite().all()
    expected = torch.zeros(6, 7, dtype=torch.bool)
    expected[2, [1, 3]] = expected[5, [0, 2, 4, 6]] = True
    assert (dwa.alpha.grad != 0).equal(expected)
    with torch.no_grad():
        dwa.alpha.copy_(dwa.weights())
    optimizers = configure_optimizers(model, learning_rate=1e-2, weight_decay=10.0)
    before = dwa.alpha.detach().clone()
    for _ in range(3):
        model(IDX, IDX)[1].backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    change = (dwa.alpha - before).abs()
    assert (change > 0).equal(expected)
    assert change.max() < 0.05  # a decay of 10 x 1e-2 x 3 steps would take a quarter of each


@pytest.mark.parametrize("impl", ["inplace", "naive"])
def test_alpha_learns_from_activations_of_another_dtype_after_frozen_blocks(impl):
    results = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        dwa, x = DWA(9, "1x1", impl), torch.randn(2, 3, 8, dtype=torch.float64).to(dtype)
        dwa.alpha.requires_grad_()
        with torch.no_grad():
            depth = dwa(x)
            x = depth.step(1, x.sin())
        for i in range(2, 10):
            x = depth.step(i, x.sin())
        x.square().sum().backward()
        assert dwa.alpha.grad.dtype == torch.float32
        results.append(dwa.alpha.grad)
    torch.testing.assert_close(*results)


class WithInPlaceBlocks(nn.Module):
    """Blocks that write to their input, which for a sparse pattern is an X_j that is read again."""

    def __init__(self, pattern):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 8)) for _ in range(6)
        )
        self.dwa = DWA(6, pattern)
        self.double()
        randomize(self.dwa)

    def forward(self, x, in_place=True):
        x = self.stem(x)
        depth = self.dwa(x)
        for i, block in enumerate(self.blocks, start=1):
            x = depth.step(i, block(x if in_place else x.clone()))
        return x


@pytest.mark.parametrize("pattern", ["1x1", "4x2"])
def test_blocks_that_write_to_their_input_where_it_is_not_counted(pattern):
    net, x = WithInPlaceBlocks(pattern), torch.randn(4, 8, dtype=torch.float64)
    right = net(x, in_place=False)
    right.sum().backward()
    expected = gradients(net)
    with torch.inference_mode():
        assert_same(net(x), right.detach())
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="aot_eager")
    exported = torch.export.export(net, (x,)).module()
    for module, run in ((net, compiled), (exported, exported)):
        module.zero_grad()
        y = run(x)
        y.sum().backward()
        assert_same(y, right)
        ours = dict(module.named_parameters())
        assert_same({name: ours[name].grad for name in expected}, expected)
    torch._dynamo.reset()


def test_inplace_trains_blocks_that_write_to_their_input():
    net, x = WithInPlaceBlocks("1x1"), torch.randn(4, 8, dtype=torch.float64)
    results = []
    for in_place in (True, False):
        net.zero_grad()
        y = net(x, in_place)  # the first block modifies X_0
        y.sum().backward()
        results.append((y, gradients(net)))
    assert_same(*results)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_torch_func_and_tracing_take_the_formula():
    model = tiny(n_layer=3)
    with torch.no_grad():
        model.dwa.alpha.copy_(model.dwa.weights())
    parameters = dict(model.named_parameters())
    ours = torch.func.grad(lambda p: torch.func.functional_call(model, p, (IDX, IDX))[1])(
        parameters
    )
    model(IDX, IDX)[1].backward()
    assert_same(ours, gradients(model))
    with torch.no_grad():
        traced = torch.jit.trace(model, (IDX, IDX), check_trace=False)
        assert_same(traced(IDX.flip(0), IDX)[0], model(IDX.flip(0), IDX)[0])


def test_pruning_and_parametrization_of_alpha():
    from torch.nn.utils import prune

    ours, naive = tiny(), tiny(dwa_impl="naive")
    for model in (ours, naive):
        with torch.no_grad():
            model.dwa.alpha.copy_(model.dwa.weights())
        prune.l1_unstructured(model.dwa, "alpha", amount=0.7)
        model(IDX, IDX)[1].backward()
    assert_same(gradients(ours), gradients(naive))
    kept = ours.dwa.alpha_mask.bool()
    assert (ours.dwa.alpha_orig.grad[~kept] == 0).all()
    assert (ours.dwa.alpha_orig.grad[kept] != 0).any()


def test_an_exported_model_trains_its_alphas():
    model = tiny(n_layer=3)
    exported = torch.export.export(model, (IDX, IDX)).module()
    for m in (model, exported):
        m(IDX, IDX)[1].backward()
    ours, theirs = dict(exported.named_parameters()), dict(model.named_parameters())
    assert_same(ours["dwa.alpha"].grad, theirs["dwa.alpha"].grad)
    assert_same(ours["wte.weight"].grad, theirs["wte.weight"].grad)


@pytest.mark.parametrize("to_empty", [True, False])
def test_a_model_built_on_the_meta_device(to_empty):
    model = tiny("2x1")
    with torch.device("meta"):
        loaded = DenseFormer(model.config)
    if to_empty:
        loaded.to_empty(device="cpu")
    loaded.load_state_dict(model.state_dict(), assign=True)
    results = []
    for m in (model, loaded):
        m(IDX, IDX)[1].backward()  # if the embedding were untied, its gradient would differ
        results.append(gradients(m))
    assert_same(*results, 0)
    assert loaded.dwa.mask.equal(model.dwa.mask)


def test_default_dtype_and_device():
    torch.set_default_dtype(torch.float64)
    try:
        model = DenseFormer(tiny().config)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model(IDX, IDX)[1].dtype == torch.float64
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device("meta")
    try:
        model = DenseFormer(tiny().config)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert model.wte.weight.dtype == torch.bfloat16
    assert model.dwa.alpha.dtype == torch.float32
    assert model.dwa.alpha.is_meta
    assert not model.dwa._constants[0].is_meta


def test_loading_weights_changes_no_mask_and_no_frozen_alpha():
    model, plain = tiny("1x1"), tiny("none")
    model.dwa.alpha.requires_grad_(False)
    model.load_state_dict(plain.state_dict())
    assert not model.dwa.alpha.requires_grad
    assert model.dwa.num_params() == 9 * 12 // 2
    assert not any("mask" in name for name in model.state_dict())


def test_copies():
    model = tiny("2x1")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        results = []
        for m in (model, twin):
            m.zero_grad()
            m(IDX, IDX)[1].backward()
            results.append(gradients(m))
        assert_same(*results, 0)


def test_blocks_are_compiled_once_for_all():
    ours, naive = tiny(n_layer=12), tiny(n_layer=12, dwa_impl="naive")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    ours.compile(backend="aot_eager")
    for _ in range(2):
        for model in (ours, naive):
            model.zero_grad()
            model(IDX, IDX)[1].backward()
        assert_same(gradients(ours), gradients(naive))
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 2  # a block, the loss
    assert not counters["graph_break"]
    torch._dynamo.reset()
    ours = tiny(n_layer=3)
    whole, naive = torch.compile(ours, backend="aot_eager", fullgraph=True), tiny(n_layer=3)
    for model in (whole, naive):
        model(IDX, IDX)[1].backward()
    assert_same(gradients(ours), gradients(naive))
    torch._dynamo.reset()


def ddp_rank(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    for pattern in ("1x1", "4x5"):
        ours = tiny(pattern)
        model = nn.parallel.DistributedDataParallel(ours)
        idx = torch.load(f"{folder}/idx.pt")[rank]
        for _ in range(2):  # DDP rebuilds its buckets after the first iteration
            ours.zero_grad()
            model(idx, idx)[1].backward()
        torch.save(gradients(ours), f"{folder}/{pattern}-{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # in torch 2.13, gloo's threads can abort the interpreter at exit


def test_distributed_data_parallel(tmp_path):
    idx = torch.randint(17, (2, 3, 8))
    torch.save(idx, tmp_path / "idx.pt")
    torch.multiprocessing.spawn(ddp_rank, (str(tmp_path),), nprocs=2)
    for pattern in ("1x1", "4x5"):
        naive = tiny(pattern, dwa_impl="naive")
        naive(idx.flatten(0, 1), idx.flatten(0, 1))[1].backward()
        for rank in (0, 1):
            assert_same(torch.load(tmp_path / f"{pattern}-{rank}.pt"), gradients(naive))


# -----------------------------------------------------------------------------
# Memory, traffic and precision


def test_the_buffer_is_freed(monkeypatch):
    buffers, init = [], denseformer.InPlaceBuffer.__init__

    def new(self, *args):
        buffers.append(weakref.ref(self))
        init(self, *args)

    monkeypatch.setattr(denseformer.InPlaceBuffer, "__init__", new)
    gc.disable()  # memory must be freed without the garbage collector
    try:
        model = tiny()
        logits, loss = model(IDX, IDX)
        loss.backward(retain_graph=True)
        assert not hasattr(buffers[0](), "X")  # at the end of the backward pass
        del logits, loss
        model(IDX, IDX)  # without a backward pass
        model.blocks[5].mlp.forward = lambda x: 1 / 0
        with pytest.raises(ZeroDivisionError):
            model(IDX, IDX)
        assert [ref() for ref in buffers] == [None, None, None]
    finally:
        gc.enable()


def test_memory_is_one_buffer_and_one_tile(monkeypatch):
    monkeypatch.setattr(denseformer, "TILE", 3)
    x = torch.randn(4, 64, 128, requires_grad=True)
    weights = torch.ones(24, 128)
    peak = {}
    for pattern in ("none", "1x1"):
        dwa = DWA(24, pattern)

        def forward(dwa=dwa):
            return all_outputs(dwa(x), x, weights)[-1]

        peak[pattern] = peak_memory(lambda f=forward: f().backward(x.detach()), x.device)
        with torch.no_grad():
            peak[pattern, "inference"] = peak_memory(forward, x.device)
    for kind in ("1x1", ("1x1", "inference")):
        plain = "none" if kind == "1x1" else ("none", "inference")
        more = (peak[kind] - peak[plain]) / x.nbytes
        assert 24 < more <= 25 + 3 + 3 + 0.5  # the buffer, a tile of b


def test_traffic_and_operations():
    # In units of bfloat16 activations, so that a hidden float32 copy would show up.
    (forward, backward), operations = count_traffic(DWA(48), torch.bfloat16)
    assert forward + backward <= 1710
    assert max(operations) <= 3 * 48


@pytest.mark.parametrize("impl", ["inplace", "naive"])
@pytest.mark.parametrize("shape", [(2, 32, 16), (3, 7, 5)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.bfloat16, 1e-2), (torch.float16, 2e-3), (torch.float32, 1e-5), (torch.float64, 1e-12)],
)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
def test_every_precision_is_close_to_float64(device, dtype, tolerance, shape, impl):
    """Use 48 blocks and alphas like trained ones: near the identity, with many small entries."""
    results = []
    for kind, place, how in ((dtype, device, impl), (torch.float64, "cpu", "naive")):
        torch.manual_seed(0)
        dwa = DWA(48, "1x1", how)
        with torch.no_grad():
            dwa.alpha += 0.03 * torch.randn(48, 49) * dwa.mask
        dwa.to(place, torch.promote_types(kind, torch.float32))
        X = torch.randn(49, *shape).cumsum(0).to(dtype).to(place, kind).requires_grad_()
        depth = dwa(X[0])
        Y = torch.stack([depth.step(i, X[i]) for i in range(1, 49)])
        (Y * torch.randn(Y.shape).to(dtype).to(place, kind)).sum().backward()
        results.append([t.double().cpu() for t in (Y.detach(), X.grad, dwa.alpha.grad)])
    for ours, exact in zip(*results, strict=True):
        assert (ours - exact).norm() < tolerance * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_stream_in_16_bits_and_alpha_in_float32(dtype):
    model, seen = tiny().float(), []
    model.blocks[3].register_forward_hook(lambda m, i, o: seen.extend((i[0].dtype, o.dtype)))
    with torch.autocast("cpu", dtype):
        logits, loss = model(IDX, IDX)
        loss.backward()
    assert seen == [dtype, dtype]
    assert loss.dtype == model.dwa.alpha.grad.dtype == torch.float32
    torch.testing.assert_close(logits.float(), model(IDX, IDX)[0], rtol=0.1, atol=0.1)


@pytest.mark.parametrize("impl", ["inplace", "naive"])
def test_autocast_does_not_round_float32_activations(impl):
    torch.manual_seed(0)
    dwa, X, results = DWA(9, "1x1", impl), torch.randn(10, 2, 8, 16), []
    randomize(dwa)
    for enabled in (False, True):
        dwa.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            depth = dwa(X[0])
            Y = torch.stack([depth.step(i, X[i]) for i in range(1, 10)])
            Y.square().mean().backward()
        results.append((Y, dwa.alpha.grad))
    torch.testing.assert_close(*results)
