"""Device and dtype: what this machine has, by the names of the flags."""

import platform
import re
from pathlib import Path

import torch

from lib.flags import UsageError


def find_device(name: str) -> torch.device:
    """Return the device of that name; "auto" is the first available of cuda, mps and cpu.

    Raises UsageError for a device that does not work here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UsageError(f"--device {name} is not available on this machine") from None
    return device


def find_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of that name; "auto" is bfloat16 where the hardware multiplies bfloat16
    matrices natively, and float32 elsewhere."""
    if name != "auto":
        return getattr(torch, name)
    native = False
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # torch 2.10
        features = torch.cpu.get_capabilities()
        native = bool(features.get("avx512_bf16") or features.get("amx_bf16"))
    return torch.bfloat16 if native else torch.float32


def keep_freed_memory():
    """Let this process reuse the blocks of up to 31 MiB that it frees.

    By default glibc, the C library of Linux, returns them to the system, and each step of training
    on a CPU gets its activations anew, in pages of 4 kB that the system fills with zeros. It stops
    for blocks no larger than one that was freed before. (With mallopt it would stop for larger
    ones, too, but there the heap can grow with every step: aligned blocks of many pages fragment.)
    """
    torch.empty(31 << 20, dtype=torch.uint8)


# Dense bfloat16 FLOPs per second, from data sheets; the first matching name is used.
PEAK_FLOPS = {
    "B200": 2250e12, "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12,
    "L40S": 362e12, "L40": 181e12, "L4": 121e12, "A10": 125e12, "RTX 5090": 209e12,
    "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip


def peak_flops(device: torch.device) -> float | None:
    """Return the peak FLOPs per second of a GPU in PEAK_FLOPS, else None."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for gpu, peak in PEAK_FLOPS.items() if re.search(rf"\b{gpu}\b", name)), None)


def describe_machine(device: torch.device) -> str:
    """Return the name of the GPU or processor, and torch's version."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}; torch {torch.__version__}"
    name = platform.processor() or platform.machine()
    if (file := Path("/proc/cpuinfo")).exists():
        lines = file.read_text().splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} threads; torch {torch.__version__}"
