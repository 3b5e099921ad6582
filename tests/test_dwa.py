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
import torch.distributed.nn  # before init_process_group, as in train.py
from torch import nn
from torch.utils.checkpoint import checkpoint

import denseformer
from denseformer import DWA, DenseFormer
from lab.bench import count_traffic, peak_memory
from test_denseformer import (
    IDX,
    NEEDS_GPU,
    Formula,
    all_outputs,
    assert_same,
    everywhere,
    gradients,
    randomize,
    tiny,
)

# The pattern of a pruned model: some rows do not read their own X_i.
HOLES = "3:0,2+4:1+5:0,1,2,3+6:2,6+7:0,1,4,5,6+8:1,3,5,6,7+9:0,1,5,7"


# -----------------------------------------------------------------------------
# The in-place DWA, used in every way that autograd allows. Each use runs a forward and backward
# pass of a small network of 9 blocks; its gradients must equal those of the naive DWA.


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


def use_two_forwards(dwa, blocks, x):
    a, b = run(dwa, blocks, x), run(dwa, blocks, 2 * x)
    with torch.no_grad():
        run(dwa, blocks, x[:1])
    return a * b


def use_interleaved(dwa, blocks, x):
    other = DWA(9).to(x)
    other_depth, depth, y, z = other(x), dwa(x), x, x
    for i, block in enumerate(blocks, start=1):
        y, z = depth.step(i, y + block(y)), other_depth.step(i, block(z))
    z.sum().backward(inputs=[x])
    x.grad = None
    return y.square()


def use_exception(dwa, blocks, x):
    def fail(x):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(dwa, [*blocks[:4], fail], x)
    return run(dwa, blocks, x).square()


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
        y = y.mul_(1.5) if dwa.impl == "inplace" else y * 1.5
        y = depth.step(i, y + block(y))
    return y.square()


def use_frozen(*names):
    def use(dwa, blocks, x):
        modules = {"alpha": dwa, "block 1": blocks[0], "block 6": blocks[5]}
        for name in modules.keys() & names:
            modules[name].requires_grad_(False)
        return run(dwa, blocks, x.detach() if "embedding" in names else x).square()

    return use


USES = {
    "outputs": use_outputs,
    "early exit": lambda dwa, blocks, x: run(dwa, blocks[:7], x).square(),
    "frozen alphas": use_frozen("alpha"),
    "frozen embedding": use_frozen("embedding"),
    "frozen embedding and blocks": use_frozen("embedding", "block 1", "block 6"),
    "frozen embedding, block 1, alphas": use_frozen("embedding", "block 1", "alpha"),
    "two forwards": use_two_forwards,
    "interleaved": use_interleaved,
    "exception": use_exception,
    "no_grad first": use_no_grad(0, 1, 2, 3),
    "no_grad at times": use_no_grad(3, 5, 6, 8),
    "no_grad around steps": use_no_grad(3, 4, 7, blocks_too=False),
    "checkpoint": lambda dwa, blocks, x: run(
        dwa, [partial(checkpoint, block, use_reentrant=False) for block in blocks], x
    ),
    "checkpoint around all": lambda dwa, blocks, x: checkpoint(
        run, dwa, blocks, x, use_reentrant=False
    ),
    "any layout": lambda dwa, blocks, x: run(
        dwa,
        [lambda x, b=b: b(x.transpose(0, 1)).transpose(0, 1) for b in blocks],
        x.transpose(0, 1),
    ),
    "blocks in place": use_blocks_in_place,
    "empty batch": lambda dwa, blocks, x: run(dwa, blocks, x[:0]),
    "one vector": lambda dwa, blocks, x: run(dwa, blocks, x[0, 0]).square(),
}


@everywhere
@pytest.mark.parametrize("pattern", ["1x1", "2x1", "last3+9:2,5", HOLES])
@pytest.mark.parametrize("use", USES.values(), ids=list(USES))
def test_inplace_gradients_are_naive_ones(use, pattern, device, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(denseformer, "TILE", 4)
    results = []
    for impl, *place in (("inplace", device, dtype), ("naive", "cpu", torch.float64)):
        torch.manual_seed(0)
        dwa, blocks, x = DWA(9, pattern, impl), network(), torch.randn(2, 3, 8)
        randomize(dwa)
        net = nn.ModuleDict({"dwa": dwa, "blocks": blocks}).to(*place)
        x = x.to(*place).requires_grad_()
        assert isinstance(dwa(x), denseformer.InPlacePass) == (impl == "inplace")
        use(dwa, blocks, x).sum().backward()  # of 1, expanded, where it is not a square
        grads = gradients(net) | {"x": torch.zeros_like(x) if x.grad is None else x.grad}
        results.append({name: g.double().cpu() for name, g in grads.items()})
    assert_same(*results, tolerance)


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


def x_modified_in_place(dwa, blocks, x):
    dwa = DWA(9, "4x5").double()  # where Y_i = X_i is one tensor
    run(dwa, [lambda x, b=b: x.add_(b(x.clone())) for b in blocks], x * 2)


def step_after_backward(dwa, blocks, x):
    depth = dwa(x)
    y = depth.step(1, blocks[0](x))
    torch.autograd.grad(y.sum(), x, retain_graph=True)
    with pytest.raises(RuntimeError, match="cannot take step 2: its backward pass has begun"):
        depth.step(2, blocks[1](y))
    depth.step(2, blocks[1](y))


NOT_IN_PLACE = [second_backward, second_other_backward, second_derivative, create_graph]
NOT_IN_PLACE += [checkpoint_around_dwas]
WRONG = {f.__name__: f for f in (*NOT_IN_PLACE, skipped_step, x_modified_in_place)} | {
    "a step after the backward pass": step_after_backward,
    "a tuple first": lambda dwa, blocks, x: dwa((x, x)),
    "a tuple": lambda dwa, blocks, x: dwa(x).step(1, (x, x)),
    "complex later": lambda dwa, blocks, x: dwa(x).step(1, x * 1j),
    "complex first": lambda dwa, blocks, x: dwa(x * 1j).step(1, x),
    "complex later, naive": lambda dwa, blocks, x: DWA(9, impl="naive")(x).step(1, x * 1j),
    "too many steps": lambda dwa, blocks, x: run(dwa, [*blocks, blocks[0]], x),
    "step 0": lambda dwa, blocks, x: dwa(x).step(0, x),
    "other shape": lambda dwa, blocks, x: dwa(x).step(1, x[:1]),
    "integers": lambda dwa, blocks, x: dwa(x.long()),
    "integers later": lambda dwa, blocks, x: dwa(x).step(1, x.long()),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=list(WRONG))
def test_wrong_use_is_a_runtime_error(wrong):
    dwa = DWA(9).double()
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"DWA|X_") as error:
        wrong(dwa, network().double(), x)
    assert len(str(error.value)) > 40
    if wrong in NOT_IN_PLACE:  # the advice in the message works: use naive
        dwa.impl = "naive"
        wrong(dwa, network().double(), x)


# -----------------------------------------------------------------------------
# DWA in other networks and with other tools


def convolution():
    layers = nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Conv2d(3, 3, 3, padding=1)
    return nn.Sequential(*layers), (2, 3, 5, 7)


def encoder():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
    return layer, (2, 5, 8)


@pytest.mark.parametrize("pattern", ["1x1", "2x1", "2x3"])
@pytest.mark.parametrize("layer", [convolution, encoder])
def test_dwa_in_another_network(layer, pattern):
    torch.manual_seed(0)
    block, shape = layer()
    blocks = nn.ModuleList(copy.deepcopy(block) for _ in range(6)).double()
    dwa, x0 = DWA(6, pattern).double(), torch.randn(shape, dtype=torch.float64)  # line 1
    randomize(dwa)
    alpha, results = dwa.alpha.detach().nan_to_num(0).requires_grad_(), []
    for depth, a in ((dwa(x0), dwa.alpha), (Formula(pattern, alpha, x0), alpha)):  # line 2
        blocks.zero_grad()
        x = x0
        for i, block in enumerate(blocks, start=1):
            x = depth.step(i, block(x))  # line 3
        x.square().sum().backward()
        results.append([x, a.grad, *(p.grad for p in blocks.parameters())])
    assert_same(*results)


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


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_tracers_take_the_formula():
    model = tiny(n_layer=3)
    with torch.no_grad():
        model.dwa.alpha.copy_(model.dwa.weights())
        traced = torch.jit.trace(model, (IDX, IDX), check_trace=False)
        assert_same(traced(IDX.flip(0), IDX)[0], model(IDX.flip(0), IDX)[0])
    model(IDX, IDX)[1].backward()
    expected, parameters = gradients(model), dict(model.named_parameters())
    model.zero_grad()

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (IDX, IDX))[1]

    assert_same(torch.func.grad(loss)(parameters), expected)
    exported = torch.export.export(model, (IDX, IDX)).module()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for module, forward in ((exported, exported), (model, compiled)):
        module.zero_grad()
        forward(IDX, IDX)[1].backward()
        assert_same({n: p.grad for n, p in module.named_parameters()}, expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("impl", ["naive", "inplace"])
def test_a_pass_uses_the_alphas_of_its_beginning(impl):
    dwa, x = DWA(4, impl=impl), torch.ones(2, 8)
    depth = dwa(x)
    with torch.no_grad():
        dwa.alpha.fill_(7)
    for i in range(1, 5):
        assert depth.step(i, i * x).equal(i * x)


def test_mask_and_initial_follow_alpha():
    with torch.device("meta"):
        dwa = DWA(4)
        assert dwa(torch.ones(2, 8)).step(1, torch.ones(2, 8)).is_meta
    with torch.inference_mode():
        dwa.load_state_dict(DWA(4).double().state_dict(), assign=True)  # as if to another device
        assert dwa.weights().equal(torch.eye(5)[1:].double())
    assert not any(tensor.is_inference() for tensor in (dwa.mask, dwa.initial))
    assert dwa.double().initial.dtype == torch.float64


@pytest.mark.parametrize("impl", ["naive", "inplace"])
@pytest.mark.parametrize("i", [3, 4])  # DWA 4 reads X_0..X_4; there is no DWA 3
def test_the_gradient_of_y_is_not_that_of_x(impl, i):
    """dLoss/dY_i is what block i + 1 contributes; later DWAs read X_i, not Y_i."""
    torch.manual_seed(0)
    dwa, blocks, Y = DWA(9, "1x2", impl).double(), network().double(), {}
    randomize(dwa)
    x, weights = torch.randn(2, 3, 8).double(), dwa.weights().detach()
    loss = run(dwa, blocks, x, Y.__setitem__).sin().sum()
    (ours,) = torch.autograd.grad(loss, Y[i])

    def later(y):  # the loss as a function of Y_i alone: X_0..X_i are constants
        X, z = [x], x
        for j, block in enumerate(blocks, start=1):
            X.append(z + block(z))
            z = sum(w * X_k for w, X_k in zip(weights[j - 1], X, strict=False))
            if j == i:
                X, z = [X_k.detach() for X_k in X], y
        return z.sin().sum()

    y = Y[i].detach().requires_grad_()
    assert_same(ours, torch.autograd.grad(later(y), y)[0], 1e-9)


@pytest.mark.filterwarnings("ignore")  # prototypes
@pytest.mark.parametrize("pattern", ["1x1", "1x2"])
def test_tensors_that_are_not_strided_take_the_formula(pattern):
    values, mask = torch.rand(6, 3), torch.rand(6, 3) > 0.5
    tensors = {
        "jagged": torch.nested.nested_tensor_from_jagged(values, torch.tensor([0, 2, 6])),
        "masked": torch.masked.masked_tensor(values, mask),
        "a subclass": nn.Buffer(values),
        "sparse": (values * mask).to_sparse(),
    }
    for name, x in tensors.items():
        dwa = DWA(6, pattern)
        randomize(dwa)
        depth, total, y = dwa(x), dwa.weights().sum(1).tolist(), x
        for i in range(1, 7):
            y = depth.step(i, x)
        ours = {"jagged": lambda y: y.values(), "sparse": lambda y: y.to_dense(),
                "masked": lambda y: y.get_data() * mask}.get(name, lambda y: y)(y)  # fmt: skip
        expected = values if name in ("jagged", "a subclass") else values * mask
        torch.testing.assert_close(ours, total[5] * expected, msg=name)


def test_complex_numbers_take_the_formula():
    torch.manual_seed(0)
    dwa, x, weights = DWA(5), torch.randn(2, 3, dtype=torch.complex64), torch.randn(5, 3)
    randomize(dwa)
    alpha = dwa.alpha.detach().nan_to_num(0).requires_grad_()
    for depth in (dwa(x), Formula("1x1", alpha, x)):
        all_outputs(depth, x, weights).abs().sum().backward()
    torch.testing.assert_close(dwa.alpha.grad, alpha.grad)


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


def on_meta(model, to_empty):
    with torch.device("meta"):
        twin = DenseFormer(model.config)
    if to_empty:
        twin.to_empty(device="cpu").double()
    twin.load_state_dict(model.state_dict(), assign=not to_empty)
    return twin


TWINS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "meta, then assign": partial(on_meta, to_empty=False),
    "meta, then to_empty": partial(on_meta, to_empty=True),
}


@pytest.mark.parametrize("twin", TWINS.values(), ids=list(TWINS))
def test_a_copy_or_loaded_model_is_the_same(twin):
    model, results = tiny("2x1"), []
    for m in (model, twin(model)):
        m(IDX, IDX)[1].backward()  # if the embedding were untied, its gradient would differ
        results.append(gradients(m))
    assert_same(*results, 0)


@pytest.mark.parametrize(
    ("default", "alpha"), [(torch.float64, torch.float64), (torch.bfloat16, torch.float32)]
)
def test_the_default_dtype(default, alpha):
    config = tiny().config
    torch.set_default_dtype(default)
    try:
        model = DenseFormer(config)
    finally:
        torch.set_default_dtype(torch.float32)
    assert (model.wte.weight.dtype, model.dwa.alpha.dtype) == (default, alpha)
    assert model(IDX, IDX)[0].dtype == default


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


def ddp_rank(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    ours = tiny()
    model, idx = nn.parallel.DistributedDataParallel(ours), torch.load(f"{folder}/idx.pt")[rank]
    for _ in range(2):  # DDP rebuilds its buckets after the first iteration
        ours.zero_grad()
        model(idx, idx)[1].backward()
    torch.save(gradients(ours), f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel(tmp_path):
    idx = torch.randint(17, (2, 3, 8))
    torch.save(idx, tmp_path / "idx.pt")
    torch.multiprocessing.spawn(ddp_rank, (str(tmp_path),), nprocs=2)
    naive = tiny(dwa_impl="naive")
    naive(idx.flatten(0, 1), idx.flatten(0, 1))[1].backward()
    for rank in (0, 1):
        assert_same(torch.load(tmp_path / f"{rank}.pt"), gradients(naive))


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


@torch.no_grad()
@pytest.mark.parametrize("impl", ["naive", "inplace"])
def test_the_pass_is_freed_before_the_logits(impl, monkeypatch):
    """Without gradients: with a large vocabulary, logits and loss need as much memory again."""
    model, passes, alive = tiny(dwa_impl=impl), [], []
    begin = DWA.forward

    def watch(dwa, x):
        passes.append(weakref.ref(depth := begin(dwa, x)))
        return depth

    monkeypatch.setattr(DWA, "forward", watch)
    model.ln_f.register_forward_hook(lambda *args: alive.append(passes[-1]() is not None))
    model(IDX, IDX)
    assert alive == [False]


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
        x = X[0]
        with torch.no_grad():  # the alphas learn nevertheless
            depth = dwa(x)
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
    torch.testing.assert_close(logits.float(), model(IDX, IDX)[0], rtol=0, atol=2e-3)


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
