"""The Atto: the global transformer over latents. Its blocks are built by a host; here is what they are told."""

from __future__ import annotations

from matformer.atto.masks import visible
from matformer.config.schema import AttoConfig
from matformer.layers.attention import AttoView, rotary_tables
from matformer.parcels import Grid


def atto_view(grid: Grid, config: AttoConfig) -> AttoView:
    """Mask and rotary tables of one microbatch. Document positions turn slowly, places inside media spans faster."""
    bases = (config.rotary_base, *(config.media_rotary_base,) * 3)
    return AttoView(visible(grid), rotary_tables(grid.axes_BSX, pairs=config.rotary_pairs, bases=bases))
