"""Ratios as a function of consumed tokens."""

import pytest

from megatron_prealign.code_switch.schedule import RatioSchedule
from megatron_prealign.recipe import CodeSwitchSection


def schedule(**fields: object) -> RatioSchedule:
    return RatioSchedule(CodeSwitchSection(**fields), ("en", "de", "zh"))


def test_constant() -> None:
    ratios = schedule(ratio=0.05, language_ratios={"zh": 0.5})
    assert ratios.ratios(0) == ratios.ratios(10**12) == [0.05, 0.05, 0.5]


@pytest.mark.parametrize(
    ("kind", "quarter"),
    # cos(pi/4) = 0.70711: the cosine schedule is at 0.14645 after a quarter of the tokens
    [("linear", 0.3), ("cosine", 0.4 * (1 - 0.1464466094067262))],
)
def test_linear_and_cosine(kind: str, quarter: float) -> None:
    falling = schedule(ratio=0.4, schedule=kind, final_ratio=0.0, schedule_tokens=1000)
    assert falling.base_ratio(0) == 0.4
    # float rounding of a handful of operations
    assert falling.base_ratio(250) == pytest.approx(quarter, abs=1e-15)
    assert falling.base_ratio(500) == pytest.approx(0.2, abs=1e-15)
    assert falling.base_ratio(1000) == falling.base_ratio(10**15) == 0.0


def test_own_ratios_scale_in_proportion() -> None:
    falling = schedule(ratio=0.4, schedule="linear", final_ratio=0.1, schedule_tokens=100, language_ratios={"de": 0.8})
    # float rounding of a handful of operations
    assert falling.ratios(0) == [0.4, 0.8, 0.4]
    assert falling.ratios(100) == pytest.approx([0.1, 0.2, 0.1], abs=1e-15)


def test_own_ratio_reaches_its_value_when_the_common_one_starts_at_zero() -> None:
    rising = schedule(ratio=0.0, schedule="linear", final_ratio=0.2, schedule_tokens=100, language_ratios={"de": 0.6})
    assert rising.ratios(0) == [0.0, 0.0, 0.0]
    assert rising.ratios(100) == pytest.approx([0.2, 0.6, 0.2], abs=1e-15)


def test_own_ratios_are_limited_to_one_and_not_scaled_without_a_common_ratio() -> None:
    growing = schedule(ratio=0.1, schedule="linear", final_ratio=0.5, schedule_tokens=100, language_ratios={"de": 0.4})
    assert growing.ratios(100)[1] == 1.0
    assert schedule(ratio=0.0, language_ratios={"de": 0.4}).ratios(5) == [0.0, 0.4, 0.0]
