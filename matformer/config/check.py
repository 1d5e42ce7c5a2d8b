"""One small function for each rule between fields of a config; `check` asks them all."""

from __future__ import annotations

import logging
import math
import re
from pathlib import PurePath

from matformer.config.budget import budgeted_splits, root_counts
from matformer.config.schema import MediaConfig, NextLatentConfig, RunConfig
from matformer.errors import ConfigError

log = logging.getLogger(__name__)

MAX_PATCH = 256  # rows of the table of places in a patch
RESERVED_NAMES = ("text", "router", "end", "recurrent", "total", "loss", "media", "heldout", "heldout_ema")


def check(config: RunConfig) -> None:
    """Raise ConfigError at the first rule that the config breaks: what must hold, the numbers, the keys to change."""
    for rule in RULES:
        rule(config)


def check_heads(config: RunConfig) -> None:
    """Heads share the width, query heads share key/value heads."""
    atto = config.model.atto
    _divides(atto.heads, atto.width, "model.atto.heads", "model.atto.width")
    _divides(atto.kv_heads, atto.heads, "model.atto.kv_heads", "model.atto.heads")


def check_rotary(config: RunConfig) -> None:
    """Rotary pairs fill a head exactly."""
    atto = config.model.atto
    size = atto.width // atto.heads
    _must(
        2 * sum(atto.rotary_pairs) == size,
        f"model.atto.rotary_pairs must sum to half of a head's size, got {sum(atto.rotary_pairs)} pairs for heads of "
        f"{size} (width {atto.width} / heads {atto.heads}); change model.atto.rotary_pairs",
    )


def check_text(config: RunConfig) -> None:
    """A latent is k slots of the byte width; byte heads share it, each of an even size for its rotary pairs."""
    text = config.model.text
    _divides(text.width, config.model.atto.width, "model.text.width", "model.atto.width")
    _divides(text.heads, text.width, "model.text.heads", "model.text.width")
    _must(
        text.width // text.heads % 2 == 0,
        f"model.text.width / model.text.heads must be even, got {text.width} / {text.heads} = "
        f"{text.width // text.heads}; change model.text.heads",
    )


def check_coda_input(config: RunConfig) -> None:
    """What the Preludio hands to the Coda beside the latents does not travel from the first stage to the last."""
    text, pp = config.model.text, config.parallel.pp
    if text.coda_input == "embedding":
        return
    _must(
        not text.preludio_places,
        "model.text.preludio_places must be false where model.text.coda_input is preludio (`<begin>` has no place in a "
        "patch), got true; change model.text.preludio_places or model.text.coda_input",
    )
    _must(
        pp == 1,
        f"parallel.pp must be 1 where model.text.coda_input is preludio, got {pp}; change parallel.pp or "
        "model.text.coda_input",
    )


def check_patcher(config: RunConfig) -> None:
    """A static patch is no longer than the longest allowed, which is no longer than the table of places is."""
    patcher = config.data.patcher
    _must(
        not config.model.text.preludio_places or patcher.max_patch_bytes <= MAX_PATCH,
        f"data.patcher.max_patch_bytes must be at most {MAX_PATCH} where model.text.preludio_places is true, got "
        f"{patcher.max_patch_bytes}; change data.patcher.max_patch_bytes",
    )
    _must(
        patcher.kind != "static" or patcher.patch_bytes <= patcher.max_patch_bytes,
        f"data.patcher.patch_bytes must be at most data.patcher.max_patch_bytes, got {patcher.patch_bytes} and "
        f"{patcher.max_patch_bytes}; change data.patcher.max_patch_bytes",
    )


def check_entropy(config: RunConfig) -> None:
    """The entropy patchers need a model and a threshold."""
    patcher = config.data.patcher
    if not patcher.kind.startswith("entropy"):
        return
    for key in ("entropy_model", "threshold"):
        _must(
            getattr(patcher, key) is not None,
            f"data.patcher.{key} must be set for data.patcher.kind {patcher.kind}, got none; "
            "`python -m data_prep.train_entropy_model` makes a model, `python -m data_prep.score_entropy` a threshold",
        )


def check_pieces(config: RunConfig) -> None:
    """The patchers of pieces need their model; boundaries of bpe depend on later bytes, so the Coda pays for them."""
    patcher, predicts = config.data.patcher, config.model.text.predicts_end
    bpe = patcher.kind == "bpe"
    _must(
        patcher.kind not in ("bpe", "tokens") or patcher.sentencepiece is not None,
        f"data.patcher.sentencepiece must be set for data.patcher.kind {patcher.kind}, got none; "
        "`python -m data_prep.train_sentencepiece` makes one, change data.patcher.sentencepiece",
    )
    _must(
        bpe == predicts,
        f"model.text.predicts_end must be true for data.patcher.kind bpe and false for the others, got "
        f"{str(predicts).lower()} for {patcher.kind}; change model.text.predicts_end",
    )


def check_tokens(config: RunConfig) -> None:
    """A vocabulary stands for its patcher's pieces, and has no layer over bytes."""
    patcher, text = config.data.patcher, config.model.text
    _must(
        (patcher.kind == "tokens") == (text.vocabulary is not None),
        f"model.text.vocabulary must be set for data.patcher.kind tokens and for no other, got "
        f"{text.vocabulary or 'none'} for {patcher.kind}; change model.text.vocabulary or data.patcher.kind",
    )
    _must(
        text.vocabulary is None or text.coda_input == "embedding",
        f"model.text.coda_input must be embedding where model.text.vocabulary is set, got {text.coda_input}; change "
        "model.text.coda_input",
    )


def check_text_diffusion(config: RunConfig) -> None:
    """Boundaries that come from clean text would tell what is masked."""
    text, patcher = config.model.text, config.data.patcher
    if text.objective == "ar":
        return
    _must(
        patcher.kind == "static",
        f"data.patcher.kind must be static for model.text.objective {text.objective} (other boundaries depend on "
        f"masked bytes and would tell them), got {patcher.kind}; change data.patcher.kind or model.text.objective",
    )
    _must(
        patcher.patch_bytes == text.patch_bytes,
        f"model.text.patch_bytes must be data.patcher.patch_bytes for model.text.objective {text.objective}, got "
        f"{text.patch_bytes} and {patcher.patch_bytes}; change model.text.patch_bytes",
    )
    _must(
        text.coda_input == "embedding",
        f"model.text.coda_input must be embedding for model.text.objective {text.objective}, got {text.coda_input}; "
        "change model.text.coda_input",
    )
    needed = 3 + 2 * (1 if text.objective == "masked_diffusion" else text.block_patches)
    _must(
        needed <= config.data.sequence_latents,
        f"data.sequence_latents must hold start, header, both copies of a block and closing, {needed} latents, for "
        f"model.text.objective {text.objective}, got {config.data.sequence_latents}; change data.sequence_latents",
    )


def check_media_names(config: RunConfig) -> None:
    """Names of modalities become keys of metrics and folders of samples."""
    for name in config.model.media:
        _must(
            re.fullmatch(r"[a-z][a-z0-9_]*", name) is not None and name not in RESERVED_NAMES,
            f"a modality's name must be lower-case letters, digits and _, and none of {', '.join(RESERVED_NAMES)}, "
            f"got {name}; rename model.media.{name}",
        )


def check_media_buckets(config: RunConfig) -> None:
    """Buckets have the grid's rank, whole patches, and stand in ascending order without repeats."""
    for name, media in config.model.media.items():
        key = f"model.media.{name}.buckets"
        _must(len(media.buckets) > 0, f"{key} must hold at least one shape, got none; change {key}")
        for bucket in media.buckets:
            _check_bucket(bucket, media=media, key=key)
        sizes = [math.prod(bucket) for bucket in media.buckets]
        _must(
            sizes == sorted(sizes) and len(set(media.buckets)) == len(media.buckets),
            f"{key} must be ascending shapes without repeats, got {_lists(media.buckets)}; change {key}",
        )


def check_channel_variance(config: RunConfig) -> None:
    """A variance a channel."""
    for name, media in config.model.media.items():
        known = media.channel_variance
        _must(
            known is None or len(known) == media.channels,
            f"model.media.{name}.channel_variance must have model.media.{name}.channels numbers, got "
            f"{len(known or ())} and {media.channels}; change model.media.{name}.channel_variance",
        )


def check_loss_weighting(config: RunConfig) -> None:
    """SD3's weight is a function of the straight path's t."""
    for name, media in config.model.media.items():
        _must(
            media.loss_weighting != "cosmap" or media.prediction == "flow",
            f"model.media.{name}.loss_weighting must be none or min_snr where the Coda predicts {media.prediction}, "
            f"got {media.loss_weighting}; change model.media.{name}.loss_weighting",
        )


def check_coda_heads(config: RunConfig) -> None:
    """Heads of a Coda that attends share its width, each of an even size for its rotary pairs."""
    for name, media in config.model.media.items():
        if media.coda == "dit":
            width, heads = f"model.media.{name}.coda_width", f"model.media.{name}.coda_heads"
            _divides(2 * media.coda_heads, media.coda_width, f"twice {heads}", width)


def check_next_latent(config: RunConfig) -> None:
    """No noised patch stands in the sequence: nothing there could be told its time."""
    for name, media in config.model.media.items():
        _must(
            not media.causal or media.time_conditioning not in ("token", "adaln_atto"),
            f"model.media.{name}.time_conditioning must be none, add or adaln_preludio_coda for objective next_latent "
            f"(the Atto sees no noised patch), got {media.time_conditioning}; change "
            f"model.media.{name}.time_conditioning or model.media.{name}.objective",
        )
        _must(
            not media.causal or (media.coda != "dit" and media.unet_width == 0),
            f"model.media.{name}.coda must be linear or mlp and unet_width 0 for objective next_latent (no patch may "
            f"see later ones), got {media.coda} and {media.unet_width}; change model.media.{name}.coda, "
            f"model.media.{name}.unet_width or model.media.{name}.objective",
        )
        _must(
            not media.causal or media.budget is None,
            f"model.media.{name}.budget must be null for objective next_latent (each patch is predicted from the one "
            f"before it, so each is a latent), got a budget; change model.media.{name}.budget or "
            f"model.media.{name}.objective",
        )
        if not media.causal and media.next_latent != NextLatentConfig():
            log.warning(
                "model.media.%s.next_latent has no effect under objective %s; set model.media.%s.objective",
                name,
                media.objective,
                name,
            )


def check_budget(config: RunConfig) -> None:
    """What no block of patches fills is within the budget."""
    for name, media in config.model.media.items():
        if media.budget is None:
            continue
        share, levels = media.budget.share, media.budget.levels
        others = [one for one, source in config.data.sources.items() if source.form == "documents"]
        _must(
            media.budget.noised_tree != "shuffled" or not others,
            f"model.media.{name}.budget.noised_tree shuffled must have sources of form pairs alone, got "
            f"{', '.join(others)} of form documents; change model.media.{name}.budget.noised_tree or data.sources",
        )
        for bucket in range(len(media.buckets)):
            grid, key = media.grid(bucket), f"model.media.{name}.budget"
            fewest = sum(root_counts(grid, levels=levels))
            _must(
                budgeted_splits(grid, share=share, levels=levels) >= 0,
                f"{key}.share must leave the fewest latents that {key}.levels {levels} can make of {list(grid)} "
                f"patches, {fewest} of {math.prod(grid)}, got {share}; change {key}.share or {key}.levels",
            )


def check_sequence(config: RunConfig) -> None:
    """A media span is never cut: start, header, both copies and closing of the largest fit in a sequence."""
    for name, media in config.model.media.items():
        largest = max(range(len(media.buckets)), key=media.noised_latents)
        noised, clean = media.noised_latents(largest), media.clean_latents(largest)
        token, copies = media.time_conditioning == "token", config.model.most_copies(media)
        needed = noised + (copies == 2) * clean + 3 + token
        what = ("two copies" if copies == 2 else "one copy") + f" of {noised} patches"
        what += f", the clean one of {clean} latents" if copies == 2 and clean != noised else ""
        _must(
            needed <= config.data.sequence_latents,
            f"data.sequence_latents must hold the largest {name} span, which takes {needed} latents (start, header, "
            f"{'its time, ' if token else ''}{what}, closing), got {config.data.sequence_latents}; change "
            f"data.sequence_latents, model.media.{name}.buckets or model.media.{name}.patch",
        )


def check_sources(config: RunConfig) -> None:
    """Sources name modalities that the model has, and folders under data.root."""
    _must(len(config.data.sources) > 0, "data.sources must hold at least one source, got none; change data.sources")
    media = ", ".join(config.model.media) or "none"
    for name, source in config.data.sources.items():
        key = f"data.sources.{name}"
        _must(
            source.form == "pairs" or source.shows == "both",
            f"{key}.shows must be both for form {source.form}, got {source.shows}; change {key}.shows",
        )
        if source.form == "pairs" and source.shows != "caption":
            _must(
                source.modality in config.model.media,
                f"{key}.modality must be one of model.media ({media}) for form pairs, got {source.modality}; change "
                f"{key}.modality",
            )
        else:
            what = "shows caption" if source.form == "pairs" else f"form {source.form}"
            _must(
                source.modality is None,
                f"{key}.modality must be absent for {what}, got {source.modality}; change {key}.modality",
            )
        path = PurePath(source.path)
        _must(
            bool(path.parts) and not path.is_absolute() and ".." not in path.parts,
            f"{key}.path must be a folder below data.root, got {source.path or 'nothing'}; change {key}.path",
        )


def check_degrees(config: RunConfig) -> None:
    """Tensor and context degrees divide heads and positions: ranks attend with other heads, and hold other chunks."""
    atto, parallel = config.model.atto, config.parallel
    for key, count in (("heads", atto.heads), ("kv_heads", atto.kv_heads), ("ffn_width", atto.ffn_width)):
        _divides(parallel.tp, count, "parallel.tp", f"model.atto.{key}")
    both, degree = "parallel.tp * parallel.cp" if parallel.cp > 1 else "parallel.tp", parallel.tp * parallel.cp
    _divides(degree, atto.heads, both, "model.atto.heads")
    _divides(degree, config.data.sequence_latents, both, "data.sequence_latents")
    key_heads = atto.kv_heads // parallel.tp
    _must(
        key_heads % parallel.cp == 0 or parallel.cp % key_heads == 0,
        f"model.atto.kv_heads / parallel.tp and parallel.cp must divide one or the other, got {atto.kv_heads} / "
        f"{parallel.tp} and {parallel.cp}; change parallel.cp",
    )


def check_stages(config: RunConfig) -> None:
    """Every layer stands in one stage, and an interleaved schedule has its microbatches in groups of pp."""
    layers, parallel = config.model.atto.layers, config.parallel
    stages = parallel.pp * parallel.virtual_stages
    if parallel.stage_layers is None:
        what = "parallel.pp" if parallel.virtual_stages == 1 else "parallel.pp * parallel.virtual_stages"
        _divides(stages, layers, what, "model.atto.layers")
    else:
        given = parallel.stage_layers
        _must(
            len(given) == stages and sum(given) == layers,
            f"parallel.stage_layers must be {stages} numbers (parallel.pp * parallel.virtual_stages) that sum to "
            f"model.atto.layers {layers}, got {list(given)}; change parallel.stage_layers",
        )
    if parallel.virtual_stages == 1:
        return
    _must(
        parallel.pp > 1,
        f"parallel.virtual_stages must be 1 with parallel.pp 1, got {parallel.virtual_stages}; change parallel.pp",
    )
    _must(
        config.microbatches % parallel.pp == 0,
        f"a rank's microbatches a step (train.global_batch / parallel.dp / train.micro_batch) must be a multiple of "
        f"parallel.pp {parallel.pp} where parallel.virtual_stages is more than 1, got {config.microbatches}; change "
        "train.global_batch or train.micro_batch",
    )


def check_sequence_parallel(config: RunConfig) -> None:
    """Sequence parallelism shards the sequence over more than one rank."""
    parallel = config.parallel
    _must(
        parallel.tp > 1 or not parallel.sequence_parallel,
        f"parallel.sequence_parallel must be false with parallel.tp 1, got true and {parallel.tp}; change parallel.tp",
    )


def check_zero(config: RunConfig) -> None:
    """ZeRO 2 and 3 need the engine's own forward and backward, which a pipeline does not use."""
    parallel = config.parallel
    _must(
        parallel.zero_stage == 1 or parallel.pp == 1,
        f"parallel.zero_stage must be 1 when parallel.pp is more than 1, got {parallel.zero_stage} and {parallel.pp}; "
        "change parallel.zero_stage",
    )
    _must(
        parallel.zero_stage >= 2 or not parallel.offload_optimizer,
        f"parallel.zero_stage must be 2 or 3 where parallel.offload_optimizer is true, got {parallel.zero_stage}; "
        "change parallel.zero_stage or parallel.offload_optimizer",
    )


def check_gradients(config: RunConfig) -> None:
    """A loss's own gradient takes a backward outside the schedule and whole weights."""
    parallel, every = config.parallel, config.run.gradients_every_steps
    _must(
        every == 0 or (parallel.pp == 1 and parallel.zero_stage <= 2),
        f"parallel.pp must be 1 and parallel.zero_stage at most 2 where run.gradients_every_steps is set, got "
        f"{parallel.pp} and {parallel.zero_stage}; change run.gradients_every_steps",
    )
    _must(
        every == 0 or parallel.recompute == "none",
        f"parallel.recompute must be none where run.gradients_every_steps is set, got {parallel.recompute}; change "
        "run.gradients_every_steps",
    )


def check_host(config: RunConfig) -> None:
    """The plain host is the reference: one rank, float32, no partitions."""
    parallel = config.parallel
    if parallel.host != "plain":
        return
    _must(
        parallel.ranks == 1,
        f"parallel.tp * cp * pp * dp must be 1 with parallel.host plain, got {parallel.tp} * {parallel.cp} * "
        f"{parallel.pp} * {parallel.dp}; change parallel.host",
    )
    _must(
        parallel.dtype == "float32" and parallel.zero_stage == 1 and parallel.recompute == "none",
        f"parallel.host plain must have dtype float32, zero_stage 1 and recompute none, got {parallel.dtype}, "
        f"{parallel.zero_stage} and {parallel.recompute}; change parallel.host",
    )


def check_batches(config: RunConfig) -> None:
    """Lanes fill global batches, global batches fill every rank's microbatches."""
    train, dp = config.train, config.parallel.dp
    _divides(train.global_batch, config.data.lanes, "train.global_batch", "data.lanes")
    _must(
        train.global_batch % (dp * train.micro_batch) == 0,
        f"train.global_batch must be a multiple of parallel.dp * train.micro_batch, got {train.global_batch} and "
        f"{dp} * {train.micro_batch} = {dp * train.micro_batch}; change train.global_batch or train.micro_batch",
    )


def check_optimizer(config: RunConfig) -> None:
    """Moments decay."""
    for beta in config.train.betas:
        _must(
            0.0 <= beta < 1.0,
            f"train.betas must each be at least 0 and below 1, got {list(config.train.betas)}; change train.betas",
        )


def check_loss_weights(config: RunConfig) -> None:
    """Weights name modalities that the model has."""
    for name in config.train.loss_weights.by_modality:
        _must(
            name in config.model.media,
            f"train.loss_weights.by_modality must name entries of model.media "
            f"({', '.join(config.model.media) or 'none'}), got {name}; change train.loss_weights.by_modality",
        )


def warn_short_run(config: RunConfig) -> None:
    """A run cut short by an override is legal, but its learning rate never reaches the peak."""
    train = config.train
    if train.warmup_steps > train.steps:
        log.warning(
            "train.warmup_steps is %d, more than train.steps %d: the learning rate never reaches train.lr",
            train.warmup_steps,
            train.steps,
        )


RULES = (
    check_heads,
    check_rotary,
    check_text,
    check_coda_input,
    check_patcher,
    check_entropy,
    check_pieces,
    check_tokens,
    check_text_diffusion,
    check_media_names,
    check_media_buckets,
    check_channel_variance,
    check_loss_weighting,
    check_coda_heads,
    check_next_latent,
    check_budget,
    check_sequence,
    check_sources,
    check_degrees,
    check_stages,
    check_sequence_parallel,
    check_zero,
    check_gradients,
    check_host,
    check_batches,
    check_optimizer,
    check_loss_weights,
    warn_short_run,
)


def _check_bucket(bucket: tuple[int, ...], *, media: MediaConfig, key: str) -> None:
    _must(
        len(bucket) == media.rank,
        f"{key} must have shapes of {media.rank} axes (the rank), got {list(bucket)}; change {key}",
    )
    _must(
        all(cells % media.patch == 0 for cells in bucket),
        f"{key} must be multiples of the patch, got {list(bucket)} and patch {media.patch}; change {key}",
    )


def _divides(divisor: int, number: int, divisor_key: str, number_key: str) -> None:
    _must(
        number % divisor == 0,
        f"{number_key} must be divisible by {divisor_key}, got {number} and {divisor}; change {divisor_key} or "
        f"{number_key}",
    )


def _must(holds: bool, sentence: str) -> None:
    if not holds:
        raise ConfigError(sentence)


def _lists(shapes: tuple[tuple[int, ...], ...]) -> list[list[int]]:
    return [list(shape) for shape in shapes]
