"""The address of the Hugging Face hub and the user's token for it, as its own tools find them."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path


def hub_url() -> str:
    """Return the address of the Hugging Face hub, or of the mirror in HF_ENDPOINT."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def hub_auth(url: str) -> Callable | None:
    """Return a function that adds the user's token to a request, or None if it is not for the hub.

    The token is HF_TOKEN or that of `hf auth login`. Passed to requests as `auth`, it is not
    replaced by an entry of ~/.netrc, and is removed where a redirect leads to another host.
    """
    if not (url.startswith("https://") and url.startswith(f"{hub_url()}/")):
        return None
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    path = Path(os.environ.get("HF_TOKEN_PATH") or f"{home}/token").expanduser()
    token = os.environ.get("HF_TOKEN", "").strip()
    with contextlib.suppress(OSError):
        token = token or path.read_text().strip()

    def authorize(request):
        request.headers["Authorization"] = f"Bearer {token}"
        return request

    return authorize if token else None
