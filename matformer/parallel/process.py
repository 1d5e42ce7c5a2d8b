"""What a process asks of its machine before it computes: threads, and memory that stays with it."""

from __future__ import annotations

import ctypes
import os
import platform

import torch

# Names and numbers of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
NEVER = 2**31 - 1


def settle(threads: int = 0) -> None:
    """Take `threads`, or (0) what OpenMP was told or finds; without a GPU also keep freed memory."""
    if threads:
        torch.set_num_threads(threads)
    if not torch.cuda.is_available():
        keep_freed_memory()


def share_of_cores(processes: int) -> int:
    """Cores for each of so many processes of this machine, at least one."""
    return max(1, len(os.sched_getaffinity(0)) // processes)


def keep_freed_memory() -> None:
    """Ask glibc to hand freed tensors out again, not back to the kernel. Does nothing with another C library.

    By default each tensor of some MB is mapped anew and its pages are cleared on first touch, which costs more than
    the operation that fills it: a fifth of the demo's step, nearly all of it in ZeRO's flat gradients.
    """
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_MAX, 0)
        library.mallopt(M_TRIM_THRESHOLD, NEVER)
