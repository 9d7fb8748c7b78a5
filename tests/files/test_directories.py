"""Directories that a command makes: gone again on failure; each refusal of the disk is one line with the path."""

import errno
import os
from pathlib import Path

import pytest

from megatron_prealign.errors import UserError
from megatron_prealign.files.directories import check_writable, make_directories, remove_empty, writing


def test_missing_parents_are_returned_outermost_first(tmp_path: Path) -> None:
    assert make_directories(tmp_path / "a" / "b") == [tmp_path / "a", tmp_path / "a" / "b"]
    assert make_directories(tmp_path / "a" / "b") == []
    (tmp_path / "a" / "file").touch()
    remove_empty([tmp_path / "a", tmp_path / "a" / "b"])
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["file"]


def test_a_file_in_the_way_is_named_and_nothing_is_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError) as caught:
        make_directories(tmp_path / "file" / "b" / "c")
    assert str(tmp_path / "file" / "b" / "c") in str(caught.value)
    assert f"{tmp_path / 'file'} is a file" in str(caught.value)


def test_parents_made_before_a_failure_are_removed(tmp_path: Path) -> None:
    # A name that no file system takes.
    with pytest.raises(OSError):
        make_directories(tmp_path / "a" / ("b" * 300))
    assert list(tmp_path.iterdir()) == []


def test_checking_leaves_nothing_behind(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b", "--output x")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="^cannot write --output x: "):
        check_writable(Path("/proc/new"), "--output x")


def refused(number: int, filename: Path | None = None) -> OSError:
    return OSError(number, os.strerror(number), *([] if filename is None else [str(filename)]))


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (refused(errno.ENOSPC), "free disk space or choose another path"),
        (refused(errno.EDQUOT), "free disk space or choose another path"),
        (refused(errno.EROFS), "check permissions or choose another path"),
        # As safetensors says it.
        (ValueError("I/O error: File too large (os error 27)"), "free disk space or choose another path"),
    ],
)
def test_what_the_disk_refuses_is_one_line(tmp_path: Path, error: Exception, advice: str) -> None:
    path = tmp_path / "new" / "table"
    with pytest.raises(UserError) as caught, writing(path, "table", kept="nothing was written"):
        raise error
    number = error.errno if isinstance(error, OSError) else 27
    assert str(caught.value) == f"cannot write table {path}: {os.strerror(number)}; nothing was written; {advice}"
    assert list(tmp_path.iterdir()) == []


def test_torch_wraps_the_error_of_the_disk(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No space left on device"), writing(tmp_path / "x"):
        try:
            raise refused(errno.ENOSPC)
        except OSError as error:
            raise RuntimeError("unexpected pos 64 vs 0") from error


def test_an_error_about_another_file_names_that_file(tmp_path: Path) -> None:
    other = tmp_path / "elsewhere" / "input.txt"
    with pytest.raises(UserError) as caught, writing(tmp_path / "out" / "x"):
        raise refused(errno.EACCES, other)
    assert str(caught.value).startswith(f"{other}: Permission denied")


def test_bugs_and_user_errors_pass_unchanged(tmp_path: Path) -> None:
    for error in (KeyError("bug"), UserError("line"), ZeroDivisionError()):
        with pytest.raises(type(error)) as caught, writing(tmp_path / "new" / "x"):
            try:
                raise refused(errno.ENOENT, tmp_path / "handled before")
            except OSError:
                raise error from None
        assert caught.value is error
        assert list(tmp_path.iterdir()) == []
