"""
DenseFormer: a GPT in which every block reads a learned weighted sum of everything before it.

Source: Pagliardini, Mohtashami, Fleuret, Jaggi, "DenseFormer: Enhancing Information Flow in
Transformers via Depth Weighted Averaging", arXiv 2402.02622. With X_0 the token embedding and
B_i the i-th Transformer block,

    X_i = B_i(Y_{i-1})                               output of block i
    Y_i = sum over j = 0..i of alpha[i, j] * X_j     depth-weighted average (DWA); Y_0 = X_0
    logits = head(norm(Y_L))

The alphas are learned scalars shared by all tokens and channels: L(L+3)/2 of them, 1,224 for 48
blocks. alpha[i, i] starts at 1 and the others at 0, so an untrained DenseFormer is exactly the
plain Transformer with the same weights, unless its pattern leaves out some alpha[i, i].

Notable here:
- DWA is a separate module; three lines add it to any residual network
- all DWAs of a model are one matrix, alpha; a sparsity pattern is a mask on that matrix
- the plain Transformer is the same model with dwa="none"
- the paper's Transformer: pre-norm, no biases, rotary positions, GELU, tied embeddings
- on a GPU, each decoding step replays one CUDA graph, until the context is full
- the in-place DWA, at the end of this file, gives the same result and moves less memory than
  autograd does with the formula: two fifths as much for 8 blocks, a sixth for 24, a tenth for 48

Shapes: B sequences, T tokens, C channels (n_embd), V vocabulary, L blocks (n_layer).
"""

import contextlib
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial, reduce

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F

try:  # installed with CUDA builds of torch; makes the in-place DWA faster
    import triton
    import triton.language as tl
except ImportError:
    triton = None


@dataclass
class DenseFormerConfig:
    """The shape of a model. The defaults are the paper's 48-block model.

    Raises ValueError if a field is out of range.
    """

    vocab_size: int = 50304  # GPT-2's 50,257 tokens, rounded up to a multiple of 64 for speed
    block_size: int = 256  # maximum context length
    n_layer: int = 48
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = False  # in Linear and LayerNorm
    dwa: str = "1x1"  # sparsity pattern, see dwa_rows; "none" is the plain Transformer
    dwa_impl: str = "inplace"  # or "naive": the same result, computed directly from the formula
    skip_gains: bool = False  # a learned scale on each skip connection, the paper's other baseline

    def __post_init__(self):
        if min(self.vocab_size, self.block_size, self.n_layer, self.n_head, self.n_embd) < 1:
            raise ValueError("vocab_size, block_size, n_layer, n_head, n_embd must be at least 1")
        if self.n_embd % (2 * self.n_head):  # rotary positions rotate pairs of channels in a head
            raise ValueError(
                f"n_embd must be a multiple of 2 * n_head = {2 * self.n_head}, not {self.n_embd}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {self.dropout}")
        dwa_rows(self.dwa, self.n_layer)  # raises ValueError for a wrong pattern


# -----------------------------------------------------------------------------
# Depth-weighted averages: the module, the formula, the patterns, and checks


class DWA(nn.Module):
    """The depth-weighted averages of a network of n_layer blocks, in three lines:

        self.dwa = DWA(n_layer, "4x5")     in __init__
        depth = self.dwa(x)                in forward; x is X_0, of any shape (..., C)
        x = depth.step(i, block(x))        for i = 1..n_layer: X_i -> Y_i

    `alpha` is the only parameter, (n_layer, n_layer + 1): row i-1 is the DWA after block i, column
    j is X_j. `mask` says which entries are trained; the others have no effect. Calling the module
    returns a pass, an object that holds the X_j of one forward pass.

    impl="naive" evaluates the formula and leaves the gradients to autograd. impl="inplace" gives
    the same result with less memory traffic, but with these limits:

    - one backward pass per forward pass; no double backward, no forward-mode differentiation
    - torch.utils.checkpoint may wrap blocks; around a whole pass it saves no memory
    - all X_j are stored in the dtype of X_0, and must be finite even where no DWA reads them

    It falls back to the formula for sparse masks, where the formula is faster, and where writing in
    place is not supported: complex numbers, tensor subclasses, sparse layouts, torch.compile,
    torch.export, torch.jit.trace and torch.func. Raises ValueError for an unknown impl, and for
    patterns as dwa_rows does.
    """

    def __init__(self, n_layer: int, pattern: str = "1x1", impl: str = "inplace"):
        super().__init__()
        if impl not in ("inplace", "naive"):
            raise ValueError(f"dwa_impl must be 'inplace' or 'naive', not {impl!r}")
        self.n_layer, self.pattern, self.impl = n_layer, pattern, impl
        self.rows = dwa_rows(pattern, n_layer)
        self.used = set().union(*self.rows)  # the j of all X_j that some DWA reads
        # The same as two matrices: mask, and alpha before training, which is also the map of rows
        # without a DWA. They are not buffers: a library that builds a model on the meta device and
        # then loads a checkpoint leaves buffers missing from that checkpoint uninitialized.
        self.mask = torch.zeros(n_layer, n_layer + 1, dtype=torch.bool, device="cpu")
        self.initial = torch.zeros(n_layer, n_layer + 1, device="cpu")
        for i, row in enumerate(self.rows, start=1):
            self.mask[i - 1, row] = True
            self.initial[i - 1, row[-1] if row else i] = 1
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        alpha = torch.empty(n_layer, n_layer + 1, dtype=dtype)
        # frozen if unused: DDP would wait for a gradient that never comes
        self.alpha = nn.Parameter(alpha, requires_grad=bool(self.used))
        self.reset_parameters()
        self.follow_alpha()

    @torch.no_grad()
    def reset_parameters(self):
        """Reset alpha so that Y_i is the newest X_j that DWA i reads: X_i, unless a row of the form
        i:j,j,j leaves it out."""
        self.alpha.copy_(self.initial)

    @torch.enable_grad()  # alpha learns even if a pass begins under no_grad
    def forward(self, x: Tensor) -> "NaivePass | InPlacePass":
        """Begin a pass with X_0, (..., C); its step(i, x) takes X_i and returns Y_i."""
        check_tensor(0, x)
        if self.impl == "inplace" and suits_inplace(self, x):
            return InPlacePass(self.weights(), x)
        return NaivePass(self, x)

    def weights(self) -> Tensor:
        """Return the map from X to Y, (n_layer, n_layer + 1): alpha in the mask, the identity in
        rows without a DWA, and 0 elsewhere."""
        self.follow_alpha()  # alpha may have been replaced by one on another device
        mask, initial = self.mask.to(self.alpha.device), self.initial.to(self.alpha)
        return torch.where(mask, self.alpha, initial)

    def num_params(self) -> int:
        """Return the number of trained scalars: L(L+3)/2 for 1x1, as in the paper."""
        return sum(map(len, self.rows))

    def extra_repr(self) -> str:
        return f"{self.n_layer}, {self.pattern!r}, impl={self.impl!r}"

    def follow_alpha(self):
        """Move mask and initial to alpha's device, but not to meta, where they would lose their
        values."""
        if not self.alpha.is_meta:
            with torch.inference_mode(False):  # else training could not use them later
                self.mask = self.mask.to(self.alpha.device)
                self.initial = self.initial.to(self.alpha)

    def _apply(self, fn, recurse=True):  # .to(), .cuda() and the like call this
        super()._apply(fn, recurse)
        self.follow_alpha()
        return self


class NaivePass:
    """The formula; autograd computes the gradients."""

    def __init__(self, dwa: DWA, x: Tensor):
        self.alpha = dwa.alpha.to(x.dtype, copy=True)  # of now: a later change is for a later pass
        self.rows, self.used = dwa.rows, dwa.used
        self.L, self.shape, self.is_complex = dwa.n_layer, x.shape, x.is_complex()
        self.X: dict[int, Tensor] = {}  # {j: X_j}
        self.versions: dict[int, int] = {}  # {j: X_j._version when it was kept}
        self.keep(0, x)

    def step(self, i: int, x: Tensor) -> Tensor:
        """Take X_i, for i = 1..L in order; return Y_i, of the same shape."""
        check_step(self, i, x)
        self.keep(i, x)
        if not self.rows[i - 1]:
            # Y_i = X_i, but another tensor: dLoss/dY_i is not dLoss/dX_i
            return x.view_as(x) if x.layout == torch.strided else x.clone()
        self.check_unmodified(i)
        alpha, X = self.alpha[i - 1].unbind(), self.X  # row i - 1 is DWA i
        # Y_i = sum over j of alpha[i, j] * X_j
        y = reduce(torch.add, (alpha[j] * X[j] for j in self.rows[i - 1]))
        return y.to(x.dtype)

    def keep(self, j: int, x: Tensor):
        """Keep X_j, if a DWA reads it."""
        if j not in self.used:
            return
        if torch.compiler.is_compiling() or x.is_inference():  # there is no version counter here
            self.X[j] = x.clone()
        else:
            self.X[j], self.versions[j] = x, x._version

    def check_unmodified(self, i: int):
        """Raise RuntimeError if a block has modified an X_j that DWA i reads."""
        for j in self.rows[i - 1]:
            x, version = self.X.get(j), self.versions.get(j)
            if x is None or (version is not None and version != x._version):
                raise RuntimeError(
                    f"DWA {i} reads X_{j}, but X_{j} was modified in place, or step {j} was skipped"
                )


def dwa_rows(pattern: str, n_layer: int) -> list[list[int]]:
    """Return, for i = 1..n_layer, the sorted indices j of the X_j that DWA i reads.

    An empty row means no DWA after that block: Y_i = X_i. A pattern is one of

        kxp              dilation k and period p (section 3.2), e.g. 4x5: a DWA after every p-th
                         block, reading X_i, X_{i-k}, X_{i-2k}, ...
        lastK            the last K outputs and X_0, e.g. last4
        connect-to-last  one DWA, after the last block
        i:j,j,j          a DWA after block i that reads these X_j
        none             no DWA: the plain Transformer

    or several joined by +, e.g. last2+12x1. Raises ValueError for anything else, and for a pattern
    other than none that has no DWA in n_layer blocks.
    """
    causal = [(i, j) for i in range(1, n_layer + 1) for j in range(i + 1)]
    reads: set[tuple[int, int]] = set()  # all (i, j) for which DWA i reads X_j
    for part in pattern.replace(" ", "").split("+"):
        if match := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", part):
            k, p = map(int, match.groups())
            reads |= {(i, j) for i, j in causal if i % p == 0 and (i - j) % k == 0}
        elif match := re.fullmatch(r"last([1-9]\d*)", part):
            reads |= {(i, j) for i, j in causal if i - j < int(match[1]) or j == 0}
        elif part == "connect-to-last":
            reads |= {(i, j) for i, j in causal if i == n_layer}
        elif match := re.fullmatch(r"(\d+):(\d+(?:,\d+)*)", part):
            reads |= {(int(match[1]), int(j)) for j in match[2].split(",")}
        elif pattern != "none":
            raise ValueError(
                f"dwa must be none, dilation x period such as 1x1 or 4x5, last4, connect-to-last, "
                f"single rows such as 24:0,12,24, or several of these joined by +; not {pattern!r}"
            )
    if not reads <= set(causal):
        raise ValueError(f"dwa {pattern!r}: a row i:j,j,j needs i in 1..{n_layer}, every j in 0..i")
    if not reads and pattern != "none":
        raise ValueError(
            f"dwa {pattern} has no DWA in {n_layer} blocks; none is the plain Transformer"
        )
    return [[j for j in range(i + 1) if (i, j) in reads] for i in range(1, n_layer + 1)]


def check_tensor(i: int, x: Tensor):
    if not isinstance(x, Tensor):
        raise RuntimeError(f"X_{i} is a {type(x).__name__}, but a DWA takes one tensor per block")
    if not (x.is_floating_point() or x.is_complex()):
        raise RuntimeError(f"X_{i} has dtype {x.dtype}, but averages need floating-point numbers")


def check_step(depth: "NaivePass | InPlacePass", i: int, x: Tensor):
    if not 1 <= i <= depth.L:
        raise RuntimeError(f"DWA step {i} is out of range: the steps are 1..{depth.L}")
    check_tensor(i, x)
    if x.shape != depth.shape:
        raise RuntimeError(f"X_{i} has shape {tuple(x.shape)}, but X_0 has {tuple(depth.shape)}")
    if x.is_complex() != depth.is_complex:
        raise RuntimeError(f"X_{i} has dtype {x.dtype}: all X_j must be complex, or none")


# -----------------------------------------------------------------------------
# The Transformer


def rotary_angles(t: Tensor, head_size: int, dtype: torch.dtype) -> Tensor:
    """Return cos and sin of the rotary angles for positions t, (T,): (2, T, head_size / 2).

    In float32 at least. Channel pair m of position t is rotated by t * 10000^(-2m / head_size)
    (arXiv 2104.09864). Recomputing these in every forward pass is cheap and saves a buffer that
    would have to be stored, moved and cast.
    """
    dtype = torch.promote_types(dtype, torch.float32)
    m = torch.arange(head_size // 2, device=t.device, dtype=dtype)
    angle = t.to(dtype).unsqueeze(1) * 10000.0 ** (-2 * m / head_size)
    return torch.stack((angle.cos(), angle.sin()))


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotate the channel pairs (m, m + head_size/2) of x, (..., T, head_size), by position."""
    cos, sin = rotary
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x1 * sin + x2 * cos), dim=-1).to(x.dtype)


class KVCache:
    """The keys and values of the tokens so far, for token-by-token generation.

    It has room for block_size tokens of B sequences in each layer. All shapes stay the same, and
    `length`, the number of tokens so far, is a tensor, so a CUDA graph of one decoding step serves
    every position.
    """

    def __init__(self, config: DenseFormerConfig, B: int, device: torch.device, dtype: torch.dtype):
        head_size = config.n_embd // config.n_head
        shape = (config.n_layer, 2, B, config.n_head, config.block_size, head_size)
        self.layers = torch.zeros(shape, device=device, dtype=dtype).unbind()
        self.length = torch.zeros((), device=device, dtype=torch.long)

    def advance(self, T: int) -> tuple[Tensor, Tensor]:
        """Make room for T tokens; return their positions, (T,), and their mask, (T, block_size)."""
        t = self.length + torch.arange(T, device=self.length.device)
        self.length += T
        return t, t[:, None] >= torch.arange(self.layers[0].size(3), device=t.device)


class CausalSelfAttention(nn.Module):
    def __init__(self, config: DenseFormerConfig):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rotary: Tensor, past: tuple[Tensor, ...] | None = None) -> Tensor:
        """x is (B, T, C); past is one layer of a KVCache, and its positions and mask."""
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, B, n_head, T, head_size)
        q, k = rotate(qkv[:2], rotary)
        v = qkv[2]
        mask = None
        if past is not None:
            kv, t, mask = past
            k, v = kv.index_copy_(3, t, torch.stack((k, v)))  # (B, n_head, block_size, head_size)
        y = F.scaled_dot_product_attention(
            q, k, v, mask, self.dropout if self.training else 0.0, is_causal=past is None
        )
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config: DenseFormerConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x))))


class Block(nn.Module):
    """B_i of the paper: attention, then an MLP, each with a pre-norm and a skip connection."""

    def __init__(self, config: DenseFormerConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)
        self.gains = nn.Parameter(torch.ones(2)) if config.skip_gains else None

    def forward(self, x: Tensor, rotary: Tensor, past: tuple[Tensor, ...] | None = None) -> Tensor:
        x = self.skip(0, x) + self.attn(self.ln_1(x), rotary, past)
        return self.skip(1, x) + self.mlp(self.ln_2(x))

    def skip(self, n: int, x: Tensor) -> Tensor:
        return x if self.gains is None else self.gains[n] * x


class Loss(nn.Module):
    """Mean cross-entropy in nats, computed in float32 at least; targets of -1 are ignored.

    A module, so that it can be compiled separately. Then the float32 logits are never materialized,
    which saves 60% of the memory of the loss with GPT-2's vocabulary.
    """

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """(B, T, V), (B, T) -> ()"""
        logits = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, targets.flatten(), ignore_index=-1)


class DenseFormer(nn.Module):
    """The whole model: token embedding, L blocks with their DWAs, norm, output head."""

    def __init__(self, config: DenseFormerConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.dwa = DWA(config.n_layer, config.dwa, config.dwa_impl)
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.loss = Loss()
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Initialize as GPT-2 does.

        weight                                     drawn from
        embedding (and so the head), c_attn, c_fc  normal, std 0.02
        c_proj of attention and MLP                normal, std 0.02 / sqrt(2 L), since 2 L of them
                                                   add up in the residual stream
        norms and gains                            1
        biases, if any                             0
        alpha                                      the identity, see DWA.reset_parameters
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                residual = math.sqrt(2 * self.config.n_layer) if name.endswith("c_proj") else 1
                nn.init.normal_(module.weight, std=0.02 / residual)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm | DWA):
                module.reset_parameters()
            elif isinstance(module, Block) and module.gains is not None:
                nn.init.ones_(module.gains)

    def compile(self, **options):
        """Compile the blocks, which share one graph, and the loss with torch.compile(**options).

        Everything else runs eagerly, so the compile time does not grow with depth.
        """
        for module in (*self.blocks, self.loss):
            module.compile(**options)

    def num_params(self) -> int:
        """Return the number of trained scalars; masked alphas do not count."""
        others = sum(p.numel() for p in self.parameters()) - self.dwa.alpha.numel()
        return others + self.dwa.num_params()

    def flops_per_token(self) -> float:
        """Return the training FLOPs per token; the backward pass counts as two forward passes.

        Forward, each weight takes 2 FLOPs, and causal attention 2 T C per block, since a token
        attends to T / 2 others on average. The DWAs' own FLOPs are neglected.
        """
        c = self.config
        return 3 * (2 * self.num_params() + 2 * c.n_layer * c.block_size * c.n_embd)

    def activation_dtype(self) -> torch.dtype:
        """Return the dtype of the residual stream: autocast's if autocast is enabled."""
        device = self.wte.weight.device.type
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return self.wte.weight.dtype

    def lm_head(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., V). The output head, tied to the token embedding."""
        return F.linear(x, self.wte.weight)

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, cache: KVCache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return logits and loss for token ids idx, (B, T).

        With targets, the following token ids, (B, T): logits of (B, T, V) and the mean
        cross-entropy in nats; targets of -1 are ignored. Without: logits of the last position
        only, (B, 1, V), and None. With a cache, idx continues the tokens in it, and the total must
        not exceed block_size; this requires torch.no_grad. Raises ValueError if T > block_size.
        """
        T = idx.size(1)
        if (block_size := self.config.block_size) < T:
            raise ValueError(f"{T} tokens exceed the block_size {block_size}")
        t, mask = cache.advance(T) if cache else (torch.arange(T, device=idx.device), None)

        x = self.drop(self.wte(idx))  # (B, T, C)
        # Under autocast, keep the residual stream in its dtype too: the DWAs read and write it.
        x = x.to(self.activation_dtype())
        rotary = rotary_angles(t, self.config.n_embd // self.config.n_head, x.dtype)
        depth = self.dwa(x)  # x is X_0
        for i, block in enumerate(self.blocks, start=1):
            past = (cache.layers[i - 1], t, mask) if cache else None
            x = block(x, rotary, past)  # X_i = B_i(Y_{i-1})
            x = depth.step(i, x)  # Y_i = sum over j of alpha[i, j] X_j
        del depth  # without gradients, free the X_j before the logits are computed

        if targets is None:
            return self.lm_head(self.ln_f(x[:, -1:])), None  # (B, 1, V)
        logits = self.lm_head(self.ln_f(x))  # (B, T, V)
        return logits, self.loss(logits, targets)

    # -------------------------------------------------------------------------
    # Generation

    @torch.no_grad()
    def stream(self, idx: Tensor, max_new_tokens: int, *args, **kwargs) -> Iterator[Tensor]:
        """Continue token ids idx, (B, T); yield the next ids, (B, 1), max_new_tokens times.

        The other arguments are those of sample: temperature, top_k, top_p, generator. All tokens
        must be drawn under the same autocast. Raises ValueError, at the first token, for an empty
        idx or an argument that sample rejects.
        """
        if idx.dim() != 2 or not idx.numel():
            raise ValueError(f"the prompt must be non-empty, (B, T), not {tuple(idx.shape)}")
        cache = KVCache(self.config, idx.size(0), idx.device, self.activation_dtype())
        decode: Callable = partial(self, cache=cache)
        for n in range(max_new_tokens):
            with evaluating(self):
                if idx.size(1) > self.config.block_size:
                    # The window slides: positions shift, and cached keys and values above the
                    # first block depend on a dropped token. Recompute the whole window.
                    logits, _ = self(idx[:, -self.config.block_size :])
                else:
                    if n == 2 and idx.is_cuda:  # kernels are compiled at n = 1
                        decode = record(decode, idx[:, -1:])
                    logits, _ = decode(idx if n == 0 else idx[:, -1:])
                new = sample(logits[:, -1], *args, **kwargs)
            idx = torch.cat((idx, new), dim=1)
            yield new

    def generate(self, idx: Tensor, max_new_tokens: int, *args, **kwargs) -> Tensor:
        """Return idx, (B, T), with max_new_tokens more; the other arguments are those of sample."""
        return torch.cat((idx, *self.stream(idx, max_new_tokens, *args, **kwargs)), dim=1)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode; on exit, restore the mode of each module."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def record(function: Callable, x: Tensor) -> Callable:
    """Capture function(x) as a CUDA graph; return a function that replays it for x of that shape.

    The function must have run before, so that its kernels are compiled. Each replay overwrites the
    tensors that the last one returned. A graph is a single launch; launching the kernels of a
    decoding step one by one takes far longer than running them.
    """
    x, graph = x.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream(x.device)):  # captures, does not run
        output = function(x)

    def replay(new: Tensor):
        x.copy_(new)
        graph.replay()
        return output

    return replay


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw a token id for each row of logits, (B, V) -> (B, 1).

    The distribution is softmax(logits / temperature), restricted to the top_k most likely tokens
    and to the smallest set with probability at least top_p, where given; temperature 0 takes the
    most likely token. The draw uses a CPU generator, so that a seed gives the same random numbers
    on any device. Raises ValueError for a value out of range.
    """
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be finite and at least 0, not {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, not {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, not {top_p}")
    if temperature < 1e-5:  # dividing by it could overflow
        return logits.argmax(dim=-1, keepdim=True)
    # Most likely first, so that top_k and top_p cut off a tail.
    logits, ids = (logits.float() / temperature).sort(dim=-1, descending=True)
    if top_k is not None:
        logits[:, top_k:] = -math.inf
    probs = F.softmax(logits, dim=-1)
    if top_p is not None:
        before = probs.cumsum(dim=-1) - probs  # the probability of all more likely tokens
        probs[:, 1:][before[:, 1:] >= top_p] = 0  # multinomial rescales the rest
    drawn = torch.multinomial(probs.cpu(), 1, generator=generator)
    return ids.gather(1, drawn.to(ids.device))


# -----------------------------------------------------------------------------
# In-place DWA
#
# DWA does little arithmetic; memory traffic dominates its cost. Count the activations read, for the
# 1x1 pattern and L blocks. Y_i reads i + 1 of them, about L^2/2 in all, and the backward of the
# naive pass reads and rewrites several times that, since DWA i adds to the gradient of every
# earlier X. Three ideas bring this down:
#
# 1. One buffer. The output of block i becomes row i of X, and Y_i is one vector-matrix product,
#    alpha[i, :i+1] @ X[:i+1].
#
# 2. The backward of DWA is DWA in reverse. With G_m = dLoss/dY_m,
#        dLoss/dX_j         = sum over m >= j of alpha[m, j] G_m
#        dLoss/dalpha[m, j] = <G_m, X_j>
#    When the backward pass reaches step j, every G_m with m >= j is known. So keep all G, and
#    compute each dX_j once.
#
# 3. Tiles of b rows. On entering rows lo..lo+b-1, one matrix product computes the contribution of
#    all older X to these rows, alpha[lo:lo+b, :lo] @ X[:lo], reading each X once instead of b
#    times. Then each row adds its newest terms, at most b:
#
#             j = 0 1 2 3 4 5     b = 2, L = 5
#        i = 1    = =             =  row by row, within a tile
#            2    # # =           #  one product per tile
#            3    # # = =
#            4    # # # # =
#            5    # # # # = =
#
#    The same holds in reverse for G, and dalpha is one product per tile. Instead of L^2/2
#    activations this reads L^2/(2b) + L b/2, which is smallest for b = sqrt(L).
#
# A tile's product needs memory for b rows. The rows of X after lo are still free, so it goes there:
# P_i, the part of Y_i from older tiles, waits in row i + 1 until X_{i+1} overwrites it. Then Y_i is
# one product again. In the tile of rows 2 and 3 ("." is free):
#
#        row           0    1    2    3    4    5    6
#        tile product  X_0  X_1  .    P_2  P_3  .    .
#        step 2        X_0  X_1  X_2  P_2  P_3  .    .     Y_2 = a22 X_2           + 1 P_2
#        step 3        X_0  X_1  X_2  X_3  P_3  .    .     Y_3 = a32 X_2 + a33 X_3 + 1 P_3
#
# The weights of Y_i stand in row i + 1 of a matrix A, which is DWA i with a 1 on the diagonal:
#
#        row 3 of A    a20  a21  a22  1
#        row 4 of A    a30  a31  a32  a33  1
#
# The backward pass works the same way with columns of A, from the last row up. G_m is written to
# row m + 1 of G. Q_j, the part of dX_j from newer tiles, waits in row j of G, and column j of A
# holds its weight, 1, and below it those of G_j, G_{j+1}, ...:
#
#        row           0    1    2    3    4    5    6
#        tile product  X_2  X_3  Q_2  Q_3  .    G_4  G_5
#        step 3        X_2  X_3  Q_2  Q_3  G_3  G_4  G_5   dX_3 = 1 Q_3 + a33 G_3
#        step 2        X_2  X_3  Q_2  G_2  G_3  G_4  G_5   dX_2 = 1 Q_2 + a22 G_2 + a32 G_3
#
# Rows 0 and 1 hold X_2 and X_3 because G shares the memory of X: row r of G is row r + b of X. The
# X of a tile are not needed once its dalpha is computed; the tile below then overwrites them.
#
# Products take the dtype of the activations and sum in float32 (float64 for float64), like a Linear
# in that dtype. What waits in the buffer is rounded to that dtype once more.

TILE = 8  # rows of a tile, b: near sqrt(L) for the paper's depths, and aligned for tensor cores


def suits_inplace(dwa: DWA, x: Tensor) -> bool:
    """Return whether a pass that begins with x can run in place, and is faster than the formula."""
    # In-place traffic does not depend on the mask. It equals naive traffic at about 2.5 mask
    # entries per block.
    dense = dwa.num_params() >= 2.5 * dwa.n_layer
    plain = type(x) in (Tensor, nn.Parameter) and x.layout == torch.strided
    # Tracers cannot follow writes to the buffer.
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    traced = traced or torch._C._are_functorch_transforms_active()
    return dense and plain and x.is_floating_point() and not traced


class InPlacePass:
    """The in-place DWA as autograd sees it: a chain of InPlaceSteps.

    Each step hands a dummy tensor, `order`, to the next, so autograd runs the backward steps from
    L down to 0:

        alpha -> step 0 -> order -> step 1 -> order -> ... -> order -> step L

    Step 0, which takes X_0, comes last in the backward pass, when dLoss/dalpha is complete. It
    receives alpha in place of an order, so that it can return this gradient. The pass holds the
    chain, which holds the buffer; the buffer must not hold the chain, because a reference cycle
    would keep the buffer's memory alive until garbage collection.
    """

    def __init__(self, weights: Tensor, x: Tensor):
        alpha = F.pad(weights, (0, 0, 1, 0))  # (L + 1, L + 1): row i is DWA i
        self.L, self.shape, self.is_complex = len(weights), x.shape, False
        self.buffer = InPlaceBuffer(alpha, x)
        # Step 0 now, not with step 1: a block may then modify X_0, its input, in place.
        _, self.order = InPlaceStep.apply(x, alpha, self.buffer, 0)

    def step(self, i: int, x: Tensor) -> Tensor:
        """Take X_i, for i = 1..L in order; return Y_i, of the same shape."""
        check_step(self, i, x)
        if not (torch.is_grad_enabled() or x.requires_grad):
            return self.buffer.forward(i, x)
        with torch.enable_grad():  # under no_grad too: a later Y may pass a gradient to X_i
            y, self.order = InPlaceStep.apply(x, self.order, self.buffer, i)
        return y if torch.is_grad_enabled() else y.detach()


class InPlaceStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, order, buffer, i):
        ctx.buffer, ctx.i = buffer, i
        ctx.set_materialize_grads(False)  # the gradient of a Y_i that nothing reads is None
        return buffer.forward(i, x) if i > 0 else None, order.new_empty(0)

    @staticmethod
    def backward(ctx, g, _):
        dx = ctx.buffer.backward(ctx.i, g)
        last = ctx.i == 0 or not ctx.needs_input_grad[1]  # no earlier step has gradients
        return dx, ctx.buffer.free() if last else None, None, None


class InPlaceBuffer:
    """The memory of a pass, and the computation in it.

    Each activation, of N elements, is split into S slices.

    X        (S, L + 2 + b, N / S): row i is X_i; before that, the part of Y_{i-1} from older tiles
    G        X from row b on: row i + 1 is G_i; before that, the part of dX_{i+1} from newer tiles
    A        (L + 2, a multiple of 8): row i + 1 is DWA i, and the diagonal is 1
    alpha_T  (L + 1, a multiple of 8): column i is DWA i
    """

    def __init__(self, alpha: Tensor, x: Tensor):
        self.L, self.b, self.shape = len(alpha) - 1, TILE, x.shape
        # On a CPU, bmm runs one product per core, so split the tokens into up to 16 slices.
        self.S = math.gcd(math.prod(x.shape[:-1]), 16) if x.device.type == "cpu" else 1
        self.X = x.new_empty(self.S, self.L + 2 + self.b, x.numel() // self.S)
        self.G = self.X[:, self.b :]
        self.X[:, 0] = x.detach().reshape(self.S, -1)
        # Rows of a multiple of 8 entries keep tiles aligned for tensor cores; A needs at least one
        # more than alpha, for the diagonal. cuBLAS is twice as fast if the matrix on the left is
        # transposed: backward tiles use A.T, forward tiles alpha_T.T.
        A = F.pad(alpha.detach(), (0, 8 - len(alpha) % 8, 1, 0))
        self.A = A.fill_diagonal_(1).to(x.dtype)
        self.alpha_T = F.pad(alpha.detach().T, (0, -len(alpha) % 8)).to(x.dtype)
        self.dalpha = torch.zeros_like(alpha) if alpha.requires_grad else None
        self.next = 1  # the next step of the forward pass
        self.task = -1  # autograd's id of the backward pass, once it has begun

    def forward(self, i: int, x: Tensor) -> Tensor:
        """Take X_i, for i = 1..L in order; return Y_i."""
        if i != self.next or self.task != -1:
            begun = self.task != -1
            reason = "its backward pass has begun" if begun else f"step {self.next} comes next"
            raise RuntimeError(
                f"an in-place DWA cannot take step {i}: {reason}. Each step runs once, in order. "
                f"(Checkpointing may wrap blocks; around DWAs it needs impl='naive' and "
                f"use_reentrant=False.)"
            )
        if not x.device == self.X.device == self.A.device:
            raise RuntimeError(f"X_{i}, X_0 and alpha must be on one device for an in-place DWA")
        A, X, lo = self.A, self.X, i - i % self.b
        hi = min(lo + self.b, self.L + 1)
        self.next = i + 1
        if lo == i > 0:  # a new tile begins
            matmul(self.alpha_T[:lo, lo:hi].T, X[:, :lo], out=X[:, lo + 1 : hi + 1])
        end = i + 2 if lo else i + 1  # the first tile has no older ones
        return write_and_sum(X, i, x, A[i + 1, lo:end], lo).to(x.dtype)

    def backward(self, i: int, g: Tensor | None) -> Tensor:
        """Take G_i = dLoss/dY_i, or None for 0, in decreasing order of i; return dLoss/dX_i."""
        task = torch._C._current_graph_task_id()
        if self.task == -1:
            self.task = task
            self.top = i + 1  # the first row without a gradient: no later Y has one
            self.previous = i + 1  # the step whose backward ran last
        if self.task != task or torch.is_grad_enabled():  # enabled only by create_graph=True
            raise RuntimeError(
                "an in-place DWA supports one backward pass, which overwrites its buffer, and no "
                "double backward; DWA(..., impl='naive') has neither limit"
            )
        for skipped in range(self.previous - 1, i, -1):  # ran under no_grad, so their G is 0
            self.backward(skipped, None)
        self.previous = i
        A, X, G, lo = self.A, self.X, self.G, i - i % self.b
        hi, top = min(lo + self.b, self.top), self.top
        if i == hi - 1 and hi < top:  # a new tile begins
            matmul(A[hi + 1 : top + 1, lo:hi].T, G[:, hi + 1 : top + 1], out=G[:, lo:hi])
        first = i if hi < top else i + 1  # the last tile has no newer ones
        g = X.new_zeros(self.shape) if g is None else g
        dx = write_and_sum(G, i + 1, g, A[first : hi + 1, i], first)
        if i == lo and self.dalpha is not None:  # the tile is complete
            dots = X.new_empty(self.S, hi - lo, hi)
            matmul(G[:, lo + 1 : hi + 1], X[:, :hi].mT, out=dots)
            self.dalpha[lo:hi, :hi] = dots.sum(0, dtype=self.dalpha.dtype)
        return dx

    def free(self) -> Tensor | None:
        """Free the memory at the end of the backward pass; return dLoss/dalpha, if needed."""
        del self.X, self.G
        return self.dalpha


def matmul(A: Tensor, X: Tensor, out: Tensor):
    """Write A @ X to out, also under autocast, which ignores calls with out=.

    A is (r, m) or (S, r, m), X is (S, m, n), out is (S, r, n).
    """
    A = A.expand(len(X), -1, -1)
    if out.is_contiguous():
        torch.bmm(A, X, out=out)
    else:  # torch.bmm uses all cores of a CPU only if its output is contiguous
        out.copy_(torch.bmm(A, X, out=X.new_empty(out.shape)))


def write_and_sum(X: Tensor, row: int, x: Tensor, a: Tensor, first: int) -> Tensor:
    """Write x to X[:, row]; return the sum over k of a[k] * X[:, first + k], in the shape of x.

    X is (S, rows, n). The sum includes the row just written.
    """
    y = X.new_empty(x.shape)  # not a view: a block may modify it in place
    if triton and X.is_cuda and X.dtype != torch.float64:  # the kernel sums in float32
        with torch.cuda.device(X.device):
            write_and_sum_kernel[(triton.cdiv(X.size(2), 1024),)](
                X, row, x.contiguous(), a, first, len(a), y, X.size(2), X.stride(1), a.stride(0),
                MAX=TILE + 1, BLOCK=1024, num_warps=8,
            )  # fmt: skip
    else:
        X[:, row] = x.reshape(len(X), -1)
        matmul(a[None], X[:, first : first + len(a)], out=y.view(len(X), 1, -1))
    return y


# For a product with one row, cuBLAS reaches 1 TB/s on an H200, this kernel 3.5, and a copy 4.2.
if triton:

    @triton.jit(do_not_specialize=["i", "first", "m"])
    def write_and_sum_kernel(
        X, i, x, a, first, m, y, n, X_stride: tl.int64, a_stride,
        MAX: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """write_and_sum() for S = 1 and m = len(a) <= MAX; reads and writes each number once."""
        columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < n
        new = tl.load(x + columns, mask=inside).to(X.dtype.element_ty)
        tl.store(X + i * X_stride + columns, new, mask=inside)
        total = tl.load(a + (i - first) * a_stride).to(tl.float32) * new.to(tl.float32)
        for k in tl.static_range(MAX):
            read = (k < m) & (first + k != i)
            weight = tl.load(a + k * a_stride, mask=read, other=0.0).to(tl.float32)
            old = tl.load(X + (first + k) * X_stride + columns, mask=inside & read, other=0.0)
            total += weight * old.to(tl.float32)
        tl.store(y + columns, total, mask=inside)
