"""A GPU that is not there: its tensors have shapes and no numbers, and refuse what CUDA and NCCL refuse.

Torch's FakeTensor knows the rules of devices; tensors of the CPU stay real. Beyond its rules: a number of the CPU may
stand beside tensors of the device in pointwise operations alone (not in AdamW's fused one), and a collective takes the
device's tensors alone. What is read back is zero. A world has any size: its collectives end at once.
Not shown: numbers, kernels, their limits, order of streams, and modules that are built on the CPU and moved.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

import matformer.engine.step as step_room
from matformer.config.schema import RunConfig
from matformer.engine.average import Average
from matformer.engine.document_sums import document_sums, gather_documents
from matformer.engine.gradients import gradient_row
from matformer.engine.loop import build_stages
from matformer.engine.step import optimizer_step
from matformer.hosts import deepspeed as zero
from matformer.hosts.hosted import MegatronHost
from matformer.layers.block_attention import BlockCore
from matformer.parcels import Batch
from tests.made import plain_host

KIND = "gpu"
aten = torch.ops.aten


@functools.cache
def device() -> torch.device:
    """The only one. Torch knows the name once `pretend` has given it."""
    return torch.device(KIND, 0)


class Pretended(FakeTensorMode):
    """Inside, tensors of the device are fake."""

    avoid_device_init = True  # pyright: ignore - torch's is a property

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        fakes = [one for one in tensors if isinstance(one, FakeTensor)]
        asked = kwargs.get("device")
        target = torch.device(asked).type if asked is not None else None
        if func.namespace == "c10d":
            return _collective(func, args, kwargs, tensors)
        if not fakes and target != KIND:
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            return torch.zeros((), dtype=fakes[0].dtype).item()
        if func is aten._to_copy.default:
            one = args[0]
            if target == "cpu":
                return torch.zeros(one.shape, dtype=kwargs.get("dtype") or one.dtype)
            args = (one if fakes else FakeTensor(self, one.to("meta"), torch.device("cpu")),)
        elif func is aten.copy_.default:
            torch.broadcast_shapes(args[0].shape, args[1].shape)
            return args[0] if isinstance(args[0], FakeTensor) else args[0].zero_()
        else:
            _refuse_a_mixture(func, tensors)
        return super().__torch_dispatch__(func, types, args, kwargs)


def _refuse_a_mixture(func: Any, tensors: Sequence[Tensor]) -> None:  # noqa: ANN401 - an overload of torch's
    name, hosts = func.name(), [one for one in tensors if one.device.type == "cpu"]
    pointwise = torch.Tag.pointwise in func.tags and not name.startswith(("aten::_fused", "aten::_foreach"))
    numbers = pointwise and all(one.dim() == 0 for one in hosts)
    if 0 < len(hosts) < len(tensors) and not numbers and not name.startswith(("aten::index.", "aten::index_put")):
        raise RuntimeError(f"{name}: tensors on the CPU and on a device")


def _collective(func: Any, args: Any, kwargs: Any, tensors: Sequence[Tensor]) -> Any:  # noqa: ANN401 - torch's
    """As NCCL takes it: tensors of the device, without holes."""
    for one in tensors:
        if "barrier" not in func.name() and not (one.device == device() and one.is_contiguous()):
            raise RuntimeError(f"{func.name()}: a tensor on {one.device}, strides {one.stride()}")
    bare, options = tree_map_only(Tensor, lambda x: torch.empty(x.shape, dtype=x.dtype, device="meta"), (args, kwargs))
    found = func(*bare, **options)
    return (args[0], found[1]) if isinstance(found, tuple | list) else found


class TorchOnDevice:
    """What megatron's schedules see as `torch`."""

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - stands for a whole module
        return getattr(torch, name)

    def zeros(self, *size: Any, device: object = None, **options: Any) -> Tensor:
        return torch.zeros(*size, device=torch.device(KIND, 0) if device == "cuda" else device, **options)  # pyright: ignore


def pretend() -> None:
    """Tell torch, megatron and DeepSpeed of the device, for the rest of this process."""
    import deepspeed.runtime.zero.partitioned_param_coordinator as coordinator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
    from megatron.core.pipeline_parallel import schedules
    from torch.distributed._tools import fake_collectives  # noqa: F401 - registers what collectives give
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(KIND)
    _replace(getattr(torch, KIND), get_amp_supported_dtype=lambda: [torch.bfloat16])
    _replace(torch.cuda, is_available=lambda: True, current_device=device, set_device=lambda _: None)
    _replace(torch.cuda, get_device_capability=lambda _: (9, 0))
    _replace(torch.cuda.nccl, version=lambda: (2, 27, 0))  # pyright: ignore
    _replace(Tensor, cuda=lambda self: self.to(device()))
    _replace(FakeTensor, is_cuda=property(lambda self: self.device.type == KIND))
    _replace(nn.Module, to=lambda self, *_: self)  # fake tensors cannot be moved inside a module: it is built there
    _replace(schedules, torch=TorchOnDevice())
    _replace(coordinator, assert_ints_same_as_other_ranks=lambda _: None)  # it reads back what it has sent
    _replace(
        CPU_Accelerator,
        device_name=lambda self, index=None: KIND if index is None else f"{KIND}:{index}",
        current_device_name=lambda self: str(device()),
        on_accelerator=lambda self, tensor: tensor.device.type == KIND,
        pin_memory=lambda self, tensor, *_, **__: tensor,
        ByteTensor=functools.partial(torch.tensor, dtype=torch.uint8, device=device()),
        FloatTensor=functools.partial(torch.tensor, dtype=torch.float32, device=device()),
    )


def _replace(home: object, **values: object) -> None:
    for name, value in values.items():
        setattr(home, name, value)


def join_world(config: RunConfig, rank: int) -> None:
    """A world of the config's size that this process is one rank of, alone; it says that it speaks NCCL."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend

    plan = config.parallel
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(plan.ranks), "LOCAL_RANK": "0"}
    dist.init_process_group("fake", rank=rank, world_size=plan.ranks, store=FakeStore())
    _replace(dist, get_backend=lambda group=None: "nccl")


def attended(self: BlockCore, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """In the place of FlexAttention: the rule is asked, and every tensor is used."""
    mask, place = self.mask, torch.arange(query.shape[1], device=query.device)
    seen = mask.mask_mod(place[0], place[0], place[:, None], place[None])
    blocks = (mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices, mask.q_indices)
    assert all(one is not None and one.device == query.device for one in blocks)
    assert query.dtype == key.dtype == value.dtype
    return query + (key.sum() + value.sum()) * seen.any()


def walk(config: RunConfig, batches: Sequence[Batch], rank: int = 0, fault: str = "") -> tuple[set[str], set[str]]:
    """A step, evaluation, what a checkpoint holds, going on from one, a step. Where its tensors lie, and the average's.

    Raises where a tensor of the CPU meets one of the device. `fault`: what is planted.
    """
    torch.set_num_threads(1)
    pretend()
    join_world(config, rank)
    _replace(BlockCore, attend=attended)
    shapes = {name: weight.shape for name, weight in plain_host(config).model.named_parameters()}
    FAULTS[fault]()
    with Pretended():
        host = MegatronHost(config)
        with torch.device(device()):
            model = build_stages(host, config)
        host.prepare(model)
        average = Average(host, decay=0.9)
        _step(host, average, batches, config=config, number=0)
        if config.parallel.pp == 1 and config.parallel.zero_stage < 3:
            gradient_row(host, batches, config=config)
        with average.swapped_in():
            document_sums(host, [gather_documents(batches, num_rows=2)])
        kept, ema = host.state(), average.state()

        def read(keys: Sequence[str]) -> dict[str, Tensor]:
            return {key: torch.zeros(shapes[key.split("/", 1)[1]]) for key in keys}

        host.load(read, step=1)
        average.load(read)
        _step(host, average, batches, config=config, number=1)
        average.state()
    held = [kept.weights, *kept.moments.values(), ema]
    return {str(x.device) for part in held for x in part.values()}, {str(x.device) for x in average.values.values()}


def _step(host: MegatronHost, average: Average, batches: Sequence[Batch], *, config: RunConfig, number: int) -> None:
    numbers = optimizer_step(host, batches, config=config, step=number)
    assert not numbers.skipped
    average.update(number + 1)


def _step_on_the_cpu() -> None:
    made = zero.make_room_for_moments

    def wrong(engine: Any, step: int) -> None:  # noqa: ANN401 - DeepSpeed's
        made(engine, step)
        for state in engine.optimizer.optimizer.state.values():
            state["step"] = torch.tensor(float(step))

    _replace(zero, make_room_for_moments=wrong)


def _average_on_the_cpu() -> None:
    def wrong(self: Average, read: Any) -> None:  # noqa: ANN401 - a Reader
        self.values = {name: torch.zeros(value.shape) for name, value in self.values.items()}

    _replace(Average, load=wrong)


def _totals_on_the_cpu() -> None:
    _replace(step_room, on_comm_device=lambda values: values)


FAULTS: dict[str, Callable[[], None]] = {
    "": lambda: None,
    "step": _step_on_the_cpu,
    "average": _average_on_the_cpu,
    "totals": _totals_on_the_cpu,
}
