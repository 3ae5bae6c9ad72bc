"""Random tokens, and traces with a known right answer."""

from __future__ import annotations

import torch

from shadowllm.predictor.calibration import Windows
from shadowllm.predictor.linear_fit import LinearFit
from shadowllm.predictor.traces import Chunk


def token_windows(spec, n=4, seqlen=24, seed=3):
    return torch.randint(0, spec.vocab_size, (n, seqlen), generator=torch.Generator().manual_seed(seed))


def split(windows, held_out=1):
    return Windows(windows[held_out:], windows[:held_out], "random tokens")


class LearnableTraces:
    """Traces where the importance of every unit is a linear function of the hidden state, exponentiated."""

    criterion, dense_layers, base_fingerprint = "l2norm", 1, "f00d"

    def __init__(self, spec, n_windows=40, seqlen=64, seed=0):
        generator = torch.Generator().manual_seed(seed)
        n_sparse = spec.n_layers - 1
        hidden = torch.randn(n_windows * seqlen, spec.hidden_size, generator=generator)
        parts = []
        for units in (spec.n_heads, spec.intermediate_size):
            factors = torch.randn(spec.hidden_size, 4, generator=generator) / spec.hidden_size**0.5
            loadings = torch.randn(4, n_sparse * units, generator=generator)
            offset = torch.randn(n_sparse * units, generator=generator)
            parts.append((hidden @ factors @ loadings + offset).exp().unflatten(1, (n_sparse, units)))
        inputs = hidden.unsqueeze(1).expand(-1, n_sparse, -1)
        self.all = Chunk(hidden, *parts, {"heads": inputs, "neurons": inputs})
        tokens = torch.zeros(n_windows, seqlen, dtype=torch.int64)
        self.windows = split(tokens, held_out=8)
        train = self._rows(torch.arange(32) + 8)
        fit = LinearFit(n_sparse, spec.hidden_size, spec.n_heads)
        fit.add(train.inputs["heads"], train.heads)
        self.fit = fit.solve(fit)
        self.final_squares = torch.ones(spec.hidden_size)
        self.statistics = {"heads": train.heads.mean(dim=0), "neurons": train.neurons.mean(dim=0)}

    def _rows(self, windows):
        return self.all[(windows[:, None] * 64 + torch.arange(64)).flatten()]

    def training(self, _tracer, order):
        for part in order.split(4):
            yield self._rows(part + 8)

    def held_out(self, _tracer):
        yield self._rows(torch.arange(8))
