"""A worker with a tiny random model, for the tests. Its mode selects an error.

Run as a script: ``python tiny_worker.py MODE [LOG]``. A line ``MODE`` goes to LOG per generation.
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch

from shadowllm.errors import UserError
from shadowllm.evaluation.speed.worker import StepTimer, serve
from shadowllm.models.decoder import Decoder, KVCache
from shadowllm.models.rope import RopeSpec
from shadowllm.models.spec import ModelSpec
from shadowllm.models.weights import tensor_shape

SPEC = ModelSpec(
    family="llama",
    vocab_size=37,
    hidden_size=16,
    intermediate_size=24,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=4,
    max_seqlen=32,
    norm="rmsnorm",
    norm_eps=1e-5,
    activation="silu",
    gated=True,
    positions="rope",
    rope=RopeSpec((1.0,)),
    tied_embeddings=True,
)


def tiny_decoder() -> Decoder:
    """The same random weights in every process."""
    generator = torch.Generator().manual_seed(5)
    names = ["embed_tokens.weight", "final_norm.weight"]
    for layer in range(SPEC.n_layers):
        names += [
            f"layers.{layer}.{part}.weight"
            for part in (
                "input_norm",
                "post_norm",
                "q_proj",
                "k_proj",
                "v_proj",
                "o_proj",
                "gate_proj",
                "up_proj",
                "down_proj",
            )
        ]
    return Decoder(SPEC, {name: torch.randn(tensor_shape(SPEC, name), generator=generator) for name in names})


class TinySession:
    """The reference decoder with a cache, batch 1."""

    memory = recomputed = None

    def __init__(self, mode: str, log: Path | None) -> None:
        self._decoder, self._mode, self._log = tiny_decoder(), mode, log
        self.fired = None
        self.step_seconds = {"stem": 0.001, "predictor": 0.002, "body": 0.003}

    def reset(self, batch: int = 1) -> None:
        self._cache, self._length = KVCache.empty(SPEC, batch, SPEC.max_seqlen), 0

    def prefill(self, prompts):
        print("a library's chatter on stdout")  # must not be read as part of the protocol
        if self._log:
            with self._log.open("a") as file:
                file.write(self._mode + "\n")
        return self._run(torch.tensor(prompts))

    def decode(self, tokens: np.ndarray):
        if self._mode == "dies":
            print("the last words", file=sys.stderr, flush=True)
            os.kill(os.getpid(), 9)
        if self._mode == "bug":
            raise IndexError("index 7 is outside 0..6")
        return self._run(torch.from_numpy(tokens)[:, None])

    @torch.no_grad()
    def _run(self, ids):
        positions = torch.arange(self._length, self._length + ids.shape[1])[None]
        self._length += ids.shape[1]
        return self._decoder(ids, positions, self._cache)[:, -1].numpy()


def load():
    mode = sys.argv[1]
    if mode == "refuses":
        raise UserError("no such bundle", "make one")
    session = TinySession(mode, Path(sys.argv[2]) if len(sys.argv) > 2 else None)
    return nullcontext(StepTimer(session).commands())


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(serve(load))
