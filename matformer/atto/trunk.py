"""The Atto: the global transformer over latents. Its blocks are built by a host; here is what they are told."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from matformer.atto.masks import visible, visible_with_noised_context
from matformer.config.schema import AttoConfig, MediaContext
from matformer.layers.attention import AttoView
from matformer.layers.modulation import PositionTimes
from matformer.layers.rotary import rotary_tables
from matformer.layers.tiles import ROWS, mask_tiles
from matformer.parcels import Batch, Grid


def atto_view(
    grid: Grid,
    config: AttoConfig,
    *,
    media_context: MediaContext = "clean_copy",
    times: PositionTimes | None = None,
) -> AttoView:
    """Mask and rotary tables of one microbatch. Document positions turn slowly, places inside media spans faster."""
    bases = (config.rotary_base, *(config.media_rotary_base,) * 3)
    mask = visible(grid) if media_context == "clean_copy" else visible_with_noised_context(grid)
    # A sequence of one tile or two gains nothing by them: torch's kernel is faster there.
    tiles = mask_tiles(mask) if mask.device.type == "cpu" and mask.shape[1] > 2 * ROWS else None
    tables = rotary_tables(grid.axes_BSX, pairs=config.rotary_pairs, bases=bases)
    return AttoView(mask, tables, tiles=tiles, times=times)


def position_times(batch: Batch, modalities: Sequence[str]) -> PositionTimes | None:
    """t of the noised patches and 0 of the clean ones of these modalities; None if there is none to be told.

    All other positions (text, start, header, closing, media of other modalities) have no time.
    """
    if not modalities:
        return None
    units = [batch.media[name] for name in modalities]
    times = torch.cat([units[0].time_T.new_zeros(1), *(one.time_T for one in units)])
    index = torch.zeros_like(batch.grid.kind_BS).flatten()
    first = 2  # 1: clean
    for one in units:
        index = index.index_fill(0, one.clean_slot_Q, 1)
        index = index.index_copy(0, one.noised_slot_Q, first + one.time_of_Q)
        first += len(one.time_T)
    return PositionTimes(times, index.view_as(batch.grid.kind_BS))
