"""Which image of a kernel a GPU runs, and which images an engine contains."""

from __future__ import annotations

import pytest

from shadowllm.bundle.gpu_images import PTX, serving, with_fallback
from shadowllm.plugins.engine_programs import carried, programs_in
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


@pytest.mark.parametrize(("sms", "images"), [((80, 89), (80, 89)), ((80, 90), (80, 90, PTX)), ((PTX, 120), (PTX, 120))])
def test_images_that_need_a_new_driver_come_with_ptx(sms, images):
    assert with_fallback(sms) == images
