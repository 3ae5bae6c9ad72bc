"""Operating system errors: only those with a cause outside of the program become a UserError."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from shadowllm import cli
from shadowllm.commands import inspect
from shadowllm.errors import UserError, os_error, writing


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free disk space"),
        (errno.EDQUOT, "quota"),
        (errno.EACCES, "permissions"),
        (errno.EPERM, "permissions"),
        (errno.EROFS, "can be written"),
        (errno.ENAMETOOLONG, "shorter name"),
        (errno.ENOTDIR, "inside a folder"),
        (errno.EFBIG, "ulimit"),
    ],
)
def test_each_has_its_own_remedy(number, remedy):
    found = os_error(OSError(number, os.strerror(number), "place/file"))
    assert found.problem == f"cannot use place/file ({os.strerror(number)})"
    assert remedy in found.remedy
    assert ("disk" in found.remedy) == (number in (errno.ENOSPC, errno.EDQUOT))


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EISDIR, errno.EEXIST, errno.EBADF, errno.EIO])
def test_all_others_are_bugs(number):
    assert os_error(OSError(number, os.strerror(number))) is None


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x"), KeyboardInterrupt()])
def test_a_file_that_was_begun_is_removed_and_an_older_one_stays(tmp_path, error):
    def write(path):
        with writing(path) as file:
            file.write_text("begun")
            raise error

    (tmp_path / "old").write_text("whole")
    for name in ("old", "new"):
        with pytest.raises((UserError, KeyboardInterrupt)) as raised:
            write(tmp_path / name)
        if isinstance(error, OSError):
            assert str(raised.value).startswith(f"cannot use {tmp_path / name} ")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old").read_text() == "whole"


def test_a_link_stays_and_what_is_no_regular_file_is_written_itself(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    link.symlink_to(target)
    for text in ("first", "second"):
        with writing(link) as file:
            file.write_text(text)
    assert (link.is_symlink(), target.read_text()) == (True, "second")
    with writing(Path("/dev/null")) as file:
        assert file == Path("/dev/null")


class TestCommandLine:
    def raising(self, monkeypatch, error):
        def run(args):
            raise error

        monkeypatch.setattr(inspect, "run", run)
        return cli.main(["inspect", "x"])

    def test_a_full_disk(self, monkeypatch, capsys):
        assert self.raising(monkeypatch, OSError(errno.ENOSPC, "No space left on device")) == 1
        assert capsys.readouterr().err == (
            "shadowllm: error: cannot use the output (No space left on device); "
            "free disk space, or name a place on another disk\n"
        )

    def test_a_bug_keeps_its_traceback(self, monkeypatch):
        with pytest.raises(FileNotFoundError):
            self.raising(monkeypatch, FileNotFoundError(errno.ENOENT, "No such file or directory", "x"))

    def test_a_name_of_two_lines_makes_one_line(self, capsys):
        assert cli.main(["inspect", "two\nlines"]) == 1
        assert capsys.readouterr().err.count("\n") == 1
