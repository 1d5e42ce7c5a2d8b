"""What command lines share: errors as sentences with exit codes, numbers that say what they must be."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Callable

import pytest

from matformer.door import amount, door, natural, positive
from matformer.errors import MatformerError, ParallelError


def test_a_door_answers_with_its_own_code_or_that_of_the_error_and_its_sentence(
    capsys: pytest.CaptureFixture[str],
) -> None:
    @door
    def main(error: Exception | None = None) -> int:
        if error:
            raise error
        return 7

    assert main() == 7 and capsys.readouterr().err == ""
    assert main(MatformerError("it must be so, got that; change this")) == 2
    assert capsys.readouterr().err == "it must be so, got that; change this\n"
    assert main(error=ParallelError("so")) == 3
    with pytest.raises(ZeroDivisionError):
        main(ZeroDivisionError())


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        (natural, "-1", "at least 0, got -1"),
        (natural, "two", "at least 0, got two"),
        (positive, "0", "at least 1, got 0"),
        (positive, "1.5", "at least 1, got 1.5"),
        (amount, "0", "more than 0, got 0"),
        (amount, "nan", "more than 0, got nan"),
        (amount, "inf", "more than 0, got inf"),
        (amount, "few", "more than 0, got few"),
    ],
)
def test_a_number_that_cannot_be_says_what_it_must_be(kind: Callable[[str], float], text: str, words: str) -> None:
    with pytest.raises(ArgumentTypeError, match=words):
        kind(text)


def test_numbers_are_read() -> None:
    assert (natural("0"), positive("12"), amount("2.5")) == (0, 12, 2.5)
