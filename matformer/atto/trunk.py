"""The Atto: the global transformer over latents. Its blocks are built by a host; here is what they are told."""

from __future__ import annotations

from matformer.atto.masks import visible, visible_with_noised_context
from matformer.config.schema import AttoConfig, MediaContext
from matformer.layers.attention import AttoView
from matformer.layers.rotary import rotary_tables
from matformer.layers.tiles import ROWS, mask_tiles
from matformer.parcels import Grid, PositionTimes


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
