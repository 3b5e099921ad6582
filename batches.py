"""Windows of tokens as batches for the model."""

import numpy as np
import torch
from torch import Tensor

from data.errors import DataError


def stack_windows(
    tokens, offsets, shape: tuple[int, int], vocab_size: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return x, the windows of `tokens` at these offsets, and y, the tokens that follow: (B, T).

    The end of the tokens, and the rows of the shape (B, T) beyond the last offset, have targets of
    -1, which the loss ignores: a compiled model then sees one shape only. Raises DataError for a
    token outside the vocabulary.
    """
    B, T = shape
    ids = np.zeros((2, B, T), dtype=np.int64)
    ids[1] = -1
    for row, offset in enumerate(offsets):
        window = tokens[offset : offset + T + 1]
        ids[0, row, : len(window) - 1] = window[:-1]
        ids[1, row, : len(window) - 1] = window[1:]
    if (largest := ids.max()) >= vocab_size:
        raise DataError(
            f"the data has the token {largest}, but its tokenizer has only {vocab_size}: the data "
            f"is damaged, or was made with another tokenizer"
        )
    xy = torch.from_numpy(ids)
    if device.type == "cuda":  # copies from pinned memory are asynchronous
        xy = xy.pin_memory()
    x, y = xy.to(device, non_blocking=True)
    return x, y


def eval_offsets(tokens, block_size: int, limit: int) -> np.ndarray:
    """Return where adjacent windows begin that predict each token once.

    If these are more than `limit`, then `limit` evenly spaced ones of them, always the same.
    """
    offsets = np.arange(0, len(tokens) - 1, block_size)
    if len(offsets) > limit:
        offsets = offsets[np.linspace(0, len(offsets) - 1, limit).astype(int)]
    return offsets
