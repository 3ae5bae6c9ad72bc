"""Which image of a kernel a GPU runs, and which images an engine contains."""

from __future__ import annotations

import mmap

import psutil
import pytest

from shadowllm.bundle.gpu_images import PTX, serving, with_fallback
from shadowllm.plugins import engine_programs
from shadowllm.plugins.engine_programs import absent, carried, programs_in
from shadowllm.plugins.kernel_program_bytes import pack
from tests.plugins.kernel_programs import program


@pytest.mark.parametrize(
    ("images", "sm", "wanted"),
    [
        ((80, 86, PTX), 86, 86),
        ((80, 86, PTX), 89, 86),
        ((80, 86), 87, 86),
        ((86, 89, PTX), 80, PTX),
        ((80, 86, 89), 90, None),
        ((90, PTX), 90, 90),
        ((100, 120, PTX), 121, PTX),  # a cubin for 12.0 runs only on 12.0
        ((80, PTX), 75, None),
        ((), 80, None),
    ],
)
def test_which_image_a_gpu_runs(images, sm, wanted):
    assert serving(images, sm) == wanted


def test_programs_are_found_in_an_engine():
    one, other = program(), program("bfloat16", sms=(80, 120))
    found = list(programs_in(b"head" + pack(one) + pack(other) + b"tail" + pack(one)))
    assert found == [one, other, one]
    assert carried(found) == {"first": (80,), "second": (80,)}
    assert not list(programs_in(b"no program at all"))
    with pytest.raises(ValueError, match="damaged"):
        list(programs_in(b"head" + pack(one)[:-1]))


@pytest.mark.parametrize("part", [32, 1000])
def test_engines_are_read_in_parts(tmp_path, monkeypatch, part):
    monkeypatch.setattr(engine_programs, "PART", part)
    one, other = program(), program("bfloat16", sms=(80, 120))
    names = [f"layer.{i}" for i in range(9)]
    path = tmp_path / "model.engine"
    contents = [*(name.encode() for name in names), pack(one) + pack(other), bytes(99), pack(one)]
    path.write_bytes(b"--".join(contents))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as engine:
        assert list(programs_in(engine)) == [one, other, one]
        assert absent(engine, [*names, "layer.9", "tail"]) == ["layer.9", "tail"]


@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED"), reason="this system keeps the pages of mapped files")
def test_pages_of_an_engine_are_given_back(tmp_path):
    path = tmp_path / "model.engine"
    path.write_bytes(bytes(1 << 27))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as engine:
        before = psutil.Process().memory_info().rss
        assert absent(engine, ["layer.0"])
        assert not list(programs_in(engine))
        assert psutil.Process().memory_info().rss - before < 1 << 26


@pytest.mark.parametrize(("sms", "images"), [((80, 89), (80, 89)), ((80, 90), (80, 90, PTX)), ((PTX, 120), (PTX, 120))])
def test_images_that_need_a_new_driver_come_with_ptx(sms, images):
    assert with_fallback(sms) == images
