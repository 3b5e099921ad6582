"""Several processes, one for each GPU, as torchrun starts them. Without it there is one, rank 0."""

import contextlib
import gc
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch

# DDP imports this too, but later. Its functions then have the process group as default arguments
# and keep its threads alive until the interpreter exits, which can abort the process.
import torch.distributed.nn
from torch import distributed

from lib.files import UserError
from lib.flags import UsageError

RANK = int(os.environ.get("RANK", 0))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1

# How long to wait for the other processes: until they have started, while rank 0 prepares the data,
# and in training, where rank 0 may save a large checkpoint. One that has ended is noticed at once.
START, PREPARE, TRAIN = timedelta(minutes=2), timedelta(days=1), timedelta(minutes=30)

store: distributed.Store  # of the process group: keys and values that all processes share


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Join the process group at the beginning and leave it at the end, however it ends.

    If one process fails, the others lose their connections to it and end too, silently: only the
    first error is reported. Raises UserError if the others do not start.
    """
    if WORLD_SIZE == 1:
        yield
        return
    join()
    leave = True
    try:
        yield
        distributed.barrier()  # rank 0 may still be saving
    except BaseException as error:
        # NCCL would wait for the other processes, which wait for this one
        leave = not torch.cuda.is_available()
        # The traceback keeps the DDP model, which must be freed before its process group.
        chain: BaseException | None = error
        while chain:
            traceback.clear_frames(chain.__traceback__)
            chain = chain.__context__
        if isinstance(error, Exception):
            report_once(error)
        raise
    finally:
        gc.collect()
        if leave:
            distributed.destroy_process_group()


def report_once(error: Exception):
    """Raise SystemExit if another process has already reported an error."""
    lost = isinstance(error, distributed.DistError) or "gloo" in str(error)
    try:
        is_first = store.add("errors", 1) == 1
    except distributed.DistError:  # the process of the store has ended, and said why
        is_first = not lost
    if not is_first:
        raise SystemExit(2 if isinstance(error, UsageError) else 1) from None
    if lost:
        reason = str(error).splitlines()[0]
        raise UserError(f"lost the connection to another process: {reason}") from None


def join():
    """Wait until all processes have started, and join their process group."""
    global store
    if torch.cuda.device_count() > LOCAL_RANK:
        torch.cuda.set_device(LOCAL_RANK)
    try:
        store, *_ = next(distributed.rendezvous("env://", timeout=START))
        store.set(f"rank {RANK}", "")
        store.wait([f"rank {rank}" for rank in range(WORLD_SIZE)])
    except (distributed.DistError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"rank {RANK}: {WORLD_SIZE} processes have not met: {reason}") from None
    has_nccl = torch.cuda.is_available() and distributed.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if has_nccl else "gloo"
    distributed.init_process_group(
        backend, store=store, rank=RANK, world_size=WORLD_SIZE, timeout=TRAIN
    )


def send(name: str, value: Any):
    """Give the others a value that JSON can represent; they wait for it in receive(name)."""
    if WORLD_SIZE > 1:
        store.set(name, json.dumps(value))


def receive(name: str) -> Any:
    store.wait([name], PREPARE)
    return json.loads(store.get(name))


def all_reduce(number: float, op=distributed.ReduceOp.SUM) -> float:
    """Return the sum, or another reduction, of a number over all processes."""
    if WORLD_SIZE == 1:
        return number
    result = torch.tensor(number, dtype=torch.float64)
    distributed.all_reduce(result, op)
    return result.item()


class StopSignals:
    """In a `with` block, Ctrl-C and SIGTERM only ask the loop to save and stop.

    A second signal ends the program at once, but is ignored within 3 seconds of the first: a
    scheduler may signal torchrun and its workers, and torchrun then signals the workers again.
    """

    def __enter__(self):
        self.received, self.time = 0, 0.0
        self.previous = {n: signal.signal(n, self.handle) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def handle(self, number, frame):
        if not self.received:
            self.received, self.time = int(number), time.monotonic()
            if number == signal.SIGINT and RANK == 0:  # not print, which may just be at work
                os.write(2, b"\nsaving after this step; Ctrl-C after 3 seconds ends at once\n")
        elif time.monotonic() - self.time > 3:
            sys.exit(128 + number)

    def any(self) -> int:
        """Return the number of a signal that any process has received, or 0."""
        return int(all_reduce(self.received, distributed.ReduceOp.MAX))
