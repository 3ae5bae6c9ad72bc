"""Programs: the sizes that they compute, and their serialised form."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from shadowllm.bundle.gpu_images import PTX
from shadowllm.plugins.kernel_program import Image, Output, Size
from shadowllm.plugins.kernel_program_bytes import pack, unpack
from tests.plugins.kernel_programs import program as make_program


@pytest.fixture(name="program")
def sample():
    return make_program()


def test_a_program_survives_serialisation(program):
    assert unpack(pack(program)) == program


def test_the_images_that_wait_survive_serialisation():
    waiting = make_program(waits=True)
    assert unpack(pack(waiting)) == waiting
    assert [image.waits for image in waiting.kernels[0].images] == [False, True, False]


@pytest.mark.parametrize("sm", [PTX, 86, 89])
def test_a_gpu_without_dependent_launch_has_no_image_that_waits(program, sm):
    kernel = replace(program.kernels[0], images=(Image(sm, 0, b"", waits=True),))
    with pytest.raises(ValueError, match=re.escape("waits is True, and should be 0..0")):
        replace(program, kernels=(kernel, program.kernels[1]))


@pytest.mark.parametrize(("batch", "seqlen", "wanted"), [(1, 1, 0), (2, 1, 1), (1, 2, 1), (4, 128, 1)])
def test_the_first_plan_that_covers_a_call_serves_it(program, batch, seqlen, wanted):
    assert program.plan(batch, seqlen) is program.plans[wanted]


def test_a_call_that_no_plan_covers_is_refused(program):
    with pytest.raises(ValueError, match="batch 5, seqlen 1"):
        program.plan(5, 1)


def test_the_workspace_is_the_largest_plan_s(program):
    assert program.workspace_bytes == 65536


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        (Size(5), 5),
        (Size(5, divisor=2), 3),
        (Size(batch=True), 3),
        (Size(seqlen=True), 7),
        (Size(2, True, True, 4), 11),
    ],
)
def test_sizes_are_rounded_up(size, wanted):
    assert size(batch=3, seqlen=7) == wanted


def test_the_zero_of_the_onnx_parser_does_no_harm(program):
    assert unpack(pack(program) + b"\0") == program


def test_damage_is_noticed(program):
    whole = pack(program)
    for end in range(0, len(whole), 7):
        with pytest.raises(ValueError):
            unpack(whole[:end])
    with pytest.raises(ValueError, match="longer"):
        unpack(whole + b"\0\0")
    with pytest.raises(ValueError, match="longer"):
        unpack(whole + b"\1")
    with pytest.raises(ValueError, match="version: build the engine again"):
        unpack(whole.replace(b"program 4", b"program 3"))


def test_a_damaged_length_is_noticed(program):
    data = bytearray(pack(program))
    data[0:8] = (2**62).to_bytes(8, "little")
    with pytest.raises(ValueError, match="damaged"):
        unpack(bytes(data))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: {"inputs": ()}, "inputs"),
        (lambda p: {"plans": ()}, "plans"),
        (lambda p: {"kernels": ()}, "kernel is 1"),
        (lambda p: {"outputs": (Output("float16", ((3, 0),)),)}, "dimension is 3"),
        (lambda p: {"outputs": ()}, "output is 0"),
        (lambda p: {"kernels": (replace(p.kernels[0], name="m l p"),)}, "kernel name"),
        (lambda p: {"kernels": (replace(p.kernels[0], threads=2048),)}, "threads is 2048"),
        (lambda p: {"kernels": (with_shared(p.kernels[0], -1),)}, "shared_bytes is -1"),
        (lambda p: {"plans": (replace(p.plans[0], max_batch=0),)}, "largest call is 0"),
        (lambda p: {"plans": (replace(p.plans[1], workspace_bytes=511),)}, "workspace is 512"),
        (lambda p: {"plans": (replace(p.plans[1], max_seqlen=2**30),)}, "size is"),
        (lambda p: {"plans": (with_grid(p, Size(0)),)}, "factor is 0"),
        (lambda p: {"plans": (with_grid(p, Size(1, divisor=0)),)}, "divisor is 0"),
        (lambda p: {"plans": (with_grid(p, Size(65536)),)}, "grid is 65536, and should be 1..65535"),
        (lambda p: {"plans": (with_grid(p, z=Size(131071, divisor=1)),)}, "grid is 131071"),
    ],
)
def test_what_cannot_be_run_is_no_program(program, change, words):
    with pytest.raises(ValueError, match=words):
        replace(program, **change(program))


def test_grids_are_long_along_x_alone(program):
    plan = replace(program.plans[1], max_batch=65535)
    for grid in ((Size(2**31 - 1), Size(65535), Size(131070, divisor=2)), (Size(), Size(batch=True), Size())):
        launch = replace(plan.launches[0], grid=grid)
        assert replace(program, plans=(replace(plan, launches=(launch,)),)).plans[0].launches == (launch,)


def with_shared(kernel, shared_bytes):
    return replace(kernel, images=(replace(kernel.images[0], shared_bytes=shared_bytes),))


def with_grid(program, y=None, z=None):
    grid = (Size(100_000), y or Size(), z or Size())
    return replace(program.plans[0], launches=(replace(program.plans[0].launches[0], grid=grid),))


def test_an_offset_is_of_an_int32_input(program):
    """Kernels are compiled for floats that begin at a multiple of 16 bytes."""
    arguments = program.plans[1].launches[0].arguments
    moved = program.with_offsets({1: 400}).plans[1].launches[0].arguments
    assert moved == (replace(arguments[0], offset=400), *arguments[1:])
    with pytest.raises(ValueError, match="offset is 4"):
        program.with_offsets({0: 4})
    with pytest.raises(ValueError, match="offset is -4"):
        program.with_offsets({1: -4})
