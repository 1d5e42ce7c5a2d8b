"""The house: who may import whom, and what no file of ours holds."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

HOME = Path(__file__).parents[2]
OURS = sorted(file for folder in ("matformer", "data_prep", "tools") for file in (HOME / folder).rglob("*.py"))
HOST_FILES = re.compile(r"matformer/hosts/(megatron|deepspeed)\w*\.py")
VAGUE = re.compile(r"(^|_)(utils?|misc|helpers?|managers?|new|v2)(_|$)")


def name_of(file: Path) -> str:
    return file.relative_to(HOME).as_posix()


def imports_of(file: Path) -> Iterator[str]:
    """Dotted names of everything that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def importing(*packages: str) -> set[str]:
    """Our files that import one of these packages."""
    return {name_of(file) for file in OURS if any(name.split(".")[0] in packages for name in imports_of(file))}


def places(files: Iterable[Path], offends: Callable[[ast.AST], bool]) -> list[str]:
    """file:line of every node that offends."""
    return [
        f"{name_of(file)}:{getattr(node, 'lineno', 0)}"
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if offends(node)
    ]


def catches_blindly(node: ast.AST) -> bool:
    return isinstance(node, ast.ExceptHandler) and (
        node.type is None or (isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException"))
    )


def test_the_contracts_of_imports_are_kept() -> None:
    script = Path(sys.executable).with_name("lint-imports")
    end = subprocess.run([str(script), "--no-cache"], cwd=HOME, capture_output=True, text=True)
    assert end.returncode == 0, end.stdout


def test_only_host_files_name_a_host() -> None:
    assert {name for name in importing("megatron", "deepspeed") if not HOST_FILES.fullmatch(name)} == set()


def test_nobody_imports_tools_or_tests() -> None:
    longer_tests = {"tools/parity_fuzz.py"}  # as many of tests/parity/test_fuzz.py as one likes
    assert importing("tools", "tests") == longer_tests


def test_only_data_prep_and_what_times_it_import_data_prep() -> None:
    free = ("data_prep/", "tools/bench/")
    assert {name for name in importing("data_prep") if not name.startswith(free)} == set()


def test_no_error_is_caught_blindly() -> None:
    assert places(OURS, catches_blindly) == []


def test_nothing_is_asked_for_by_name_but_what_a_host_hangs_on_a_parameter() -> None:
    files = [file for file in OURS if not HOST_FILES.fullmatch(name_of(file))]
    assert places(files, lambda node: isinstance(node, ast.Name) and node.id == "hasattr") == []


def test_no_name_is_vague() -> None:
    assert [name_of(file) for file in OURS if VAGUE.search(file.stem)] == []


def test_the_environment_is_read_by_train_launch_and_hosts_alone() -> None:
    """A module that reads os.environ has an input that no config shows."""
    free = ("matformer/train.py", "matformer/launch.py", "matformer/hosts/", "data_prep/", "tools/")
    files = [file for file in OURS if not name_of(file).startswith(free)]
    assert places(files, lambda node: isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")) == []


def test_every_dependency_has_an_upper_bound() -> None:
    project = tomllib.loads((HOME / "pyproject.toml").read_text())["project"]
    every = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    assert [one for one in every if "<" not in one] == []


def test_the_version_is_one() -> None:
    project = tomllib.loads((HOME / "pyproject.toml").read_text())["project"]
    version = re.search(r'__version__ = "(.+)"', (HOME / "matformer/__init__.py").read_text())
    assert version is not None and version[1] == project["version"]
