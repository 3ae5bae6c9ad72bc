"""Training of one network in several processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from shadowllm.bundle.predictor_file import Predictor
from shadowllm.config import TrainConfig
from shadowllm.errors import UserError
from shadowllm.predictor.parallel import Workers
from shadowllm.predictor.tracefile import Traces, calibrate
from shadowllm.predictor.train import train_network
from tests.tiny import split, token_windows


def test_one_process_keeps_everything_and_averages_nothing():
    workers, gradient = Workers(), torch.arange(3.0)
    workers.average([gradient, None])
    assert (workers.count, workers.index) == (1, 0)
    assert gradient.tolist() == [0, 1, 2]
    assert workers.share(torch.arange(5)).tolist() == [0, 1, 2, 3, 4]


def test_several_processes_ask_for_accelerate(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)  # as where it is not installed
    with pytest.raises(UserError, match="accelerate"):
        Workers()


@pytest.mark.slow
def test_two_processes_learn_what_one_does_from_the_same_batches(llama, tmp_path):
    """Two windows of 24 tokens in two processes give the same gradient and step as one batch of 48."""
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    spec, weights = llama
    windows = split(token_windows(spec, n=3), held_out=1)
    (tmp_path / "spec.json").write_text(json.dumps(spec.to_dict()))
    calibrate(spec, weights, windows, "f00d").save(tmp_path / "traces.safetensors")
    alone = train_network(
        spec, Traces.load(tmp_path / "traces.safetensors"), TrainConfig(rank=8, epochs=3, batch_tokens=48)
    )
    launcher = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "tests.predictor.train_apart",
    ]
    out = tmp_path / "together.safetensors"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *launcher, tmp_path, out, "24"], check=True, timeout=300, env=environment)
    together = Predictor.load(out)
    assert (alone.record["processes"], together.record["processes"]) == (1, 2)
    for name in alone.learned:
        torch.testing.assert_close(together.tensors[name], alone.tensors[name], atol=1e-5, rtol=1e-4)
    assert float(alone.tensors["neurons.weight"].abs().max()) > 1e-3  # something was learned
