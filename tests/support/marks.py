"""Marks of tests and of some of their parameters."""

from collections.abc import Iterable
from typing import Any

import pytest

from megatron_prealign.kernels._triton import INTERPRETED

# Triton's interpreter takes up to a hundred times as long as torch for the same test.
slow_interpreted = pytest.mark.slow if INTERPRETED else pytest.mark.skipif(False, reason="fast")


def fewer_interpreted(cases: Iterable[Any], *kept: Any) -> list[Any]:
    """Parameters for `parametrize`: only `kept` in Triton's interpreter, where the others would repeat in minutes what
    they show of the reference or on a GPU."""
    cases = list(cases)
    assert all(case in cases for case in kept), kept
    return list(kept) if INTERPRETED else cases


def slow_except(cases: Iterable[Any], *fast: Any) -> list[Any]:
    """Parameters for `parametrize`, all marked `slow` except `fast`; tuples are values of several arguments."""
    cases = list(cases)
    assert all(case in cases for case in fast), fast
    return [
        case if case in fast else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
        for case in cases
    ]
