"""Fixtures for every implementation of code-switching that this process can run."""

import pytest
from support.code_switch_cases import DEVICE, IMPLEMENTATIONS, Implementation, Run, assert_equals_oracle


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> Implementation:
    return IMPLEMENTATIONS[request.param]


@pytest.fixture
def checked(implementation: Implementation) -> Run:
    """Runs a case and compares it with the oracle."""
    return lambda case: assert_equals_oracle(case.but(device=DEVICE), implementation)
