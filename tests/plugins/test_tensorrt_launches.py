"""Compares the launches of both interpreters of programs, on a CUDA driver that only records. No GPU is needed."""

from __future__ import annotations

import os
import random
import shutil
import struct
import subprocess
import sys
from dataclasses import replace

import pytest

from shadowllm.bundle.gpu_images import PTX
from shadowllm.plugins.kernel_program_bytes import pack
from tests.plugins.driver.recorder import CXX, ROOT, build, record
from tests.plugins.kernel_programs import program

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which(CXX) is None, reason="no C++ compiler"),
    pytest.mark.skipif(sys.platform != "linux", reason="the fake driver is a libcuda.so.1"),
]
pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed (pip install 'shadowllm[tensorrt-rtx]')")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build(tmp_path_factory.mktemp("driver"))


def test_one_token_and_a_prompt(built, tmp_path):
    data = pack(program())
    python, cpp = record(built, tmp_path, [(data, 1, 1), (data, 2, 50), (data + b"\0", 5, 1)])
    block = "shared 98920 stream 0x55 extra (nil)"
    assert python == [
        "call 0",
        "load one-80",
        "function first of one-80",
        "load two-80",
        "function second of two-80",
        "second attribute 8 = 98920",
        f"launch second of two-80 grid 3 1 1 block 256 1 1 {block}: 7f0000000000 1000000000 100000000 1",
        "call 1",
        "function first of one-80",
        "function second of two-80",
        "second attribute 8 = 98920",
        "launch first of one-80 grid 9 2 7 block 128 1 1 shared 4176 stream 0x55 extra (nil): "
        "200000018 7f0000000200 240 0 0",
        f"launch second of two-80 grid 3 1 1 block 256 1 1 {block}: 7f0000000000 1000000000 100000000 43",
        "call 2",
        "error: no plan serves batch 5, seqlen 1",
    ]
    assert cpp == python


@pytest.mark.parametrize(("sm", "image"), [(86, 80), (90, 90), (100, 0), (121, 0)])
def test_the_image_that_serves_the_gpu_is_loaded(built, tmp_path, sm, image):
    """With the shared memory that it needs, which is not that of the others."""
    python, cpp = record(built, tmp_path, [(pack(program()), 1, 1)], FAKE_SM=str(sm))
    assert python[1] == f"load one-{image}"
    assert python[5] == f"second attribute 8 = {99000 - image}"
    assert f"block 256 1 1 shared {99000 - image} " in python[6]
    assert cpp == python


def test_a_call_under_capture_only_launches(built, tmp_path):
    """Loading, allocating and waiting fail while a stream is under capture; the first call has loaded everything."""
    calls = [(pack(program()), 2, 50)]
    python, cpp = record(built, tmp_path, calls, PROBE_CAPTURES="1")
    assert cpp == python
    assert [line.split()[0] for line in python[-4:]] == ["launch"] * 4
    python, cpp = record(built, tmp_path, calls, FAKE_CAPTURES="1")
    assert cpp == python
    assert python[-1] == "error: CUDA driver: CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"


@pytest.mark.parametrize(("sm", "waits"), [(80, False), (90, True), (121, False)])
def test_kernels_that_wait_are_launched_early(built, tmp_path, sm, waits):
    """`CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION` is 6. Images for sm_80 and PTX do not wait."""
    calls = [(pack(program(waits=waits)), 2, 50) for waits in (False, True)]
    python, cpp = record(built, tmp_path, calls, FAKE_SM=str(sm))
    assert cpp == python
    launches = [line for line in python if line.startswith("launch")]
    early = [line.replace(" extra (nil):", " extra (nil) attribute 6 = 1:") for line in launches[:2]]
    assert launches == launches[:2] + (early if waits else launches[:2])


def test_early_launches_under_capture(built, tmp_path):
    python, cpp = record(built, tmp_path, [(pack(program(waits=True)), 2, 50)], FAKE_SM="90", PROBE_CAPTURES="1")
    assert cpp == python
    assert [(line.split()[0], " attribute 6 = 1:" in line) for line in python[-4:]] == [("launch", True)] * 4


def test_a_driver_too_old_for_an_image_launches_nothing_early(built, tmp_path):
    """It takes the PTX, which does not wait."""
    python, cpp = record(built, tmp_path, [(pack(program(waits=True)), 1, 1)], FAKE_SM="90", FAKE_OLD="1")
    assert cpp == python
    assert python[-1].startswith("launch second of two-0 ")
    assert "attribute" not in python[-1]


@pytest.mark.parametrize(("sm", "flag"), [(90, 2), (90, -1), (90, 1 << 32), (86, 1), (PTX, 1)])
def test_a_damaged_flag_is_refused(built, tmp_path, sm, flag):
    data = pack(program(sms=(sm,)))
    assert data.count(struct.pack("<3q", sm, 4096 + sm, 0)) == 1
    data = data.replace(struct.pack("<3q", sm, 4096 + sm, 0), struct.pack("<3q", sm, 4096 + sm, flag))
    assert record(built, tmp_path, [(data, 1, 1)]) == [["call 0", "refused"]] * 2


def test_a_driver_too_old_for_an_image_takes_the_ptx(built, tmp_path):
    calls = [(pack(program(sms=sms)), 1, 1) for sms in ((80, 90, PTX), (90,))]
    python, cpp = record(built, tmp_path, calls, FAKE_SM="90", FAKE_OLD="1")
    assert cpp == python
    assert python[1:4] == ["load one-90", "load one-0", "function first of one-0"]
    assert f"block 256 1 1 shared {99000 - PTX} " in next(line for line in python if line.startswith("launch"))
    words = "error: the driver does not know the image of kernel first for sm_90"
    assert python[-1] == f"{words}; images for sm_90 and later need driver 580"


@pytest.mark.parametrize(
    ("offsets", "words"),
    [
        ({"PROBE_INPUT": "8"}, "error: input 0 does not begin at a multiple of 16 bytes"),
        ({"PROBE_OUTPUT": "4"}, "error: output 0 does not begin at a multiple of 16 bytes"),
        ({"PROBE_INPUT": "32", "PROBE_OUTPUT": "16"}, "launch second"),
    ],
)
def test_floats_begin_where_kernels_can_load_them(built, tmp_path, offsets, words):
    python, cpp = record(built, tmp_path, [(pack(program()), 1, 1)], **offsets)
    assert cpp == python
    assert python[-1].startswith(words)


def test_integers_may_begin_anywhere(built, tmp_path):
    whole = replace(program(), inputs=("int32",) * 3)
    python, cpp = record(built, tmp_path, [(pack(whole), 1, 1)], PROBE_INPUT="4")
    assert cpp == python
    assert python[-1].endswith(": 7f0000000000 1000000000 100000004 1")


def test_a_gpu_that_nothing_serves_is_named(built, tmp_path):
    calls = [(pack(program(sms=sms)), 1, 1) for sms in ((80, PTX), (86, 90), ())]
    python, cpp = record(built, tmp_path, calls, FAKE_SM="75")
    words = "error: kernel first is compiled for {}; none of it runs on this GPU, sm_75"
    assert python[1::2] == [words.format(text) for text in ("sm_80, PTX", "sm_86, sm_90", "nothing")]
    assert cpp == python


@pytest.mark.parametrize(
    ("sm", "function"),
    [
        (80, "cuModuleLoadData"),
        (80, "cuModuleGetFunction"),
        (80, "cuFuncSetAttribute"),
        (80, "cuLaunchKernel"),
        (90, "cuLaunchKernelEx"),
    ],
)
def test_what_the_driver_refuses_is_an_error(built, tmp_path, sm, function):
    calls = [(pack(program(waits=True)), 1, 1)]
    python, cpp = record(built, tmp_path, calls, FAKE_SM=str(sm), FAKE_FAIL=function)
    assert python[-1] == "error: CUDA driver: CUDA_ERROR_LAUNCH_FAILED"
    assert cpp == python


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="this machine has a driver")
def test_a_machine_without_a_driver(built, tmp_path):
    data = pack(program())
    (tmp_path / "calls").write_bytes(struct.pack("<3q", 1, 1, len(data)) + data)
    variables = {name: value for name, value in os.environ.items() if name != "LD_LIBRARY_PATH"}
    done = subprocess.run(
        [built / "probe", tmp_path / "calls"], env=variables, capture_output=True, text=True, check=True
    )
    assert done.stdout == "call 0\nerror: there is no CUDA driver: libcuda.so.1 cannot be loaded\n"


def test_damaged_programs_are_taken_or_refused_alike(built, tmp_path):
    """Damaged programs: random bytes, extreme numbers, missing ends."""
    rng, whole = random.Random(0), pack(small())
    wild = [0, 1, -1, 2, 7, 2**31, -(2**63), 2**63 - 1, 2**32 + 1]
    calls = []
    for i in range(3000):
        data, place = bytearray(whole), rng.randrange(len(whole))
        if i % 3 == 0:
            data[place] ^= 1 << rng.randrange(8)
        elif i % 3 == 1:
            data[place : place + 8] = struct.pack("<q", rng.choice(wild))
        else:
            data[place : place + 8] = b""
        calls.append((bytes(data), rng.choice((1, 4)), rng.choice((1, 128))))
    python, cpp = record(built, tmp_path, calls)
    assert cpp == python
    assert python.count("refused") > 1000
    assert sum(line.startswith("launch") for line in python) > 500


def small():
    """A program most of which is numbers; its kernels have no parameters to look at."""
    whole = program(sms=(80,))
    kernels = tuple(
        replace(k, images=(replace(k.images[0], data=f"{i}".encode()),)) for i, k in enumerate(whole.kernels)
    )
    return replace(whole, kernels=kernels)


# A builder shapes a plugin without attaching it to a context, and may capture the run that it times.
TIMED = """
import os
from types import SimpleNamespace
from shadowllm.plugins.tensorrt import creators, load_tensorrt
from shadowllm.plugins.tensorrt.launcher import Launcher
from tests.plugins.kernel_programs import program
plugin = creators.plugin_class(load_tensorrt.load("tensorrt_rtx"))("SparseMLP", Launcher(program()))
plugin.on_shape_change([], [])
os.environ["FAKE_CAPTURES"] = "1"
inputs = [SimpleNamespace(dims=(1, 1, 576))]
plugin.enqueue(inputs, [], [16 * (i + 1) for i in range(len(plugin.program.inputs))], [1024], 0, 0x55)
print("timed", flush=True)
"""


def test_a_builder_may_capture_the_run_that_it_times(built):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed (pip install 'shadowllm[tensorrt-rtx]')")
    paths = os.pathsep.join(filter(None, [str(built), os.environ.get("LD_LIBRARY_PATH")]))
    environment = os.environ | {"LD_LIBRARY_PATH": paths, "FAKE_SM": "80"}
    done = subprocess.run(
        [sys.executable, "-c", TIMED], env=environment, capture_output=True, text=True, check=False, cwd=ROOT
    )
    lines = done.stdout.splitlines()
    assert lines[-1] == "timed", done.stderr
    assert [line.split()[0] for line in lines[-2:]] == ["launch", "timed"]
