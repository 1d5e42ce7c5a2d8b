"""Denoising in few steps by diffusers' DPM-Solver++ of second order. Source: Lu 2022 (arXiv 2211.01095), 2M."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from matformer.config.schema import MediaObjective
from matformer.errors import ConfigError
from matformer.layers.noise_levels import NUM_INDICES


def denoise_by_dpm(
    velocity: Callable[[Tensor, float], Tensor],
    x: Tensor,
    *,
    steps: int,
    objective: MediaObjective,
    first_log_snr: float,
) -> Tensor:
    """x_0 of x_1 = `x`; `velocity` is eps - x on the straight path, v on DDPM's circle, as in `denoiser.denoise`.

    flow: sigmas from 0.999 down, evenly. DDPM: indices evenly from `first_log_snr` down. Raises ConfigError as
    `scheduler_of`.
    """
    scheduler = scheduler_of(objective, steps=steps, first_log_snr=first_log_snr)
    for place, index in enumerate(scheduler.timesteps):
        time = float(scheduler.sigmas[place]) if objective == "flow" else (float(index) + 0.5) / NUM_INDICES
        x = scheduler.step(velocity(x, time), index, x, return_dict=False)[0]
    return x


def scheduler_of(objective: MediaObjective, *, steps: int, first_log_snr: float) -> Any:  # noqa: ANN401
    """diffusers' scheduler, its steps set.

    Raises ConfigError without diffusers, or for more steps than there are indices of DDPM to take: diffusers rounds to
    whole ones, and a step from an index to the same one divides by zero.
    """
    try:
        from diffusers.schedulers.scheduling_dpmsolver_multistep import (  # noqa: PLC0415  optional: the extra `media`
            DPMSolverMultistepScheduler,
        )
    except ImportError as error:
        raise ConfigError(
            f"--solver dpm needs diffusers, got {error}; install it with `pip install -e '.[media]'` in the "
            "project's folder, or choose --solver heun"
        ) from error
    if objective == "flow":
        scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
        scheduler.set_timesteps(steps)
        return scheduler
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2", lambda_min_clipped=first_log_snr / 2
    )
    scheduler.set_timesteps(steps)
    most = int(scheduler.timesteps[0])  # to index 0 in steps of at least 1
    if steps > most:
        raise ConfigError(
            f"--steps must be at most {most} for --solver dpm under {objective}, got {steps}; lower --steps or choose "
            "--solver heun"
        )
    return scheduler
