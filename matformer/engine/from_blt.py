"""Weights of a BLT as the transformers library keeps it -> ours.

Both compute the same function, up to rounding. What differs is where things are written down: they turn neighbouring
pairs of a head, ours its halves; their cross-attention adds its input twice, which doubles the residual stream at every
layer and is folded here into the matrices that write into it; their sequence begins with BOS as a patch of its own,
ours with `start`, whose embedding is what their encoder makes of that patch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from matformer.config.schema import AttoConfig, ModelConfig, TextConfig
from matformer.errors import CheckpointError
from matformer.layers.norm import RMSNorm
from matformer.model import Matformer
from matformer.preludio.text import TextPreludio, blt_numbers
from matformer.shapes import NUM_SYMBOLS, NUM_TARGETS


class LocalBlt(Protocol):
    """What is read of their encoder's and decoder's settings."""

    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    num_hidden_layers: int
    intermediate_size: int
    cross_attn_k: int
    cross_attn_all_layers: bool
    rope_parameters: Mapping[str, float]


class GlobalBlt(Protocol):
    """What is read of their global transformer's settings."""

    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    num_hidden_layers: int
    intermediate_size: int
    rms_norm_eps: float
    rope_parameters: Mapping[str, float]


class Blt(Protocol):
    """What is read of transformers' BltConfig."""

    encoder_config: LocalBlt
    decoder_config: LocalBlt
    global_config: GlobalBlt
    local_attention_window_len: int | None
    encoder_hash_byte_group_size: list[int]
    encoder_hash_byte_group_vocab: int
    encoder_hash_byte_group_nb_functions: int


def model_config_of(blt: Blt, *, window: int | None = None) -> ModelConfig:
    """Our config of their model. `window` stands in where theirs sees the whole text.

    Raises CheckpointError for what ours cannot be.
    """
    _check(blt)
    encoder, decoder, trunk = blt.encoder_config, blt.decoder_config, blt.global_config
    looks_back = blt.local_attention_window_len or window
    if looks_back is None:
        raise CheckpointError("local_attention_window_len must be a number, got none; give the longest text instead")
    atto = AttoConfig(
        width=trunk.hidden_size,
        layers=trunk.num_hidden_layers,
        heads=trunk.num_attention_heads,
        kv_heads=trunk.num_key_value_heads,
        ffn_width=trunk.intermediate_size,
        rotary_pairs=(trunk.hidden_size // trunk.num_attention_heads // 2, 0, 0, 0),
        rotary_base=trunk.rope_parameters["rope_theta"],
        qk_norm=False,
        norm_epsilon=trunk.rms_norm_eps,
    )
    text = TextConfig(
        width=encoder.hidden_size,
        heads=encoder.num_attention_heads,
        ffn_width=encoder.intermediate_size,
        preludio_layers=encoder.num_hidden_layers,
        coda_layers=decoder.num_hidden_layers,
        window=looks_back,
        rotary_base=encoder.rope_parameters["rope_theta"],
        preludio_pool="max",
        preludio_places=False,
        preludio_ngrams=tuple(blt.encoder_hash_byte_group_size),
        coda_input="preludio",
        coda_ngrams=(),
        coda_projection=True,
        ngram_rows=blt.encoder_hash_byte_group_vocab,
        ngram_gain=1.0,
    )
    return ModelConfig(atto=atto, text=text, media={})


def _check(blt: Blt) -> None:
    encoder, decoder, trunk = blt.encoder_config, blt.decoder_config, blt.global_config
    rules = {
        "the encoder and the decoder must have one width": encoder.hidden_size == decoder.hidden_size,
        "cross_attn_k * the local width must be the global width": encoder.cross_attn_k * encoder.hidden_size
        == decoder.cross_attn_k * decoder.hidden_size
        == trunk.hidden_size,
        "local layers must have as many key heads as heads": all(
            local.num_attention_heads == local.num_key_value_heads == encoder.num_attention_heads
            for local in (encoder, decoder)
        ),
        "the encoder and the decoder must have one inner width": encoder.intermediate_size == decoder.intermediate_size,
        "every layer of the decoder must read the latents": decoder.cross_attn_all_layers,
        "n-grams must have one hash function": blt.encoder_hash_byte_group_nb_functions == 1,
    }
    for rule, holds in rules.items():
        if not holds:
            raise CheckpointError(f"{rule}, this BLT is another; it cannot be loaded into our modules")


@torch.no_grad()
def load_blt(model: Matformer, blt: Blt, state: Mapping[str, Tensor]) -> None:
    """Make a model of `model_config_of` theirs; `state` is BltForCausalLM's state_dict. The router stays as it is."""
    missing, unexpected = model.load_state_dict(weights_of(blt, state), strict=False)
    assert not unexpected and all(name.startswith(("router.", "start.")) for name in missing), (missing, unexpected)
    for name, epsilon in epsilons_of(blt).items():
        norm = model.get_submodule(name)
        assert isinstance(norm, RMSNorm)
        norm.epsilon = epsilon
    preludio = model.preludi["text"]
    assert isinstance(preludio, TextPreludio)
    model.start.embedding.weight.copy_(preludio.begin_latent())


def weights_of(blt: Blt, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our weights by global name, but `start.embedding.weight`; `state` is BltForCausalLM's state_dict."""
    ours: dict[str, Tensor] = {}
    trunk, encoder, decoder = blt.global_config, blt.encoder_config, blt.decoder_config
    size = encoder.hidden_size // encoder.num_attention_heads
    for i in range(trunk.num_hidden_layers):
        _trunk_layer(ours, f"atto.layers.{i}", state, f"model.global_transformer.layers.{i}", trunk=trunk)
    ours["atto.final_norm.weight"] = torch.ones(trunk.hidden_size)
    ours["preludi.text.embedding.weight"] = _symbols(state["model.local_encoder.embed_tokens.weight"], NUM_SYMBOLS)
    ours["preludi.text.ngram_embedding.table.weight"] = state["model.encoder_hash_tok_embedding.weight"]
    for i in range(encoder.num_hidden_layers):
        block, theirs = f"preludi.text.blocks.{i}", f"model.local_encoder.layers.{i}"
        _local_block(ours, block, state, theirs, size=size, scale=1.0)
    _pool(ours, state, encoder)
    ours["code.text.projection.weight"] = state["model.local_decoder.patch_embedding_projection.weight"]
    ours["code.text.latent_norm.weight"] = torch.ones(decoder.hidden_size)
    for i in range(decoder.num_hidden_layers):
        _reader(ours, i, state, scale=0.5 ** (i + 1))
        block, theirs = f"code.text.blocks.{i}", f"model.local_decoder.layers.{i}"
        _local_block(ours, block, state, theirs, size=size, scale=0.5 ** (i + 1))
    ours["code.text.output_norm.weight"] = state["model.local_decoder.norm.weight"]
    ours["code.text.head.weight"] = _symbols(state["lm_head.weight"], NUM_TARGETS)
    return ours


def epsilons_of(blt: Blt) -> dict[str, float]:
    """The norms of ours, by module name, whose epsilon follows the residual stream that was rescaled."""
    epsilon = blt.global_config.rms_norm_eps
    found = {"preludi.text.pool.slot_norm": 4 * epsilon}
    layers = blt.decoder_config.num_hidden_layers
    for i in range(layers):
        found[f"code.text.readers.{i}.norm"] = epsilon / 4**i
        found[f"code.text.blocks.{i}.attention_norm"] = epsilon / 4 ** (i + 1)
        found[f"code.text.blocks.{i}.feed_forward_norm"] = epsilon / 4 ** (i + 1)
    found["code.text.output_norm"] = epsilon / 4**layers
    return found


def _trunk_layer(
    ours: dict[str, Tensor], name: str, state: Mapping[str, Tensor], theirs: str, *, trunk: GlobalBlt
) -> None:
    query, key, value = _queries_keys_values(state, theirs, size=trunk.hidden_size // trunk.num_attention_heads)
    ours |= _layer(name, state, theirs)
    ours |= {
        f"{name}.attention.query.weight": query,
        f"{name}.attention.key.weight": key,
        f"{name}.attention.value.weight": value,
    }


def _local_block(
    ours: dict[str, Tensor], name: str, state: Mapping[str, Tensor], theirs: str, *, size: int, scale: float
) -> None:
    ours |= _layer(name, state, theirs, scale=scale)
    ours[f"{name}.attention.query_key_value.weight"] = torch.cat(_queries_keys_values(state, theirs, size=size))


def _queries_keys_values(state: Mapping[str, Tensor], theirs: str, *, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """With rotary pairs as ours has them; `size` of a head."""
    query, key, value = (state[f"{theirs}.self_attn.{part}_proj.weight"] for part in "qkv")
    return _halves(query, size), _halves(key, size), value


def _layer(name: str, state: Mapping[str, Tensor], theirs: str, *, scale: float = 1.0) -> dict[str, Tensor]:
    """What layers of the trunk and of the local models are called alike; `scale` of what goes into the stream."""
    return {
        f"{name}.attention_norm.weight": state[f"{theirs}.input_layernorm.weight"],
        f"{name}.attention.output.weight": scale * state[f"{theirs}.self_attn.o_proj.weight"],
        f"{name}.feed_forward_norm.weight": state[f"{theirs}.post_attention_layernorm.weight"],
        f"{name}.feed_forward.gate.weight": state[f"{theirs}.mlp.gate_proj.weight"],
        f"{name}.feed_forward.up.weight": state[f"{theirs}.mlp.up_proj.weight"],
        f"{name}.feed_forward.down.weight": scale * state[f"{theirs}.mlp.down_proj.weight"],
    }


def _pool(ours: dict[str, Tensor], state: Mapping[str, Tensor], encoder: LocalBlt) -> None:
    """Of several layers that pool, they keep the last."""
    last = encoder.num_hidden_layers - 1 if encoder.cross_attn_all_layers else 0
    theirs, pool = f"model.local_encoder.cross_attn_layers.{last}", "preludi.text.pool"
    ours |= {
        f"{pool}.project.weight": 2 * state["model.local_encoder.patch_embedding_projection.weight"],
        f"{pool}.slot_norm.weight": state[f"{theirs}.q_norm.weight"],
        f"{pool}.query.weight": state[f"{theirs}.q_proj.weight"],
        f"{pool}.symbol_norm.weight": state[f"{theirs}.k_norm.weight"],
        f"{pool}.key_value.weight": torch.cat((state[f"{theirs}.k_proj.weight"], state[f"{theirs}.v_proj.weight"])),
        f"{pool}.output.weight": state[f"{theirs}.o_proj.weight"],
    }


def _reader(ours: dict[str, Tensor], number: int, state: Mapping[str, Tensor], *, scale: float) -> None:
    """The weight of their norm of the latents goes into the matrices behind it: ours norms once for all layers."""
    theirs, reader = f"model.local_decoder.cross_attn_layers.{number}", f"code.text.readers.{number}"
    pair = torch.cat((state[f"{theirs}.k_proj.weight"], state[f"{theirs}.v_proj.weight"]))
    ours |= {
        f"{reader}.norm.weight": state[f"{theirs}.q_norm.weight"],
        f"{reader}.query.weight": state[f"{theirs}.q_proj.weight"],
        f"{reader}.key_value.weight": pair * state[f"{theirs}.k_norm.weight"],
        f"{reader}.output.weight": scale * state[f"{theirs}.o_proj.weight"],
    }


def _symbols(theirs: Tensor, count: int) -> Tensor:
    """Rows of their vocabulary in the order of our first `count` symbols."""
    return theirs[blt_numbers(torch.arange(count))]


def _halves(weight: Tensor, size: int) -> Tensor:
    """Rows of each head, from neighbouring rotary pairs to halves."""
    return weight.view(-1, size // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
