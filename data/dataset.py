"""The Dataset class, batches of token windows, and the loss on them."""

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.tokenizer import Tokenizer

SAMPLES, SAMPLE = 64, 1 << 20  # fingerprint() reads 64 samples of a million tokens from a split


@dataclass
class Dataset:
    name: str  # the value of --dataset that loads it
    train: np.ndarray  # (tokens,) ids of any integer type
    val: np.ndarray
    tokenizer: Tokenizer

    def fingerprint(self) -> str:
        """Return a string that changes with the tokens and the tokenizer.

        Splits of up to 64 million tokens are read whole; of longer ones the head, the tail and
        evenly spaced samples are read.
        """
        crc = zlib.crc32(repr(self.tokenizer.state()).encode())
        for ids in (self.train, self.val):
            starts = np.linspace(0, max(0, len(ids) - SAMPLE), SAMPLES).astype(int)
            for start in np.unique(starts):
                crc = zlib.crc32(ids[start : start + SAMPLE].tobytes(), crc)
        return f"{len(self.train)}-{len(self.val)}-{crc:08x}"


def stack_windows(
    tokens, offsets, shape: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return x, the windows of `tokens` at these offsets, and y, the tokens that follow: (B, T).

    Positions past the end of the tokens, and rows without an offset, have target -1, which the
    loss ignores: all batches have one shape, so a model is compiled once.
    """
    B, T = shape
    ids = np.zeros((2, B, T), dtype=np.int64)
    ids[1] = -1
    for row, offset in enumerate(offsets):
        window = tokens[offset : offset + T + 1]
        ids[0, row, : len(window) - 1] = window[:-1]
        ids[1, row, : len(window) - 1] = window[1:]
    xy = torch.from_numpy(ids)
    if device.type == "cuda":  # copies from pinned memory are asynchronous
        xy = xy.pin_memory()
    x, y = xy.to(device, non_blocking=True)
    return x, y


def eval_offsets(tokens, block_size: int, limit: int) -> np.ndarray:
    """Return the offsets of adjacent windows that together predict each token once.

    If there are more than `limit`, return that many evenly spaced ones, the same every time.
    """
    offsets = np.arange(0, len(tokens) - 1, block_size)
    if len(offsets) > limit:
        offsets = offsets[np.linspace(0, len(offsets) - 1, limit).astype(int)]
    return offsets


@torch.no_grad()
def sum_losses(model: Callable, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, int]:
    """Return the sum of the losses of all tokens in batches of x and y, and their number."""
    loss_sum, count = 0.0, 0
    for x, y in batches:
        if n := int((y >= 0).sum()):  # else the batch has no windows, and its mean is not a number
            loss_sum += model(x, y)[1].item() * n
            count += n
    return loss_sum, count
