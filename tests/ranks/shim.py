"""What stands between the hosted model and torch while it computes: asked on a rank of its own."""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, FunctionType, ModuleType
from typing import Any

import torch
import typing_extensions
from torch.overrides import TorchFunctionMode

from matformer.config.schema import RunConfig
from matformer.engine.step import optimizer_step
from matformer.hosts import megatron_on_cpu
from tests.made import mixed_documents, one_a_row, tiny_run
from tests.ranks.cases import hosted

SHIM = megatron_on_cpu.__file__
# Torch's own functions, and what its decorators leave of them.
TORCHS_OWN = (str(Path(torch.__file__).parent), sysconfig.get_path("stdlib"), typing_extensions.__file__, "<")


def replaced(home: ModuleType | type) -> set[str]:
    """Python functions under a name of torch's whose code is not torch's."""
    found = {name: value for name, value in vars(home).items() if isinstance(value, FunctionType)}
    return {name for name, value in found.items() if not value.__code__.co_filename.startswith(TORCHS_OWN)}


class Watch:
    """Counts modes and entered frames of the shim, inside the trunk's forward and outside of it."""

    def __init__(self, trunk: torch.nn.Module) -> None:
        self.inside, self.frames, self.modes, self.layers = False, {True: 0, False: 0}, 0, 0
        trunk.register_forward_pre_hook(lambda *_: self._enter(True))
        trunk.register_forward_hook(lambda *_: self._enter(False))
        for module in trunk.modules():
            module.register_forward_pre_hook(lambda *_: self._look())

    def _enter(self, inside: bool) -> None:
        self.inside = inside

    def _look(self) -> None:
        self.layers += 1
        self.modes = max(self.modes, torch._C._len_torch_function_stack() + torch._C._len_torch_dispatch_stack())

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        self.frames[self.inside] += event == "call" and frame.f_code.co_filename == SHIM


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Inside, every Python call is seen; backward on a CPU runs in the caller's thread, so its calls too."""
    sys.setprofile(watch)
    try:
        yield
    finally:
        sys.setprofile(None)


class Planted(TorchFunctionMode):
    """What the shim is not: a mode on every torch call."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def seen_in_a_step(config: RunConfig | None = None, *, planted: bool = False) -> dict[str, Any]:
    """Of one training step over two microbatches: modules that ran, modes, frames of the shim, names replaced."""
    config = config or tiny_run(train={"global_batch": 4})
    documents = mixed_documents()
    batches = [one_a_row(documents[:2]), one_a_row(documents[2:4])]
    with hosted(config) as host:
        watch = Watch(host.trunks[0])
        with watched(watch), Planted() if planted else torch.enable_grad():
            optimizer_step(host, batches, config=config, step=0)
        homes = {"torch": torch, "functional": torch.nn.functional, "Tensor": torch.Tensor, "cuda": torch.cuda}
        others = [
            name
            for name, module in sys.modules.items()
            if name.startswith("megatron.") and vars(module).get("torch", torch) is not torch
        ]
        return {
            "modules": watch.layers,
            "modes": watch.modes,
            "shim in the forward": watch.frames[True],
            "shim elsewhere": watch.frames[False],
            "modules with another torch": others,
            **{name: sorted(replaced(home)) for name, home in homes.items()},
        }


def seen_with_a_mode() -> dict[str, Any]:
    """The control."""
    return seen_in_a_step(planted=True)
