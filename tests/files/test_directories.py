"""Output directories: removed again on failure; every disk error is one line with the path."""

import errno
import os
from pathlib import Path

import pytest
from support.messages import user_error

from megatron_prealign.errors import UserError
from megatron_prealign.files.directories import check_writable, make_directories, remove_empty, writing


def test_missing_parents_are_returned_outermost_first(tmp_path: Path) -> None:
    assert make_directories(tmp_path / "a" / "b") == [tmp_path / "a", tmp_path / "a" / "b"]
    assert make_directories(tmp_path / "a" / "b") == []
    (tmp_path / "a" / "file").touch()
    remove_empty([tmp_path / "a", tmp_path / "a" / "b"])
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["file"]


def test_a_parent_that_is_a_file_is_named_and_nothing_is_created(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with user_error(tmp_path / "file" / "b" / "c", f"{tmp_path / 'file'} is a file"):
        make_directories(tmp_path / "file" / "b" / "c")


def test_parents_created_before_a_failure_are_removed(tmp_path: Path) -> None:
    # A name too long for any file system.
    with pytest.raises(OSError):
        make_directories(tmp_path / "a" / ("b" * 300))
    assert list(tmp_path.iterdir()) == []


def test_checking_leaves_nothing_behind(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b", "--output x")
    assert list(tmp_path.iterdir()) == []
    with user_error("cannot write --output x"):
        check_writable(Path("/proc/new"), "--output x")


def os_error(number: int, filename: Path | None = None) -> OSError:
    return OSError(number, os.strerror(number), *([] if filename is None else [str(filename)]))


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (os_error(errno.ENOSPC), "free disk space or choose another path"),
        (os_error(errno.EDQUOT), "free disk space or choose another path"),
        (os_error(errno.EROFS), "check permissions or choose another path"),
        # The text of safetensors.
        (ValueError("I/O error: File too large (os error 27)"), "free disk space or choose another path"),
    ],
)
def test_disk_errors_are_one_line(tmp_path: Path, error: Exception, advice: str) -> None:
    path = tmp_path / "new" / "table"
    number = error.errno if isinstance(error, OSError) else 27
    with (
        user_error(f"table {path}: {os.strerror(number)}; nothing was written; {advice}"),
        writing(path, "table", note="nothing was written"),
    ):
        raise error
    assert list(tmp_path.iterdir()) == []


def test_disk_errors_wrapped_by_torch(tmp_path: Path) -> None:
    with user_error(tmp_path / "x", "No space left on device"), writing(tmp_path / "x"):
        try:
            raise os_error(errno.ENOSPC)
        except OSError as error:
            raise RuntimeError("unexpected pos 64 vs 0") from error


def test_an_error_about_another_file_names_that_file(tmp_path: Path) -> None:
    other = tmp_path / "elsewhere" / "input.txt"
    with user_error(f"{other}: Permission denied") as caught, writing(tmp_path / "out" / "x"):
        raise os_error(errno.EACCES, other)
    assert str(tmp_path / "out") not in str(caught.value)


def test_bugs_and_user_errors_pass_unchanged(tmp_path: Path) -> None:
    for error in (KeyError("bug"), UserError("line"), ZeroDivisionError()):
        with pytest.raises(type(error)) as caught, writing(tmp_path / "new" / "x"):
            try:
                raise os_error(errno.ENOENT, tmp_path / "handled before")
            except OSError:
                raise error from None
        assert caught.value is error
        assert list(tmp_path.iterdir()) == []
