"""The number of worker processes is checked before any of them starts."""

import pytest
from support.messages import user_error

from megatron_prealign.data.dataset import MOST_WORKERS, check_workers


@pytest.mark.parametrize("workers", [0, -1, MOST_WORKERS + 1, 10**9])
def test_a_number_that_no_machine_can_start(workers: int) -> None:
    with user_error(f"--workers is {workers}"):
        check_workers(workers)


def test_more_workers_than_cores_are_allowed() -> None:
    check_workers(MOST_WORKERS)
