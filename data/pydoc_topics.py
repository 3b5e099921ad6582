"""Python's language reference: half a megabyte of English that comes with Python."""

from data.dataset import Dataset, from_text
from lib.files import UserError


def load(kind: str | None) -> Dataset:
    """Return the texts that help() shows, in the order of their names."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError("this Python comes without pydoc_data") from None
    return from_text("pydoc", "\n".join(topics[name] for name in sorted(topics)), kind)
