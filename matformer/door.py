"""What all command lines share: a mistake is one sentence and an exit code, and numbers say what they must be."""

from __future__ import annotations

import sys
from argparse import ArgumentTypeError
from collections.abc import Callable
from functools import wraps
from math import isfinite
from typing import ParamSpec

from matformer.errors import MatformerError

Arguments = ParamSpec("Arguments")


def door(main: Callable[Arguments, int]) -> Callable[Arguments, int]:
    """The same, but an error of ours goes to stderr as its sentence, and its exit code is the answer."""

    @wraps(main)
    def guarded(*args: Arguments.args, **kwargs: Arguments.kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except MatformerError as error:
            sys.stderr.write(f"{error}\n")
            return error.exit_code

    return guarded


def natural(text: str) -> int:
    """A whole number of an option, at least 0. Raises ArgumentTypeError, which argparse shows with the option."""
    return _whole(text, least=0)


def positive(text: str) -> int:
    """A whole number of an option, at least 1. Raises ArgumentTypeError."""
    return _whole(text, least=1)


def amount(text: str) -> float:
    """A number of an option, more than 0. Raises ArgumentTypeError."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not (isfinite(number) and number > 0):
        raise ArgumentTypeError(f"must be a number of more than 0, got {text}")
    return number


def _whole(text: str, *, least: int) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise ArgumentTypeError(f"must be a whole number of at least {least}, got {text}")
    return number
