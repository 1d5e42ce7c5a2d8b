"""The arms of the ablation of text front ends: their configs, and what has to be made for them before they can run."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from jobs import arm_file, load_checked

from matformer.config.schema import RunConfig
from matformer.data.entropy import entropies, load_entropy_model
from matformer.data.matching import TOLERANCE, matched, pick_threshold
from matformer.data.patching import EntropyPatcher, build_patcher, text_symbols
from matformer.data.pieces import load_pieces, train_pieces
from matformer.data.sources import TextSpan, open_source
from matformer.errors import ConfigError
from matformer.files import write_whole
from matformer.parallel.seeds import Permutation

log = logging.getLogger("ablate.arms")

PROJECT = Path(__file__).resolve().parents[2]
FOLDER = PROJECT / "configs" / "ablation" / "text"

BYTES = ("static", "space", "entropy", "entropy_monotonic", "bpe")
ARMS = (*BYTES, "tokens", "masked_diffusion", "block_diffusion")
PIECES = ("bpe", "tokens")
"""Kinds of patcher that share a vocabulary."""
REFERENCE = "static"
UNMATCHED = ("space",)
"""Arms whose patches are as long as they come."""

SYMBOLS_A_LATENT = 4.0
MATCHED_ON_BYTES, LEARNED_FROM_BYTES = 1_000_000, 8_000_000
"""Of train, documents drawn from all of it: what patches are counted on, and what a vocabulary is learned from."""


@dataclass
class Prepared:
    """What was made for the arms, kept as prepared.json. made_from: what it depends on."""

    made_from: dict[str, str]
    thresholds: dict[str, float] = field(default_factory=dict)
    pieces: str = ""
    vocabulary: int = 0

    def overrides(self, arm: str, kind: str) -> list[str]:
        """The keys of an arm with this kind of patcher that only preparing could tell."""
        found = [f"data.patcher.threshold={self.thresholds[kind]}"] if kind in self.thresholds else []
        if kind in PIECES:
            found.append(f"data.patcher.sentencepiece={self.pieces}")
        if arm == "tokens":
            found.append(f"model.text.vocabulary={self.vocabulary}")
        return found


def config_file(arm: str) -> Path:
    """The run file of an arm. Raises ConfigError if there is none."""
    return arm_file(arm, arms=ARMS, folder=FOLDER)


def load_arm(arm: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The checked config of an arm. Raises ConfigError."""
    return load_checked(config_file(arm), overrides)


def train_texts(config: RunConfig) -> Iterator[bytes]:
    """Documents of train in a fixed shuffled order, each once; no seed of the run enters."""
    (name,) = config.data.sources
    source = open_source(name, data=config.data, model=config.model, split="train")
    order = Permutation(len(source), 0, "ablation", name)
    for number in range(len(source)):
        (span,) = source.pick(order[number]).spans
        assert isinstance(span, TextSpan), "the arms learn from text alone"
        yield span.data


def taken(texts: Iterator[bytes], *, num_bytes: int) -> list[bytes]:
    """The next documents, until `num_bytes` are there."""
    found, size = [], 0
    for text in texts:
        found.append(text)
        size += len(text)
        if size >= num_bytes:
            break
    return found


def symbols_a_latent(config: RunConfig, sample: Sequence[bytes]) -> float:
    """Symbols (bytes and `<end>`) a patch in the mean."""
    patcher = build_patcher(config.data.patcher)
    return sum(len(text) + 1 for text in sample) / sum(len(patcher.lengths(text_symbols(text))) for text in sample)


def require_matched(found: dict[str, float]) -> None:
    """Raises ConfigError for an arm whose patches are not of the wanted length."""
    for arm, mean in found.items():
        if arm not in UNMATCHED and abs(mean / SYMBOLS_A_LATENT - 1) > TOLERANCE:
            raise ConfigError(
                f"the patches of {arm} must hold {SYMBOLS_A_LATENT:g} symbols within {TOLERANCE:.0%} in the mean, got "
                f"{mean:.3f}; change {config_file(arm)} or remove prepared.json"
            )


def prepare(out: Path, arms: Sequence[str], overrides: Sequence[str] = ()) -> Prepared:
    """Thresholds and the vocabulary that these arms need; what stands in `out` and is of the same data is kept."""
    base = load_arm(REFERENCE, overrides)
    configs = {arm: load_arm(arm, overrides) for arm in arms}
    models = {c.data.patcher.entropy_model for c in configs.values() if c.data.patcher.entropy_model}
    prepared = _kept(out / "prepared.json", made_from=_origin(base, models=models))
    for config in configs.values():
        kind = config.data.patcher.kind
        if kind.startswith("entropy") and kind not in prepared.thresholds:
            prepared.thresholds[kind] = _threshold(config, texts=train_texts(base))
            log.info("%s: threshold %.4f", kind, prepared.thresholds[kind])
        if kind in PIECES and not (prepared.pieces and Path(prepared.pieces).is_file()):
            _learn_pieces(config, prepared, texts=train_texts(base), file=out / "pieces.model")
            log.info("%s: %d pieces", prepared.pieces, prepared.vocabulary)
    write_whole(out / "prepared.json", json.dumps(asdict(prepared), indent=1).encode())
    return prepared


def _origin(config: RunConfig, *, models: set[str]) -> dict[str, str]:
    """Whatever the numbers depend on."""
    (source,) = config.data.sources.values()
    manifest = Path(config.data.root, source.path, "train", "manifest.json").read_bytes()
    amounts = f"{SYMBOLS_A_LATENT} {MATCHED_ON_BYTES} {LEARNED_FROM_BYTES} {config.data.patcher.max_patch_bytes}"
    found = {"text": hashlib.sha256(manifest).hexdigest(), "amounts": amounts}
    fingerprints = [load_entropy_model(Path(model)).fingerprint for model in sorted(models)]
    return found | ({"entropy models": " ".join(fingerprints)} if fingerprints else {})


def _kept(path: Path, *, made_from: dict[str, str]) -> Prepared:
    """What was prepared before; nothing of it if its data were others."""
    if path.is_file():
        before = Prepared(**json.loads(path.read_text(encoding="utf-8")))
        both = before.made_from.keys() & made_from.keys()
        if all(before.made_from[name] == made_from[name] for name in both):
            before.made_from |= made_from
            return before
    return Prepared(made_from)


def _threshold(config: RunConfig, *, texts: Iterator[bytes]) -> float:
    patcher = build_patcher(config.data.patcher)
    assert isinstance(patcher, EntropyPatcher), "only these have a threshold"
    sample = taken(texts, num_bytes=MATCHED_ON_BYTES)
    nats = entropies(patcher.model, sample)
    return pick_threshold(list(zip(sample, nats, strict=True)), patcher=patcher, mean_patch=SYMBOLS_A_LATENT)


def _learn_pieces(config: RunConfig, prepared: Prepared, *, texts: Iterator[bytes], file: Path) -> None:
    """The vocabulary is matched on documents that it does not learn from."""
    sample, learned = taken(texts, num_bytes=MATCHED_ON_BYTES), taken(texts, num_bytes=LEARNED_FROM_BYTES)
    longest = config.data.patcher.max_patch_bytes
    pieces = matched(
        lambda vocabulary: train_pieces(learned, vocabulary=vocabulary, longest=longest),
        sample,
        mean=SYMBOLS_A_LATENT,
    )
    write_whole(file, pieces.model)
    prepared.pieces, prepared.vocabulary = str(file), len(load_pieces(file))
