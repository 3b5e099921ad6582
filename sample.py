"""Sample text from a trained DenseFormer.

python sample.py
python sample.py --start "ROMEO:" --num_samples 3 --temperature 0.7
python sample.py --start FILE:prompt.txt --top_k 40 --max_new_tokens 1000
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is imported: no traceback

import codecs
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from lib.checkpoint import load_model
from lib.device import find_device
from lib.files import UserError
from lib.flags import UsageError, flag, parse_flags, path, run_cli
from lib.graphs import speed_up_decoding


@dataclass
class SampleConfig:
    out_dir: str = flag("out", "folder of the run", read=path)
    checkpoint: str = flag("best", "which checkpoint of the run", choices=("best", "last"))
    start: str | None = flag(None, "prompt, or FILE:path of a text file (default: none)")
    num_samples: int = flag(1, "number of samples", low=1)
    max_new_tokens: int = flag(500, "tokens to generate per sample", low=1)
    temperature: float = flag(0.8, "0: the most likely token; 1: the model's distribution", low=0.0)
    top_k: int | None = flag(None, "sample only from this many most likely tokens", low=1)
    top_p: float | None = flag(
        None, "sample only from the smallest set of tokens that has this probability"
    )
    seed: int = flag(1337, "the same seed gives the same text", low=0, below=2**63)
    device: str = flag("auto", "cpu, cuda, cuda:1, mps...; auto prefers cuda, then mps")


def read_prompt(start, tokenizer):
    """Return the text of --start and its token ids, (1, T)."""
    if start is None:
        return "", torch.tensor([tokenizer.start])
    text = start
    if start.startswith("FILE:"):
        file = Path(path(start.removeprefix("FILE:")))
        try:
            text = file.read_text(encoding="utf-8-sig")  # without a byte-order mark
        except UnicodeDecodeError:
            raise UserError(f"--start: {file} is not UTF-8 text") from None
        if not text:
            raise UserError(f"--start: {file} is empty")
    return text, torch.tensor([tokenizer.encode(text).tolist()])


def main(argv=None):
    config = SampleConfig(**parse_flags(SampleConfig, argv, __doc__))
    if config.top_p is not None and not 0 < config.top_p <= 1:
        raise UsageError(f"--top_p must be above 0 and at most 1, not {config.top_p}")
    device = find_device(config.device)
    file = Path(config.out_dir) / f"{config.checkpoint}.pt"
    model, tokenizer, checkpoint = load_model(file, device)
    if checkpoint["step"] == 0:
        print(f"sample.py: {config.checkpoint}.pt is from step 0, before training", file=sys.stderr)
    speed_up_decoding(model)
    text, prompt = read_prompt(config.start, tokenizer)
    for n in range(config.num_samples):
        if n > 0:
            print()
        if config.num_samples > 1:
            print(f"--- sample {n + 1} ---")
        print(text, end="", flush=True)
        # Each sample has its own seed, so it does not depend on how many precede it.
        generator = torch.Generator().manual_seed(config.seed + n)
        tokens = model.stream(
            prompt.to(device), config.max_new_tokens,
            config.temperature, config.top_k, config.top_p, generator,
        )  # fmt: skip
        # A token may end in the middle of a character; the decoder waits for the rest of it.
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in tokens:
            print(decoder.decode(tokenizer.decode_bytes([token.item()])), end="", flush=True)
        print(decoder.decode(b"", final=True))


if __name__ == "__main__":
    run_cli(main)
