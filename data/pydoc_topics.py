"""Python's own language reference, half a megabyte of English that is wherever Python is."""

from data.dataset import DataError, Dataset, from_text


def load(kind: str | None) -> Dataset:
    """The texts that help() shows, in the order of their names."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DataError("this Python comes without pydoc_data, so there is no text here") from None
    return from_text("pydoc", "\n".join(topics[name] for name in sorted(topics)), kind)
