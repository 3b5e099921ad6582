"""Training data: token ids to train on and to validate on, and their tokenizer.

    dataset = data.load("shakespeare", block_size=128)
    dataset.train, dataset.val      1-D arrays of token ids, memory-mapped where they are large
    dataset.tokenizer               encode: str -> ids, decode: ids -> str, vocab_size, state()

To add a data set, write a file with a function that returns a Dataset, and add it to DATASETS.
"""

import difflib
import os
from collections.abc import Callable

from data import openwebtext, pydoc_topics, shakespeare, textfile
from data.dataset import Dataset
from lib.files import UserError, say

__all__ = ["DATASETS", "Dataset", "load"]

# {name: function of the tokenizer's name, or None, and the number of shards}
DATASETS: dict[str, Callable[[str | None, int], Dataset]] = {
    "shakespeare": lambda kind, n_shards: shakespeare.load(kind),  # 1.1 MB, downloaded
    "pydoc": lambda kind, n_shards: pydoc_topics.load(kind),  # 0.5 MB, part of Python
    "openwebtext": openwebtext.load,  # 80 shards of 300 MB, downloaded
}

PATIENCE = 5.0  # seconds to wait for Tiny Shakespeare if no data set was named


def load(
    name: str | None, block_size: int, tokenizer: str | None = None, n_shards: int = 1
) -> Dataset:
    """Return the data set with this name in DATASETS, or one made from the text at this path.

    None means Tiny Shakespeare, or pydoc if Tiny Shakespeare cannot be downloaded.
    tokenizer is char, byte, gpt2, or None to choose by the text. n_shards is for openwebtext.
    Raises UserError if the data cannot be loaded, or if a split is too short for one window of
    block_size tokens and the token after it.
    """
    if name is None:
        dataset = load_default(tokenizer)
    elif name in DATASETS:
        dataset = DATASETS[name](tokenizer, n_shards)
    elif os.path.exists(name):
        dataset = textfile.load(name, tokenizer)
    else:
        close = difflib.get_close_matches(name, DATASETS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"the data sets are {', '.join(DATASETS)}"
        raise UserError(f"there is no data set, file or folder {name!r}; {hint}")
    for split, tokens in (("train", dataset.train), ("val", dataset.val)):
        if len(tokens) <= block_size:
            raise UserError(
                f"{dataset.name} is too short: its {split} split has {len(tokens)} tokens, and a "
                f"block_size of {block_size} needs at least {block_size + 1}"
            )
    return dataset


def load_default(tokenizer: str | None) -> Dataset:
    """Return Tiny Shakespeare, or pydoc and print why."""
    try:
        shakespeare.fetch(deadline=PATIENCE)
    except UserError as error:
        if os.environ.get("SHAKESPEARE_URL"):  # somebody asked for it
            raise
        say(
            f"CANNOT DOWNLOAD TINY SHAKESPEARE ({error}): TRAINING ON PYTHON'S LANGUAGE REFERENCE "
            f"INSTEAD. To require it, use --dataset shakespeare; if you have a copy, set "
            f"SHAKESPEARE_URL to its path; or use --dataset YOUR.txt"
        )
        return pydoc_topics.load(tokenizer)
    return shakespeare.load(tokenizer)
