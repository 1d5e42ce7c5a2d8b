"""Other libraries that train text and continuous latents in one trunk, each with its loss over given latents.

A peer is built at the shape of `../shared/research/anchors_model.md`, section 3; its package is imported only then.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from matformer.errors import ConfigError

ROWS, TEXT, LATENTS = 2, 96, 64  # rows; bytes of each text; latents of the one span of each row
NOISES = 4  # VibeVoice draws so many noises a latent by default
AUDIO = 256  # VibeVoice's placeholder, behind the bytes


@dataclass(frozen=True)
class Built:
    """A model with its loss. `last_norm` is the trunk's: it shows how many positions the trunk sees.

    autocasts: bfloat16 by autocast; else the weights are in it already.
    """

    model: nn.Module
    loss: Callable[[], Tensor]
    last_norm: nn.Module
    autocasts: bool = True


@dataclass(frozen=True)
class Peer:
    """What has to be installed, the size of a latent, how many texts a row has, and the model in a dtype.

    ngram_rows: of each of our tables beside it. control: not as its authors train it.
    """

    needs: tuple[str, ...]
    channels: int
    texts: int
    ngram_rows: int
    build: Callable[[str], Built]
    control: bool = False


def random_bytes(dice: torch.Generator) -> Tensor:
    """One text."""
    return torch.randint(256, (TEXT,), generator=dice)


def transfusion(_: str) -> Built:
    """lucidrains' transfusion-pytorch: AdaLN at every position, rectified flow.

    Its attention is its own (flex attention on a GPU alone), and its `auto` strategy times its ways to put a batch
    together at the first step.
    """
    from transfusion_pytorch import Transfusion  # pyright: ignore[reportMissingImports] - an extra

    torch.manual_seed(0)
    trunk = {"dim": 256, "depth": 4, "dim_head": 64, "heads": 4}
    model: Any = Transfusion(
        num_text_tokens=256, dim_latent=16, modality_default_shape=(LATENTS,), transformer=trunk, prob_uncond=0.0
    )
    dice = torch.Generator().manual_seed(1)
    rows = [[random_bytes(dice), torch.randn(LATENTS, 16, generator=dice), random_bytes(dice)] for _ in range(ROWS)]
    return Built(model, lambda: model(rows), model.transformer.norm)


class GivenLatents(nn.Module):
    """Stands where VibeVoice has its acoustic tokenizer."""

    def __init__(self, latent_BNC: Tensor) -> None:
        super().__init__()
        self.register_buffer("latents", latent_BNC)

    def encode(self, wave: Tensor, *, sample: bool) -> SimpleNamespace:
        """The latents, whatever the wave."""
        return SimpleNamespace(latents=self.latents)


def vibevoice(dtype: str, *, noises: int = NOISES) -> Built:
    """Transformers' VibeVoice: a Qwen2 with a diffusion head that answers for several noises a latent; sdpa.

    Its proportions are those of VibeVoice-1.5B by a sixth, of the two layers of the head half. The semantic tokenizer
    and its connector, which training does not run, are taken out. Under autocast its embeddings do not fit together,
    so the weights themselves are bfloat16.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
        from transformers import Qwen2Config, VibeVoiceConfig, VibeVoiceForConditionalGeneration

    torch.manual_seed(0)
    library: Any = (Qwen2Config, VibeVoiceConfig)
    text = library[0](
        vocab_size=260,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=1536,
        tie_word_embeddings=True,
    )
    smallest = {"num_filters": 2, "downsampling_ratios": [1], "depths": [1, 1]}
    config = library[1](
        text_config=text,
        diffusion_head_config={"num_hidden_layers": 2, "intermediate_size": 768},
        audio_config={"model_type": "vibevoice_acoustic_tokenizer", "hidden_size": 64, **smallest},
        semantic_model_config={"model_type": "vibevoice_acoustic_tokenizer_encoder", "hidden_size": 64, **smallest},
        audio_token_id=AUDIO,
        pad_token_id=AUDIO + 1,
        eos_token_id=AUDIO + 1,
    )
    model: Any = VibeVoiceForConditionalGeneration(config)
    dice = torch.Generator().manual_seed(1)
    model.model.audio_tower = GivenLatents(torch.randn(ROWS, LATENTS, 64, generator=dice))
    model.model.semantic_tokenizer_encoder = model.model.semantic_connector = None
    symbols = torch.full((ROWS, TEXT + LATENTS), AUDIO)
    symbols[:, :TEXT] = torch.stack([random_bytes(dice) for _ in range(ROWS)])
    given = {
        "input_ids": symbols,
        "labels": symbols.masked_fill(symbols == AUDIO, -100),
        "acoustic_loss_mask": (symbols == AUDIO).roll(-1, dims=1),  # the position before a latent answers for it
        "input_values": torch.zeros(ROWS, 1),
        "padding_mask": torch.ones(ROWS, LATENTS),
        "noise_scheduler": DPMSolverMultistepScheduler(
            beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"
        ),
        "num_diffusion_steps": 1000,
        "ddpm_batch_multiplier": noises,
        "use_cache": False,
    }
    model.to(torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    return Built(model, lambda: model(**given).loss, model.model.language_model.norm, autocasts=False)


PEERS = {
    "transfusion-pytorch": Peer(
        needs=("transfusion_pytorch",), channels=16, texts=2, ngram_rows=4096, build=transfusion
    ),
    "vibevoice": Peer(
        needs=("transformers", "transformers.models.vibevoice", "diffusers"),
        channels=64,
        texts=1,
        ngram_rows=2048,
        build=vibevoice,
    ),
}
PEERS["vibevoice-one-noise"] = replace(PEERS["vibevoice"], build=partial(vibevoice, noises=1), control=True)


def require(name: str) -> None:
    """Raises ConfigError if the packages of a peer are not installed."""
    for package in PEERS[name].needs:
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"{name} needs the package {package}, which is not installed; run pip install -e '.[bench]' or leave "
                f"it out with --peers"
            )
