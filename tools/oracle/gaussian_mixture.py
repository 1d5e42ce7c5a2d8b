"""Do the real modules learn the optimal denoiser of a mixture of Gaussians, and does the engine sample the mixture?

    python tools/oracle/gaussian_mixture.py [--steps 600] [--arms flow ddpm_v] [--json]

A document is one sound of two patches with two scalars each, so that what is known of the one tells of the other. The
whole model is trained by the engine's own step on plain PyTorch, one thread; values, noise and times are drawn afresh
each step, t uniform. The excess is the mean square of the distance between the model's prediction and the optimal one,
over the loss of the optimal one, at the held-out times (k - 1/2) / 8. Samples come from `draw_media`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple, get_args

import numpy as np
import torch
from gaussians import Mixture, three
from jaxtyping import Float
from rich.console import Console
from rich.table import Table

from matformer.config.schema import MediaObjective, RunConfig
from matformer.data.packing import DrawNoise, Noise, Piece, Place, draw_zeros, pack_batch
from matformer.data.sources import Document, MediaSpan
from matformer.engine.baselines import TIMES
from matformer.engine.denoiser import draw_media
from matformer.engine.draws import Draws, Row
from matformer.engine.step import optimizer_step
from matformer.hosts.plain import PlainHost
from matformer.layers.noise_levels import levels, on_index
from matformer.model import Matformer
from matformer.parallel.seeds import draw_times, generator
from matformer.parcels import Batch

PATCHES, SCALARS, NAME = 2, 2, "sound"
DIMS = PATCHES * SCALARS
SPANS = 256
"""Documents of a step."""
STEPS, SAMPLES = 600, 16_384
CHUNK = 4096
"""Documents of one forward in evaluation and sampling."""


class Arm(NamedTuple):
    """What is trained: an objective, and under `next_latent` what its Coda predicts."""

    objective: str
    predicts: MediaObjective


ARMS = {
    **{name: Arm(name, name) for name in get_args(MediaObjective)},
    **{f"next_latent ({name})": Arm("next_latent", name) for name in ("flow", "ddpm_v")},
}


@dataclass(frozen=True)
class Measured:
    """optimal: loss of the best denoiser. excess: of the model over it, relative. mean_error: distance of the samples'
    mean over the root of the trace of the covariance. covariance_error: Frobenius distance over Frobenius norm.
    floor_*: the same two of as many draws from the mixture itself.
    """

    arm: str
    steps: int
    seconds: float
    optimal: float
    excess: float
    first_excess: float
    mean_error: float
    covariance_error: float
    floor_mean_error: float
    floor_covariance_error: float


def measure(name: str, *, steps: int, samples: int, seed: int = 0) -> Measured:
    """Train one arm and hold it against the closed form."""
    mixture, run = three(DIMS, seed=1), run_of(ARMS[name], steps=steps, seed=seed)
    host = PlainHost(run)
    model = Matformer(run.model, trunk=host.build_trunk())
    host.prepare(model)
    first, _ = excess(model, run, mixture)
    began = time.process_time()
    train(host, run, mixture)
    seconds = time.process_time() - began
    last, optimal = excess(model, run, mixture)
    drawn = sample(model, run, number=samples)
    truth = mixture.draw(samples, np.random.default_rng(5))
    return Measured(name, steps, seconds, optimal, last, first, *errors(drawn, mixture), *errors(truth, mixture))


def run_of(arm: Arm, *, steps: int, seed: int) -> RunConfig:
    """A tiny model of one modality; no channel is told its variance."""
    media = {
        "channels": SCALARS,
        "rank": 1,
        "patch": 1,
        "buckets": [[PATCHES]],
        "coda_width": 64,
        "objective": arm.objective,
        "next_latent": {"predicts": arm.predicts},
    }
    atto = {"width": 32, "layers": 2, "heads": 2, "kv_heads": 2, "ffn_width": 64, "rotary_pairs": (2, 2, 2, 2)}
    text = {"width": 16, "heads": 1, "ffn_width": 16, "preludio_layers": 0, "coda_layers": 1, "ngram_rows": 8}
    return RunConfig.model_validate(
        {
            "name": "mixture",
            "seed": seed,
            "model": {"atto": atto, "text": text, "media": {NAME: media}},
            "data": {
                "root": "none",
                "lanes": 1,
                "sequence_latents": 8,
                "sources": {"none": {"path": "none", "form": "text", "weight": 1.0}},
            },
            "parallel": {"host": "plain", "threads": 1},
            "train": {
                "steps": steps,
                "global_batch": 1,
                "micro_batch": 1,
                "lr": 4e-3,
                "warmup_steps": steps // 20,
                "min_lr_ratio": 0.01,
                "weight_decay": 0.0,
            },
        }
    )


def train(host: PlainHost, run: RunConfig, mixture: Mixture) -> None:
    """All steps of the run, each on new draws of the mixture, of epsilon and of t."""
    dice, plain = generator(run.seed, "mixture"), batch_of(np.zeros((SPANS, DIMS)), run, draw=as_asked)
    units, flows = plain.media[NAME], run.model.media[NAME].prediction == "flow"
    for step in range(run.train.steps):
        times = draw_times(dice, tuple(units.time_T.shape), sampler="uniform", shift=1.0)
        times = times if flows else np.array([on_index(t) for t in times])
        epsilon = dice.standard_normal(tuple(units.noise_QF.shape))
        batch = filled(plain, values=mixture.draw(SPANS, dice), epsilon=epsilon, times=times)
        optimizer_step(host, [batch], config=run, step=step)


def batch_of(values: Float[np.ndarray, "n D"], run: RunConfig, *, draw: DrawNoise) -> Batch:
    """Each draw of the mixture a document of one generated span, in a row of its own."""
    spans = [
        MediaSpan(NAME, np.asarray(value.reshape(PATCHES, SCALARS).T, np.float32), 0, "generate") for value in values
    ]
    rows = [[Piece(Document(f"d{i}", (span,)), Place(), Place(1))] for i, span in enumerate(spans)]
    return pack_batch(rows, [draw] * len(rows), model=run.model, sequence_latents=3 + PATCHES)


def as_asked(key: str, span: int, shape: tuple[int, ...]) -> Noise:
    """Zeros, as many noises as the config has."""
    return Noise(False, 0.0 if len(shape) == 2 else np.zeros(shape[:-1]), np.zeros(shape, np.float32))


def filled(batch: Batch, *, values: np.ndarray, epsilon: np.ndarray, times: np.ndarray) -> Batch:
    """The same batch with other latents, noise and times."""
    units = replace(
        batch.media[NAME],
        value_NF=torch.from_numpy(values.reshape(-1, SCALARS)).float(),
        noise_QF=torch.from_numpy(epsilon).float(),
        time_T=torch.from_numpy(times).float(),
    )
    return replace(batch, media={NAME: units})


@torch.no_grad()
def excess(model: Matformer, run: RunConfig, mixture: Mixture, *, number: int = CHUNK) -> tuple[float, float]:
    """(mean |model - optimal|^2 / mean |target - optimal|^2, the latter), over `number` draws at each held-out time."""
    media, dice = run.model.media[NAME], np.random.default_rng(3)
    apart, best, plain = [], [], batch_of(np.zeros((number, DIMS)), run, draw=draw_zeros)
    for t in TIMES:
        values, epsilon = mixture.draw(number, dice), dice.standard_normal((number, DIMS))
        time = float(np.float32(t if media.prediction == "flow" else on_index(t)))
        alpha, sigma = (float(level) for level in levels(torch.tensor(time).double(), objective=media.prediction))
        clean = expected_clean(mixture, values, alpha * values + sigma * epsilon, alpha, sigma, causal=media.causal)
        optimal = prediction(clean, alpha * values + sigma * epsilon, alpha, sigma, objective=media.prediction)
        wanted = prediction(values, alpha * values + sigma * epsilon, alpha, sigma, objective=media.prediction)
        times = np.full(plain.media[NAME].time_T.shape, time)
        batch = filled(plain, values=values, epsilon=epsilon.reshape(-1, SCALARS), times=times)
        found = model.code[NAME](model.latents(batch).flatten(0, 1), batch.media[NAME]).double().numpy()
        apart.append(np.square(found.reshape(-1, DIMS) - optimal).mean())
        best.append(np.square(wanted - optimal).mean())
    return float(np.mean(apart) / np.mean(best)), float(np.mean(best))


def expected_clean(
    mixture: Mixture, values: np.ndarray, noised: np.ndarray, alpha: float, sigma: float, *, causal: bool
) -> np.ndarray:
    """E[x | what the model sees]: all patches noised, or each patch noised and those before it clean."""
    if not causal:
        return mixture.expected(noised, np.full(DIMS, alpha), np.full(DIMS, sigma))
    found = []
    for first in range(0, DIMS, SCALARS):
        seen = np.concatenate([values[:, :first], noised[:, first : first + SCALARS]], axis=1)
        alphas, sigmas = (
            np.r_[np.full(first, own), np.full(SCALARS, level)] for own, level in ((1, alpha), (0, sigma))
        )
        found.append(mixture.expected(seen, alphas, sigmas)[:, first:])
    return np.concatenate(found, axis=1)


def prediction(
    clean: np.ndarray, noised: np.ndarray, alpha: float, sigma: float, *, objective: MediaObjective
) -> np.ndarray:
    """What an objective asks for where x is `clean`: eps - x, eps, or alpha eps - sigma x."""
    noise = (noised - alpha * clean) / sigma
    if objective == "ddpm_eps":
        return noise
    return noise - clean if objective == "flow" else alpha * noise - sigma * clean


def sample(model: Matformer, run: RunConfig, *, number: int) -> Float[np.ndarray, "n D"]:
    """Samples of the engine, Heun in 16 steps."""
    draws, found = Draws(seed=7, steps=16, guidance=1.0, solver="heun"), []
    for first in range(0, number, CHUNK):
        rows = [Row(i) for i in range(first, min(first + CHUNK, number))]
        spans = draw_media(model, rows, modality=NAME, buckets=[0] * len(rows), config=run, draws=draws)
        found += [span.latent.T.reshape(-1) for span in spans]
    return np.array(found, np.float64)


def errors(drawn: Float[np.ndarray, "n D"], mixture: Mixture) -> tuple[float, float]:
    """Of the mean, relative to the root of the trace of the covariance; of the covariance, relative to its norm."""
    mean, covariance = mixture.moments()
    of_mean = np.linalg.norm(drawn.mean(0) - mean) / np.sqrt(np.trace(covariance))
    of_covariance = np.linalg.norm(np.cov(drawn.T, bias=True) - covariance) / np.linalg.norm(covariance)
    return float(of_mean), float(of_covariance)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and measure each arm; the exit code."""
    asked = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    found = [
        measure(name, steps=asked.steps, samples=asked.samples, seed=seed)
        for name in asked.arms
        for seed in asked.seeds
    ]
    Console(width=130).print(table(found))
    if asked.json:
        sys.stdout.write(json.dumps([asdict(one) for one in found]) + "\n")
    return 0


def table(found: Sequence[Measured]) -> Table:
    """One row an arm."""
    head = ("objective", "CPU s", "optimal loss", "excess at first", "excess", "mean off by", "covariance off by")
    shown = Table(*head, box=None)
    for one in found:
        shown.add_row(
            one.arm,
            f"{one.seconds:.0f}",
            f"{one.optimal:.4f}",
            f"{one.first_excess:.1%}",
            f"{one.excess:.2%}",
            f"{one.mean_error:.2%} ({one.floor_mean_error:.2%})",
            f"{one.covariance_error:.2%} ({one.floor_covariance_error:.2%})",
        )
    return shown


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of training ({STEPS})")
    parser.add_argument("--samples", type=int, default=SAMPLES, help=f"drawn by the engine ({SAMPLES})")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
