"""Runs the calls in a file with the Python launcher; ``probe.cpp`` does the same in C++."""

from __future__ import annotations

import os
import struct
import sys
from pathlib import Path

from shadowllm.plugins.kernel_program_bytes import unpack
from shadowllm.plugins.tensorrt.launcher import Launcher


def main(path: str) -> None:
    """Print the launches of each call."""
    data, place, i = Path(path).read_bytes(), 0, 0
    while place < len(data):
        batch, seqlen, size = struct.unpack_from("<3q", data, place)
        print("call", i, flush=True)
        run(data[place + 24 : place + 24 + size], batch, seqlen)
        place, i = place + 24 + size, i + 1


def run(packed: bytes, batch: int, seqlen: int) -> None:
    """Make one call, with invented addresses."""
    try:
        program = unpack(packed)
    except ValueError:
        print("refused", flush=True)
        return
    read, written = (int(os.environ.get(name, "0")) for name in ("PROBE_INPUT", "PROBE_OUTPUT"))
    inputs = [0x100000000 * (i + 1) + read for i in range(len(program.inputs))]
    outputs = [0x1000000000 * (i + 1) + written for i in range(len(program.outputs))]
    try:
        launcher = Launcher(program)
        launcher.run((batch, seqlen, 576), inputs, outputs, 0x7F0000000000, 0x55)
        if "PROBE_CAPTURES" in os.environ:
            os.environ["FAKE_CAPTURES"] = "1"
            launcher.run((batch, seqlen, 576), inputs, outputs, 0x7F0000000000, 0x55)
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
