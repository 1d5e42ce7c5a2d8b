"""Measures this machine for `matformer.plan`: writes a file of configs/device.

    python tools/calibrate.py --out configs/device/cpu.yaml --name "this CPU"

A minute. On a GPU the products are bfloat16 (of float32 the peak alone is measured), on a CPU float32 with the threads
that torch takes. The links are measured between two processes of this machine (gloo); on a node of GPUs write the links
of the data sheet over them.
"""

from __future__ import annotations

import argparse
import os
import platform
import socket
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as processes

from matformer.config.schema import AttoConfig
from matformer.hosts.plain import Layer
from matformer.layers.attention import AttoView
from matformer.layers.block_attention import CausalCore
from matformer.layers.rotary import rotary_tables

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
SIDE = 8192 if DEVICE.type == "cuda" else 1536  # of the product that shows the peak
WIDE, NARROW = (4096, 1024) if DEVICE.type == "cuda" else (768, 192)  # widths of the layers that show the share
POSITIONS = 4096 if DEVICE.type == "cuda" else 512
SENT = 2**24  # float32 numbers of one sum between processes


def fastest(call: Callable[[], object], *, times: int = 4) -> float:
    """Seconds of the fastest of some calls, after one to warm up."""
    found = []
    for _ in range(times + 1):
        begun = time.perf_counter()
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - begun)
    return min(found[1:])


def peak_flops(dtype: torch.dtype) -> float:
    """Of one square product."""
    a, b = (torch.randn(SIDE, SIDE, device=DEVICE, dtype=dtype) for _ in range(2))
    return 2 * SIDE**3 / fastest(lambda: a @ b)


def layer_config(width: int) -> AttoConfig:
    """Of the layer that is timed."""
    heads = width // 64
    return AttoConfig(
        width=width, layers=1, heads=heads, kv_heads=heads, ffn_width=3 * width, rotary_pairs=(32, 0, 0, 0)
    )


def layer_work(width: int, positions: int) -> int:
    """FLOPs of that layer, forward and backward; of its attention the pairs that the causal mask shows, as in plans."""
    return 6 * positions * (4 + 9) * width**2 + 6 * width * positions * (positions + 1)


def layer_flops(width: int) -> float:
    """FLOPs a second of one layer of the Atto, forward and backward, causal attention."""
    config = layer_config(width)
    layer = Layer(config).to(DEVICE, DTYPE)
    axes = torch.zeros(1, POSITIONS, 4, dtype=torch.long, device=DEVICE)
    core = CausalCore([POSITIONS], device=DEVICE)
    view = AttoView(core, rotary_tables(axes, pairs=config.rotary_pairs, bases=(1e4,) * 4))
    x = torch.randn(1, POSITIONS, width, device=DEVICE, dtype=DTYPE, requires_grad=True)
    return layer_work(width, POSITIONS) / fastest(lambda: layer(x, view).sum().backward())


def memory_rate() -> float:
    """Bytes a second, reading and writing."""
    a = torch.empty(2**27, dtype=torch.uint8, device=DEVICE)
    b = torch.empty_like(a)
    return 2 * a.numel() / fastest(lambda: b.copy_(a))


def memory_bytes() -> int:
    """Of the device."""
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def link_rate() -> tuple[float, float]:
    """Bytes a second that each of two processes sends in a sum, and seconds of the smallest sum."""
    spawn = processes.get_context("spawn")
    answers = spawn.SimpleQueue()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    pair = [spawn.Process(target=_sum_in_pairs, args=(rank, port, answers), daemon=True) for rank in range(2)]
    for process in pair:
        process.start()
    found = answers.get()
    for process in pair:
        process.join()
    return found


def _sum_in_pairs(rank: int, port: int, answers: Any) -> None:  # noqa: ANN401 - a queue of multiprocessing
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    large, small = torch.ones(SENT), torch.ones(1)
    rate = 4 * SENT / fastest(lambda: dist.all_reduce(large))  # 2 (n - 1) / n of the bytes, n = 2
    latency = fastest(lambda: dist.all_reduce(small), times=20)
    if rank == 0:
        answers.put((rate, latency))
    dist.destroy_process_group()


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description="Measure this machine for matformer.plan.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", default=platform.node())
    asked = parser.parse_args()
    asked.out.write_text(measured(asked.name))


def measured(name: str) -> str:
    """The file. share(w) = share * w / (w + half), through the two layers that were timed."""
    peak, wide, narrow = peak_flops(DTYPE), layer_flops(WIDE), layer_flops(NARROW)
    half = max(0.0, (wide - narrow) / (narrow / NARROW - wide / WIDE))
    share = min(1.0, wide / peak * (WIDE + half) / WIDE)
    rate, latency = link_rate()
    cores = f", {torch.get_num_threads()} threads" if DEVICE.type == "cpu" else ""
    lines = {
        "name": name,
        "source": f"measured by tools/calibrate.py on {date.today()}, torch {torch.__version__}{cores}",
        "peak_tflops": round(peak / 1e12, 4),
        **({"float32_tflops": round(peak_flops(torch.float32) / 1e12, 4)} if DEVICE.type == "cuda" else {}),
        "achieved_share": round(share, 3),
        "half_width": round(half),
        "memory_gib": round(memory_bytes() / 2**30, 1),
        "usable_share": 0.8,
        "memory_gb_s": round(memory_rate() / 1e9, 1),
        "devices_a_node": max(1, torch.cuda.device_count()),
        "in_node_gb_s": round(rate / 1e9, 2),
        "between_nodes_gb_s": round(rate / 1e9, 2),
        "latency_us": round(latency * 1e6),
    }
    return "".join(f"{key}: {value}\n" for key, value in lines.items())


if __name__ == "__main__":
    main()
