"""Small convolutional autoencoders of pictures and sound that we train ourselves.

Both begin and end with a closed-form one (`base`: patches or MDCT frames on principal axes) and learn, at the
resolution of the latents, what convolutions over neighbouring cells add to it: latent = linear + net(cells),
cells = linear + net(latent). The nets' last layers begin at zero, so an untrained one is the closed-form one, and
training starts from there: a minute is enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from matformer.autoencoders.base import LOGVAR_RANGE, Autoencoder, Moments
from matformer.autoencoders.mdct_pca import MDCTPCA, inverse_mdct, mdct
from matformer.autoencoders.patch_pca import PatchPCA
from matformer.errors import DataError

START_LOGVAR = -6.0
Medium = Literal["image", "audio"]


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), three cells wide along each axis."""

    def __init__(self, width: int, *, rank: int) -> None:
        super().__init__()
        conv = nn.Conv2d if rank == 2 else nn.Conv1d
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for _ in range(2))
        self.convs = nn.ModuleList(conv(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Float[Tensor, "B D *grid"]) -> Float[Tensor, "B D *grid"]:
        h = x
        for norm, conv in zip(self.norms, self.convs, strict=True):
            h = conv(functional.silu(norm(h)))
        return x + h


@final
class ConvolutionalAutoencoder(Autoencoder):
    """[B, 3, y, x] <-> [B, C, y / size, x / size], or [B, 1, samples] <-> [B, C, T] as `MDCTPCA`.

    size: side of a patch, or hop of the MDCT. width, blocks: of each of the two nets.
    """

    kind = "convolutional"
    cell_gain: Tensor
    latent_gain: Tensor

    def __init__(
        self,
        *,
        medium: Medium,
        size: int,
        channels: int,
        width: int = 96,
        blocks: int = 3,
        sample_rate: int | None = None,
    ) -> None:
        super().__init__()
        if width % 8:
            raise DataError(f"the width must be a multiple of 8, got {width}; change --width")
        self.medium: Medium = medium
        self.size, self.channels, self.width, self.blocks = size, channels, width, blocks
        if medium == "image":
            self.base: PatchPCA | MDCTPCA = PatchPCA(factor=size, channels=channels)
        elif sample_rate is not None:
            self.base = MDCTPCA(hop=size, channels=channels, sample_rate=sample_rate)
        else:
            raise DataError("sound must have a sample rate, got none; set sample_rate")
        self.downsampling, self.media_channels = self.base.downsampling, self.base.media_channels
        self.sample_rate, self.stochastic = sample_rate, True
        values, rank = self.base.axes.shape[1], len(self.downsampling)
        self.encoder = _net(values, 2 * channels, width=width, blocks=blocks, rank=rank)
        self.decoder = _net(channels, values, width=width, blocks=blocks, rank=rank)
        # cells enter the nets at about unit size, whatever the loudness or contrast of the data
        self.register_buffer("cell_gain", torch.ones(()))
        self.register_buffer("latent_gain", torch.ones(channels))

    @classmethod
    def fit(
        cls, media: Sequence[Tensor], *, medium: Medium, size: int, channels: int, **others: Any
    ) -> ConvolutionalAutoencoder:  # noqa: ANN401
        """The closed-form one of pictures (uint8 [3, y, x], one size) or waves [samples]: training starts there."""
        autoencoder = cls(medium=medium, size=size, channels=channels, **others)
        base = autoencoder.base
        if isinstance(base, PatchPCA):
            base.load_state_dict(PatchPCA.fit(torch.stack(list(media)), factor=size, channels=channels).state_dict())
        else:
            fitted = MDCTPCA.fit(list(media), hop=size, channels=channels, sample_rate=base.sample_rate or 0)
            base.load_state_dict(fitted.state_dict())
        return autoencoder

    @torch.no_grad()
    def set_gains(self, media: Float[Tensor, "B c *axes"]) -> None:
        """Measure on some media how large cells and latents are."""
        cells = self._cells(media)
        latent = self._linear(cells)
        self.cell_gain.copy_(1 / cells.std().clamp_min(1e-6))
        self.latent_gain.copy_(1 / latent.movedim(1, 0).flatten(1).std(1).clamp_min(1e-6))

    def encode(self, media: Float[Tensor, "B c *axes"]) -> Moments:
        """Raises DataError where the closed-form one would."""
        cells = self._cells(media)
        learned, logvar = self.encoder(cells * self.cell_gain).chunk(2, dim=1)
        # the net's answer is in units of each channel's own deviation, as is the noise that training adds
        deviation = self._per_channel(1 / self.latent_gain, rank=cells.ndim - 2)
        mean = self._linear(cells) + learned * deviation
        return Moments(mean, (logvar + START_LOGVAR + 2 * deviation.log()).clamp(*LOGVAR_RANGE))

    def decode(self, latent: Float[Tensor, "B C *grid"]) -> Float[Tensor, "B c *axes"]:
        gain = self._per_channel(self.latent_gain, rank=latent.ndim - 2)
        cells = torch.einsum("bc...,cn->bn...", latent, self.base.axes) + self.decoder(latent * gain) / self.cell_gain
        if isinstance(self.base, PatchPCA):
            return functional.pixel_shuffle(cells + self.base.mean[:, None, None], self.size)
        return inverse_mdct(cells.movedim(1, 2), matrix=self.base.matrix)[:, None]

    def media_axes(self, grid: Sequence[int]) -> tuple[int, ...]:
        return self.base.media_axes(grid)

    def settings(self) -> dict[str, Any]:
        return {
            "medium": self.medium,
            "size": self.size,
            "channels": self.channels,
            "width": self.width,
            "blocks": self.blocks,
            "sample_rate": self.sample_rate,
        }

    def _cells(self, media: Tensor) -> Float[Tensor, "B n *grid"]:
        self.base.check(media)
        if isinstance(self.base, PatchPCA):
            return functional.pixel_unshuffle(media, self.size) - self.base.mean[:, None, None]
        return mdct(media[:, 0], matrix=self.base.matrix).movedim(2, 1)

    def _linear(self, cells: Float[Tensor, "B n *grid"]) -> Float[Tensor, "B C *grid"]:
        return torch.einsum("bn...,cn->bc...", cells, self.base.axes)

    @staticmethod
    def _per_channel(values: Float[Tensor, " C"], *, rank: int) -> Tensor:
        return values.reshape(-1, *[1] * rank)


def _net(inputs: int, outputs: int, *, width: int, blocks: int, rank: int) -> nn.Sequential:
    conv = nn.Conv2d if rank == 2 else nn.Conv1d
    last = conv(width, outputs, 1)
    for parameter in last.parameters():
        nn.init.zeros_(parameter)
    middle = [ResidualBlock(width, rank=rank) for _ in range(blocks)]
    return nn.Sequential(conv(inputs, width, 1), *middle, nn.GroupNorm(8, width), nn.SiLU(), last)
