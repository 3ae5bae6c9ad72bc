"""Builds the CUDA driver that only records, and runs both interpreters of programs on it."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
SOURCES = ROOT / "plugins" / "tensorrt" / "cpp"
CXX = os.environ.get("CXX", "g++")


def build(folder):
    """Build the driver and the C++ probe in a folder, with sanitizers if possible, and return the folder."""
    fake = [CXX, "-x", "c", "-shared", "-fPIC", "-O1", str(HERE / "fake_cuda.c"), "-o", str(folder / "libcuda.so.1")]
    subprocess.run([*fake, "-ldl"], check=True)
    sources = [HERE / "probe.cpp", *(SOURCES / f"{name}.cpp" for name in ("kernel_program", "launcher", "driver"))]
    watch = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    command = [CXX, "-std=c++17", "-O1", f"-I{SOURCES}", *map(str, sources), "-o", str(folder / "probe"), "-ldl"]
    if subprocess.run([*command, *watch], capture_output=True, check=False).returncode:
        subprocess.run(command, check=True)  # a compiler without sanitizers
    return folder


def record(built, tmp_path, calls, **environment):
    """The launches of Python and of C++ for calls ``(program, batch, seqlen)``, as lines."""
    path = tmp_path / "calls"
    path.write_bytes(b"".join(struct.pack("<3q", batch, seqlen, len(data)) + data for data, batch, seqlen in calls))
    library_path = os.pathsep.join(filter(None, [str(built), os.environ.get("LD_LIBRARY_PATH")]))
    variables = os.environ | {"LD_LIBRARY_PATH": library_path, "FAKE_SM": "80", "ASAN_OPTIONS": "detect_leaks=0"}
    variables |= environment
    outputs = []
    for command in ([sys.executable, "-m", "tests.plugins.driver.probe"], [str(built / "probe")]):
        done = subprocess.run(
            [*command, str(path)], env=variables, capture_output=True, text=True, check=False, cwd=ROOT
        )
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout.splitlines())
    return outputs
