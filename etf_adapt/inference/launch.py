"""Threads and processes of a run, and requests to a launcher that are not met."""

from __future__ import annotations

import ctypes
import math
import multiprocessing
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

Value = TypeVar("Value")

MAX_WORKERS = 8
MIN_PASS_BYTES = 2**30  # of pixels: reading less takes no longer than starting processes
SHARED_MEMORY = Path("/dev/shm")  # in which processes hand over batches; containers often have 64 MB of it
_BATCHES_ON_THE_WAY = 2  # of each process

_MALLOC_OPTIONS = {-4: 0, -1: -1}  # of malloc.h: M_MMAP_MAX none, M_TRIM_THRESHOLD without end


def set_threads(threads: int | None = None) -> int:
    """Set the CPU threads of this process, and return them; by default a launcher's processes share the usable cores."""
    # `accelerate launch` and `torchrun` set OMP_NUM_THREADS=1, by which two cores would run as one.
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if threads is None and launched:
        threads = usable_cores()
    if threads is not None and threads != torch.get_num_threads():
        torch.set_num_threads(threads)
    return torch.get_num_threads()


def usable_cores() -> int:
    """Return the cores that this process may use, at least one: under a launcher its share of them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // _processes_here())


def _processes_here() -> int:
    """Return how many processes a launcher has started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def choose_num_workers(num_rows: int, row_bytes: int, batch_size: int, device: torch.device) -> int:
    """Return how many processes read images: beside a GPU some, for long passes; steps on a CPU use all cores."""
    method = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    # Other methods pickle what is read and the collator, which not all of them bear.
    if device.type in ("cpu", "mps") or method != "fork" or num_rows * row_bytes < MIN_PASS_BYTES:
        return 0
    room = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else math.inf
    held = 2 * _BATCHES_ON_THE_WAY * batch_size * row_bytes  # twice, as a pass may begin before another is gone
    return int(min(MAX_WORKERS, usable_cores() - 1, room // (held * _processes_here())))


def join_processes() -> bool:
    """Let the processes of a launcher know of each other; return whether this is the first."""
    # Processes started on a machine without a device join only if told so (accelerate 1.15).
    return PartialState(cpu=not torch.accelerator.is_available()).is_main_process


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory for the next batch; return whether the C library is glibc."""
    # Not for texts, whose batches differ in size: that of the longest text takes many times what the others do.
    # On CPUs glibc otherwise maps the large tensors of each operation anew, and the system clears their pages. Results are the
    # same; the peak of memory is held until it is given back. Seconds of a whole run with it 23, without 27, of CPU and of the
    # clock alike (medians of five alternating pairs, one thread of two x86 cores, seed 0, 2026-11-28): recipes/finetune.py
    # --model mobilenetv2_100.timm --dataset bccd_cells --image_size 64 --max_train_rows 800 --num_train_epochs 1
    # --torch_threads 1 --evaluate_test false
    try:
        libc = ctypes.CDLL("libc.so.6")
        return all(libc.mallopt(option, value) == 1 for option, value in _MALLOC_OPTIONS.items())
    except (OSError, AttributeError):  # another system, or another C library
        return False


def give_back_memory() -> None:
    """Give the system what ``keep_freed_memory`` has kept; what follows a training then adds nothing to its peak."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def first_process_decides(decide: Callable[[], Value]) -> Value:
    """Return on all processes what the first one finds, or raise its error on all: none waits for one that failed."""
    found: list[Any] = [None]
    if PartialState().is_main_process:
        try:
            found = [decide()]
        except Exception as error:
            found = [error]
    (value,) = broadcast_object_list(found)
    if isinstance(value, Exception):
        raise value
    return cast(Value, value)


def unmet_requests(distributed_type: str) -> list[str]:
    """Return a warning for each request to a launcher that what Accelerate does (its ``DistributedType``) does not meet."""
    # `accelerate launch --cpu --num_processes 2` starts one process without a word; it leaves MASTER_ADDR behind, which it sets
    # for more than one only. FSDP and DeepSpeed are passed over on CPUs (accelerate 1.15).
    warnings = []
    if {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= set(os.environ) and PartialState().num_processes == 1:
        warnings.append(
            "WARNING: several processes were asked for, but one runs: start them with `torchrun --nproc_per_node <n>` or "
            "`accelerate launch --multi_gpu --num_processes <n>`, which start them on CPUs too."
        )
    for kind in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{kind}", "").lower() == "true" and distributed_type != kind:
            warnings.append(f"WARNING: {kind} was asked for, but Accelerate runs {distributed_type} on this machine.")
    return warnings
