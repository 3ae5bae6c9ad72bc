"""Programmatic dependent launch: every compiled kernel waits before it accesses memory. No GPU is needed."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from shadowllm.errors import UserError
from tests.plugins.compiler import child

pytestmark = pytest.mark.slow

pytest.importorskip("triton")
# Instructions that access global memory: loads, stores, atomics, asynchronous copies.
ACCESS = re.compile(r"\b(LD|LDG|LDGSTS|ST|STG|ATOM|ATOMG|RED|REDG|UBLKCP|UTMALDG|UTMASTG)\b")
WAIT, LAUNCH_DEPENDENTS = "ACQBULK", "PREEXIT"
COMPILE = """
import json, sys
from dataclasses import replace
from pathlib import Path
from shadowllm.benchmarks.kernel_programs import Shape, nested_nodes, nodes
folder, wanted, sms = Path(sys.argv[1]), sys.argv[2] == "waits", tuple(map(int, sys.argv[3:]))
shape = Shape(48, 88, 2, 4, 2, 12, gated=True, capacity=300, vocab_size=97)
scores, copy_scores, _, _, gate_first, attention, _, logits, *blocks = nodes(shape, "float16")
*_, linear, _, gather = nested_nodes(shape, "float32")
# Every kernel is in one of these programs. Some are for one token only, which saves time.
one_token = [replace(node, max_batch=1, max_seqlen=1) for node in (gate_first, blocks[2])]
every = [scores, copy_scores, attention, logits, *one_token, blocks[3], linear, gather]
found = []
for node in every if wanted else one_token:
    for kernel in node.program(sms, wanted).kernels:
        for image in kernel.images:
            assert image.waits == wanted
            path = folder / f"{len(found)}.cubin"
            path.write_bytes(image.data)
            found.append((kernel.name, image.sm, path.name))
print(json.dumps(found))
"""


def machine_code(tmp_path, *arguments):
    """Kernel, architecture and instructions in the order of the code, for each image of a tiny model's programs."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    for kernel, sm, file in json.loads(child("-c", COMPILE, str(tmp_path), *arguments)):
        done = subprocess.run([tool, "--print-code", tmp_path / file], check=True, capture_output=True, text=True)
        yield (kernel, sm), re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", done.stdout)


def first(lines, pattern):
    return next((i for i, line in enumerate(lines) if re.search(pattern, line)), len(lines))


def test_every_kernel_waits_before_it_accesses_memory(tmp_path):
    """Before any jump, too, so that all of its threads wait."""
    seen = set()
    for image, lines in machine_code(tmp_path, "waits", "90", "120"):
        wait, access = first(lines, WAIT), first(lines, ACCESS)
        assert wait < min(access, first(lines, r"\b(BRA|BRX|JMP|EXIT|CALL|RET)\b")), image
        assert not lines[wait].startswith("@"), image
        assert wait < first(lines, LAUNCH_DEPENDENTS) < len(lines), image
        assert access < len(lines), image
        seen.add(image)
    assert len(seen) == 2 * 21  # all kernels of programs


def test_kernels_without_it_do_not_wait(tmp_path):
    found = list(machine_code(tmp_path, "plain", "90"))
    assert found
    for image, lines in found:
        assert first(lines, WAIT) == first(lines, LAUNCH_DEPENDENTS) == len(lines), image


@pytest.mark.parametrize("sms", [(86,), (90, 89)])
def test_gpus_without_it_are_refused(sms):
    from shadowllm.plugins.triton.compile import Tensor, compile_program

    inputs = {"scores": Tensor("float32", (2, 88)), "counts": Tensor("int32", (2,))}
    limits = {"max_batch": 1, "max_seqlen": 1, "sms": sms, "programmatic_dependent_launch": True}
    with pytest.raises(UserError, match=f"sm_{min(sms)} has no programmatic dependent launch"):
        compile_program("SelectTopK", inputs, {"cap": 88}, **limits)
