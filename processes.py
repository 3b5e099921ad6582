"""The processes of a run: ranks that torchrun starts, the lock of a folder, and signals.

Without torchrun there is one process, of rank 0, and nothing here communicates.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from data.errors import UserError


def init_processes() -> int | None:
    """Join the other processes of torchrun. Return the index of this one's GPU, if it has one."""
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return None
    local_rank = int(os.environ["LOCAL_RANK"])
    if not (torch.cuda.is_available() and distributed.is_nccl_available()):
        distributed.init_process_group("gloo")
        return None
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"torchrun started more processes than the {torch.cuda.device_count()} GPUs"
        )
    torch.cuda.set_device(local_rank)
    distributed.init_process_group("cpu:gloo,cuda:nccl")
    return local_rank


def end_processes():
    """Wait for all ranks, for instance until rank 0 has saved, and leave the process group."""
    if distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


def get_rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def get_world_size() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def from_rank_0(function: Callable, *args):
    """Return function(*args) of rank 0 on every rank. The others wait, and exit if it fails."""
    if not distributed.is_initialized():
        return function(*args)
    # A group of its own, because a download takes longer than the default half an hour.
    group = distributed.new_group(backend="gloo", timeout=timedelta(days=7))
    box: list[Any] = [None, 1]  # the result, or the exit status
    try:
        if get_rank() == 0:
            box = [function(*args), None]
    except SystemExit as error:  # --help
        box[1] = error.code
    finally:
        distributed.broadcast_object_list(box, 0, group=group)
    result, status = box
    if status == 0:
        end_processes()
    if status is not None:
        sys.exit(status)
    return result


def all_reduce(number, op=distributed.ReduceOp.SUM):
    """Return the sum of the ranks' numbers, or another reduction."""
    if not distributed.is_initialized():
        return number
    result = torch.tensor(number, dtype=torch.int64 if isinstance(number, int) else torch.float64)
    distributed.all_reduce(result, op)
    return result.item()


def wrap_ddp(model, device: torch.device):
    """Return the model with gradients averaged over the ranks."""
    if not distributed.is_initialized():
        return model
    # Some sparse patterns skip a whole block: nothing reads its output.
    rows = model.dwa.rows
    read = set().union(*rows)
    unread = any(row and i not in read for i, row in enumerate(rows, start=1))
    return DistributedDataParallel(
        model, gradient_as_bucket_view=True, find_unused_parameters=unread
    )


def say(text: str):
    """Print on rank 0. A reader that has gone, as after `| head`, does not end the training."""
    if get_rank() == 0:
        with contextlib.suppress(OSError):
            print(text, flush=True)


def lock_folder(lock: FileLock):
    """Make the lock's folder, and keep other runs out of it until the lock is released."""
    folder = Path(lock.lock_file).parent
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"another run is training in {folder}: wait for it, or use another --out_dir"
        ) from None


class StopSignals:
    """Between install() and restore(), SIGINT and SIGTERM only set `received`, to save and stop.

    A second signal of the same kind ends the program at once, but not within seconds of the first:
    a scheduler signals torchrun and its workers, and then torchrun signals the workers as well.
    """

    def __init__(self):
        self.received, self.time, self.handlers = 0, 0.0, {}

    def install(self):
        if threading.current_thread() is threading.main_thread():  # no other thread may do this
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers[number] = signal.signal(number, self.handle)

    def restore(self):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}

    def handle(self, number, frame):
        if not self.received:
            self.received, self.time = int(number), time.monotonic()
        elif number == self.received and time.monotonic() - self.time > 3:
            sys.exit(128 + number)
