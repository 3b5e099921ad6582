"""Text to token ids and back. A tokenizer is stored whole in a checkpoint, as a plain dict."""

import numpy as np


class DataError(Exception):
    """What is wrong with the data or the text, in one sentence for the person who gave it."""


class CharTokenizer:
    """One id a character: its place in `chars`, a string of at most 256 different ones, sorted."""

    def __init__(self, chars: str):
        self.chars = chars
        self.vocab_size = len(chars)
        self.prompt = "\n" if "\n" in chars else chars[:1]  # to start from where nothing is given

    def encode(self, text: str) -> np.ndarray:
        """uint8 ids, one a character. Raises DataError that names a character it does not know."""
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
        return ids.astype(np.uint8)

    def decode(self, ids) -> str:
        return "".join(self.chars[i] for i in ids)

    def state(self) -> dict:
        return {"kind": "char", "chars": self.chars}


class ByteTokenizer:
    """One id a byte of the text's UTF-8: any text at all, and 256 ids."""

    vocab_size = 256
    prompt = "\n"

    def encode(self, text: str) -> np.ndarray:
        """uint8 ids, one a byte."""
        return np.frombuffer(text.encode("utf-8", "surrogateescape"), dtype=np.uint8)

    def decode(self, ids) -> str:
        """The text; what is no UTF-8, as a character cut in half, becomes U+FFFD."""
        return bytes(ids).decode("utf-8", "replace")

    def state(self) -> dict:
        return {"kind": "byte"}


Tokenizer = CharTokenizer | ByteTokenizer


def from_state(state: dict) -> Tokenizer:
    """The tokenizer whose state() this is. Raises DataError for a kind that it does not know."""
    if state["kind"] == "char":
        return CharTokenizer(state["chars"])
    if state["kind"] == "byte":
        return ByteTokenizer()
    raise DataError(f"a tokenizer of the unknown kind {state['kind']!r}; a newer version wrote it")
