"""Let a trained DenseFormer write.

python sample.py
python sample.py --start "ROMEO:" --num_samples 3 --temperature 0.7
python sample.py --start FILE:prompt.txt --top_k 40 --max_new_tokens 1000
"""

import codecs
import signal
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C ends it at once, also while torch is imported
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch

from common import CheckpointError, Parser, find_device, flag, load_model, start
from data.tokenizer import DataError


@dataclass
class SampleConfig:
    out_dir: str = flag("out", "folder of the run")
    checkpoint: str = flag("best", "best or last", choices=("best", "last"))
    start: str | None = flag(None, "text to continue, or FILE:path (default: none)", type=str)
    num_samples: int = flag(1, "how many texts", low=1)
    max_new_tokens: int = flag(500, "length of each, in tokens", low=1)
    temperature: float = flag(0.8, "0 takes the likeliest token, 1 samples as learned", low=0.0)
    top_k: int | None = flag(None, "choose among this many likeliest tokens only", low=1, type=int)
    top_p: float | None = flag(
        None, "choose among the fewest tokens of this probability in sum", type=float
    )
    seed: int = flag(1337, "the same seed, the same text", low=0)
    device: str = flag("auto", "cuda, mps, cpu; auto takes the first of them that is here")


def read_prompt(start, tokenizer):
    """The text that --start gives, and its ids, (1, T)."""
    if start is None:
        return "", torch.tensor([tokenizer.start])
    text = start
    if text.startswith("FILE:"):
        path = Path(text.removeprefix("FILE:"))
        try:
            text = path.read_bytes().decode()
        except UnicodeDecodeError:
            raise DataError(f"--start: {path} is not UTF-8 text") from None
        except OSError as error:
            raise DataError(f"--start: cannot read {path}: {error.strerror}") from None
    if not text:
        raise DataError("--start is empty: give at least one character, or leave it out")
    return text, torch.tensor([tokenizer.encode(text).tolist()])


def main(argv=None):
    parser = Parser(SampleConfig, __doc__)
    config = SampleConfig(**parser.given(argv))
    if config.top_p is not None and not 0 < config.top_p <= 1:
        parser.error(f"--top_p must be above 0 and at most 1, not {config.top_p}")
    try:
        device = find_device(config.device)
    except ValueError as error:
        parser.error(str(error))
    out_dir = Path(config.out_dir)
    if not out_dir.is_dir():
        raise CheckpointError(f"there is no folder {out_dir}: python train.py makes one")
    model, tokenizer, _ = load_model(out_dir / f"{config.checkpoint}.pt", device)
    text, prompt = read_prompt(config.start, tokenizer)
    for number in range(config.num_samples):
        if config.num_samples > 1:
            print(f"{'' if number == 0 else chr(10)}--- sample {number + 1} ---")
        print(text, end="", flush=True)
        # Sample n depends on the seed and n alone, not on how many come before it.
        generator = torch.Generator(device).manual_seed(config.seed + number)
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
    start(main)
