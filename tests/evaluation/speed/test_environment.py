"""The environment record, the bandwidth measurement and the text of benchmarks."""

from __future__ import annotations

import getpass
import json
import platform
from pathlib import Path

import pytest

from shadowllm.errors import UserError
from shadowllm.evaluation.default_text import passage
from shadowllm.evaluation.speed.bandwidth import read_bandwidth
from shadowllm.evaluation.speed.environment import environment, package_versions


def test_environment_names_no_host_and_no_path():
    text = json.dumps(environment(2))
    assert platform.node() not in text
    assert str(Path.home()) not in text
    assert str(Path.cwd()) not in text
    assert getpass.getuser() not in text or getpass.getuser() in ("root", "user")
    assert json.loads(text)["threads"] == 2


def test_packages_that_are_not_installed_are_left_out():
    assert set(package_versions(("numpy", "no-such-package-at-all"))) == {"numpy"}


def test_bandwidth_is_a_plausible_rate():
    # Between a slow disk and any CPU cache: this only finds units that are wrong by a factor of 1000.
    assert 0.1 < read_bandwidth(1, passes=2, buffer_bytes=1 << 26) < 10_000


def test_passage_is_the_same_each_time_and_longer_extends_shorter():
    def encode(text: str) -> list[int]:
        return list(text.encode())

    assert passage(encode, 300) == passage(encode, 300)
    assert passage(encode, 9000)[:300] == passage(encode, 300)
    assert bytes(passage(encode, 300)).startswith(b"Heap queues")
    with pytest.raises(UserError, match="shorter prompt"):
        passage(encode, 10**9)
