"""Evaluates combined selectors: a static hot set with a network for the rest, and two kinds of networks together.

    python -m shadowllm.benchmarks.combinations MODEL out/scaling --tokens 131072 --json combinations.json

It uses predictors that `shadowllm.benchmarks.scaling` trained, and evaluates them in the same way.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from shadowllm.benchmarks.scaling import EVALUATED, STATIC, WINDOW, Point
from shadowllm.benchmarks.script_parser import add_json, script, script_parser
from shadowllm.bundle.predictor_file import Kind, Predictor
from shadowllm.evaluation.default_text import passage
from shadowllm.evaluation.quality import evaluate
from shadowllm.evaluation.speed.environment import environment
from shadowllm.malloc import keep_freed_memory
from shadowllm.models.registry import load_model
from shadowllm.models.sparsity import SparseLayers, Unit
from shadowllm.predictor.selectors import Context, Selector, make_selector
from shadowllm.predictor.topk import top_mask

BUDGET = 0.5


class Mean(Selector):
    """Ranks units by the mean of the log softmax of other selectors' scores."""

    def __init__(self, *parts: Selector) -> None:
        self._parts = parts

    def start(self, windows: Tensor, hidden: Tensor) -> None:
        """Start all selectors."""
        for part in self._parts:
            part.start(windows, hidden)

    def observe(self, layer: int, unit: Unit, x: Tensor) -> None:
        """Pass the input to all selectors."""
        for part in self._parts:
            part.observe(layer, unit, x)

    def scores(self, layer: int, unit: Unit, activation: Tensor) -> Tensor:
        """Sum of the log softmax of each selector's scores."""
        found = [part.scores(layer, unit, activation).log_softmax(dim=-1) for part in self._parts]
        return torch.stack(found).sum(dim=0)


class HotSet(Mean):
    """Always selects the first ``count`` neurons per layer of a static ranking; another selector chooses the rest."""

    def __init__(self, rest: Selector, ranking: Tensor, count: int, layers: SparseLayers) -> None:
        super().__init__(rest)
        self._hot, self._layers = top_mask(ranking, count), layers

    def scores(self, layer: int, unit: Unit, activation: Tensor) -> Tensor:
        """The other selector's scores, with infinity for the hot set."""
        found = super().scores(layer, unit, activation)
        return found.masked_fill(self._hot[self._layers.row(layer)], torch.inf)


@script
def main() -> None:
    """Command line."""
    parser = script_parser("combinations", __doc__)
    parser.add_argument("model", help="folder or GGUF file")
    parser.add_argument("folder", type=Path, help="folder with the predictors")
    parser.add_argument("--tokens", type=int, required=True, help="number of tokens that they were trained on")
    add_json(parser, "write the results there", required=True)
    args = parser.parse_args()
    keep_freed_memory()
    spec, stored, checkpoint = load_model(args.model)
    weights, tokenizer = stored.load(), checkpoint.tokenizer()
    static = Predictor.load(args.folder / f"{STATIC}.safetensors")

    def trained(kind: Kind) -> Selector:
        predictor = Predictor.load(args.folder / Point(kind, 0.04, args.tokens).file)
        return make_selector(kind, Context(spec, weights, predictor=predictor))

    ranking, kept = static.tensors["neurons.scores"], BUDGET * spec.intermediate_size
    layers = SparseLayers(spec, static.dense_layers)
    contenders: dict[str, Selector] = {
        f"layerwise, {share:.0%} hot": HotSet(trained("layerwise"), ranking, int(share * kept), layers)
        for share in (0.25, 0.5)
    }
    contenders["shadow and layerwise"] = Mean(trained("shadow"), trained("layerwise"))
    tokens = passage(lambda text: tokenizer(text, add_special_tokens=False).input_ids, EVALUATED)
    windows = torch.tensor(tokens).view(-1, WINDOW)
    results = evaluate(spec, weights, static, contenders, windows, neuron_budgets=(BUDGET,))
    rows = [{key: value for key, value in result.row().items() if key != "layers"} for result in results]
    args.json.write_text(json.dumps({"environment": environment(), "results": rows}, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
