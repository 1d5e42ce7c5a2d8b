"""The Atto: the global transformer over latents. Its blocks are built by a host; here is what they are told."""

from __future__ import annotations

from matformer.atto.masks import Rule, mask_entry, mask_rows, sees, sees_noised_context, visible
from matformer.config.schema import AttoConfig, MediaContext
from matformer.layers.attention import AttentionCore, AttoView, DenseCore, TiledCore
from matformer.layers.block_attention import BlockCore, CausalCore, block_mask
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
    """Attention and rotary tables of one microbatch. Document positions turn slowly, places in media spans faster."""
    bases = (config.rotary_base, *(config.media_rotary_base,) * 3)
    rule = sees if media_context == "clean_copy" else sees_noised_context
    tables = rotary_tables(grid.axes_BSX, pairs=config.rotary_pairs, bases=bases)
    return AttoView(attention_core(grid, rule), tables, times=times)


def attention_core(grid: Grid, rule: Rule) -> AttentionCore:
    """How this device computes attention under this rule. On a GPU no mask of S x S is made."""
    device = grid.kind_BS.device
    if device.type == "cpu":
        mask = visible(grid, rule)
        # A sequence of one tile or two gains nothing by them: torch's kernel is faster there.
        return TiledCore(mask_tiles(mask)) if mask.shape[1] > 2 * ROWS else DenseCore(mask)
    if grid.causal_runs is not None:
        return CausalCore(grid.causal_runs, device=device)
    return blocks_of_rule(grid, rule)


def blocks_of_rule(grid: Grid, rule: Rule) -> BlockCore:
    """FlexAttention under the blocks of a rule."""
    rows, length = grid.kind_BS.shape
    mask = block_mask(
        lambda queries: mask_rows(grid, queries, rule=rule), mask_entry(grid, rule), batch=rows, length=length
    )
    return BlockCore(mask)
