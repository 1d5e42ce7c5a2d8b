"""The one place that lets megatron-core run on CPU ranks. Nothing else patches a host.

megatron-core 0.16 asks CUDA for a device, for random states and for three zeros named "cuda". Each is answered by
name here, once, in the modules that ask: no mode sits on the torch calls of a forward.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class TorchOnCpu:
    """What `schedules` sees as `torch`: the same, but tensors made for "cuda" are made for the CPU."""

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - stands for a whole module
        return getattr(torch, name)

    def zeros(self, *size: Any, device: object = None, **options: Any) -> torch.Tensor:  # noqa: ANN401
        return torch.zeros(*size, device="cpu" if device == "cuda" else device, **options)  # pyright: ignore


@contextmanager
def importing_megatron() -> Iterator[None]:
    """Inside, megatron-core is imported without its warnings, and without torch's compiler where there is no CUDA.

    megatron-core compiles its small fusions where it defines them, which imports inductor (a third of a start's time);
    on a CPU nobody here calls them.
    """
    compiler = torch.compile
    if not torch.cuda.is_available():
        torch.compile = _as_it_is  # pyright: ignore
    try:
        with warnings.catch_warnings():  # of optional kernels that this host does not use
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.compile = compiler


def _as_it_is(function: Callable[..., Any] | None = None, **_: object) -> Any:  # noqa: ANN401 - any callable
    """torch.compile that compiles nothing."""
    return _as_it_is if function is None else function


def host_megatron_on_cpu() -> None:
    """Answer megatron-core's questions to CUDA for the CPU. Does nothing where CUDA is there, or the second time."""
    if torch.cuda.is_available() or torch.cuda.current_device is _current_device:
        return
    torch.cuda.current_device = _current_device  # pyright: ignore
    torch.cuda.synchronize = _nothing
    torch.cuda.get_rng_state = _rng_state
    torch.cuda.set_rng_state = _set_rng_state
    torch.cuda.manual_seed = torch.manual_seed  # pyright: ignore
    torch.cuda.default_generators = (torch.default_generator,)
    with importing_megatron():
        import megatron.core.tensor_parallel.random as megatron_random
        from megatron.core.pipeline_parallel import schedules
    megatron_random._get_cuda_rng_state = _rng_state
    megatron_random._set_cuda_rng_state = _set_rng_state
    schedules.torch = TorchOnCpu()  # pyright: ignore


def _current_device() -> torch.device:
    return torch.device("cpu")


def _nothing(*_: object, **__: object) -> None:
    """Work on a CPU is done when the call returns."""


def _rng_state(*_: object, **__: object) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, *_: object, **__: object) -> None:
    torch.set_rng_state(state)
