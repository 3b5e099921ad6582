"""CUDA graphs: a micro-batch, or the decoding of a token, as one launch; on a CPU, fewer calls.

Launching the kernels of a small model takes longer than running them. A graph replays what was
recorded, so every choice that Python made is fixed: shapes, `if`s, layers skipped at random.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from denseformer import DWA, DenseFormer, DenseFormerConfig, KVCache


def record(function: Callable, *inputs: Tensor) -> Callable:
    """Return a function that replays function(*inputs), for inputs of the same shapes.

    With gradients, function is a module, and forward and backward pass become one graph each: set
    the gradients to None between two calls, since each backward pass overwrites those of the last
    one. Without, function must have run before, so that its kernels are compiled, and each replay
    overwrites what the last one returned.
    """
    with torch.cuda.device(inputs[0].device):  # else the graphs would record the current one
        if torch.is_grad_enabled():
            # Recording uses a stream of its own, which autograd then synchronizes with that of the
            # training loop: correct, and the time is not noticeable.
            warnings.filterwarnings("ignore", "The AccumulateGrad node's stream does not match")
            return torch.cuda.make_graphed_callables(function, inputs, allow_unused_input=True)
        inputs, graph = tuple(x.clone() for x in inputs), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.Stream()):  # captures, does not run
            output = function(*inputs)

    def replay(*new: Tensor):
        for x, x_new in zip(inputs, new, strict=True):
            x.copy_(x_new)
        graph.replay()
        return output

    return replay


class MicroBatchLoss(nn.Module):
    """The loss of a micro-batch, (B, T) token ids and targets, under autocast."""

    def __init__(self, model: nn.Module, autocast: torch.autocast):
        super().__init__()
        self.model, self.autocast = model, autocast

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        with self.autocast:
            return self.model(idx, targets)[1]


class FixedCache(KVCache):
    """A KVCache in which no shape changes, so that one graph serves every position.

    `length` is a tensor, and each token attends to the whole cache under a mask.
    """

    def __init__(self, config: DenseFormerConfig, B: int, device: torch.device, dtype: torch.dtype):
        super().__init__(config, B, device, dtype)
        self.length = torch.zeros((), device=device, dtype=torch.long)  # type: ignore[assignment]

    def advance(self, T: int) -> Tensor:
        """Make room for T tokens; return their positions, (T,)."""
        self.t = self.length + torch.arange(T, device=self.layers[0].device)
        self.length += T
        room = torch.arange(self.layers[0].size(3), device=self.t.device)
        self.mask = self.t[:, None] >= room  # (T, block_size)
        return self.t

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Add k and v of the new tokens; return those of all, and the mask."""
        k, v = self.layers[layer].index_copy_(3, self.t, torch.stack((k, v)))
        return k, v, self.mask


def speed_up_decoding(model: DenseFormer):
    """Make model.stream and model.generate faster, for a model that is not trained further.

    On a GPU they replay one CUDA graph per token. On a CPU, a product with a single token takes as
    long as reading the weights does, which is fastest along their longer side.
    """
    if model.wte.weight.device.type == "cuda":
        record_decoding(model)
        return
    for weight in model.parameters():
        if weight.dim() == 2 and weight.size(0) > weight.size(1):
            weight.data = weight.data.t().contiguous().t()
    if model.dwa.num_params():
        model.dwa = TokenDWA(model.dwa)


class TokenDWA(DWA):
    """A DWA for decoding on a CPU: calling torch takes longer than the sums for a single token, so
    Y_i is one product with the X_j side by side. Longer inputs take the usual steps."""

    def __init__(self, dwa: DWA):
        super().__init__(dwa.n_layer, dwa.pattern)
        self.alpha = dwa.alpha
        self.weights = [  # (1, 1, i + 1), 0 where DWA i does not read
            alphas[None, None, : i + 1].where(torch.tensor([j in row for j in range(i + 1)]), 0)
            for i, (row, alphas) in enumerate(zip(self.rows, dwa.alpha.detach(), strict=True))
        ]

    def forward(self, x: Tensor) -> Any:
        """Begin a forward pass with X_0, (B, T, C)."""
        return TokenSteps(self, x) if x.size(1) == 1 else super().forward(x)


class TokenSteps:
    def __init__(self, dwa: TokenDWA, x: Tensor):
        self.dwa, self.X = dwa, [x]

    def step(self, i: int, x: Tensor) -> Tensor:
        """Take X_i; return Y_i."""
        self.X.append(x)
        if not self.dwa.rows[i]:
            return x
        self.X = [torch.cat(self.X, dim=1)]  # X_0..X_i, (B, i + 1, C)
        return torch.bmm(self.dwa.weights[i].expand(len(x), -1, -1), self.X[0])


def record_decoding(model: DenseFormer):
    """Let model.stream and model.generate replay one CUDA graph per token."""

    def start_decoding(idx: Tensor) -> Callable[[Tensor], Tensor]:
        cache = FixedCache(model.config, idx.size(0), idx.device, model.activation_dtype())
        calls, decode = 0, lambda new: model(new, cache=cache)[0]

        def step(new: Tensor) -> Tensor:
            nonlocal calls, decode
            if calls == 2:  # the first call has the prompt, and the second compiles the kernels
                decode = record(decode, new)
            calls += 1
            return decode(new)

        return step

    model.start_decoding = start_decoding  # type: ignore[method-assign]
