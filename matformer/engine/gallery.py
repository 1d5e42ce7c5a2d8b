"""Samples of a finished run beside held-out data, and statistics of what it was fed: what the report shows."""

from __future__ import annotations

import base64
import io
import json
import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import soundfile
import torch
from PIL import Image
from torch import Tensor

from matformer.autoencoders import MotionField
from matformer.autoencoders.motion_field import INTRA
from matformer.config.schema import RunConfig
from matformer.data.coders import coders_of
from matformer.data.holdings import manifest_of
from matformer.data.loader import Loader
from matformer.data.sources import Document, MediaSpan, Source, TextSpan, open_source
from matformer.engine.continuation import continue_rows
from matformer.engine.draws import Draws, Row, given, guidance_for
from matformer.engine.folder import RunFolder, State
from matformer.engine.media import MediaCodec, load_codec
from matformer.engine.motion import animated
from matformer.engine.restore import load_for_inference
from matformer.engine.video_file import write_mp4
from matformer.model import Matformer
from matformer.parallel.seeds import Permutation
from matformer.parcels import Batch, Kind

log = logging.getLogger(__name__)

PROMPT_BYTES, NEW_BYTES, CAPTION_BYTES = 64, 160, 64
STATISTICS_STEPS = 4
LOOKED_AT = 32
MOTION_STEPS = 16
TRANSCRIPT, CAPTION = "transcript", "caption"
Entries = list[dict[str, Any]]


def make_gallery(
    run_folder: Path,
    *,
    num_images: int = 8,
    num_audio: int = 4,
    num_texts: int = 4,
    num_videos: int = 4,
    seed: int = 0,
    steps: int = Draws().steps,
) -> None:
    """Write RUN/samples/ with its samples.json, and RUN/statistics.json, from the average of the last checkpoint.

    Prompts, captions and transcripts are held-out ones; `real` is None where the shards hold latents alone.
    """
    began = time.perf_counter()
    config, _, model = load_for_inference(run_folder, ema=True)
    folder = RunFolder(Path(run_folder), State.RESUME).samples
    folder.mkdir(parents=True, exist_ok=True)
    gallery = _Gallery(model, config, folder, Draws(seed=seed, steps=steps, guidance=guidance_for(config)))
    samples = {
        "text": gallery.texts(num_texts),
        "image": gallery.media("image", num_images, words=CAPTION),
        "audio": gallery.media("audio", num_audio, words=TRANSCRIPT),
        "caption": gallery.captions("image", num_images),
        "video": gallery.media("video", num_videos, words=CAPTION),
        "motion": gallery.animations(num_videos // 2),
    }
    _write(folder / "samples.json", samples)
    _write(Path(run_folder) / "statistics.json", run_statistics(config))
    log.info("samples in %s, %.0f s", folder, time.perf_counter() - began)


@dataclass(frozen=True)
class Shown:
    """A held-out document, where it came from, and its place there."""

    document: Document
    source: Source
    index: int


@dataclass(frozen=True)
class _Gallery:
    model: Matformer
    config: RunConfig
    folder: Path
    draws: Draws

    def texts(self, count: int) -> Entries:
        """Continuations of held-out documents, of as many kinds as there are."""
        shown = _of_many_labels(self._heldout("text", None), count)
        prompts = [_prompt(one.document) for one in shown]
        rows = [Row(number, prompt=data) for number, (data, _) in enumerate(prompts)]
        self._continue(rows, want="text", draws=replace(self.draws, max_bytes=NEW_BYTES))
        return [
            {"prompt": _words(data), "patches": _patches(row), "prompt_patches": patches, "label": _label(one)}
            for one, row, (data, patches) in zip(shown, rows, prompts, strict=True)
        ]

    def media(self, modality: str, count: int, *, words: str) -> Entries:
        """What the model makes of held-out captions or transcripts, beside the medium itself."""
        shown = self._pairs(modality, count, direction="generate")
        if not shown:
            return []
        codec = load_codec(self.config, modality)
        rows = [Row(number, spans=one.document.spans[:1]) for number, one in enumerate(shown)]
        self._continue(rows, want=modality, draws=self.draws)
        return [
            {
                words: _text_of(one.document),
                **self._files(one, codec, stem=f"{modality}-{row.number}"),
                "generated": self._file(row.spans[-1], codec, name=f"{modality}-{row.number}-generated"),
            }
            for one, row in zip(shown, rows, strict=True)
        ]

    def captions(self, modality: str, count: int) -> Entries:
        """What the model says of held-out pictures; the likeliest bytes."""
        shown = self._pairs(modality, count, direction="given")
        if not shown:
            return []
        codec = load_codec(self.config, modality)
        rows = [Row(number, spans=one.document.spans[:1]) for number, one in enumerate(shown)]
        self._continue(rows, want="text", draws=replace(self.draws, temperature=0.0, max_bytes=CAPTION_BYTES))
        entries = []
        for one, row in zip(shown, rows, strict=True):
            files = self._files(one, codec, stem=f"{modality}-{row.number}")
            picture, written = files["real"] or files["reconstructed"], row.spans[-1]
            assert isinstance(written, TextSpan)
            entries.append({"image": picture, "truth": _text_of(one.document), "generated": _words(written.data)})
        return entries

    def animations(self, count: int) -> Entries:
        """Held-out pictures moved by their own fields, and by as many that the model draws; those that move most."""
        modality = self._motion()
        if modality is None:
            return []
        codecs = {name: load_codec(self.config, name) for name in self.config.model.media}
        looked_at = list(islice((one for one in self._heldout("documents", None) if _moves(one, modality)), LOOKED_AT))
        shown = sorted(looked_at, key=lambda one: -_motion_of(one, codecs[modality]))[:count]
        rows = [Row(number, spans=_before(one.document, modality)) for number, one in enumerate(shown)]
        fields = min(
            (len(one.document.spans) - len(row.spans) for one, row in zip(shown, rows, strict=True)), default=0
        )
        draws = replace(self.draws, steps=min(self.draws.steps, MOTION_STEPS))
        self._continue(rows, want=modality, draws=draws, spans=fields)
        return [
            {
                CAPTION: _text_of(one.document),
                "real": None,
                "reconstructed": self._animation(one.document.spans, codecs, name=f"{modality}-{row.number}-own"),
                "generated": self._animation(row.spans, codecs, name=f"{modality}-{row.number}-generated"),
            }
            for one, row in zip(shown, rows, strict=True)
        ]

    def _motion(self) -> str | None:
        """The modality whose latents are fields of motion, if the run has one."""
        for name in self.config.data.sources:
            for modality, coder in coders_of(manifest_of(self.config.data, name)).items():
                if coder.get("kind") == MotionField.kind and modality in self.config.model.media:
                    return modality
        return None

    def _animation(
        self, spans: Sequence[TextSpan | MediaSpan], codecs: dict[str, MediaCodec], *, name: str
    ) -> str | None:
        moved = animated(spans, codecs.__getitem__)
        if moved is None:
            return None
        write_mp4(self.folder / f"{name}.mp4", moved[0], fps=moved[1])
        return f"{name}.mp4"

    def _continue(self, rows: list[Row], *, want: str, draws: Draws, spans: int = 1) -> None:
        if rows:
            continue_rows(self.model, rows, want=want, config=self.config, draws=draws, max_spans=spans)

    def _heldout(self, form: str, direction: Literal["generate", "given"] | None) -> Iterator[Shown]:
        """Held-out documents of all sources of a form, each source in evaluation's shuffled order."""
        for name, declared in self.config.data.sources.items():
            if declared.form == form and declared.shows == "both":
                source = open_source(name, data=self.config.data, model=self.config.model, split="heldout")
                order = Permutation(len(source), 0, "heldout", name)
                for number in range(len(source)):
                    index = order[number]
                    yield Shown(source.pick(index, direction=direction), source, index)

    def _pairs(self, modality: str, count: int, *, direction: Literal["generate", "given"]) -> list[Shown]:
        """The first held-out pairs of a modality, one of each concept."""
        chosen: dict[str, Shown] = {}
        if modality not in self.config.model.media:
            return []
        for one in self._heldout("pairs", direction):
            concept = str(one.source.describe(one.index).get("concept", one.document.key))
            if _media_of(one.document).modality == modality:
                chosen.setdefault(concept, one)
            if len(chosen) == count:
                break
        return list(chosen.values())

    def _files(self, one: Shown, codec: MediaCodec, *, stem: str) -> dict[str, str | None]:
        """The medium itself, where the shard holds it, and through the autoencoder alone."""
        real = self._original(one, codec, name=f"{stem}-real")
        return {"real": real, "reconstructed": self._file(_media_of(one.document), codec, name=f"{stem}-reconstructed")}

    def _original(self, one: Shown, codec: MediaCodec, *, name: str) -> str | None:
        reader = one.source.reader
        members = set(reader.names(one.index))
        if codec.suffix == ".png" and (kind := next(iter(members & {"png", "webp", "jpg"}), None)):
            with Image.open(io.BytesIO(reader.view(one.index, kind))) as picture:
                picture.convert("RGB").save(self.folder / f"{name}.png")
            return f"{name}.png"
        if codec.suffix == ".wav" and (kind := next(iter(members & {"wav", "flac", "ogg"}), None)):
            wave, rate = soundfile.read(io.BytesIO(reader.view(one.index, kind)), dtype="float32")
            soundfile.write(self.folder / f"{name}.wav", wave, rate, subtype="PCM_16")
            return f"{name}.wav"
        return None

    def _file(self, span: TextSpan | MediaSpan, codec: MediaCodec, *, name: str) -> str:
        assert isinstance(span, MediaSpan)
        codec.write(self.folder / f"{name}{codec.suffix}", codec.decode(span.latent))
        return f"{name}{codec.suffix}"


def run_statistics(config: RunConfig) -> dict[str, Any]:
    """Patches, positions and spans of the first train batches: lengths in bytes, shares of positions."""
    loader = Loader(config, prefetch=False)
    batches = [batch for step in range(STATISTICS_STEPS) for batch in loader.next_global_batch(step)]
    loader.close()
    kinds = torch.cat([batch.grid.kind_BS for batch in batches])
    filled = kinds[kinds != Kind.PAD]
    shares = torch.bincount(filled, minlength=len(Kind)) / max(len(filled), 1)
    pieces = sum(len(batch.text.piece_U.unique()) for batch in batches)
    spans = {name: sum(len(batch.media[name].bucket_J) for batch in batches) for name in config.model.media}
    documents = sum(int((batch.grid.kind_BS == Kind.START).sum()) for batch in batches)
    return {
        "patches": _patch_statistics(batches),
        "sequences": {
            "sequences_counted": len(kinds),
            "latents": config.data.sequence_latents,
            "fill": round(float((kinds != Kind.PAD).float().mean()), 4),
            "documents_a_sequence": round(documents / len(kinds), 3),
            "spans_a_sequence": {
                name: round(number / len(kinds), 3) for name, number in {"text": pieces, **spans}.items()
            },
        },
        "share_of_positions": {kind.name.lower(): round(float(shares[kind]), 4) for kind in Kind if shares[kind] > 0},
        "share_of_latents_by_source": _shares_of_sources(batches),
    }


def _patch_statistics(batches: Sequence[Batch]) -> dict[str, float]:
    lengths = np.concatenate([torch.bincount(batch.text.patch_U).numpy() for batch in batches])
    if not len(lengths):
        return {"patches_counted": 0}
    percentiles = {f"symbols_percentile_{p}": float(np.percentile(lengths, p)) for p in (5, 50, 95)}
    return {
        "patches_counted": len(lengths),
        "mean_symbols": round(float(lengths.mean()), 4),
        "mean_bytes": round(sum(batch.num_bytes for batch in batches) / len(lengths), 4),
        **percentiles,
        "longest_symbols": int(lengths.max()),
    }


def _shares_of_sources(batches: Sequence[Batch]) -> dict[str, float]:
    """By the documents that patches, headers and closings belong to; starts are left out."""
    latents: Counter[str] = Counter()
    for batch in batches:
        text = batch.text
        first = torch.ones_like(text.patch_U, dtype=torch.bool)
        first[1:] = text.patch_U[1:] != text.patch_U[:-1]
        owners = [text.document_U[first]]
        for units in batch.media.values():
            stands = batch.grid.kind_BS.flatten()[units.noised_slot_Q] == Kind.NOISED  # not so under next_latent
            slots = torch.cat((units.noised_slot_Q[stands], units.clean_slot_Q))
            rows = torch.cat((units.noised_row_Q[stands], units.clean_row_Q))[_first_of_each(slots)]
            owners += [units.document_J[units.span_N[rows]], units.document_J, units.document_J]
        counts = torch.bincount(torch.cat(owners), minlength=batch.num_documents).tolist()
        for key, count in zip(batch.document_keys, counts, strict=True):
            latents[key.split("/", 1)[0]] += count
    total = max(sum(latents.values()), 1)
    return {name: round(count / total, 4) for name, count in latents.most_common()}


def _first_of_each(slots: Tensor) -> Tensor:
    """Where each number stands first: patches that share a latent are one."""
    return torch.from_numpy(np.unique(slots.numpy(), return_index=True)[1])


def _prompt(document: Document) -> tuple[bytes, int]:
    """The first bytes of a document, up to the end of a patch, and their number of patches; never all of it."""
    span = document.spans[0]
    assert isinstance(span, TextSpan)
    ends = np.cumsum(span.patch_lengths)
    patches = int(np.searchsorted(ends, min(PROMPT_BYTES, len(span.data) // 2), side="right"))
    return span.data[: int(ends[patches - 1]) if patches else 0], patches


def _of_many_labels(shown: Iterator[Shown], count: int, *, looked_at: int = 200) -> list[Shown]:
    """The first document of each label among the first few, then more of them until there are `count`."""
    fresh: dict[str, Shown] = {}
    others: list[Shown] = []
    for number, one in enumerate(shown):
        if number == looked_at or len(fresh) == count:
            break
        if _label(one) in fresh:
            others.append(one)
        elif len(_prompt(one.document)[0]) >= PROMPT_BYTES // 2:
            fresh[_label(one)] = one
    return [*fresh.values(), *others][:count]


def _label(one: Shown) -> str:
    facts = one.source.describe(one.index)
    return ", ".join(str(facts[name]) for name in ("source", "lang") if name in facts) or one.source.name


def _patches(row: Row) -> list[str | dict[str, str]]:
    span = row.spans[-1]
    assert isinstance(span, TextSpan)
    ends = np.cumsum(span.patch_lengths)
    patches = [span.data[first:last] for first, last in zip([0, *ends[:-1]], ends, strict=True)]
    return [_patch(patch) for patch in patches if patch]  # `<end>` alone holds no byte


def _patch(data: bytes) -> str | dict[str, str]:
    """As text, or its bytes where they are no UTF-8 by themselves."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return {"bytes": base64.b64encode(data).decode()}


def _words(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def _text_of(document: Document) -> str:
    return _words(b"".join(span.data for span in document.spans if isinstance(span, TextSpan)))


def _media_of(document: Document) -> MediaSpan:
    return next(span for span in document.spans if isinstance(span, MediaSpan))


def _before(document: Document, modality: str) -> tuple[TextSpan | MediaSpan, ...]:
    """What stands before the first span of a modality, given."""
    first = next(i for i, one in enumerate(document.spans) if isinstance(one, MediaSpan) and one.modality == modality)
    return given(document.spans[:first])


def _moves(one: Shown, modality: str) -> bool:
    """Whether fields of motion stand behind a picture in it."""
    media = [span.modality for span in one.document.spans if isinstance(span, MediaSpan)]
    return modality in media[1:]


def _motion_of(one: Shown, codec: MediaCodec) -> float:
    """Mean length of its vectors, in pixels."""
    latents = [s.latent for s in one.document.spans if isinstance(s, MediaSpan) and s.modality == codec.modality]
    return float(np.mean([codec.decode(latent)[:INTRA].abs().mean() for latent in latents]))


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
