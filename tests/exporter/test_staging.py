"""Output folders: complete or absent, one writer at a time, and no data loss if a writer dies."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading

import pytest

from shadowllm.errors import UserError
from shadowllm.exporter import staging
from shadowllm.exporter.staging import staged


def contents(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


NAMES = {"manifest": "manifest.json", "data": "model.onnx.data"}


def fill(folder, **files):
    """Make a folder that looks like a bundle."""
    folder.mkdir(exist_ok=True)
    for name, text in ({"manifest": '{"schema_version": 1}'} | files).items():
        (folder / NAMES.get(name, name)).write_text(text)


OLD = {"manifest.json": "old", "model.onnx.data": "old", "gone": "old"}
NEW = {"manifest.json": "new", "model.onnx.data": "new"}


@pytest.fixture
def old(tmp_path):
    fill(tmp_path / "out", manifest="old", data="old", gone="old")
    return tmp_path / "out"


def publish(out):
    with staged(out, overwrite=True) as folder:
        fill(folder, manifest="new", data="new")


class TestStaging:
    def test_appears_whole(self, tmp_path):
        with staged(tmp_path / "out") as folder:
            (folder / "file").write_text("x")
            assert not (tmp_path / "out").exists()
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_an_error_leaves_nothing(self, tmp_path):
        def fail():
            with staged(tmp_path / "out") as folder:
                (folder / "file").write_text("x")
                raise ValueError("no")

        with pytest.raises(ValueError, match="no"):
            fail()
        assert list(tmp_path.iterdir()) == []

    def test_a_full_disk_is_one_line(self, tmp_path):
        with pytest.raises(UserError, match="No space left"), staged(tmp_path / "out"):
            raise OSError(28, os.strerror(28))
        assert list(tmp_path.iterdir()) == []

    def test_existing_output_needs_overwrite(self, tmp_path):
        out = tmp_path / "out"
        out.mkdir()
        (out / "manifest.json").write_text('{"schema_version": 1}')
        with pytest.raises(UserError, match="--overwrite or overwrite=True"), staged(out):
            pass
        with staged(out, overwrite=True) as folder:
            (folder / "manifest.json").write_text("new")
        assert (out / "manifest.json").read_text() == "new"
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_overwrite_spares_what_is_no_bundle(self, tmp_path):
        (tmp_path / "home").mkdir()
        (tmp_path / "home" / "letters").write_text("dear")
        with pytest.raises(UserError, match="not a bundle"), staged(tmp_path / "home", overwrite=True):
            pass
        assert (tmp_path / "home" / "letters").read_text() == "dear"
        (tmp_path / "home" / "manifest.json").write_text('{"name": "a web app"}')
        with pytest.raises(UserError, match="not a bundle"), staged(tmp_path / "home", overwrite=True):
            pass
        assert (tmp_path / "home" / "letters").read_text() == "dear"

    def test_a_killed_process_leaves_no_output_and_the_next_cleans_up(self, tmp_path):
        code = """
import os, signal, sys
from pathlib import Path
from shadowllm.exporter.staging import staged

with staged(Path(sys.argv[1])) as folder:
    (folder / "file").write_text("x")
    os.kill(os.getpid(), signal.SIGKILL)
"""
        subprocess.run([sys.executable, "-c", code, tmp_path / "out"], check=False)
        assert len(list(tmp_path.glob(".out.partial-*"))) == 1
        assert not (tmp_path / "out").exists()
        with staged(tmp_path / "out"):
            pass
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


class TestAnExistingFolderStays:
    def test_its_contents_are_exchanged(self, old, tmp_path):
        before = old.stat().st_ino
        publish(old)
        assert contents(old) == NEW
        assert old.stat().st_ino == before
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_the_current_folder(self, old, monkeypatch):
        monkeypatch.chdir(old)
        publish(old.__class__("."))
        assert contents(old.__class__(".")) == NEW

    def test_a_link_to_a_folder(self, old, tmp_path):
        (tmp_path / "link").symlink_to(old)
        publish(tmp_path / "link")
        assert contents(old) == NEW
        assert (tmp_path / "link").is_symlink()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "out"]

    def test_where_nothing_can_be_moved_in_from_beside_it(self, old, tmp_path, monkeypatch):
        """Nothing can be moved into the output from outside, as with a mount point."""
        rename = os.rename

        def within(source, target):
            if source.is_relative_to(old) != target.is_relative_to(old):
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
            rename(source, target)

        monkeypatch.setattr(os, "rename", within)
        publish(old)
        assert contents(old) == NEW
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    @pytest.mark.parametrize("fails", range(2, 8))
    def test_it_is_as_it_was_when_that_fails(self, old, tmp_path, monkeypatch, fails):
        rename, calls = os.rename, []

        def failing(source, target):
            calls.append(source)
            if len(calls) == fails:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            rename(source, target)

        monkeypatch.setattr(os, "rename", failing)
        with pytest.raises(OSError, match="Input/output"):
            publish(old)
        monkeypatch.undo()
        assert contents(old) == OLD
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


class TestADyingProcess:
    CODE = """
import os, signal, sys
from pathlib import Path
from shadowllm.exporter.staging import staged
from tests.exporter.test_staging import publish

rename, calls = os.rename, []
def dying(source, target):
    calls.append(source)
    if len(calls) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)
os.rename = dying
publish(Path(sys.argv[1]))
"""

    @pytest.mark.parametrize("dies", [2, 3, 5, 6, 7, 8])
    def test_the_next_one_brings_the_old_contents_back(self, old, tmp_path, dies):
        subprocess.run([sys.executable, "-c", self.CODE, old, str(dies)], check=False)
        assert len(list(tmp_path.glob(".out.*"))) > 1
        with pytest.raises(UserError, match="exists already"), staged(old):
            pass
        assert contents(old) == OLD
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_a_name_that_is_the_start_of_another_is_left_alone(self, tmp_path):
        with staged(tmp_path / "out.partial-1") as other:
            with staged(tmp_path / "out"):
                pass
            assert other.is_dir()


class TestTwoAtOnce:
    @pytest.mark.parametrize("overwrite", [False, True])
    def test_the_second_is_told_at_once(self, tmp_path, overwrite):
        with staged(tmp_path / "out", overwrite) as first:
            with (
                pytest.raises(UserError, match=r"another export to .*out is running"),
                staged(tmp_path / "out", overwrite),
            ):
                pass
            fill(first, manifest="first")
        assert contents(tmp_path / "out") == {"manifest.json": "first"}
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_another_process(self, tmp_path):
        code = """
import sys
from pathlib import Path
from tests.exporter.test_staging import publish

publish(Path(sys.argv[1]))
"""
        with staged(tmp_path / "out"):
            done = subprocess.run(
                [sys.executable, "-c", code, tmp_path / "out"], check=False, capture_output=True, text=True
            )
        assert "another export" in done.stderr.splitlines()[-1]

    def test_threads_that_take_turns_never_mix(self, tmp_path):
        told = []

        def run():
            for _ in range(20):
                try:
                    publish(tmp_path / "out")
                except UserError as error:
                    told.append(error.problem)

        threads = [threading.Thread(target=run) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all("is running" in problem for problem in told)
        assert contents(tmp_path / "out") == NEW
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


class TestNames:
    @pytest.mark.parametrize(
        "name", ["a b", "ünï 🙂", "-dash", "x" * 255, "é" * 127, "new\nline", "percent%20#?", "[a]*"]
    )
    def test_odd_ones_work(self, tmp_path, name):
        with staged(tmp_path / name) as folder:
            fill(folder)
        publish(tmp_path / name)
        assert [path.name for path in tmp_path.iterdir()] == [name]

    def test_long_ones_that_begin_alike_do_not_meet(self, tmp_path):
        with staged(tmp_path / ("x" * 250)), staged(tmp_path / ("x" * 249 + "y")):
            pass
        assert len(list(tmp_path.iterdir())) == 2


class TestRefused:
    def test_a_link_to_nothing(self, tmp_path):
        (tmp_path / "link").symlink_to(tmp_path / "nowhere")
        with pytest.raises(UserError, match="link is a link to nothing"), staged(tmp_path / "link", overwrite=True):
            pass
        assert (tmp_path / "link").is_symlink()

    def test_a_file(self, tmp_path):
        (tmp_path / "file").write_text("dear")
        with pytest.raises(UserError, match="not a bundle"), staged(tmp_path / "file", overwrite=True):
            pass
        with pytest.raises(UserError, match="file is not a folder"), staged(tmp_path / "file" / "out"):
            pass
        assert contents(tmp_path) == {"file": "dear"}

    def test_a_name_that_is_too_long(self, tmp_path):
        with (
            pytest.raises(UserError, match=r"File name too long.*; choose a shorter name"),
            staged(tmp_path / ("x" * 256)),
        ):
            pass

    def test_no_parent(self, tmp_path):
        with pytest.raises(UserError, match=r"the folder .*no does not exist"), staged(tmp_path / "no" / "out"):
            pass


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.ENOSPC, "free disk space"), (errno.EACCES, "change its permissions"), (errno.EROFS, "that can be written")],
)
def test_what_the_system_refuses_has_its_own_remedy(tmp_path, number, remedy):
    with (
        pytest.raises(UserError, match=f"{tmp_path}/out .*{os.strerror(number)}.*{remedy}"),
        staged(tmp_path / "out") as folder,
    ):
        raise OSError(number, os.strerror(number), str(folder / "file"))


@pytest.mark.parametrize(
    "error", [FileNotFoundError(2, "no"), IsADirectoryError(21, "no"), UserError("no"), ValueError("no")]
)
def test_all_else_passes_through(tmp_path, error):
    with pytest.raises(type(error), match="no"), staged(tmp_path / "out"):
        raise error
    assert list(tmp_path.iterdir()) == []


def test_the_lock_is_there_only_while_it_is_held(tmp_path):
    with staged(tmp_path / "out"):
        assert (tmp_path / staging._name(tmp_path / "out", "lock")).exists()
    assert not (tmp_path / ".out.lock").exists()
