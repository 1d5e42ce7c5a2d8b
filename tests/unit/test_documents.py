"""What README and docs tell a reader to type."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from matformer.config.check import check
from matformer.config.load import load_run
from tools.draw_architecture import main as draw

PROJECT = Path(__file__).parents[2]
DOCUMENTS = [PROJECT / "README.md", *sorted((PROJECT / "docs").rglob("*.md"))]
COMMAND = re.compile(r"(?:sbatch (?P<options>[^`\n]*))?slurm/pretrain\.sh (?P<words>configs/[^`\n]*)")


def commands() -> list[tuple[str, str]]:
    """(options of sbatch, words after the script) of every command that names a config."""
    found = [one for file in DOCUMENTS for one in COMMAND.finditer(file.read_text(encoding="utf-8"))]
    return [(one["options"] or "", one["words"]) for one in found]


def test_the_documents_have_commands() -> None:
    assert len(commands()) > 10 and any(options for options, _ in commands())


@pytest.mark.parametrize(("options", "words"), commands())
def test_a_command_of_the_documents_can_run(options: str, words: str) -> None:
    numbered = re.sub(r"\$N\b|(?<=[=-])N\b", "1", words)  # N stands for a number of the reader's
    config, *overrides = shlex.split(numbered, comments=True)
    run = load_run(PROJECT / config, overrides)
    check(run)
    if options:
        asked = dict(option.split("=") for option in options.split())
        assert int(asked["--nodes"]) * int(asked["--gpus-per-node"]) == run.parallel.ranks


def test_the_picture_is_what_its_tool_draws_and_help_draws_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="0"):
        draw(["--help"])
    assert list(tmp_path.iterdir()) == []
    assert draw(["drawn.svg"]) == 0
    assert (tmp_path / "drawn.svg").read_text() == (PROJECT / "docs" / "architecture.svg").read_text()
