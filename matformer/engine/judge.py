"""The judge of generated pictures: a classifier of a data set's real ones, learned once and kept beside the data."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from jaxtyping import Float, Int
from torch import Tensor

from matformer.config.schema import RunConfig
from matformer.data.sources import MediaSpan, Source, open_source
from matformer.engine.classifier import Classifier, by_concept, seen, train_classifier
from matformer.engine.frechet import Gaussian, fitted
from matformer.engine.media import MediaCodec, load_codec
from matformer.errors import DataError
from matformer.files import write_whole

log = logging.getLogger(__name__)

VERSION, STEPS = 1, 1000
UNKNOWN = "unknown"
"""What a data set says of a picture that belongs to no group: it is not judged."""


@dataclass(frozen=True)
class Judge:
    """A classifier, and how the features of the train pictures lie (each concept counts as one)."""

    classifier: Classifier
    train: Gaussian

    @property
    def labels(self) -> tuple[str, ...]:
        return self.classifier.labels


@dataclass(frozen=True)
class Pictures:
    """Pictures as the classifier sees them, through the autoencoder, with the number of their label."""

    pixels: Float[Tensor, "n 3 side side"]
    label_n: Int[Tensor, " n"]
    concepts: tuple[str, ...]
    labels: tuple[str, ...]


def load_judge(config: RunConfig, *, modality: str) -> Judge:
    """The judge of a run's data, from data.root/classifier-<fingerprint>.safetensors; learned if it is not there.

    Learning takes less than two CPU minutes on the demo. Raises DataError if the data say no group of their pictures.
    """
    kept = Path(config.data.root) / f"classifier-{_fingerprint(config, modality=modality)}.safetensors"
    if kept.is_file():
        return _read(kept)
    log.info("learning a classifier of the real pictures: %s", kept)
    pictures = labelled_pictures(config, modality=modality)
    classifier = train_classifier(
        pictures.pixels, pictures.label_n, concepts=pictures.concepts, labels=pictures.labels, steps=STEPS
    )
    features, _ = classifier.judge(pictures.pixels)
    judge = Judge(classifier, fitted(features.double().numpy(), weights=by_concept(pictures.concepts)))
    _keep(judge, kept)
    return judge


def labelled_pictures(config: RunConfig, *, modality: str) -> Pictures:
    """All train pictures whose group is known. Raises DataError if there are not two groups."""
    codec = load_codec(config, modality)
    pixels, groups, concepts = [], [], []
    for source in picture_sources(config, modality=modality, split="train"):
        for index in range(len(source)):
            facts = source.describe(index)
            group = group_of(facts)
            if group is not None:
                pixels.append(seen(decoded(source, index, codec=codec)[None])[0])
                groups.append(group)
                concepts.append(concept_of(facts))
    labels = sorted(set(groups))
    if len(labels) < 2:
        raise DataError(
            f"pictures that are judged must be of at least two groups, got {labels} in the pairs of {modality} below "
            f"{config.data.root}; prepare the data with a `group` for each picture, or ask for no judged samples"
        )
    number = {label: place for place, label in enumerate(labels)}
    label_n = torch.tensor([number[group] for group in groups])
    return Pictures(torch.stack(pixels), label_n, tuple(concepts), tuple(labels))


def picture_sources(config: RunConfig, *, modality: str, split: str) -> Iterator[Source]:
    """The run's sources of pairs of this modality."""
    for name, source in config.data.sources.items():
        if source.form == "pairs" and source.modality == modality:
            yield open_source(name, data=config.data, model=config.model, split=split)


def decoded(source: Source, index: int, *, codec: MediaCodec) -> Float[Tensor, "3 y x"]:
    """A stored picture as its latent gives it back."""
    document = source.pick(index, direction="generate")
    return codec.decode(next(span.latent for span in document.spans if isinstance(span, MediaSpan)))


def group_of(facts: dict[str, Any]) -> str | None:
    """The label of a picture, if it has one."""
    group = facts.get("group")
    return None if group in (None, UNKNOWN) else str(group)


def concept_of(facts: dict[str, Any]) -> str:
    """What a picture shows, without variants."""
    return str(facts.get("base") or facts["concept"])


def _fingerprint(config: RunConfig, *, modality: str) -> str:
    """Of everything the judge depends on: the train pictures, the steps, and the version of how they are learned."""
    digest = hashlib.sha256(f"{VERSION} {modality} {STEPS}".encode())
    for source in picture_sources(config, modality=modality, split="train"):
        digest.update((source.reader.folder / "manifest.json").read_bytes())
    return digest.hexdigest()[:16]


def _keep(judge: Judge, path: Path) -> None:
    """Write beside the data; a data set that is read-only costs the minutes again, not the evaluation."""
    tensors = {f"classifier.{name}": value for name, value in judge.classifier.state_dict().items()}
    train = judge.train._asdict().items()
    tensors |= {f"train.{name}": torch.from_numpy(np.ascontiguousarray(value)) for name, value in train}
    try:
        write_whole(path, safetensors.torch.save(tensors, metadata={"labels": json.dumps(judge.labels)}))
    except OSError as error:
        log.warning("the classifier is not kept in %s: %s", path, error)


def _read(path: Path) -> Judge:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            labels: Sequence[str] = json.loads(file.metadata()["labels"])
    except (OSError, safetensors.SafetensorError) as error:
        raise DataError(f"{path} must be readable, got {error}; delete it, and it is made again") from error
    classifier = Classifier(labels)
    own = {name.removeprefix("classifier."): value for name, value in tensors.items() if name.startswith("classifier.")}
    classifier.load_state_dict(own)
    train = Gaussian(tensors["train.mean"].numpy(), tensors["train.covariance"].numpy())
    return Judge(classifier.eval().requires_grad_(False), train)
