"""Messages for users, compared by their facts (paths, values, options, numbers): the wording may improve any time."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from megatron_prealign.errors import UserError


@contextmanager
def user_error(*facts: object, kind: type[Exception] = UserError) -> Iterator[pytest.ExceptionInfo[Exception]]:
    """Expects the block to raise `kind`, in one line that contains every fact."""
    with pytest.raises(kind) as caught:
        yield caught
    text = str(caught.value)
    assert "\n" not in text, f"expected one line, got {text!r}"
    assert_facts(text, *facts)


def assert_facts(text: str, *facts: object) -> None:
    """Fails unless `text` contains every fact, written as `str` writes it."""
    missing = [str(fact) for fact in facts if str(fact) not in text]
    assert not missing, f"{missing} not found in {text!r}"


def assert_refused(status: int, stderr: str, *facts: object) -> None:
    """Fails unless a command ended as it does after a user's error: status 2 and one line with every fact."""
    lines = stderr.strip().splitlines()
    assert status == 2, f"exit status {status}, expected 2: {stderr}"
    assert len(lines) == 1, f"expected one line on standard error, got {stderr!r}"
    assert_facts(lines[0], *facts)
