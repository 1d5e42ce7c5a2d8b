"""Waves of one channel [samples] at full scale 1: another rate, silence cut off, one loudness."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float

LOUDNESS = 0.08
PEAK = 0.99
SILENCE = 0.002
FFT_BLOCK = 16


def levelled(wave: Float[np.ndarray, " samples"]) -> Float[np.ndarray, " samples"]:
    """The same sound at a root mean square of 0.08 of full scale, less where its peak would pass 0.99."""
    power = float(np.sqrt(np.mean(np.square(wave)))) or 1.0
    peak = float(np.abs(wave).max()) or 1.0
    return (wave * min(LOUDNESS / power, PEAK / peak)).astype(np.float32)


def resampled(wave: Float[np.ndarray, " n"], *, rate: int, to: int) -> Float[np.ndarray, " m"]:
    """From `rate` to another, in Hz, by cutting or padding the spectrum."""
    if rate == to:
        return wave
    step = math.gcd(rate, to)
    down, up = rate // step, to // step
    blocks = -(-len(wave) // (down * FFT_BLOCK)) * FFT_BLOCK  # lengths without large prime factors: 100 times faster
    spectrum = np.fft.rfft(wave, blocks * down)[: blocks * up // 2 + 1]
    return np.fft.irfft(spectrum, blocks * up)[: len(wave) * up // down] * (up / down)


def trimmed(wave: Float[np.ndarray, " n"]) -> Float[np.ndarray, " m"]:
    """Without the silence at either end; empty if there is nothing else."""
    loud = np.flatnonzero(np.abs(wave) > SILENCE)
    return wave[loud[0] : loud[-1] + 1] if len(loud) else wave[:0]
