"""DWA in tiles: the in-place DWA of denseformer.py with less memory traffic in deep networks.

There, Y_i reads i + 1 activations, so that L blocks read about L^2/2 in each direction. Here rows
are computed in tiles of b. On entering rows lo..lo+b-1, one matrix product computes the part of all
older X in these rows, alpha[lo:lo+b, :lo] @ X[:lo], and so reads each X once instead of b times.
Then each row adds its newest terms, at most b. Here the tiles are rows 0-1, 2-3 and 4-5:

            j = 0 1 2 3 4 5     b = 2, L = 5
       i = 1    = =             =  row by row, within a tile
           2    # # =           #  one product per tile
           3    # # = =
           4    # # # # =
           5    # # # # = =

The same holds in reverse for G_m = dLoss/dY_m, and dalpha is one product per tile. Instead of
L^2/2 activations this reads L^2/(2b) + L b/2, which is smallest for b = sqrt(L). Forward and
backward together move 203 activations for 8 blocks, 709 for 24 and 1,648 for 48; without tiles it
is 196, 1,148 and 4,016, and with the formula and autograd 584, 4,440 and 16,944.

A tile's product needs memory for b rows. The rows of X after lo are still free, so it goes there:
P_i, the part of Y_i from older tiles, waits in row i + 1 until X_{i+1} overwrites it. Then Y_i is
one product again. In the tile of rows 2 and 3 ("." is free):

       row           0    1    2    3    4    5    6
       tile product  X_0  X_1  .    P_2  P_3  .    .
       step 2        X_0  X_1  X_2  P_2  P_3  .    .     Y_2 = a22 X_2           + 1 P_2
       step 3        X_0  X_1  X_2  X_3  P_3  .    .     Y_3 = a32 X_2 + a33 X_3 + 1 P_3

Row i + 1 of a matrix A holds the weights of Y_i, and the diagonal of A is 1. A step uses the part
in brackets; the product of a tile has used the rest:

       row 3 of A    a20  a21 [a22  1 ]
       row 4 of A    a30  a31 [a32  a33  1 ]

The backward pass works the same way with columns of A, from the last row up, in a view G of the
same memory: row r of G is row r + b of X. G_m is written to row m + 1 of G. Q_j, the part of dX_j
from newer tiles, waits in row j of G, and column j of A holds its weight, 1, and below it those of
G_j, G_{j+1}, ...:

       row of G      0    1    2    3    4    5    6
       tile product  X_2  X_3  Q_2  Q_3  .    G_4  G_5
       step 3        X_2  X_3  Q_2  Q_3  G_3  G_4  G_5   dX_3 = 1 Q_3 + a33 G_3
       step 2        X_2  X_3  Q_2  G_2  G_3  G_4  G_5   dX_2 = 1 Q_2 + a22 G_2 + a32 G_3

The X of a tile are not needed once its dalpha is computed; the next older tile overwrites them.

Products take the dtype of the activations and add up in float32 (float64 for float64), like a
Linear in that dtype. What waits in the buffer is rounded to that dtype once more.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from denseformer import DWA, Buffer, Formula, InPlace, Rows, is_plain, matmul

try:  # installed with CUDA builds of torch
    import triton
    import triton.language as tl
except ImportError:
    triton = None

TILE = 8  # rows of a tile, b: near sqrt(L) for the paper's depths, and aligned for tensor cores
DEEP = 24  # blocks from which tiles are at least as fast as denseformer.Buffer on a CPU


def make_dwa(dwa: DWA, impl: str, device: torch.device) -> DWA:
    """Return a new DWA like this one for --dwa_impl: naive, inplace, tiled, or auto, which is tiled
    on a GPU and for deep models, where tiles are faster, and in place elsewhere."""
    if impl == "auto":
        impl = "tiled" if device.type == "cuda" or dwa.n_layer >= DEEP else "inplace"
    if impl == "tiled":
        return TiledDWA(dwa.n_layer, dwa.pattern).to(device)
    return DWA(dwa.n_layer, dwa.pattern, impl).to(device)


class TiledDWA(DWA):
    """A DWA that computes in tiles, with the parameter, the results and the limits of the DWA in
    place. Patterns so sparse that the formula moves less memory use the formula."""

    def __init__(self, n_layer: int, pattern: str | Rows = "1x1"):
        super().__init__(n_layer, pattern)
        read = torch.zeros(n_layer + 1, n_layer + 1, dtype=torch.bool, device="cpu")
        for i, row in enumerate(self.rows):
            read[i, row] = True
        # no buffers, which to_empty and from_pretrained would leave uninitialized
        self.masks: tuple[Tensor, ...] = read, torch.diag(~read.any(dim=1))

    @torch.enable_grad()  # alpha learns even if X_0 is computed under no_grad
    def forward(self, x: Tensor) -> Formula | InPlace:
        """Begin a forward pass with X_0; its step(i, x) takes X_i and returns Y_i."""
        # The traffic in tiles does not depend on the pattern. It equals that of the formula at
        # about 2.5 alphas per block.
        if self.num_params() < 2.5 * self.n_layer or not is_plain(x):
            return Formula(self.alpha, self.rows, x)
        read, same = self.masks = tuple(mask.to(x.device) for mask in self.masks)
        weights = torch.where(read, self.alpha, same)
        return InPlace(weights, TiledBuffer(weights, x), x)


class TiledBuffer(Buffer):
    """The memory of one forward pass, for InPlace in place of a Buffer, of which it shares no code.

    Each activation, of N numbers, is split into S slices.

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
        # Rows of a multiple of 8 entries keep tiles aligned for tensor cores; A needs at least one
        # more than alpha, for the diagonal. cuBLAS is twice as fast if the matrix on the left is
        # transposed: backward tiles use A.T, forward tiles alpha_T.T.
        A = F.pad(alpha.detach(), (0, 8 - len(alpha) % 8, 1, 0))
        self.A = A.fill_diagonal_(1).to(x.dtype)
        self.alpha_T = F.pad(alpha.detach().T, (0, -len(alpha) % 8)).to(x.dtype)
        self.dalpha = torch.zeros_like(alpha)
        self.lowest, self.next = self.L + 1, 0

    G = property(lambda self: self.X[:, self.b :])  # a stored view would keep X

    def forward(self, i: int, x: Tensor) -> Tensor:
        """Take X_i; return Y_i."""
        A, X, lo = self.A, self.X, i - i % self.b
        hi = min(lo + self.b, self.L + 1)
        self.next = i + 1
        if lo == i > 0:  # a new tile begins: P_lo..P_{hi-1}
            write_product(self.alpha_T[:lo, lo:hi].T, X[:, :lo], out=X[:, lo + 1 : hi + 1])
        end = i + 2 if lo else i + 1  # the first tile has no older ones
        return self.write_and_sum(X, i, x, A[i + 1, lo:end], lo).to(x.dtype)

    def backward(self, i: int, g: Tensor | None) -> Tensor:
        """Take G_i = dLoss/dY_i, or None for 0, in decreasing order of i; return dLoss/dX_i."""
        if self.lowest > self.L:  # the backward pass begins
            self.next, self.top, self.lowest = self.L + 1, i + 1, i + 1
        for skipped in range(self.lowest - 1, i, -1):  # ran under no_grad, so their G is 0
            self.backward(skipped, None)
        self.lowest = i
        A, X, G, lo = self.A, self.X, self.G, i - i % self.b
        hi, top = min(lo + self.b, self.top), self.top
        if i == hi - 1 and hi < top:  # a new tile begins: Q_lo..Q_{hi-1}
            write_product(A[hi + 1 : top + 1, lo:hi].T, G[:, hi + 1 : top + 1], out=G[:, lo:hi])
        first = i if hi < top else i + 1  # the last tile has no newer ones
        g = X.new_zeros(self.shape) if g is None else g
        dx = self.write_and_sum(G, i + 1, g, A[first : hi + 1, i], first)
        if i == lo:  # the tile is complete
            dots = matmul(G[:, lo + 1 : hi + 1], X[:, :hi].mT, (self.S, hi - lo, hi))
            self.dalpha[lo:hi, :hi] = dots.sum(0, dtype=self.dalpha.dtype)
        return dx

    def write_and_sum(self, X: Tensor, row: int, x: Tensor, a: Tensor, first: int) -> Tensor:
        """Write x to row X[:, row]; return the sum over k of a[k] * X[:, first + k], like x.

        X is self.X or self.G. The sum includes the row just written.
        """
        if triton and X.is_cuda and X.dtype != torch.float64:  # the kernel sums in float32
            y = X.new_empty(x.shape)
            with torch.cuda.device(X.device):
                write_and_sum_kernel[(triton.cdiv(X.size(2), 1024),)](
                    X, row, x.contiguous(), a, first, len(a), y, X.size(2), X.stride(1),
                    a.stride(0), MAX=TILE + 1, BLOCK=1024, num_warps=8,
                )  # fmt: skip
            return y
        X[:, row] = x.reshape(len(X), -1)
        # a column of A must be contiguous, or torch.bmm multiplies slice by slice
        return matmul(a.contiguous().expand(len(X), 1, -1), X[:, first : first + len(a)], x.shape)


def write_product(A: Tensor, X: Tensor, out: Tensor):
    """Write A @ X to out: (r, m), (S, m, n) and (S, r, n)."""
    A = A.expand(len(X), -1, -1)
    if out.is_contiguous():
        torch.bmm(A, X, out=out)
    else:  # torch.bmm uses all cores of a CPU only if its output is contiguous
        out.copy_(matmul(A, X, out.shape))


# For a product with one row, cuBLAS reaches 1 TB/s on an H200, this kernel 3.5, and a copy 4.2.
if triton:

    @triton.jit(do_not_specialize=["i", "first", "m"])
    def write_and_sum_kernel(
        X, i, x, a, first, m, y, n, X_stride: tl.int64, a_stride,
        MAX: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """TiledBuffer.write_and_sum for S = 1 and m = len(a) <= MAX; each number moves once."""
        columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < n
        new = tl.load(x + columns, mask=inside).to(X.dtype.element_ty)
        tl.store(X + i * X_stride + columns, new, mask=inside)
        total = tl.load(a + (i - first) * a_stride).to(tl.float32) * new.to(tl.float32)
        for k in tl.static_range(MAX):
            # read nothing of a row past m, nor of the new row, which is added above
            end = tl.where((k < m) & (first + k != i), n, 0)
            weight = tl.load(a + tl.minimum(k, m - 1) * a_stride).to(tl.float32)
            old = tl.load(X + (first + k) * X_stride + columns, mask=columns < end, other=0.0)
            total += weight * old.to(tl.float32)
        tl.store(y + columns, total, mask=inside)
