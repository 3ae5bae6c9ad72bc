"""In a process of its own, all graphs share one pool of threads. Each case needs a process."""

from __future__ import annotations

import subprocess
import sys

import pytest

COUNT = """
import os, sys
from pathlib import Path
from shadowllm.runtime.ort.session import OrtSession
from shadowllm.threads import share_threads

def threads():
    return len(os.listdir("/proc/self/task"))

def opened(kind, number):
    session = OrtSession(Path(sys.argv[1]), kind, threads=number).__enter__()
    return session, session.prefill([[3, 4, 5]])

if sys.argv[2] == "shared":
    share_threads()
counts, sessions = [threads()], []
for kind, number in (("dense", 4), ("dense", 4), ("sparse", 4), ("dense", 6)):
    sessions.append(opened(kind, number))
    counts.append(threads())
print([after - before for before, after in zip(counts, counts[1:])])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts the threads of a process in /proc")
@pytest.mark.parametrize("case", ["shared", "own"])
def test_graphs_of_all_sessions_share_threads(bundle, case):
    command = [sys.executable, "-c", COUNT, str(bundle("llama-head-dim-16")), case]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    first, second, sparse, other = map(int, done.stdout.strip("[]\n").split(","))
    assert first > 0
    assert not done.stderr
    if case == "shared":
        assert (second, sparse, other) == (0, 0, 0)
    else:
        assert (first, second, other) == (3, 3, 5)  # the caller is a thread too
        assert sparse > 3


def test_the_program_shares_threads():
    """Tests call `cli.main`, because a pool of a process would also change the other tests' sessions."""
    code = "import shadowllm.threads as t; from shadowllm.cli import script; script(); print(t._sharing)"
    done = subprocess.run([sys.executable, "-c", code, "families"], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "True"
