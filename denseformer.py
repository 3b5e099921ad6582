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
plain Transformer with the same weights.

Notable here:
- class Formula is the formula; class DWA adds it to any residual network in three lines
- dwa="none" is the plain Transformer
- the paper's Transformer: pre-norm, no biases, rotary positions, GELU, tied embeddings
- the last section computes the same in place; at 48 blocks it moves a quarter of the memory

Shapes: B sequences, T tokens, C channels (n_embd), V vocabulary, L blocks (n_layer).
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn import functional as F

Rows = list[list[int]]  # rows[i], for i = 0..L, lists the j that Y_i sums over; rows[0] is empty


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
    dwa: str | Rows = "1x1"  # see dwa_rows; "none" is the plain Transformer

    def __post_init__(self):
        if min(self.vocab_size, self.block_size, self.n_layer, self.n_head, self.n_embd) < 1:
            raise ValueError("vocab_size, block_size, n_layer, n_head, n_embd must be at least 1")
        if self.n_embd % (2 * self.n_head):  # rotary positions rotate pairs of channels in a head
            raise ValueError(f"n_embd {self.n_embd} must be a multiple of 2 * n_head")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {self.dropout}")
        dwa_rows(self.dwa, self.n_layer)  # raises ValueError for a wrong pattern


# -----------------------------------------------------------------------------
# Depth-weighted averages


class Formula:
    """One forward pass of the DWA below, by the formula; autograd computes the gradients."""

    def __init__(self, alpha: Tensor, rows: Rows, x: Tensor):
        self.alpha, self.rows, self.shape = alpha, rows, x.shape
        self.used = set().union(*rows)  # the j of all X_j that some Y_i needs
        self.X: list = [x]

    def step(self, i: int, x: Tensor) -> Tensor:
        """Take X_i, for i = 1..L in order; return Y_i, of the same shape."""
        # whether a reentrant checkpoint ran this step before, without gradients
        lost = any(X is not None and X.requires_grad < x.requires_grad for X in self.X[i : i + 1])
        check_step(i, x, 0 < i <= len(self.X) and not lost, self.shape, len(self.rows) - 1)
        # append X_i, or replace it where checkpointing runs a step again
        self.X[i : i + 1] = [x if i in self.used else None]
        if not self.rows[i]:
            return x
        alpha, X = self.alpha[i].unbind(), self.X
        # Y_i = sum over j of alpha[i, j] * X_j
        return sum(alpha[j] * X[j] for j in self.rows[i]).to(x.dtype)


class DWA(nn.Module):
    """The depth-weighted averages of a network of n_layer blocks, in three lines:

        self.dwa = DWA(n_layer)            in __init__
        depth = self.dwa(x)                in forward; x is X_0, of any shape
        x = depth.step(i, block(x))        for i = 1..n_layer: X_i -> Y_i

    The pattern 1x1 is the full DWA: Y_i sums over all X_j. Others leave some out: see dwa_rows.

    alpha, (L + 1, L + 1), is the only parameter, and alpha[i, j] is the paper's alpha_ij. Row 0
    and the entries that the pattern leaves out are unused: their gradient is 0.

    impl="naive" evaluates the formula. impl="inplace" computes 1x1 in place (last section): the
    same result, but with one backward pass for each forward pass and no second derivatives.
    """

    def __init__(self, n_layer: int, pattern: str | Rows = "1x1", impl: str = "inplace"):
        super().__init__()
        if impl not in ("inplace", "naive"):
            raise ValueError(f"impl must be 'inplace' or 'naive', not {impl!r}")
        self.n_layer, self.pattern, self.impl = n_layer, pattern, impl
        self.rows = dwa_rows(pattern, n_layer)
        self.is_full = all(len(row) == i + 1 for i, row in enumerate(self.rows) if i > 0)  # 1x1
        # without any DWA it needs no gradient, for which DDP would wait in vain
        self.alpha = nn.Parameter(torch.empty(n_layer + 1, n_layer + 1), any(self.rows))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        """Reset alpha so that Y_i is the newest X_j that DWA i reads, in general X_i."""
        newest = torch.tensor([row[-1] if row else i for i, row in enumerate(self.rows)])
        self.alpha.copy_(F.one_hot(newest, len(newest)))

    def num_params(self) -> int:
        """Return the number of trained scalars: L(L+3)/2 for 1x1, as in the paper."""
        return sum(map(len, self.rows))

    def forward(self, x: Tensor) -> "Formula | InPlace":
        """Begin a forward pass with X_0; its step(i, x) takes X_i and returns Y_i."""
        if self.impl == "inplace" and self.is_full and is_plain(x):
            return InPlace(self.alpha, Buffer(self.alpha, x), x)
        return Formula(self.alpha, self.rows, x)


def is_plain(x: Tensor) -> bool:
    """Return whether steps can write x to a buffer: not under torch.compile, as a subclass of
    Tensor or as complex numbers, all of which the formula serves."""
    return type(x) in (Tensor, nn.Parameter) and x.is_floating_point() and not is_compiling()


def check_step(i: int, x: Tensor, allowed: bool, shape: torch.Size, L: int):
    """Raise RuntimeError unless x can be X_i, and step i may run now."""
    if not allowed or i > L or getattr(x, "shape", None) != shape:
        raise RuntimeError(
            f"DWA step {i} got {getattr(x, 'shape', type(x))}: steps 1..{L} run in order, and take "
            f"a tensor like X_0, {shape}; to checkpoint them: impl='naive', use_reentrant=False"
        )


def dwa_rows(pattern: str | Rows, n_layer: int) -> Rows:
    """Return L + 1 lists: the indices j of the X_j that DWA i reads, in increasing order.

    An empty list means no DWA after block i: Y_i = X_i. A pattern is one of

        kxp              dilation k and period p (section 3.2), e.g. 4x5: a DWA after every p-th
                         block, reading X_i, X_{i-k}, X_{i-2k}, ...
        lastK            the last K outputs and X_0, e.g. last4
        connect-to-last  one DWA, after the last block
        none             no DWA: the plain Transformer

    or such lists as data, the first of them empty, as in a pruned model. Raises ValueError for
    anything else, and for a pattern other than none that has no DWA in n_layer blocks.
    """
    reads, pairs = set(), [(i, j) for i in range(1, n_layer + 1) for j in range(i + 1)]
    if not isinstance(pattern, str):
        reads = {(i, j) for i, row in enumerate(pattern) for j in row} & set(pairs)
    elif match := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", pattern):
        k, p = map(int, match.groups())
        reads = {(i, j) for i, j in pairs if i % p == 0 and (i - j) % k == 0}
    elif match := re.fullmatch(r"last([1-9]\d*)", pattern):
        reads = {(i, j) for i, j in pairs if i - j < int(match[1]) or j == 0}
    elif pattern == "connect-to-last":
        reads = {(i, j) for i, j in pairs if i == n_layer}
    elif pattern != "none":
        raise ValueError(f"dwa {pattern!r} is not of the form 4x5, last4, connect-to-last or none")
    rows = [[j for j in range(i + 1) if (i, j) in reads] for i in range(n_layer + 1)]
    if not isinstance(pattern, str) and rows != pattern:  # what is out of place was left out
        raise ValueError(f"dwa: rows must be {n_layer + 1} lists, row 0 empty, row i within 0..i")
    if pattern != "none" and not reads:
        raise ValueError(f"dwa {pattern} has no DWA in {n_layer} blocks; none is without DWA")
    return rows


# -----------------------------------------------------------------------------
# The Transformer


def rotary_angles(t: Tensor, head_size: int, dtype: torch.dtype) -> Tensor:
    """Return cos and sin of the rotary angles for positions t, (T,): (T, 1, head_size / 2, 2).

    In float32 at least. Channel pair m of position t is rotated by t * 10000^(-2m / head_size)
    (arXiv 2104.09864). Recomputing these in every forward pass is cheap and saves a buffer that
    would have to be stored, moved and cast.
    """
    dtype = torch.promote_types(dtype, torch.float32)
    m = torch.arange(head_size // 2, device=t.device, dtype=dtype)
    angle = t.to(dtype).view(-1, 1, 1) * 10000.0 ** (-2 * m / head_size)
    return torch.stack((angle.cos(), angle.sin()), dim=-1)


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotate the channel pairs (2m, 2m + 1) of x, (B, T, heads, head_size), by position."""
    pairs = x.unflatten(-1, (-1, 2))
    if x.device.type == "cpu" and not is_compiling():
        # one product of complex numbers is fastest, but torch.compile generates no code for it
        z = torch.view_as_complex(pairs.to(rotary.dtype)) * torch.view_as_complex(rotary)
        pairs = torch.view_as_real(z)
    else:
        (a, b), (cos, sin) = pairs.unbind(-1), rotary.unbind(-1)
        pairs = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1)
    return pairs.flatten(-2).to(x.dtype)


class KVCache:
    """The keys and values of up to block_size tokens of B sequences, for generation."""

    def __init__(self, config: DenseFormerConfig, B: int, device: torch.device, dtype: torch.dtype):
        head_size = config.n_embd // config.n_head
        shape = (config.n_layer, 2, B, config.n_head, config.block_size, head_size)
        self.layers = torch.zeros(shape, device=device, dtype=dtype).unbind()
        self.length = 0  # the number of tokens so far

    def advance(self, T: int) -> Tensor:
        """Make room for T tokens; return their positions, (T,)."""
        self.length += T
        return torch.arange(self.length - T, self.length, device=self.layers[0].device)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Add k and v of the T new tokens, (B, n_head, T, head_size); return those of all S tokens,
        and which of them each new one attends to, (T, S), or None for all."""
        T, S = k.size(2), self.length
        keys, values = self.layers[layer][:, :, :, :S]
        keys[:, :, S - T :], values[:, :, S - T :] = k, v
        mask = torch.ones(T, S, dtype=torch.bool, device=k.device).tril(S - T) if T > 1 else None
        return keys, values, mask


class CausalSelfAttention(nn.Module):
    def __init__(self, config: DenseFormerConfig, layer: int):
        super().__init__()
        self.n_head, self.dropout, self.layer = config.n_head, config.dropout, layer
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rotary: Tensor, cache: KVCache | None = None) -> Tensor:
        """(B, T, C) -> (B, T, C)"""
        (B, T, C), H = x.shape, self.n_head
        qk, v = self.c_attn(x).view(B, T, 3 * H, C // H).split((2 * H, H), dim=2)
        q, k = rotate(qk, rotary).split(H, dim=2)
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))  # (B, n_head, T, head_size)
        k, v, mask = cache.update(self.layer, k, v) if cache else (k, v, None)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=cache is None)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))


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

    def __init__(self, config: DenseFormerConfig, layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotary: Tensor, cache: KVCache | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), rotary, cache)
        return x + self.mlp(self.ln_2(x))


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean loss in nats of logits, (B, T, V), in float32 at least; targets, (B, T), of
    -1 do not count."""
    logits = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets.flatten(), ignore_index=-1)


class DenseFormer(nn.Module):
    """The whole model: token embedding, L blocks with their DWAs, norm, output head."""

    def __init__(self, config: DenseFormerConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.dwa = DWA(config.n_layer, config.dwa)
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.loss: Callable = cross_entropy
        self.init_weights()

    def init_weights(self):
        """Initialize as GPT-2 does.

        weight                                     drawn from
        embedding (and so the head), c_attn, c_fc  normal, std 0.02
        c_proj of attention and MLP                normal, std 0.02 / sqrt(2 L), since 2 L of them
                                                   add up in the residual stream
        norms                                      1
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

    def compile(self, **options):
        """Compile the blocks, which share one graph, and the loss with torch.compile(**options).

        Everything else runs eagerly, so the compile time does not grow with depth. The compiled
        loss never stores its float32 logits.
        """
        for block in self.blocks:
            block.compile(**options)
        self.loss = torch.compile(self.loss, **options)

    def num_params(self) -> int:
        """Return the number of trained scalars; alphas that no DWA reads do not count."""
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
        t = cache.advance(T) if cache else torch.arange(T, device=idx.device)

        x = self.drop(self.wte(idx))  # (B, T, C)
        # Under autocast, keep the residual stream in its dtype too: the DWAs read and write it.
        x = x.to(self.activation_dtype())
        rotary = rotary_angles(t, self.config.n_embd // self.config.n_head, x.dtype)
        depth = self.dwa(x)  # x is X_0
        for i, block in enumerate(self.blocks, start=1):
            x = block(x, rotary, cache)  # X_i = B_i(Y_{i-1})
            x = depth.step(i, x)  # Y_i = sum over j of alpha[i, j] X_j
        del depth  # without gradients, free the X_j before the logits are computed

        if targets is None:
            return self.lm_head(self.ln_f(x[:, -1:])), None  # (B, 1, V)
        logits = self.lm_head(self.ln_f(x))  # (B, T, V)
        return logits, self.loss(logits, targets)

    # -------------------------------------------------------------------------
    # Generation

    def start_decoding(self, idx: Tensor) -> Callable[[Tensor], Tensor]:
        """Return a function from new token ids, (B, T), to the logits of the last, (B, 1, V)."""
        cache = KVCache(self.config, idx.size(0), idx.device, self.activation_dtype())
        return lambda new: self(new, cache=cache)[0]

    @torch.no_grad()
    def stream(self, idx: Tensor, max_new_tokens: int, *args, **kwargs) -> Iterator[Tensor]:
        """Continue token ids idx, (B, T); yield the next ids, (B, 1), max_new_tokens times.

        The other arguments are those of sample_token: temperature, top_k, top_p, generator. Call
        model.eval() before. Raises ValueError, at the first token, for an empty idx or an argument
        that sample_token rejects.
        """
        if idx.dim() != 2 or not idx.numel():
            raise ValueError(f"the prompt must be non-empty, (B, T), not {tuple(idx.shape)}")
        decode, new = self.start_decoding(idx), idx
        for _ in range(max_new_tokens):
            if idx.size(1) > self.config.block_size:
                # The window slides: positions shift, and cached keys and values above the first
                # block depend on a dropped token. Recompute the whole window.
                logits = self(idx[:, -self.config.block_size :])[0]
            else:
                logits = decode(new)
            new = sample_token(logits[:, -1], *args, **kwargs)
            idx = torch.cat((idx, new), dim=1)
            yield new

    def generate(self, idx: Tensor, max_new_tokens: int, *args, **kwargs) -> Tensor:
        """Return idx, (B, T), with max_new_tokens more; the other arguments are stream's."""
        return torch.cat((idx, *self.stream(idx, max_new_tokens, *args, **kwargs)), dim=1)


def sample_token(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None,
    top_p: float | None = None, generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
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
# In place
#
# DWA does little arithmetic; memory traffic is its cost. Count the activations that are read or
# written: with the formula and autograd, the forward and the backward pass of 8, 24 and 48 blocks
# move 584, 4,440 and 16,944. Each product alpha[i, j] * X_j is written and read again, and the
# backward of DWA i adds to the gradients of all earlier X. Two ideas move 196, 1,148 and 4,016:
#
# 1. One buffer. The output of block i becomes row i of X, and Y_i is one vector-matrix product,
#    alpha[i, :i+1] @ X[:i+1].
#
# 2. The backward of DWA is DWA in reverse. With G_m = dLoss/dY_m,
#        dLoss/dalpha[m, j] = <G_m, X_j>                          for j <= m
#        dLoss/dX_j         = sum over m >= j of alpha[m, j] G_m
#    The backward pass reaches step m = L first. Row m of dalpha is one matrix-vector product, and
#    after it nothing needs X_m any more, so G_m takes its place. Then all G that dX_m needs stand
#    in rows m..L, and dX_m is one product too: each gradient is computed once.
#
#        row           0    1    2    3
#        step 1        X_0  X_1  .    .      Y_1 = a10 X_0 + a11 X_1
#        step 2        X_0  X_1  X_2  .      Y_2 = a20 X_0 + a21 X_1 + a22 X_2
#        step 3        X_0  X_1  X_2  X_3    Y_3 = a30 X_0 + a31 X_1 + a32 X_2 + a33 X_3
#
#        and back
#        step 3        X_0  X_1  X_2  G_3    dX_3 = a33 G_3
#        step 2        X_0  X_1  G_2  G_3    dX_2 = a22 G_2 + a32 G_3
#        step 1        X_0  G_1  G_2  G_3    dX_1 = a11 G_1 + a21 G_2 + a31 G_3
#        step 0        .    G_1  G_2  G_3    dX_0 = a10 G_1 + a20 G_2 + a30 G_3
#
#    Where the forward pass stops early, a step runs under no_grad, or nothing reads Y_m, G_m is 0.
#
# A third idea, tiles, moves 203, 709 and 1,648: lib/tiled.py.


class Buffer:
    """The memory of one forward pass: X, (S, L + 1, N / S), for activations of N numbers.

    X[:, i] is X_i, in S slices, since torch.bmm on a CPU runs one product per core. (torch.mv uses
    a single core.) In the backward pass, the rows from `lowest` on are G, those before still X.
    """

    def __init__(self, alpha: Tensor, x: Tensor):
        self.S, self.shape = math.gcd(x.numel(), 16), x.shape
        # in memory, the slices of each X_i lie together
        self.X = x.new_empty(len(alpha), self.S, x.numel() // self.S).transpose(0, 1)
        # alpha and its transpose, for every slice: copies, since the backward pass needs them even
        # if an optimizer has stepped, with contiguous rows, else torch.bmm takes slice by slice
        A = alpha.detach().to(x.dtype, copy=True)
        self.A, self.A_T = (a.expand(self.S, -1, -1) for a in (A, A.T.contiguous()))
        # next is the next step of the forward pass
        self.dalpha, self.lowest, self.next = torch.zeros_like(alpha), len(alpha), 0

    def forward(self, i: int, x: Tensor) -> Tensor:
        """Take X_i; return Y_i = alpha[i, :i+1] @ X[:, :i+1]."""
        self.next = i + 1
        self.X[:, i : i + 1] = x.reshape(self.S, 1, -1)
        return matmul(self.A[:, i : i + 1, : i + 1], self.X[:, : i + 1], self.shape).to(x.dtype)

    def backward(self, i: int, g: Tensor | None) -> Tensor:
        """Take G_i = dLoss/dY_i, or None for 0, in decreasing order of i; return dLoss/dX_i."""
        if g is not None:
            self.X[:, i + 1 : self.lowest].zero_()  # the G that were skipped
            g = g.to(self.X.dtype).reshape(self.S, 1, -1)
            self.dalpha[i, : i + 1] = matmul(g, self.X[:, : i + 1].mT, (self.S, i + 1)).sum(0)
            self.X[:, i : i + 1] = g
            self.lowest, self.next = i, len(self.dalpha)  # no step may follow
        return matmul(self.A_T[:, i : i + 1, self.lowest :], self.X[:, self.lowest :], self.shape)


def matmul(A: Tensor, X: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return A @ X in this shape, for A of (S, r, m) and X of (S, m, n).

    It has the dtype of X, with sums in float32 at least, also under autocast, which ignores calls
    with out=.
    """
    y = X.new_empty(shape)  # no view of A @ X, so that a block may modify it in place
    torch.bmm(A, X, out=y.view(A.size(0), A.size(1), -1))
    return y


class InPlaceStep(torch.autograd.Function):
    """A step as autograd sees it.

    Each step hands `order`, an empty tensor, to the next, so that the backward steps run from L
    down to 0. The first step with gradients (step 0, unless that ran under no_grad) receives alpha
    instead, and so can return its gradient when all of dalpha is known.
    """

    @staticmethod
    def forward(ctx, x, order, buffer, i):
        ctx.buffer, ctx.i, ctx.is_first = buffer, i, order.dim() == 2
        ctx.set_materialize_grads(False)  # so that the gradients below can be None
        return buffer.forward(i, x), order.new_empty(0)

    @staticmethod
    def backward(ctx, g, order):  # g is None: nothing reads Y_i; order is None: it begins here
        buffer = ctx.buffer
        if torch.is_grad_enabled() or (order is None and buffer.lowest < len(buffer.dalpha)):
            raise RuntimeError("a second backward pass or derivative needs DWA(..., impl='naive')")
        dx = buffer.backward(ctx.i, g)
        if not ctx.is_first and ctx.needs_input_grad[1]:
            return dx, dx.new_empty(0), None, None
        del buffer.X  # no earlier step has gradients
        return dx, buffer.dalpha, None, None


class InPlace:
    """The steps of one forward pass in place. They hold the buffer, which must not hold them: a
    cycle would keep its memory until garbage collection."""

    def __init__(self, alpha: Tensor, buffer: Buffer, x: Tensor):
        self.buffer, self.order = buffer, alpha
        self.step(0, x)  # stores X_0; nothing uses its Y

    def step(self, i: int, x: Tensor) -> Tensor:
        """Take X_i, for i = 1..L in order; return Y_i, of the same shape."""
        check_step(i, x, i == self.buffer.next, self.buffer.shape, len(self.buffer.dalpha) - 1)
        if not (torch.is_grad_enabled() or x.requires_grad):
            return self.buffer.forward(i, x)  # no gradient can reach X_i, nor alpha from Y_i
        with torch.enable_grad():  # under no_grad, a later Y still passes a gradient to X_i
            y, self.order = InPlaceStep.apply(x, self.order, self.buffer, i)
        return y if torch.is_grad_enabled() else y.detach()
