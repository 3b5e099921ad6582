"""
DenseFormer: a GPT in which every block reads a learned average of all that came before it.

Source: Pagliardini, Mohtashami, Fleuret, Jaggi, "DenseFormer: Enhancing Information Flow in
Transformers via Depth Weighted Averaging", arXiv 2402.02622. With X_0 the token embedding and
B_i the i-th Transformer block,

    X_i = B_i(Y_{i-1})                               what block i computes
    Y_i = sum over j = 0..i of alpha[i, j] * X_j     depth-weighted average (DWA); Y_0 = X_0
    logits = head(norm(Y_L))

The alphas are learned scalars, the same for every token and every channel: L(L+3)/2 of them,
1,224 for 48 blocks. They start as the identity, so an untrained DenseFormer is exactly the
plain Transformer of the same weights.

What is notable here:
- all DWAs of the model are one matrix, alpha, and one mask; a sparse DWA is a sparser mask
- the plain Transformer is the same code with dwa="none"
- the paper's Transformer: pre-norm, no biases, rotary positions, GELU, tied embeddings
- generation keeps a key-value cache and can be streamed, a token at a time

In the comments B is sequences, T tokens, C channels (n_embd), V vocabulary, L blocks (n_layer).
"""

import math
import re
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F


@dataclass
class DenseFormerConfig:
    """The shape of a model. The defaults are the paper's: 48 blocks, GPT-2's vocabulary.

    Raises ValueError, with a sentence that names the field, where there is no such model.
    """

    vocab_size: int = 50304  # GPT-2's 50,257 tokens, rounded up to a multiple of 64 for speed
    block_size: int = 256  # the most tokens of context
    n_layer: int = 48
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = False  # in the linear layers and the norms
    dwa: str = "1x1"  # which weights there are, see dwa_mask; "none" is the plain Transformer
    dwa_impl: str = "inplace"  # or "naive": the same, as the formula stands
    skip_gains: bool = False  # a learned scale on each skip connection, the paper's other baseline

    def __post_init__(self):
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        if self.n_embd // self.n_head % 2:
            raise ValueError(
                f"n_embd / n_head must be even, since rotary positions turn pairs of channels; "
                f"{self.n_embd} / {self.n_head} is {self.n_embd // self.n_head}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {self.dropout}")
        if self.dwa_impl not in ("inplace", "naive"):
            raise ValueError(f"dwa_impl must be 'inplace' or 'naive', not {self.dwa_impl!r}")
        dwa_mask(self.dwa, self.n_layer)  # raises for a pattern that it does not know


# -----------------------------------------------------------------------------
# Depth-weighted averages


def dwa_mask(pattern: str, n_layer: int) -> Tensor:
    """Which entries alpha has, as a bool matrix of (n_layer, n_layer + 1).

    Row i-1 is the DWA after block i and column j is X_j. The patterns are

        kxp, as 4x5      dilation k and period p (section 3.2): after block i there is a DWA only
                         where p divides i, and it sees only X_j with j = i (mod k)
        lastK, as last4  the last K outputs and X_0
        connect-to-last  one DWA, after the last block
        i:j,j,j          a DWA after block i that sees these X_j and no others
        none             no DWA

    and, joined by +, all that any of them has: last2+12x1. A row that no part names has only its
    diagonal, which is no DWA: Y_i = X_i. Raises ValueError for other patterns.
    """
    i = torch.arange(1, n_layer + 1).unsqueeze(1)  # (L, 1)
    j = torch.arange(n_layer + 1)  # (L + 1)
    causal = j <= i
    mask = torch.zeros_like(causal)
    for part in pattern.split("+"):
        if match := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", part):
            k, p = map(int, match.groups())
            mask |= causal & (i % p == 0) & ((i - j) % k == 0)
        elif match := re.fullmatch(r"last([1-9]\d*)", part):
            mask |= causal & ((i - j < int(match[1])) | (j == 0))
        elif part == "connect-to-last":
            mask |= causal & (i == n_layer)
        elif match := re.fullmatch(r"(\d+):(\d+(?:,\d+)*)", part):
            row = int(match[1])
            for column in map(int, match[2].split(",")):
                if not 1 <= row <= n_layer:
                    raise ValueError(f"dwa {part!r}: there is no block {row} among {n_layer}")
                if column > row:
                    raise ValueError(f"dwa {part!r}: X_{column} comes after block {row}")
                mask[row - 1, column] = True
        elif part != "none":
            raise ValueError(
                f"dwa must be none, dilation x period such as 1x1 or 4x5, last4, connect-to-last, "
                f"single rows such as 24:0,12,24, or several of these joined by +; not {part!r}"
            )
    return mask | ((i == j) & ~mask.any(dim=1, keepdim=True))


def trained(mask: Tensor) -> Tensor:
    """The entries of a DWA's mask that are alphas: all but those of rows that are no DWA."""
    diagonal = torch.eye(len(mask) + 1, dtype=torch.bool, device=mask.device)[1:]
    return mask & mask.ne(diagonal).any(dim=1, keepdim=True)


def dwa_pattern(mask: Tensor) -> str:
    """The pattern that dwa_mask makes this mask of, DWA by DWA: 5:1,5+10:2,6,10."""
    rows = enumerate((row.nonzero().flatten().tolist() for row in trained(mask)), start=1)
    dwas = (f"{i}:{','.join(map(str, row))}" for i, row in rows if row)
    return "+".join(dwas) or "none"


class DWA(nn.Module):
    """Every depth-weighted average of a model: one matrix `alpha`, one `mask`, both (L, L + 1).

    alpha is float32 and always is the whole linear map from X to Y. Of its entries, those
    outside the mask are 0 and those of a row without a DWA are the identity; neither is ever
    trained. A pass through the depth of the model is

        Y_0, X = dwa.start(X_0)
        Y_i = dwa(i, X_i, X)      for i = 1..L

    where X is all that this pass remembers. The module itself remembers nothing of it.

    dwa_impl "naive" is the formula as it stands; "inplace" computes the same with a fraction of
    the memory traffic. Masks of few entries have little to save and take the naive way.
    """

    mask: Tensor

    def __init__(self, config: DenseFormerConfig):
        super().__init__()
        L = config.n_layer
        self.impl = config.dwa_impl
        self.tile_rows: int | None = None  # of the in-place way, which chooses unless it is set
        self.alpha = nn.Parameter(torch.eye(L + 1)[1:].clone())  # alpha[i, i] = 1: Y_i = X_i
        self.register_buffer("mask", torch.eye(L + 1, dtype=torch.bool)[1:].clone())
        self.set_mask(dwa_mask(config.dwa, L))

    @torch.no_grad()
    def set_mask(self, mask: Tensor):
        """Keep only the entries of alpha in `mask`, a bool matrix of (n_layer, n_layer + 1).

        Raises ValueError where no DWA has such a mask.
        """
        if mask.shape != self.mask.shape or mask.triu(2).any() or not mask.any(dim=1).all():
            raise ValueError(
                f"a DWA mask of this model has the shape {tuple(self.mask.shape)}, nothing above "
                f"the diagonal (column i of row i-1) and at least one entry in each row"
            )
        self.mask.copy_(mask)
        self._read_mask()
        self.alpha.requires_grad_(bool(self.needed))
        self.alpha.mul_(self.mask)
        for i, sources in enumerate(self.sources):
            if not sources:
                self.alpha[i, i + 1] = 1  # no DWA: Y_i = X_i
            elif not self.alpha[i].any():
                self.alpha[i, sources[-1]] = 1  # without X_i it begins as the newest X there is

    def _read_mask(self):
        # The mask as Python lists, so that a forward pass never waits for the device: for each row
        # its columns j, and none at all where the diagonal is alone, which is no DWA.
        self.sources = [row.nonzero().flatten().tolist() for row in trained(self.mask.cpu())]
        self.needed = set().union(*self.sources)  # the j of those X_j that some DWA reads
        # The in-place way moves the same memory for any mask: what the naive one does for one of
        # 2.5 L entries.
        self.in_place_pays = self.num_params() >= 2.5 * len(self.sources)

    def _load_from_state_dict(self, *args, **kwargs):
        had = bool(self.needed)
        super()._load_from_state_dict(*args, **kwargs)
        self._read_mask()
        if bool(self.needed) != had:  # else alphas that somebody froze stay frozen
            self.alpha.requires_grad_(not had)

    def num_params(self) -> int:
        """The number of trained scalars: L(L+3)/2 for 1x1, as in the paper."""
        return sum(map(len, self.sources))

    def sparsity(self) -> float:
        """The share of the weights of earlier X that the mask lacks: 0 for 1x1, 1 for none."""
        L = len(self.sources)
        earlier = self.mask.tril(0).sum().item()  # the diagonal, of X_i itself, does not count
        return 1 - earlier / (L * (L + 1) // 2)

    def start(self, x: Tensor) -> "tuple[Tensor, dict[int, Tensor] | InPlacePass]":
        """Begin a pass with X_0, of (B, T, C); returns Y_0 and the memory of this pass."""
        if self.impl == "inplace" and self.in_place_pays:
            X = InPlacePass(self, x)
            return X.step(0, x), X
        return x, {0: x}

    def forward(self, i: int, x: Tensor, X: "dict[int, Tensor] | InPlacePass") -> Tensor:
        """Take X_i, the output of block i = 1..L; return Y_i. Both are (B, T, C)."""
        if isinstance(X, InPlacePass):
            return X.step(i, x)
        if i in self.needed:
            X[i] = x
        if not self.sources[i - 1]:
            return x
        # Y_i = sum over j of alpha[i, j] X_j, with the paper's row i in row i - 1 here. The sum is
        # kept in float32 at least, whatever the activations are.
        dtype = torch.promote_types(x.dtype, torch.float32)
        alpha = self.alpha[i - 1].to(dtype)
        terms = [alpha[j] * X[j].to(dtype) for j in self.sources[i - 1]]
        return sum(terms[1:], terms[0]).to(x.dtype)


# -----------------------------------------------------------------------------
# The Transformer around it


def rotary_angles(head_size: int, block_size: int, base: float = 10000.0) -> Tensor:
    """cos and sin of the rotary angles, (2, block_size, head_size / 2), float32.

    Channel pair m of position t turns by t * base^(-2m / head_size) (arXiv 2104.09864).
    """
    frequency = base ** (-torch.arange(0, head_size, 2).float() / head_size)
    angle = torch.outer(torch.arange(block_size).float(), frequency)
    return torch.stack((angle.cos(), angle.sin()))


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Turn the channel pairs (m, m + head_size/2) of x, (..., T, head_size), by position."""
    cos, sin = rotary
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x1 * sin + x2 * cos), dim=-1).to(x.dtype)


class KVCache:
    """The keys and values of the tokens read so far, for generation a token at a time.

    Room for block_size tokens of B sequences in every layer; `length` says how many are there.
    """

    def __init__(self, config: DenseFormerConfig, B: int, device: torch.device, dtype: torch.dtype):
        head_size = config.n_embd // config.n_head
        shape = (config.n_layer, 2, B, config.n_head, config.block_size, head_size)
        self.layers = torch.empty(shape, device=device, dtype=dtype).unbind()
        self.length = 0


class CausalSelfAttention(nn.Module):
    def __init__(self, config: DenseFormerConfig):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rotary: Tensor, kv: Tensor | None = None, past: int = 0) -> Tensor:
        """x is (B, T, C). kv is (2, B, n_head, block_size, head_size) and holds `past` tokens."""
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        qk, v = qkv.permute(2, 0, 3, 1, 4).split((2, 1))  # (2 and 1, B, n_head, T, head_size)
        (q, k), v = rotate(qk, rotary), v[0]
        if kv is not None:
            kv[0, :, :, past : past + T], kv[1, :, :, past : past + T] = k, v
            k, v = kv[:, :, :, : past + T]
        # Token t sees the keys up to past + t. With no past that is the kernel's own causal mask,
        # and a single token sees everything; only several tokens after a past need a mask written.
        mask = None
        if past and T > 1:
            mask = torch.ones(T, past + T, dtype=torch.bool, device=x.device).tril(past)
        y = F.scaled_dot_product_attention(
            q, k, v, mask, dropout_p=self.dropout if self.training else 0.0, is_causal=not past
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
    """B_i of the paper: attention, then an MLP, each reading a norm and added to its input."""

    def __init__(self, config: DenseFormerConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotary: Tensor, kv: Tensor | None = None, past: int = 0) -> Tensor:
        x = x + self.attn(self.ln_1(x), rotary, kv, past)
        return x + self.mlp(self.ln_2(x))


class GainBlock(Block):
    """A block whose two skip connections have a learned scale: "skips with gains"."""

    def __init__(self, config: DenseFormerConfig):
        super().__init__(config)
        self.gains = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor, rotary: Tensor, kv: Tensor | None = None, past: int = 0) -> Tensor:
        x = self.gains[0] * x + self.attn(self.ln_1(x), rotary, kv, past)
        return self.gains[1] * x + self.mlp(self.ln_2(x))


class Loss(nn.Module):
    """Mean cross-entropy in nats, in float32; a target of -1 does not count.

    A module, to be compiled by itself: then the float32 logits are never in memory, which with
    GPT-2's vocabulary saves three fifths of what the loss takes.
    """

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """(B, T, V), (B, T) -> ()"""
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)


class DenseFormer(nn.Module):
    """The whole model: token embedding, L blocks with their DWAs, norm, output head."""

    rotary: Tensor

    def __init__(self, config: DenseFormerConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        block = GainBlock if config.skip_gains else Block
        self.blocks = nn.ModuleList(block(config) for _ in range(config.n_layer))
        self.dwa = DWA(config)
        self.loss = Loss()
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight  # tied: one matrix reads tokens and predicts them
        rotary = rotary_angles(config.n_embd // config.n_head, config.block_size)
        self.register_buffer("rotary", rotary, persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """GPT-2's initialisation.

        weight                                  drawn from
        embedding (and so the head), c_attn,
          c_fc                                  normal, std 0.02
        c_proj of attention and MLP             normal, std 0.02 / sqrt(2 L): 2 L of them add up
                                                in the residual stream
        norms                                   gain 1
        biases, where there are any             0
        alpha                                   the identity (set by DWA)
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                residual = name.endswith("c_proj")
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02
                nn.init.normal_(module.weight, std=std)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)

    def compile(self, **options):
        """torch.compile(**options) one block, for all are alike, and the loss; the rest is eager.

        So it takes no longer for a deep model than for a shallow one.
        """
        for module in (*self.blocks, self.loss):
            module.compile(**options)

    def num_params(self) -> int:
        """The number of trained scalars; the tied embedding counts once, a masked alpha never."""
        others = sum(p.numel() for p in self.parameters()) - self.dwa.alpha.numel()
        return others + self.dwa.num_params()

    def flops_per_token(self) -> float:
        """FLOPs of training on one token: forward, and twice that backward.

        Two for each weight, and 2 T C in each block for the two products of causal attention,
        which see T / 2 tokens on average.
        """
        c = self.config
        return 3 * (2 * self.num_params() + 2 * c.n_layer * c.block_size * c.n_embd)

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, cache: KVCache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Logits and loss. idx: token ids, (B, T); targets: the tokens that follow, (B, T).

        With targets: logits of (B, T, V) and the mean cross-entropy in nats, a target of -1
        not counting. Without: logits of the last position only, (B, 1, V), and None. With a
        cache, which needs torch.no_grad, idx continues the tokens that are in it. Raises
        ValueError for more tokens than block_size.
        """
        T = idx.size(1)
        past = cache.length if cache else 0
        if past + T > self.config.block_size:
            raise ValueError(f"{past + T} tokens are more than block_size {self.config.block_size}")
        rotary = self.rotary[:, past : past + T]

        x = self.drop(self.wte(idx))  # (B, T, C)
        if torch.is_autocast_enabled(x.device.type):
            # The residual stream in 16 bits too: it is what a DWA reads, so half the bytes.
            x = x.to(torch.get_autocast_dtype(x.device.type))
        x, X = self.dwa.start(x)  # Y_0 = X_0
        for i, block in enumerate(self.blocks, start=1):
            x = block(x, rotary, cache.layers[i - 1] if cache else None, past)  # X_i = B_i(Y_{i-1})
            x = self.dwa(i, x, X)  # Y_i = sum_j alpha[i, j] X_j
        if cache:
            cache.length += T

        if targets is None:
            return self.lm_head(self.ln_f(x[:, [-1]])), None  # (B, 1, V)
        logits = self.lm_head(self.ln_f(x))  # (B, T, V)
        return logits, self.loss(logits, targets)

    def configure_optimizers(
        self,
        learning_rate: float,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        optimizer: str = "adamw",
    ) -> list[torch.optim.Optimizer]:
        """The optimizers to step together: AdamW, or Muon for the blocks' matrices and AdamW.

        Weights that multiply activations, the matrices of the blocks and the embedding, decay.
        Norms and biases do not, nor does alpha: decay pulls towards 0, and for alpha[i, i],
        which starts at 1 as the skip connection of the whole depth, 0 is no simpler model but a
        broken one. (The authors' experiments did decay it.)

        Muon (torch.optim.Muon, torch 2.9 or later) is scaled so that AdamW's learning rate and
        weight decay suit it (arXiv 2502.16982). Raises ValueError where torch lacks it.
        """
        if optimizer not in ("adamw", "muon"):
            raise ValueError(f"optimizer must be 'adamw' or 'muon', not {optimizer!r}")
        alpha = self.dwa.alpha
        matrices = [p for p in self.parameters() if p.dim() >= 2 and p is not alpha]
        vectors = [p for p in self.parameters() if p.dim() < 2 or p is alpha]
        optimizers: list[torch.optim.Optimizer] = []
        if optimizer == "muon":
            if not hasattr(torch.optim, "Muon"):
                raise ValueError(f"optimizer 'muon' needs torch 2.9; this is {torch.__version__}")
            inner = {id(p) for p in self.blocks.parameters()}
            muon = [p for p in matrices if id(p) in inner]
            optimizers.append(
                torch.optim.Muon(muon, learning_rate, weight_decay, adjust_lr_fn="match_rms_adamw")
            )
            matrices = [p for p in matrices if id(p) not in inner]
        groups = [
            {"params": matrices, "weight_decay": weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        fused = self.wte.weight.device.type in ("cuda", "cpu")
        optimizers.append(torch.optim.AdamW(groups, learning_rate, betas, fused=fused))
        return optimizers

    # -------------------------------------------------------------------------
    # Generation

    @torch.no_grad()
    def stream(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """Continue idx, (B, T) token ids; yield max_new_tokens times the next token ids, (B, 1).

        Each token is drawn from softmax(logits / temperature), of which only the top_k most
        likely and the smallest set with probability top_p remain, where these are given;
        temperature 0 takes the most likely one. Raises ValueError, when the first token is asked
        for, for an empty idx or for settings out of range.
        """
        if idx.dim() != 2 or not idx.numel():
            raise ValueError(f"a prompt is (B, T) token ids, at least one; not {tuple(idx.shape)}")
        if not (temperature >= 0 and math.isfinite(temperature)):
            raise ValueError(f"temperature must be 0 or more, not {temperature}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1, not {top_k}")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {top_p}")
        training = self.training
        self.eval()  # no dropout
        try:
            block_size = self.config.block_size
            cache = None
            for _ in range(max_new_tokens):
                if cache is None or cache.length == block_size:
                    # Start, or the window is full and slides by one token. The old keys and values
                    # cannot stay: above the first block they have read the token that now leaves.
                    # So past block_size each token costs a whole window. Rotary positions restart
                    # at 0, which changes nothing, for only their differences matter.
                    new = idx[:, -block_size:]
                    cache = KVCache(self.config, idx.size(0), idx.device, self.activation_dtype())
                logits, _ = self(new, cache=cache)
                new = sample(logits[:, -1].float(), temperature, top_k, top_p, generator)
                idx = torch.cat((idx[:, -block_size:], new), dim=1)
                yield new
        finally:
            self.train(training)

    def generate(self, idx: Tensor, max_new_tokens: int, *args, **kwargs) -> Tensor:
        """idx, (B, T), and the max_new_tokens that follow it; the arguments are those of stream."""
        return torch.cat((idx, *self.stream(idx, max_new_tokens, *args, **kwargs)), dim=1)

    def activation_dtype(self) -> torch.dtype:
        device = self.wte.weight.device.type
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return self.wte.weight.dtype


def sample(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> Tensor:
    """Draw one token id a row from logits, (B, V) -> (B, 1). See DenseFormer.stream."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    # Most likely first, so that what top_k and top_p drop is a tail.
    logits, order = logits.sort(dim=-1, descending=True)
    logits = logits - logits[:, :1]  # no overflow below, however low the temperature
    if top_k is not None:
        logits[:, top_k:] = -math.inf
    probs = F.softmax(logits / temperature, dim=-1)
    if top_p is not None:
        before = probs.cumsum(dim=-1) - probs  # the probability of all that are more likely
        probs[before >= top_p] = 0  # multinomial rescales what is left
    return order.gather(1, torch.multinomial(probs, 1, generator=generator))


# -----------------------------------------------------------------------------
# In-place DWA
#
# A DWA does almost no arithmetic: its cost is memory traffic. Let an activation be
# N = B T C numbers and count activations read or written, for 1x1 and L blocks. The formula reads
# i + 1 of them for Y_i, about L^2/2 in all, and autograd's backward reads and rewrites several
# times that, for row i adds its share to the gradient of every earlier X. Three ideas:
#
# 1. One buffer. Block i's output goes into row i of X, (L + 1, N), and Y_i is one product of a
#    vector and a matrix, alpha[i, :i+1] @ X[:i+1]. (In memory the N numbers are cut into pages, and
#    a page has its L + 1 rows together: a product then reads one region at a time, not L + 1.)
#
# 2. The backward of a DWA is a DWA in reverse. With G_m = dLoss/dY_m,
#        dLoss/dX_j         = sum over m >= j of alpha[m, j] G_m
#        dLoss/dalpha[m, j] = <G_m, X_j>
#    When the backward pass comes to step j, it knows every G_m with m >= j. So keep the G and form
#    each dX_j once.
#
# 3. Tiles. The alphas of later rows are known before the rows are needed. On entering a tile, the
#    rows lo..lo+b-1, one matrix product alpha[lo:lo+b, :lo] @ X[:lo] brings all its rows up to
#    X_{lo-1}, reading each old X once instead of b times; then each row adds its newest terms, b at
#    most:
#
#             j = 0 . . . . . . . lo . . L
#        i = 1    = =                           = = =  row by row, inside its tile
#            .    = = =
#            lo   # # # # # # # # =             # # #  one product for the tile
#            .    # # # # # # # # = =
#
#    Likewise in reverse for G, and dalpha is one product a tile. That makes L^2/(2b) + L b/2
#    activations instead of L^2/2, least for b near sqrt(L). Once a tile's dalpha is formed nobody
#    reads its X again, and its G take their place in the buffer.
#
# What a mask lacks is a 0 in alpha. To pass over it hardly pays, for a tile reads an X if any row
# of it does. A dilation k amounts to k interleaved DWAs of L/k rows each, which would move less
# memory, but on a CPU they are slower than one of L rows: their products are smaller.


class InPlaceMemory:
    """What one pass through the depth remembers: X on the way up, G on the way down."""

    def __init__(self, dwa: DWA, x: Tensor):
        L, N = len(dwa.sources), x.numel()
        few = N < 1 << 14  # numbers: then the count of operations matters, not the traffic
        # Rows of a tile: near sqrt(L), and what was fastest of the sizes tried.
        self.b = dwa.tile_rows or (L + 1 if few else math.ceil(1.4 * math.sqrt(L + 1)))
        # Sums are in float32 at least, whatever the activations are. (On a GPU that may take
        # TensorFloat32 for it, as train.py allows, alpha has 11 significant bits.)
        self.dtype = torch.promote_types(x.dtype, torch.float32)
        self.alpha = torch.eye(L + 1, device=x.device, dtype=self.dtype)  # row i makes Y_i
        self.alpha[1:] = dwa.alpha.detach()
        self.mask = dwa.mask
        self.dalpha = torch.zeros_like(self.alpha) if dwa.alpha.requires_grad else None
        # A CPU multiplies matrices of one dtype only, so there X is converted once, when it comes.
        stored = self.dtype if x.device.type == "cpu" else x.dtype
        # A page has the rows of up to 16 tokens: X is (pages, L + 1, c).
        self.pages = N // (x.size(-1) * math.gcd(N // x.size(-1), 16))
        self.X = x.new_empty(self.pages, L + 1, N // self.pages, dtype=stored)
        # What the rows of a tile get from outside it, and the G of a tile: both (pages, b, c).
        self.partial = self.tile_G = self.X[:, :0]
        # The steps of the backward pass: where it began, where it is, and where it will end.
        self.top = L
        self.last: int | None = None
        self.lowest: int | None = None

    def up(self, i: int, x: Tensor) -> Tensor:
        """X_i -> Y_i."""
        alpha, X, lo = self.alpha, self.X, i - i % self.b
        X[:, i] = x.reshape(self.pages, -1)
        if i == 0:
            return x
        if i == lo:  # a new tile begins
            self.partial = weighted_sums(alpha[lo : lo + self.b, :lo], X[:, :lo])
        ready = self.partial[:, i - lo : i - lo + 1] if lo else None
        y = weighted_sums(alpha[i : i + 1, lo : i + 1], X[:, lo : i + 1], ready)
        return y.view_as(x).to(x.dtype)

    def down(self, i: int, G: Tensor) -> Tensor:
        """G_i = dLoss/dY_i -> dLoss/dX_i; the steps come in falling order, each once."""
        alpha, X, lo = self.alpha, self.X, i - i % self.b
        if self.last is None:
            self.top = i  # above it no Y has a gradient
            self.tile_G = torch.empty_like(X[:, : self.b])
        elif i != self.last - 1 or not X.numel():
            raise RuntimeError(
                "the in-place DWA goes backward through a forward pass once, for it overwrites its "
                "memory on the way; dwa_impl='naive' can do it more often"
            )
        self.last = i
        end = self.top + 1
        hi = min(lo + self.b, end)
        if i == hi - 1 < self.top:  # a new tile begins; beyond it, X holds G by now
            self.partial = weighted_sums(alpha[hi:end, lo:hi].T, X[:, hi:end])
        tile_G = self.tile_G[:, : hi - lo]
        tile_G[:, i - lo] = G.reshape(self.pages, -1)
        ready = self.partial[:, i - lo : i - lo + 1] if hi < end else None
        dX = weighted_sums(alpha[i:hi, i : i + 1].T, tile_G[:, i - lo :], ready)
        if i == lo:  # the tile is complete
            if self.dalpha is not None:
                self.dalpha[lo:hi, :hi] = dots(tile_G, X[:, :hi])
            X[:, lo:hi] = tile_G
        if i == self.lowest:  # nothing of it is needed again
            self.X = self.partial = self.tile_G = G.new_empty(0)
        return dX.view_as(G).to(G.dtype)

    def alpha_gradient(self) -> Tensor:
        """dLoss/dalpha; 0 outside the mask, and where a diagonal is alone, which is no DWA."""
        assert self.dalpha is not None
        return self.dalpha[1:].masked_fill(~trained(self.mask), 0)


class InPlacePass:
    """One pass through the depth, step by step; autograd sees InPlaceSteps in a chain.

    The link that goes from each step to the next makes their backward come in falling order. The
    link into step 0, which comes last, is alpha.
    """

    def __init__(self, dwa: DWA, x: Tensor):
        # The memory must not know the link, which knows the memory: the two would never be freed.
        self.memory, self.link = InPlaceMemory(dwa, x), dwa.alpha
        # Autocast would round alpha to bfloat16. To switch it off takes time, at every step of
        # every decoded token, so only where it is on.
        cast = torch.is_autocast_enabled(x.device.type)
        self.no_autocast = torch.autocast(x.device.type, enabled=False) if cast else nullcontext()

    def step(self, i: int, x: Tensor) -> Tensor:
        """X_i -> Y_i; the steps are i = 0..L in this order."""
        with self.no_autocast:
            if not torch.is_grad_enabled():
                return self.memory.up(i, x)
            if self.memory.lowest is None and (x.requires_grad or self.link.requires_grad):
                self.memory.lowest = i
            y, self.link = InPlaceStep.apply(x, self.link, i, self.memory)
            return y


class InPlaceStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, link, i, memory):
        ctx.i, ctx.memory = i, memory
        return memory.up(i, x), link.new_empty(0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, G, dlink):
        with torch.autocast(G.device.type, enabled=False):
            dX = ctx.memory.down(ctx.i, G)
        if ctx.i == 0 and ctx.memory.dalpha is not None:
            dlink = ctx.memory.alpha_gradient().to(dlink.dtype)
        return dX, dlink, None, None


# Numbers that a GPU converts at a time: 64 MB, for smaller pieces would take longer to launch than
# to convert.
PIECE = 1 << 24


def weighted_sums(alpha: Tensor, X: Tensor, ready: Tensor | None = None) -> Tensor:
    """alpha @ X + ready, of (a, s), (pages, s, c) and (pages, a, c), in the dtype of alpha."""
    if X.dtype == alpha.dtype:
        alpha = alpha.expand(len(X), -1, -1)
        return torch.bmm(alpha, X) if ready is None else torch.baddbmm(ready, alpha, X)
    n = max(1, PIECE // X[0].numel())
    readies = [None] * len(X) if ready is None else ready.split(n)
    pieces = zip(X.split(n), readies, strict=False)
    return torch.cat([weighted_sums(alpha, x.to(alpha.dtype), r) for x, r in pieces])


def dots(G: Tensor, X: Tensor) -> Tensor:
    """<G_m, X_j>, of (pages, b, c) with (pages, s, c) -> (b, s), in float32 at least."""
    dtype = torch.promote_types(X.dtype, torch.float32)
    n = len(X) if X.dtype == dtype else max(1, PIECE // X[0].numel())
    return sum(
        (g.to(dtype) @ x.to(dtype).mT).sum(0) for g, x in zip(G.split(n), X.split(n), strict=True)
    )
