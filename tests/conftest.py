"""What all tests share: one thread, marks by folder, the demo's config, a folder of small configs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from matformer.config.load import load_run
from matformer.config.schema import RunConfig

HERE = Path(__file__).parent
CATEGORIES = ("unit", "parity", "ranks", "house")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test's folder is its category."""
    for item in items:
        category = item.path.relative_to(HERE).parts[0]
        if category in CATEGORIES:
            item.add_marker(category)


@pytest.fixture(scope="session")
def project() -> Path:
    """The project's folder."""
    return HERE.parent


@pytest.fixture
def demo(project: Path) -> Callable[..., RunConfig]:
    """demo("train.steps=6", ...) is the demo's config with overrides."""
    return lambda *overrides: load_run(project / "configs/run/demo.yaml", overrides)
