"""A plan in words: rows of tables, every number with its unit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from matformer.config.device import DeviceConfig
from matformer.config.schema import RunConfig
from matformer.errors import ConfigError
from matformer.parallel.counts import Counts, MediaCounts
from matformer.parallel.expected import Guess, expected_counts
from matformer.parallel.flops import added, flops_by_part
from matformer.parallel.layouts import Estimate
from matformer.parallel.memory import RankMemory, writers
from matformer.parallel.parameters import parameters_by_part

Row = tuple[str, ...]

PARTS_HEAD: Row = ("part", "parameters", "FLOPs", "of all", "units a sequence", "FLOPs a unit")
ON_HOST = ("host", "saving")  # fields of RankMemory
MANY = {"patch": "patches"}
AS_FAST = 1.01  # steps that differ by less are equal: no expectation is that good
LAYOUTS_HEAD: Row = tuple("tp,cp,pp x stages,dp,ZeRO,recompute,microbatch,memory,bubble,step,MFU,latents/s".split(","))


def parts_rows(config: RunConfig, guess: Guess) -> list[Row]:
    """Parameters and FLOPs (forward and backward, the mask's own pairs) of every part over one sequence."""
    one = config.model_copy(update={"train": config.train.model_copy(update={"micro_batch": 1})})
    counts = expected_counts(one, guess)
    parameters, flops = parameters_by_part(config.model), flops_by_part(config.model, counts)
    whole = added(flops).total
    rows = []
    for name, number in parameters.items():
        cost, (units, unit) = flops[name].total, _units(name, counts)
        each = f"{large(cost / units)} a {unit}" if units else "-"
        rows.append(
            (name, large(number), large(cost), f"{cost / whole:.1%}", f"{units:,} {MANY.get(unit, unit + 's')}", each)
        )
    symbols = counts.text.symbols
    rows.append(
        (
            "all",
            large(sum(parameters.values())),
            large(whole),
            "100%",
            f"{counts.positions:,} latents",
            f"{large(whole / counts.positions)} a latent" + (f", {large(whole / symbols)} a byte" if symbols else ""),
        )
    )
    return rows


def _units(name: str, counts: Counts) -> tuple[int, str]:
    kind, _, modality = name.partition("/")
    if modality == "text":
        return (counts.read.symbols if kind == "preludio" else counts.text.symbols), "byte"
    if modality:
        media = counts.media.get(modality, MediaCounts())
        return media.noised + (media.clean if kind == "preludio" else 0), "patch"
    return (counts.questions, "question") if name == "router" else (counts.positions, "latent")


def layout_row(one: Estimate, device: DeviceConfig) -> Row:
    """One layout in a line."""
    parallel = one.config.parallel
    rate = one.config.train.global_batch * one.config.data.sequence_latents / one.time.total
    return (
        f"{parallel.tp}{' sp' if parallel.sequence_parallel else ''}",
        str(parallel.cp),
        f"{parallel.pp} x {parallel.virtual_stages}",
        str(parallel.dp),
        str(parallel.zero_stage),
        parallel.recompute,
        f"{one.config.train.micro_batch} x {one.config.microbatches}",
        gib(one.memory.peak) + ("" if one.fits(device) else " too much"),
        f"{one.bubble:.0%}",
        seconds(one.time.total),
        f"{one.time.share:.1%}",
        large(rate),
    )


def detail_rows(one: Estimate, device: DeviceConfig) -> list[Row]:
    """Memory, traffic and time of a layout, item by item."""
    memory, time = one.memory, one.time
    names = [field.name for field in fields(RankMemory) if getattr(memory, field.name) and field.name not in ON_HOST]
    host = [f"{gib(memory.host)} the optimizer, whose update's time is not counted"] if memory.host else []
    host.append(f"{gib(memory.saving)} while it writes a checkpoint, as {writers(one.config.parallel)} a stage do")
    phases = ", ".join(f"{name} {gib(value)}" for name, value in memory.phases.items())
    sent = one.traffic
    return [
        ("memory of the fullest rank", ", ".join(f"{name} {gib(getattr(memory, name))}" for name in names)),
        ("at most in", f"{phases}; {gib(device.usable_bytes)} can be used"),
        ("in the host's memory", "; ".join(host)),
        (
            "sent by a rank a step",
            f"TP {gib(sent.tensor)}, CP {gib(sent.context)}, PP {gib(sent.pipeline)}, DP {gib(sent.data)}",
        ),
        (
            "time of a step",
            ", ".join(
                f"{name} {seconds(value)}"
                for name, value in (
                    ("products", time.compute),
                    ("computed again", time.again),
                    ("TP", time.tensor),
                    ("CP", time.context),
                    ("PP", time.pipeline),
                    ("bubble", time.bubble),
                    ("DP", time.data),
                    ("update", time.update),
                )
                if value
            ),
        ),
    ]


def guess_row(guess: Guess) -> Row:
    """What was assumed of the data."""
    return (
        "assumed of the data",
        f"{guess.symbols:g} bytes a patch, documents of {guess.document:,} latents, captions of {guess.caption} bytes",
    )


def too_large(one: Estimate, device: DeviceConfig) -> ConfigError:
    """Why a layout is no plan: even the smallest of them does not fit."""
    return ConfigError(
        f"a layout must fit into the {gib(device.usable_bytes)} that can be used of one {device.name}, got "
        f"{gib(one.memory.peak)} for the smallest; change --gpus, --device or the model"
    )


def plan_file(one: Estimate, *, command: str) -> str:
    """The layout as a file of configs/plan; its microbatch, which belongs to `train`, and its numbers as comments."""
    train, peak = one.config.train, gib(one.memory.peak)
    keys = one.config.parallel.model_dump(mode="json", exclude_defaults=True)
    shown = {key: str(value).lower() if isinstance(value, bool) else value for key, value in keys.items()}
    return (
        f"# by `{command}`\n"
        f"# with train.micro_batch {train.micro_batch}, train.global_batch {train.global_batch}: {peak} "
        f"a rank, {seconds(one.time.total)} a step, MFU {one.time.share:.0%} expected\n"
        + "".join(f"{key}: {value}\n" for key, value in shown.items())
    )


def best(found: Sequence[Estimate], device: DeviceConfig, *, count: int) -> list[Estimate]:
    """The fastest that fit, one a layout; if none fits, those that lack least.

    Of microbatches, stages a rank and recomputes whose steps are as good as equal, the one that needs least memory.
    """
    fitting = [one for one in found if one.fits(device)]
    if not fitting:
        return sorted(found, key=lambda one: one.memory.peak)[:count]
    layouts: dict[tuple[int, ...], list[Estimate]] = {}
    for one in fitting:
        parallel = one.config.parallel
        layouts.setdefault((parallel.tp, parallel.cp, parallel.pp, parallel.zero_stage), []).append(one)
    chosen = [min(_as_fast(alike), key=lambda one: one.memory.peak) for alike in layouts.values()]
    return sorted(chosen, key=lambda one: one.time.total)[:count]


def _as_fast(found: Sequence[Estimate]) -> list[Estimate]:
    fastest = min(one.time.total for one in found)
    return [one for one in found if one.time.total <= AS_FAST * fastest]


def large(number: float) -> str:
    """1.3 B, 42 M, 7.1 P: three digits and a thousand's letter."""
    for letter, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return f"{number:.3g}"


def gib(number: float) -> str:
    """GiB, or MiB below one."""
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"


def seconds(number: float) -> str:
    """Seconds, or milliseconds below one."""
    return f"{number:.2f} s" if number >= 1 else f"{number * 1e3:.1f} ms"
