"""The script that each process of `test_parallel` runs: FOLDER OUT BATCH_TOKENS. FOLDER has spec and traces."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from shadowllm.config import TrainConfig
from shadowllm.models.spec import ModelSpec
from shadowllm.predictor.tracefile import Traces
from shadowllm.predictor.train import train_network
from shadowllm.progress import is_first


def main() -> None:
    folder, out, batch = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    spec = ModelSpec.from_dict(json.loads((folder / "spec.json").read_text()))
    traces = Traces.load(folder / "traces.safetensors")
    predictor = train_network(spec, traces, TrainConfig(rank=8, epochs=3, batch_tokens=batch))
    if is_first():
        predictor.save(out)


if __name__ == "__main__":
    main()
