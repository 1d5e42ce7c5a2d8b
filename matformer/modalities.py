"""The table of modalities: a name -> its Preludio, its Coda and its loss. Adding a modality is a row of a config."""

from __future__ import annotations

from matformer.coda.latent import LatentCoda
from matformer.coda.text import TextCoda
from matformer.coda.token import TokenCoda
from matformer.config.check import MAX_PATCH
from matformer.config.schema import MediaConfig, ModelConfig, TextConfig
from matformer.layers.cells import CellShape
from matformer.layers.ngrams import NgramSettings
from matformer.preludio.latent import LatentPreludio
from matformer.preludio.leaves import LeafMerge
from matformer.preludio.text import TextPreludio
from matformer.preludio.token import TokenPreludio
from matformer.router.tree import TreeHead


def patch_variance(media: MediaConfig) -> list[float]:
    """Variance of each scalar of a patch, in the order of `patchify`: 1 unless the config knows better."""
    known = media.channel_variance if media.precondition == "channel" else None
    return [value for value in known or (1.0,) * media.channels for _ in range(media.patch**media.rank)]


def ngram_settings(text: TextConfig, sizes: tuple[int, ...]) -> NgramSettings:
    """What a local model's table of n-grams is."""
    return NgramSettings(sizes, rows=text.ngram_rows, gain=text.ngram_gain)


def _text_preludio(model: ModelConfig) -> TextPreludio | TokenPreludio:
    text = model.text
    if text.vocabulary is not None:
        return TokenPreludio(text.vocabulary, atto_width=model.atto.width)
    return TextPreludio(
        text.width,
        atto_width=model.atto.width,
        heads=text.heads,
        ffn_width=text.ffn_width,
        layers=text.preludio_layers,
        window=text.window,
        rotary_base=text.rotary_base,
        ngrams=ngram_settings(text, text.preludio_ngrams),
        max_patch=MAX_PATCH if text.preludio_places else None,
        pool=text.preludio_pool,
        reads_begin=text.coda_input == "preludio",
        diffused=model.diffuses_text,
    )


def _text_coda(model: ModelConfig) -> TextCoda | TokenCoda:
    text = model.text
    if text.vocabulary is not None:
        return TokenCoda(text.vocabulary, atto_width=model.atto.width)
    return TextCoda(
        text.width,
        atto_width=model.atto.width,
        heads=text.heads,
        ffn_width=text.ffn_width,
        layers=text.coda_layers,
        window=text.window,
        rotary_base=text.rotary_base,
        ngrams=ngram_settings(text, text.coda_ngrams),
        embeds=text.coda_input == "embedding",
        projects=text.coda_projection,
        predicts_end=text.predicts_end,
        diffused=model.diffuses_text,
    )


def _cells(media: MediaConfig) -> CellShape:
    return CellShape(media.places, patch=media.patch, rank=media.rank, channels=media.channels)


def build_preludi(model: ModelConfig) -> dict[str, TextPreludio | TokenPreludio | LatentPreludio]:
    """One Preludio a modality, text first."""
    preludi: dict[str, TextPreludio | TokenPreludio | LatentPreludio] = {"text": _text_preludio(model)}
    for name, media in model.media.items():
        preludi[name] = LatentPreludio(
            patch_variance(media),
            atto_width=model.atto.width,
            num_buckets=len(media.buckets),
            places=media.places,
            objective=media.prediction,
            scaled=media.precondition != "none",
            time_conditioning="none" if media.causal else media.time_conditioning,
            causal=media.causal,
            cells=_cells(media),
            unet_width=media.unet_width,
            merge=_leaf_merge(media, atto_width=model.atto.width),
        )
    return preludi


def _leaf_merge(media: MediaConfig, *, atto_width: int) -> LeafMerge | None:
    if media.budget is None:
        return None
    return LeafMerge(media.patch_scalars, atto_width=atto_width, rank=media.rank, levels=media.budget.levels)


def build_code(model: ModelConfig) -> dict[str, TextCoda | TokenCoda | LatentCoda]:
    """One Coda a modality, text first."""
    code: dict[str, TextCoda | TokenCoda | LatentCoda] = {"text": _text_coda(model)}
    for name, media in model.media.items():
        code[name] = LatentCoda(
            patch_variance(media),
            atto_width=model.atto.width,
            width=media.coda_width,
            layers=media.coda_layers,
            kind=media.coda,
            heads=media.coda_heads,
            window=media.coda_window,
            cells=_cells(media),
            unet_width=media.unet_width,
            places=media.places,
            objective=media.prediction,
            scaled=media.precondition != "none",
            time_conditioning=media.time_conditioning,
        )
    return code


def build_tree_heads(model: ModelConfig) -> dict[str, TreeHead]:
    """Of each modality whose noised copies stand in trees."""
    return {
        name: TreeHead(model.atto.width, places=media.places, levels=media.budget.levels)
        for name, media in model.media.items()
        if media.budget is not None and media.noises_trees
    }
