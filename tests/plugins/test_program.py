"""A plugin's state: what it computes, and its serialised form."""

from __future__ import annotations

import pytest

from shadowllm.plugins.program import PTX, Argument, Image, Kernel, Launch, Output, Plan, Program, Size


@pytest.fixture
def program():
    launch = Launch(
        0,
        (Size(576, divisor=64), Size(batch=True), Size(batch=True, seqlen=True, divisor=16)),
        (Argument("input", 2), Argument("output", 0), Argument("workspace", 512), Argument("int", 0, Size(576))),
    )
    kernel = Kernel("mlp", 128, 4096, 2, (Image(80, b"\x7fELF\0\1\2\0"), Image(PTX, b".version 8.0")))
    plans = (Plan(1, 1, 1024, (launch,)), Plan(4, 128, 65536, (launch, launch)))
    outputs = (Output("bfloat16", ((0, 0), (0, 1), 576)), Output("int32", (7,)))
    return Program(("bfloat16", "int32", "float32"), outputs, (kernel,), plans)


def test_a_program_survives_serialisation(program):
    assert Program.unpack(program.pack()) == program


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


def test_damage_is_noticed(program):
    whole = program.pack()
    for end in range(0, len(whole), 7):
        with pytest.raises(ValueError):
            Program.unpack(whole[:end])
    with pytest.raises(ValueError, match="longer"):
        Program.unpack(whole + b"\0")
    with pytest.raises(ValueError, match="version"):
        Program.unpack(whole.replace(b"program 1", b"program 2"))


def test_a_damaged_length_is_noticed(program):
    data = bytearray(program.pack())
    data[0:8] = (2**62).to_bytes(8, "little")
    with pytest.raises(ValueError, match="damaged"):
        Program.unpack(bytes(data))
