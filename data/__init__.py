"""What a model is trained on: token ids to train and to validate with, and their tokenizer.

    dataset = data.load("shakespeare", block_size=128)
    dataset.train, dataset.val      1-D arrays of token ids, memory-mapped where they are large
    dataset.tokenizer               encode: str -> ids, decode: ids -> str, vocab_size, state()

A data set is a file here with a function that makes a Dataset, and a line in DATASETS.
"""

import difflib
from collections.abc import Callable
from pathlib import Path

from data import openwebtext, pydoc_topics, shakespeare, textfile
from data.dataset import DataError, Dataset

# {name: function of the tokenizer's name, or None, and the number of shards}
DATASETS: dict[str, Callable[[str | None, int], Dataset]] = {
    "shakespeare": lambda kind, n_shards: shakespeare.load(kind),  # 1.1 MB, downloaded
    "pydoc": lambda kind, n_shards: pydoc_topics.load(kind),  # 0.5 MB, part of Python
    "openwebtext": openwebtext.load,  # 80 shards of 300 MB, downloaded
}

# How long to wait for a network before a run that named no data set goes on without one.
PATIENCE = 12.0  # seconds


def load(
    name: str | None, block_size: int, tokenizer: str | None = None, n_shards: int = 1
) -> Dataset:
    """The data set of that name in DATASETS, or of the text at that path.

    None is Tiny Shakespeare, or pydoc where that cannot be downloaded, which it says in a line.
    tokenizer is char, byte, gpt2, or None: what suits the text. n_shards is of openwebtext. Raises
    DataError, with one sentence, for an unknown name, a file that is no UTF-8 text, a failed
    download, or data too short for one window of block_size tokens and the next token.
    """
    if name is None:
        try:
            dataset = shakespeare.load(tokenizer, deadline=PATIENCE)
        except DataError as error:
            dataset = pydoc_topics.load(tokenizer)
            print(
                f"TINY SHAKESPEARE IS OUT OF REACH ({error}): TRAINING ON PYTHON'S LANGUAGE "
                f"REFERENCE INSTEAD. To insist, --dataset shakespeare; or --dataset YOUR.txt",
                flush=True,
            )
    elif name in DATASETS:
        dataset = DATASETS[name](tokenizer, n_shards)
    elif Path(name).exists():
        dataset = textfile.load(Path(name), tokenizer)
    else:
        near = difflib.get_close_matches(name, DATASETS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the data sets are {', '.join(DATASETS)}."
        raise DataError(f"there is no data set and no file {name!r}; {hint}")
    for split in ("train", "val"):
        tokens = len(getattr(dataset, split))
        if tokens <= block_size:
            raise DataError(
                f"{dataset.name} is too short: its {split} split has {tokens} tokens, and a "
                f"block_size of {block_size} needs at least {block_size + 1}"
            )
    return dataset
