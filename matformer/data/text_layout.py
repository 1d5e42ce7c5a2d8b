"""How the patches of a text span stand in a sequence under each objective.

ar: one position a patch. masked_diffusion: header, all patches noised, all of them clean if something follows, closing.
block_diffusion: header, then each block noised and clean (the last clean only if something follows), closing. What is
given stands clean alone. Source: SEMANTICS, Text; BD3-LM, section 4, for blocks that see the clean ones before them.
"""

from __future__ import annotations

from typing import NamedTuple

from matformer.config.schema import TextConfig

MARKS = 2  # header and closing


class Block(NamedTuple):
    """Patches first .. first + size - 1 of a piece (padding patches included), and the copies that stand of them."""

    first: int
    size: int
    noised: bool
    clean: bool


def blocks_of(patches: int, text: TextConfig, *, given: int, followed: bool) -> list[Block]:
    """The blocks of a piece of text under a diffusion objective; the last one may reach beyond its patches."""
    size = patches if text.objective == "masked_diffusion" else text.block_patches
    firsts = range(0, patches, max(size, 1))
    blocks = []
    for first in firsts:
        known = min(first + size, patches) <= given
        clean = known or followed or first != firsts[-1]
        blocks.append(Block(first, size, noised=not known, clean=clean))
    return blocks


def text_positions(patches: int, text: TextConfig, *, given: int, followed: bool) -> int:
    """Positions that a piece of text takes."""
    if text.objective == "ar":
        return patches
    blocks = blocks_of(patches, text, given=given, followed=followed)
    return MARKS + sum(block.size * (block.noised + block.clean) for block in blocks)


def patches_that_fit(room: int, text: TextConfig, *, patches: int) -> int:
    """How many of a text's `patches` open a piece of at most `room` positions that goes on elsewhere; may be 0."""
    if text.objective == "ar":
        return min(room, patches - 1)
    if text.objective == "masked_diffusion":
        return max(0, min(room - MARKS, patches - 1))
    size = text.block_patches
    blocks = min((room - MARKS + size) // (2 * size), (patches - 1) // size)
    return max(0, blocks) * size
