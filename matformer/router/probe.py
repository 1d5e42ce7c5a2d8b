"""The router: a linear probe on the Atto's output that says which Coda speaks next."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from matformer.layers.precision import at_least_float32
from matformer.parcels import RouterUnits
from matformer.router.tree import TreeHead


class Router(nn.Module):
    """Logits of the next position's kind (modalities, end, recurrent), and of the shape bucket of each modality."""

    def __init__(
        self, atto_width: int, *, num_buckets: Mapping[str, int], trees: Mapping[str, TreeHead] | None = None
    ) -> None:
        super().__init__()
        self.head = nn.Linear(atto_width, 1 + len(num_buckets) + 2)
        self.bucket_head = nn.ModuleDict({name: nn.Linear(atto_width, n) for name, n in num_buckets.items()})
        self.tree_head = nn.ModuleDict(trees or {})

    def forward(
        self, latent_LH: Float[Tensor, "L H"], units: RouterUnits
    ) -> tuple[Float[Tensor, "R M2"], dict[str, Float[Tensor, "R buckets"]]]:
        """Kind logits with illegal answers at -inf, and bucket logits by modality (in the config's order)."""
        asked_RH = latent_LH.index_select(0, units.slot_R)
        kind = at_least_float32(self.head(asked_RH)).masked_fill(~units.legal_RM, -torch.inf)
        return kind, {name: at_least_float32(head(asked_RH)) for name, head in self.bucket_head.items()}


def chosen_bucket(units: RouterUnits, modality: int) -> tuple[Bool[Tensor, " R"], Int[Tensor, " R"]]:
    """Where the next span is of `modality`, and its bucket there (0 elsewhere, to be masked)."""
    here = (units.target_R == modality) & (units.bucket_R >= 0)
    return here, units.bucket_R.clamp(min=0) * here
