"""How the losses pull on the shared layers: cosines and norm ratios of their gradients, layer by layer of the Atto.

All of it follows from the dot products of each loss's gradient over each half of the global batch: sums of gradients
are sums of dot products. Losses are weighted and divided as in the step, so the parts' gradients sum to the step's.

Sources: conflict is a negative cosine (PCGrad, Yu et al. 2020), measured by layer (Gradient Vaccine, Wang et al. 2021).
Ours adds the cosine of a loss with itself over two halves of the batch: it says how much of a gradient is noise, and a
cosine between two noisy gradients is small whatever their means do.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from matformer.config.schema import RunConfig
from matformer.engine.step import global_counts, loss_weights, on_comm_device
from matformer.hosts.base import Host, Sums
from matformer.losses.total import total_loss
from matformer.parallel.groups import Groups
from matformer.parcels import Batch

MEDIA = "media"
"""All latent modalities together; no modality has this name."""
HALVES = 2

# Shape letters of this file: N vectors, one a part and half (part by part); P parameters.
Gradients = list[list[Tensor]]  # [N][P]


def gradient_row(host: Host, batches: Sequence[Batch], *, config: RunConfig) -> dict[str, float]:
    """Keys `gradients/<where>/<what>`, where: layer_00, layer_01, ..., and atto for all layers as one. Collective.

    `A_B_cosine` and `A_B_norm_ratio` (|A| / |B|) for each two losses that the global batch has, and for text and the
    sum of all media as text_media; `A_self_cosine` between A's gradients over every other microbatch and over the rest.
    What has no value (a gradient that is zero) has no key. Nothing of the training state is touched.
    """
    counts = global_counts(batches, host.groups)
    weights = {name: weight for name, weight in loss_weights(config).items() if counts[name] and weight}
    if not weights:
        return {}
    gradients = part_gradients(host, batches, counts=counts, weights=weights)
    products = layer_products(host, gradients, groups=host.groups)
    places = {f"layer_{layer:02d}": product_NN for layer, product_NN in sorted(products.items())}
    places["atto"] = torch.stack(list(products.values())).sum(0)
    media = [name for name in config.model.media if name in weights]
    row: dict[str, float] = {}
    for place, product_NN in places.items():
        found = relations(product_NN.tolist(), list(weights), media=media)
        row |= {f"gradients/{place}/{what}": value for what, value in found.items() if math.isfinite(value)}
    return row


def part_gradients(
    host: Host, batches: Sequence[Batch], *, counts: Mapping[str, float], weights: Mapping[str, float]
) -> Gradients:
    """For each part and half, the gradient of that part of the loss on the host's layer weights; this rank's share.

    Microbatches are numbered over the global batch; even numbers are the first half.
    """
    parameters = [weight.parameter for weight in host.layer_weights()]
    found = [[torch.zeros_like(p, dtype=torch.float32) for p in parameters] for _ in range(HALVES * len(weights))]
    for number, batch in enumerate(batches):
        half = (number * host.groups.dp_size + host.groups.dp_rank) % HALVES
        sums = host.sums_with_graph(batch)
        for part, name in enumerate(weights):
            loss = part_loss(sums, name, counts=counts, weight=weights[name])
            last = part == len(weights) - 1
            gradients = torch.autograd.grad(loss, parameters, retain_graph=not last, allow_unused=True)
            for total, gradient in zip(found[HALVES * part + half], gradients, strict=True):
                if gradient is not None:
                    total.add_(gradient)
    return found


def part_loss(sums: Sums, name: str, *, counts: Mapping[str, float], weight: float) -> Tensor:
    """What one part adds to the loss of the step."""
    return total_loss({name: sums[name]}, counts=counts, weights={name: weight})


@torch.no_grad()
def layer_products(host: Host, gradients: Gradients, *, groups: Groups) -> dict[int, Float[Tensor, "N N"]]:
    """Layer -> dot products of the whole gradients: summed over DP first, shards over TP afterwards. Collective."""
    weights = host.layer_weights()
    products = {weight.layer: torch.zeros(len(gradients), len(gradients), dtype=torch.float64) for weight in weights}
    for index, weight in enumerate(weights):
        vector_NF = torch.stack([vectors[index].flatten() for vectors in gradients])
        if groups.reduce_size > 1:
            dist.all_reduce(vector_NF, group=groups.reduce)
        if weight.sharded or groups.tp_rank == 0:  # a whole weight counts once
            products[weight.layer] += (vector_NF @ vector_NF.T).double().cpu()
    if groups.tp_size > 1:
        stacked = on_comm_device(torch.stack([products[layer] for layer in sorted(products)]))
        dist.all_reduce(stacked, group=groups.tp)
        products = dict(zip(sorted(products), stacked.cpu(), strict=True))
    return products


def relations(products: Sequence[Sequence[float]], parts: Sequence[str], *, media: Sequence[str]) -> dict[str, float]:
    """Cosines and norm ratios of one layer from its dot products; nan where a gradient is zero."""
    members = {name: [parts.index(name)] for name in parts}
    if "text" in parts and media:
        members[MEDIA] = [parts.index(name) for name in media]

    def dot(a: str, b: str, halves: Sequence[tuple[int, int]]) -> float:
        pairs = itertools.product(members[a], members[b], halves)
        return sum(products[HALVES * p + i][HALVES * q + j] for p, q, (i, j) in pairs)

    both = [(i, j) for i in range(HALVES) for j in range(HALVES)]
    found: dict[str, float] = {}
    for a, b in itertools.combinations(members, 2):
        if b == MEDIA and a != "text":
            continue
        squares = dot(a, a, both), dot(b, b, both)
        found[f"{a}_{b}_cosine"] = _over_root(dot(a, b, both), *squares)
        found[f"{a}_{b}_norm_ratio"] = math.sqrt(squares[0] / squares[1]) if squares[1] > 0 else math.nan
    for name in members:
        squares = dot(name, name, [(0, 0)]), dot(name, name, [(1, 1)])
        found[f"{name}_self_cosine"] = _over_root(dot(name, name, [(0, 1)]), *squares)
    return found


def _over_root(product: float, first: float, second: float) -> float:
    return product / math.sqrt(first * second) if first > 0 and second > 0 else math.nan
