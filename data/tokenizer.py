"""Text to token ids and back. A checkpoint stores a tokenizer as a plain dict."""

import os
from typing import Protocol

import numpy as np

from data.cache import cache_dir, import_extra, innermost
from lib.files import UserError


class Tokenizer(Protocol):
    vocab_size: int
    start: list[int]  # the ids to begin with if there is no prompt
    end: int | None  # the id after each document

    def encode(self, text: str) -> np.ndarray: ...  # uint8 or uint16 ids
    def decode_bytes(self, ids) -> bytes: ...  # UTF-8; an id may be a part of a character
    def state(self) -> dict: ...  # for from_state()

    def decode(self, ids) -> str:
        """Return a text, with U+FFFD in place of incomplete characters."""
        return self.decode_bytes(ids).decode("utf-8", "replace")


class CharTokenizer(Tokenizer):
    """One id per character: its position in `chars`, a sorted string without repetitions."""

    end = None

    def __init__(self, chars: str):
        self.chars, self.vocab_size = chars, len(chars)
        self.codes = np.array([ord(c) for c in chars], dtype=np.uint32)
        self.start = [max(0, chars.find("\n"))]

    def encode(self, text: str) -> np.ndarray:
        """Return one id per character. Raises UserError that names an unknown character."""
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        ids = np.searchsorted(self.codes, codes).clip(max=self.vocab_size - 1)
        unknown = np.flatnonzero(self.codes[ids] != codes)
        if len(unknown):
            raise UserError(
                f"the character {text[unknown[0]]!r} is not among the {self.vocab_size} "
                f"characters that this model was trained on"
            )
        return ids.astype(np.uint8 if self.vocab_size <= 256 else np.uint16)

    def decode_bytes(self, ids) -> bytes:
        return "".join(self.chars[i] for i in ids).encode()

    def state(self) -> dict:
        return {"kind": "char", "chars": self.chars}


class ByteTokenizer(Tokenizer):
    """One id per byte of the text's UTF-8: 256 ids for any text."""

    vocab_size = 256
    start = [ord("\n")]  # noqa: RUF012
    end = None

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8", "surrogateescape"), dtype=np.uint8)

    def decode_bytes(self, ids) -> bytes:
        return bytes(ids)

    def state(self) -> dict:
        return {"kind": "byte"}


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-pair encoding: 50,257 ids, of which the last follows each document.

    vocab_size is the next multiple of 64, which a GPU multiplies faster; ids above 50,256 never
    occur. Raises UserError if tiktoken is missing, or the vocabulary cannot be downloaded.
    """

    vocab_size = 50_304
    end = 50_256  # <|endoftext|>
    start = [end]  # noqa: RUF012

    def __init__(self):
        tiktoken = import_extra("tiktoken")
        # tiktoken downloads the vocabulary once, into this folder
        folder = os.environ.get("TIKTOKEN_CACHE_DIR") or str(cache_dir() / "tiktoken")
        os.environ["TIKTOKEN_CACHE_DIR"] = folder
        try:
            self.encoding = tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as error:
            raise UserError(f"cannot get GPT-2's vocabulary: {innermost(error)}") from None

    def encode(self, text: str) -> np.ndarray:
        """Return uint16 ids; <|endoftext|> in the text is encoded as ordinary text."""
        text = text.encode("utf-8", "replace").decode()  # replaces half surrogate pairs
        return self.encoding.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)

    def decode_bytes(self, ids) -> bytes:
        return self.encoding.decode_bytes([i for i in ids if i < self.encoding.n_vocab])

    def state(self) -> dict:
        return {"kind": "gpt2"}


Choice = Tokenizer | str | None  # a tokenizer, its name, or None to choose by the text


def make_tokenizer(choice: Choice, chars: set[str]) -> Tokenizer:
    """Return the chosen tokenizer for a text with these characters.

    None stands for char if there are at most 256 different characters, and for byte otherwise.
    """
    choice = choice or ("char" if len(chars) <= 256 else "byte")
    if isinstance(choice, str):
        return from_state({"kind": choice, "chars": "".join(sorted(chars))})
    return choice


def from_state(state: dict) -> Tokenizer:
    """Return the tokenizer with this state()."""
    if state["kind"] == "char":
        return CharTokenizer(state["chars"])
    return {"byte": ByteTokenizer, "gpt2": GPT2Tokenizer}[state["kind"]]()
