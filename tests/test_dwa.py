"""DWA in other people's code: pytest tests/test_dwa.py

The references are the paper's formula and the naive DWA, which test_denseformer.py verifies.
"""

import copy
import gc
import pickle
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import denseformer
from denseformer import DWA
from lab.bench import peak_memory
from lib import graphs, tiled
from lib.tiled import TiledDWA, make_dwa
from test_denseformer import (
    IDX,
    all_outputs,
    assert_dwa_is_the_formula,
    assert_same,
    gradients,
    randomize,
    tiny,
)

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
PLACES = [("cpu", torch.float64, 1e-11)]  # where the grids run, and how close they come to float64
PLACES += [("cuda", torch.float64, 1e-11), ("cuda", torch.float32, 1e-4)][: 2 * len(DEVICES) - 2]
everywhere = pytest.mark.parametrize(("device", "dtype", "tolerance"), PLACES)


@pytest.fixture(autouse=True)
def nan_in_empty():
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory with nan
    yield
    torch.use_deterministic_algorithms(False)


IMPLS = {"inplace": DWA, "tiled": TiledDWA, "naive": partial(DWA, impl="naive")}


@everywhere
@pytest.mark.parametrize("tile", [1, 3, 8, 99])  # rows: some divide the depth, some do not
@pytest.mark.parametrize(("pattern", "n_layer"), [("1x1", 5), ("1x1", 48), ("2x1", 9), ("1x2", 48)])
def test_tiles_are_the_formula(pattern, n_layer, tile, device, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(tiled, "TILE", tile)
    dwa = TiledDWA(n_layer, pattern)
    assert isinstance(dwa(torch.zeros(3)), denseformer.InPlace)
    assert_dwa_is_the_formula(dwa, device, dtype, tolerance)


def test_the_choice_of_an_implementation():
    cpu = torch.device("cpu")
    for impl, L, kind in (("auto", 8, DWA), ("auto", 24, TiledDWA), ("tiled", 8, TiledDWA)):
        assert type(make_dwa(DWA(L), impl, cpu)) is kind
    assert TiledDWA(8).state_dict().keys() == {"alpha"}  # checkpoints do not depend on it
    assert make_dwa(DWA(8, "4x5"), "naive", cpu).impl == "naive"
    assert not isinstance(TiledDWA(48, "4x5")(torch.zeros(3)), denseformer.InPlace)


# -----------------------------------------------------------------------------
# In place, in every way that autograd allows. Each use runs a forward and a backward pass of a
# small network of 9 blocks; its gradients must equal those of the naive DWA.


def network():
    torch.manual_seed(1)
    return nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(9))


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
    return Y[4].sin() + Y[7].square() + Y[9].cos()


def use_no_grad(*steps, blocks_too=True):
    def use(dwa, blocks, x):
        with torch.set_grad_enabled(0 not in steps):
            depth = dwa(x)
        for i, block in enumerate(blocks, start=1):
            with torch.set_grad_enabled(i not in steps or not blocks_too):
                x = x + block(x)
            with torch.set_grad_enabled(i not in steps):  # else Y_i is a constant
                x = depth.step(i, x)
        return x.square()

    return use


def use_blocks_in_place(dwa, blocks, x):  # which may modify X_0 and each Y_i, but no X_i
    y = x + 0
    depth = dwa(y)
    for i, block in enumerate(blocks, start=1):
        y = y * 1.5 if dwa.impl == "naive" else y.mul_(1.5)
        y = depth.step(i, y + block(y))
    return y.square()


def use_changed_alpha(dwa, blocks, x):  # as by another loss's optimizer step, before backward
    y = run(dwa, blocks, x).square()
    if dwa.impl != "naive":  # there, autograd refuses
        with torch.no_grad():
            dwa.alpha += 1
    return y


def use_frozen(dwa, blocks, x, *modules):
    nn.ModuleList(modules).requires_grad_(False)
    return run(dwa, blocks, x).square()


def use_checkpoint(dwa, blocks, x):
    return run(dwa, [partial(checkpoint, block, use_reentrant=False) for block in blocks], x)


USES = {
    "outputs": use_outputs,
    "early exit": lambda dwa, blocks, x: run(dwa, blocks[:7], x).square(),
    "frozen alphas": lambda dwa, blocks, x: use_frozen(dwa, blocks, x, dwa),
    "frozen start": lambda dwa, blocks, x: use_frozen(dwa, blocks, x.detach(), blocks[0], dwa),
    "no_grad first": lambda dwa, blocks, x: use_no_grad(0, 1, 2)(dwa, blocks, x.detach()),
    "no_grad at times": use_no_grad(0, 3, 5, 6, 8),
    "no_grad around steps": use_no_grad(3, 4, 7, blocks_too=False),
    "checkpoint": use_checkpoint,
    "checkpoint around all": lambda *args: checkpoint(run, *args, use_reentrant=True),
    "blocks in place": use_blocks_in_place,
    "changed alpha": use_changed_alpha,
    "empty batch": lambda dwa, blocks, x: run(dwa, blocks, x[:0]),
}


@everywhere
@pytest.mark.parametrize("row", ["1x1 inplace", "1x1 tiled", "2x1 tiled"])
@pytest.mark.parametrize("use", USES.values(), ids=list(USES))
def test_gradients_in_place_are_naive_ones(use, row, device, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(tiled, "TILE", 4)
    pattern, impl = row.split()
    results = []
    for name, *place in ((impl, device, dtype), ("naive", "cpu", torch.float64)):
        torch.manual_seed(0)
        dwa, blocks, x = IMPLS[name](9, pattern), network(), torch.randn(2, 3, 8)
        randomize(dwa)
        net = nn.ModuleDict({"dwa": dwa, "blocks": blocks}).to(*place)
        x = x.to(*place).requires_grad_()
        assert isinstance(dwa(x), denseformer.InPlace) == (name != "naive")
        use(dwa, blocks, x).sum().backward()  # of 1, expanded, where it is not a square
        grads = gradients(net) | {"x": torch.zeros_like(x) if x.grad is None else x.grad}
        results.append({name: g.double().cpu() for name, g in grads.items()})
    assert_same(*results, tolerance)


# -----------------------------------------------------------------------------
# Misuse raises a RuntimeError that explains it, and never returns a wrong number


def second_backward(dwa, blocks, x):
    # The backward of blocks 5..9 stops at step 5; that of an auxiliary loss then begins at 4.
    Y = {}
    loss = run(dwa, blocks, x, Y.__setitem__).sum()
    torch.autograd.grad(loss, list(blocks[4:].parameters()), retain_graph=True)
    torch.autograd.grad(Y[4].sin().sum(), list(blocks[:4].parameters()))


def create_graph(dwa, blocks, x):
    torch.autograd.grad(run(dwa, blocks, x).square().sum(), dwa.alpha, create_graph=True)


def checkpoint_around_steps(dwa, blocks, x, reentrant=False):
    depth = dwa(x)

    def two(x, i):
        x = depth.step(i, blocks[i - 1](x))
        return depth.step(i + 1, blocks[i](x))

    for i in range(1, 9, 2):
        x = checkpoint(two, x, i, use_reentrant=reentrant)
    x.sum().backward()


def step_after_backward(dwa, blocks, x):
    depth = dwa(x)
    y = depth.step(1, blocks[0](x))
    torch.autograd.grad(y.sum(), x, retain_graph=True)
    depth.step(2, blocks[1](y))


LIMITS = [second_backward, create_graph, checkpoint_around_steps, step_after_backward]
WRONG = {f.__name__: f for f in LIMITS} | {
    "reentrant": partial(checkpoint_around_steps, reentrant=True),
    "a skipped step": lambda dwa, blocks, x: dwa(x).step(2, x),
    "a tuple": lambda dwa, blocks, x: dwa(x).step(1, (x, x)),
    "too many steps": lambda dwa, blocks, x: run(dwa, [*blocks, blocks[0]], x),
    "other shape": lambda dwa, blocks, x: dwa(x).step(1, x[:1]),
}


@pytest.mark.parametrize("impl", ["inplace", "tiled"])
@pytest.mark.parametrize("wrong", WRONG.values(), ids=list(WRONG))
def test_wrong_use_is_a_runtime_error(wrong, impl):
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match="naive"):
        wrong(IMPLS[impl](9).double(), network().double(), x)
    naive = DWA(9, impl="naive").double()
    if wrong in LIMITS:  # the advice in the message works
        wrong(naive, network().double(), x)
    else:
        with pytest.raises(RuntimeError, match="DWA step"):
            wrong(naive, network().double(), x)


# -----------------------------------------------------------------------------
# DWA in other networks and with other tools


@pytest.mark.parametrize("impl", ["inplace", "tiled"])
def test_compile_and_export_take_the_formula(impl):
    model, broken = tiny(n_layer=3), tiny(n_layer=3)
    model.dwa, broken.dwa = IMPLS[impl](3).double(), IMPLS[impl](3).double()
    model(IDX, IDX)[1].backward()
    expected = gradients(model)
    exported = torch.export.export(model, (IDX, IDX)).module()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch._dynamo.utils.counters.clear()
    for module, forward in ((exported, exported), (model, compiled), (model, model)):
        if forward is model:  # blocks and loss alone, which keep the DWA in place
            model.compile(backend="aot_eager", fullgraph=True)
        module.zero_grad()
        forward(IDX, IDX)[1].backward()
        assert_same({n: dict(module.named_parameters())[n].grad for n in expected}, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1 + 2  # a block, the loss
    broken.blocks[1].register_forward_hook(lambda *args: torch._dynamo.graph_break())
    torch.compile(broken, backend="eager")(IDX, IDX)[1].backward()
    assert_same(gradients(broken), expected)
    torch._dynamo.reset()


def test_other_kinds_of_tensors_take_the_formula():
    x = torch.randn(2, 3, 8)
    for kind in (x.to(torch.complex64), torch.nested.as_nested_tensor([*x], layout=torch.jagged)):
        depth = DWA(2)(kind)
        assert not isinstance(depth, denseformer.InPlace)
        y = depth.step(2, depth.step(1, kind) * 3)
        for ours, part in zip(y.unbind(), kind.unbind(), strict=True):
            assert_same(ours, 3 * part, 1e-6)


@pytest.mark.parametrize("impl", list(IMPLS))
def test_copies_pickles_averages_and_inference_mode(impl):
    dwa, x = IMPLS[impl](9), torch.randn(2, 3, 8)
    randomize(dwa)
    dwa.alpha.data.nan_to_num_(0)
    blocks = network()
    expected = run(dwa, blocks, x)
    ema = torch.optim.swa_utils.AveragedModel(dwa)
    ema.update_parameters(dwa)
    with torch.device("meta"):  # as from_pretrained makes a model, and fills it afterwards
        meta = IMPLS[impl](9)
    meta.load_state_dict(dwa.state_dict(), assign=True)
    for twin in (copy.deepcopy(dwa), pickle.loads(pickle.dumps(dwa)), ema.module, meta):
        with torch.inference_mode():
            assert_same(run(twin, blocks, x), expected, 1e-6)
        run(twin, blocks, x).sum().backward()
        assert dwa.alpha.grad is None


def test_data_parallel_and_fully_sharded():
    """In one process, where both run all their hooks; tests/test_train.py trains with two."""
    naive = tiny()
    naive.dwa.impl = "naive"
    naive(IDX, IDX)[1].backward()
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    ddp = nn.parallel.DistributedDataParallel(tiny())
    mesh = dist.init_device_mesh("cpu", (1,))
    for model in (ddp, dist.fsdp.fully_shard(tiny(), mesh=mesh)):
        for _ in range(2):  # DDP rebuilds its buckets after the first iteration
            model.zero_grad()
            model(IDX, IDX)[1].backward()
        grads = gradients(getattr(model, "module", model))
        whole = {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in grads.items()}
        assert_same(whole, gradients(naive))
    del ddp, model
    dist.destroy_process_group()


# -----------------------------------------------------------------------------
# Memory, traffic and precision


@pytest.mark.parametrize("impl", ["inplace", "tiled"])
def test_the_buffer_is_freed(impl, monkeypatch):
    buffers, begin = [], denseformer.InPlace.__init__

    def watch(self, alpha, buffer, x):
        buffers.append(weakref.ref(buffer))
        begin(self, alpha, buffer, x)

    monkeypatch.setattr(denseformer.InPlace, "__init__", watch)
    gc.disable()  # X must be freed, at the end of backward, without the garbage collector
    try:
        model = tiny()
        model.dwa = IMPLS[impl](9).double()
        for _ in range(2):
            logits, loss = model(IDX, IDX)
            loss.backward(retain_graph=True)
            tensors = filter(torch.is_tensor, vars(buffers.pop()()).values())
            assert max(x.untyped_storage().nbytes() for x in tensors) < 2000
            nn.ModuleList((model.wte, model.dwa)).requires_grad_(False)
        del logits, loss
        model(IDX, IDX)  # without a backward pass
        assert [ref() for ref in buffers] == [None]
    finally:
        gc.enable()


def test_memory_is_one_buffer():
    """And one tile, with tiles."""
    x, weights = torch.randn(4, 64, 128, requires_grad=True), torch.ones(24, 128)
    dwas = {"plain": DWA(24, "none"), "inplace": DWA(24), "tiled": TiledDWA(24)}
    train, infer = {}, {}
    for name, dwa in dwas.items():

        def forward(dwa=dwa):
            return all_outputs(dwa(x), x, weights)[-1]

        train[name] = peak_memory(lambda f=forward: f().backward(x.detach()), x.device)
        with torch.no_grad():
            infer[name] = peak_memory(forward, x.device)
    for name, rows in (("inplace", 25), ("tiled", 24 + 2 + 8 + 8)):
        for peak in (train, infer):
            assert 24 < (peak[name] - peak["plain"]) / x.nbytes <= rows + 1.1, name


@pytest.mark.parametrize("impl", list(IMPLS))
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.bfloat16, 1e-2), (torch.float16, 2e-3), (torch.float32, 1e-5), (torch.float64, 1e-12)],
)
@pytest.mark.parametrize("device", DEVICES)
def test_every_precision_is_close_to_float64(device, dtype, tolerance, impl):
    """Use 48 blocks and alphas like trained ones: near the identity, with many small entries."""
    results = []
    for kind, place, how in ((dtype, device, impl), (torch.float64, "cpu", "naive")):
        torch.manual_seed(0)
        dwa = IMPLS[how](48)
        with torch.no_grad():
            dwa.alpha += 0.03 * torch.randn(49, 49).tril()
            dwa.alpha[0] = 0
        dwa.to(place, torch.promote_types(kind, torch.float32))
        X = torch.randn(49, 2, 32, 16).cumsum(0).to(dtype).to(place, kind).requires_grad_()
        x = X[0]
        with torch.no_grad():  # the alphas learn nevertheless
            depth = dwa(x)
        half = dtype if dtype.itemsize == 2 else torch.bfloat16
        with torch.autocast(place, half):  # which must not round float32 and float64
            Y = torch.stack([depth.step(i, X[i]) for i in range(1, 49)])
            (Y * torch.randn(Y.shape).to(dtype).to(place, kind)).sum().backward()
        results.append([t.double().cpu() for t in (Y.detach(), X.grad, dwa.alpha.grad)])
    for ours, exact in zip(*results, strict=True):
        assert (ours - exact).norm() < tolerance * exact.norm()


def test_autocast_keeps_the_stream_in_16_bits_and_alpha_in_float32():
    model, seen = tiny().float(), []
    model.blocks[3].register_forward_hook(lambda m, i, o: seen.extend((i[0].dtype, o.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        model(IDX, IDX)[1].backward()
    assert seen == [torch.bfloat16] * 2
    assert model.dwa.alpha.grad.dtype == torch.float32


@pytest.mark.parametrize("pattern", ["1x1", "3x2"])
def test_faster_decoding_draws_the_same_tokens(pattern, monkeypatch):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":  # without graphs
        monkeypatch.setattr(graphs, "record", lambda function, *inputs: function)
    model, idx = tiny(pattern).to(device), IDX[:, :3].to(device)
    expected = model.generate(idx, 9, temperature=0)  # beyond the context of 8, too
    for speed_up in (graphs.record_decoding, graphs.speed_up_decoding):
        speed_up(model)
        assert model.generate(idx, 9, temperature=0).equal(expected)
