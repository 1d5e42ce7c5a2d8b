"""A module as two files: the bytes that manifests remember by their fingerprints."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from torch import nn

from matformer.layers.saved import saved


def module() -> nn.Module:
    one = nn.Linear(2, 1, bias=False)
    nn.init.constant_(one.weight, 0.5)
    return one


HEADER = b'{"weight":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]}}'
WEIGHTS = (64).to_bytes(8, "little") + HEADER.ljust(64) + bytes.fromhex("0000003f") * 2


@pytest.mark.parametrize(
    ("sort_keys", "settings"),
    [(True, b'{\n "a": 2,\n "b": 1\n}\n'), (False, b'{\n "b": 1,\n "a": 2\n}\n')],
)
def test_a_saved_module_is_these_bytes(sort_keys: bool, settings: bytes, tmp_path: Path) -> None:
    one = saved(module(), {"b": 1, "a": 2}, sort_keys=sort_keys)
    assert (one.settings, one.weights) == (settings, WEIGHTS)
    assert one.fingerprint == hashlib.sha256(settings + WEIGHTS).hexdigest()
    one.write(tmp_path / "new", settings_file="its.json", weights_file="its.safetensors")
    assert (tmp_path / "new" / "its.json").read_bytes() == settings
    assert (tmp_path / "new" / "its.safetensors").read_bytes() == WEIGHTS


def test_other_weights_or_settings_are_another_fingerprint() -> None:
    other = module()
    with torch.no_grad():
        next(other.parameters()).mul_(2)
    found = [saved(one, {"a": a}, sort_keys=True).fingerprint for one, a in ((module(), 1), (other, 1), (module(), 2))]
    assert len(set(found)) == 3
