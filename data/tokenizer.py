"""Text to token ids and back. A tokenizer is stored in a checkpoint, as a plain dict.

Each has vocab_size; encode: str -> ids; decode_bytes: ids -> UTF-8; decode: ids -> str; start, the
ids to begin with where no text is given; end, the id after a document, or None; and state(), from
which from_state() makes it again.
"""

import os

import numpy as np


class DataError(Exception):
    """What is wrong with the data or the text, in one sentence for the person who gave it."""


class Tokenizer:
    vocab_size: int
    start: list[int]
    end: int | None = None

    def encode(self, text: str) -> np.ndarray:
        """uint8 or uint16 ids."""
        raise NotImplementedError

    def decode_bytes(self, ids) -> bytes:
        """The UTF-8 of the text; a single id may be a part of a character."""
        raise NotImplementedError

    def state(self) -> dict:
        """What from_state() makes it again of."""
        raise NotImplementedError

    def decode(self, ids) -> str:
        """The text; what is no UTF-8, as a character cut in half, becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")


class CharTokenizer(Tokenizer):
    """One id a character: its place in `chars`, a string of different ones, sorted."""

    def __init__(self, chars: str):
        if len(chars) > 1 << 16:
            raise DataError(
                f"{len(chars):,} different characters do not fit a token of 16 bits; "
                f"--tokenizer byte or gpt2 can take any text"
            )
        self.chars = chars
        self.vocab_size = len(chars)
        self.start = [max(0, chars.find("\n"))]

    def encode(self, text: str) -> np.ndarray:
        """Ids, one a character. Raises DataError that names a character it does not know."""
        code = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        known = np.array([ord(c) for c in self.chars], dtype=np.uint32)
        ids = np.searchsorted(known, code).clip(max=len(known) - 1)
        unknown = known[ids] != code
        if unknown.any():
            at = int(unknown.argmax())
            raise DataError(
                f"the character {text[at]!r} (number {at + 1} of the text) is not among the "
                f"{self.vocab_size} characters that this model was trained on"
            )
        return ids.astype(np.uint8 if self.vocab_size <= 256 else np.uint16)

    def decode_bytes(self, ids) -> bytes:
        return "".join(self.chars[i] for i in ids).encode()

    def state(self) -> dict:
        return {"kind": "char", "chars": self.chars}


class ByteTokenizer(Tokenizer):
    """One id a byte of the text's UTF-8: any text at all, and 256 ids."""

    vocab_size = 256
    start = [ord("\n")]  # noqa: RUF012

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8", "surrogateescape"), dtype=np.uint8)

    def decode_bytes(self, ids) -> bytes:
        return bytes(ids)

    def state(self) -> dict:
        return {"kind": "byte"}


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-pair encoding: 50,257 ids, the last of which ends a text.

    vocab_size is the next multiple of 64, for the speed of a GPU; the ids beyond are never trained
    on and stand for nothing. Raises DataError where tiktoken is not installed, or its vocabulary
    neither in the cache nor to be had.
    """

    vocab_size = 50_304
    end = 50_256  # <|endoftext|>, after each text
    start = [end]  # noqa: RUF012

    def __init__(self):
        try:
            import tiktoken
        except ImportError:
            raise DataError("GPT-2's tokens need tiktoken: pip install tiktoken") from None
        from data.download import cache_dir  # beside the data; tiktoken downloads it once

        os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(cache_dir() / "tiktoken"))
        try:
            self.encoding = tiktoken.get_encoding("gpt2")
        except Exception as error:  # of requests, the file system, its own checks
            raise DataError(
                f"cannot get the vocabulary of GPT-2, which tiktoken downloads: "
                f"{type(error).__name__}"
            ) from None

    def encode(self, text: str) -> np.ndarray:
        """uint16 ids of the text, in which <|endoftext|> is but these letters."""
        text = text.encode("utf-8", "replace").decode()  # half a surrogate pair is no text
        return self.encoding.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)

    def decode_bytes(self, ids) -> bytes:
        return self.encoding.decode_bytes([i for i in ids if i < self.encoding.n_vocab])

    def state(self) -> dict:
        return {"kind": "gpt2"}


def from_state(state: dict) -> Tokenizer:
    """The tokenizer whose state() this is. Raises DataError for a kind that it does not know."""
    if state["kind"] == "char":
        return CharTokenizer(state["chars"])
    if state["kind"] == "byte":
        return ByteTokenizer()
    if state["kind"] == "gpt2":
        return GPT2Tokenizer()
    raise DataError(f"a tokenizer of the unknown kind {state['kind']!r}; a newer version wrote it")
