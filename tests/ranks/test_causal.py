"""The control of the GPU bench: its attentions agree, it is causal, it is as large as our trunk."""

from __future__ import annotations

import numpy as np

from matformer.hosts.plain import PlainTrunk
from tests.made import MODEL
from tests.ranks import causal
from tests.ranks.launcher import Ranks


def test_the_causal_decoder_of_megatron() -> None:
    with Ranks(1) as ranks:
        (found,) = ranks.run(causal.answers_by_core, MODEL.atto)
    assert {"megatron", "torch"} <= set(found)
    ours = sum(one.numel() for one in PlainTrunk(MODEL.atto).parameters())
    for one in found.values():
        assert one["parameters"] == ours
        np.testing.assert_allclose(one["leaving"], found["torch"]["leaving"], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(one["back"], found["torch"]["back"], rtol=1e-4, atol=1e-5)
        assert (one["back"][12:] == 0).all() and (one["back"][:12] != 0).any(), "later rows are not seen"
