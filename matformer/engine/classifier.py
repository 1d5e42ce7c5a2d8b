"""A small convolutional network that says what kind of thing a picture shows. B pictures, F features, N labels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as functional
from jaxtyping import Float, Int
from torch import Tensor, nn

from matformer.parallel.seeds import generator

SIDE = 32
"""Pixels that it looks at: larger pictures are averaged."""
BATCH, LARGEST_RATE, WEIGHT_DECAY, SMOOTHING, FURTHEST = 64, 3e-3, 0.05, 0.1, 3
_CHUNK = 256


class Classifier(nn.Module):
    """Pictures of three channels, -1 to 1, any size -> a score for each label."""

    def __init__(self, labels: Sequence[str], *, width: int = 16, num_features: int = 64) -> None:
        super().__init__()
        self.labels = tuple(labels)
        self.body = nn.Sequential(
            *_convolution(3, width),
            *_convolution(width, 2 * width, stride=2),
            *_convolution(2 * width, 2 * width),
            *_convolution(2 * width, 4 * width, stride=2),
            *_convolution(4 * width, 4 * width),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4 * width, num_features),
            nn.ReLU(),
        )
        self.head = nn.Linear(num_features, len(self.labels))

    def forward(self, pictures: Float[Tensor, "B 3 y x"]) -> Float[Tensor, "B N"]:
        return self.head(self.body(seen(pictures)))

    @torch.no_grad()
    def judge(self, pictures: Float[Tensor, "B 3 y x"]) -> tuple[Float[Tensor, "B F"], Int[Tensor, " B"]]:
        """Features, and the likeliest label's number."""
        self.eval()
        features = torch.cat([self.body(seen(part)) for part in pictures.split(_CHUNK)])
        return features, self.head(features).argmax(1)


def seen(pictures: Float[Tensor, "B 3 y x"]) -> Float[Tensor, "B 3 side side"]:
    """What of a picture it looks at; doing it twice changes nothing."""
    return functional.adaptive_avg_pool2d(pictures.clamp(-1, 1), SIDE)


def train_classifier(
    pictures: Float[Tensor, "n 3 y x"],
    label_n: Int[Tensor, " n"],
    *,
    concepts: Sequence[str],
    labels: Sequence[str],
    steps: int,
    seed: int = 0,
) -> Classifier:
    """Fit by AdamW and one cycle of the rate, on pictures that are shifted and mirrored.

    A concept with k pictures is drawn as often as sqrt(k): else the many shades of a few persons are most of what is
    seen. The same arguments give the same weights on one machine.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = Classifier(labels)
    pictures, dice = seen(pictures), generator(seed, "classifier")
    chance = by_concept(concepts) ** 0.5
    chance = chance / chance.sum()
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LARGEST_RATE, total_steps=steps)
    for _ in range(steps):
        rows = torch.from_numpy(dice.choice(len(pictures), BATCH, p=chance))
        scores = classifier(_moved(pictures[rows], dice=dice))
        loss = functional.cross_entropy(scores, label_n[rows], label_smoothing=SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return classifier.eval().requires_grad_(False)


def by_concept(concepts: Sequence[str]) -> Float[np.ndarray, " n"]:
    """A weight for each picture: those of one concept share 1."""
    counts: dict[str, int] = defaultdict(int)
    for concept in concepts:
        counts[concept] += 1
    return np.array([1 / counts[concept] for concept in concepts])


def _convolution(channels: int, width: int, *, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]


def _moved(pictures: Float[Tensor, "B 3 side side"], *, dice: np.random.Generator) -> Float[Tensor, "B 3 side side"]:
    """Each mirrored or not, all shifted by one step: what leaves at one side is replaced by the edge."""
    mirrored = torch.from_numpy(dice.random(len(pictures)) < 0.5)[:, None, None, None]
    down, right = dice.integers(0, 2 * FURTHEST + 1, 2).tolist()
    wide = functional.pad(torch.where(mirrored, pictures.flip(3), pictures), [FURTHEST] * 4, mode="replicate")
    return wide[:, :, down : down + SIDE, right : right + SIDE]
