"""Measures how the quality of learned selectors depends on their training text and their size.

    python -m shadowllm.benchmarks.scaling "$(python benchmarks/model_path.py)" out/scaling --json scaling.json

Networks of several kinds, sizes and losses are trained together in one pass over Python's own documentation
(`small_model.documents`, without the modules that are evaluated on) and, with --packages, over the docstrings of
installed packages. Each network has its own learning rate schedule and stops at its own number of tokens, as in
`shadowllm train`. The networks are written to a folder. A network that is already there is not trained again, and
one that is already in the JSON is not evaluated again. The evaluation selects neurons, with all heads kept and
layer 0 dense, on the benchmarks' passage.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from shadowllm.benchmarks.script_parser import add_json, script, script_parser
from shadowllm.benchmarks.small_model import docstrings, documents
from shadowllm.bundle.predictor_file import Kind, Predictor
from shadowllm.config import TrainConfig
from shadowllm.errors import UserError
from shadowllm.evaluation.default_text import MODULES, passage
from shadowllm.evaluation.quality import evaluate
from shadowllm.evaluation.speed.environment import environment
from shadowllm.evaluation.speed.worker import peak_rss_mb
from shadowllm.malloc import keep_freed_memory
from shadowllm.models.registry import load_model
from shadowllm.models.sparsity import SparseLayers
from shadowllm.models.spec import ModelSpec
from shadowllm.predictor.calibration import Encode, Windows
from shadowllm.predictor.losses import LOSSES
from shadowllm.predictor.networks import default_rank
from shadowllm.predictor.selectors import Context, make_selector
from shadowllm.predictor.tracefile import Traces, calibrate
from shadowllm.predictor.traces import Tracer
from shadowllm.predictor.train import Trainer, initial, train_static
from shadowllm.progress import progress

SEQLEN = 256
STATISTICS = 16384  # tokens for the static ranking
BUDGETS = (0.5, 0.3)
EVALUATED, WINDOW = 2048, 512
SEED = 0
STATIC = "static"


@dataclass(frozen=True)
class Point:
    """A network to train.

    Attributes:
        kind: "shadow" or "layerwise".
        share: largest size relative to the model.
        tokens: number of tokens to train on.
        loss: name of the loss.
    """

    kind: Kind
    share: float
    tokens: int
    loss: str = "listnet"

    @classmethod
    def parse(cls, text: str) -> Point:
        """Parse ``KIND:SHARE:TOKENS`` or ``KIND:SHARE:TOKENS:LOSS``, e.g. ``layerwise:0.04:131072``."""
        kind, share, tokens, *loss = text.split(":")
        if kind not in ("shadow", "layerwise") or len(loss) > 1 or any(name not in LOSSES for name in loss):
            raise UserError(f"{text!r} is no network to train", "write it as layerwise:0.04:131072 or ...:weighted_bce")
        return cls(cast(Kind, kind), float(share), int(tokens), *loss)

    @property
    def file(self) -> str:
        """File name of its predictor."""
        return f"{self.kind}-{self.share:g}-{self.tokens}-{self.loss}.safetensors"


POINTS = (
    *(f"{kind}:0.04:{tokens}" for kind in ("shadow", "layerwise") for tokens in (8192, 32768, 131072)),
    *(f"{kind}:{share}:32768" for kind in ("shadow", "layerwise") for share in (0.08, 0.16)),
    "layerwise:0.08:131072",
    *(f"{kind}:0.04:32768:weighted_bce" for kind in ("shadow", "layerwise")),
)


def text_windows(encode: Encode, seqlen: int, seed: int, packages: Sequence[str] = ()) -> Tensor:
    """The documentation cut into windows, int64 ``(n, seqlen)``, in a random order.

    Args:
        packages: names of installed packages whose docstrings are added.

    Raises:
        UserError: a package is not installed.
    """
    folders = [_package(name) for name in packages]  # before the text is read, which takes seconds
    texts = chain(documents(), *(docstrings(folder, MODULES) for folder in folders))
    ids = torch.tensor([token for text in texts for token in encode(text)])
    windows = ids[: len(ids) // seqlen * seqlen].view(-1, seqlen)
    return windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))]


def _package(name: str) -> Path:
    found = find_spec(name) if name.isidentifier() else None
    # A single-file module has no folder of its own: its folder holds all installed packages.
    if found is None or not found.submodule_search_locations:
        raise UserError(f"no package {name!r} is installed", "install it, or name another")
    return Path(found.submodule_search_locations[0])


def train(
    spec: ModelSpec, traces: Traces, points: Sequence[Point], tracer: Tracer, windows: Tensor, folder: Path
) -> None:
    """Train all points in one pass over the windows, and write each predictor when it is done.

    Its record has the cost of the run so far: seconds, peak memory, and CPU seconds (of all threads) per token, for
    tracing and for this network.
    """
    learners = {point: _learner(spec, traces, point) for point in points}
    cost: dict[Point | None, float] = defaultdict(float)
    began, before, seen = time.time(), time.process_time(), 0
    with progress("Training", max((point.tokens for point in points), default=0)) as advance:
        for chunk in tracer.chunks(windows if points else windows[:0]):
            seen += chunk.tokens
            for point in (None, *learners):
                if point is not None:
                    learners[point].learn(chunk)
                now = time.process_time()
                cost[point], before = cost[point] + now - before, now
            advance(chunk.tokens)
            for point in [point for point in learners if seen >= point.tokens]:
                spent = {
                    "cpu_seconds_per_token": {"trace": cost[None] / seen, "network": cost[point] / seen},
                    "wall_seconds": time.time() - began,
                    "peak_rss_mb": peak_rss_mb(),
                }
                predictor = learners.pop(point).predictor()
                replace(predictor, record=asdict(point) | spent).save(folder / point.file)
                print(f"{point.file}: {time.time() - began:.0f} s", flush=True)
                before = time.process_time()
            if not learners:
                return


def _learner(spec: ModelSpec, traces: Traces, point: Point) -> Trainer:
    rank = default_rank(SparseLayers(spec, traces.dense_layers), point.kind, point.share)
    config = TrainConfig(loss=point.loss, rank=rank, seed=SEED)
    return Trainer(spec, initial(point.kind, spec, traces, config), config, point.tokens)


def judge(
    spec: ModelSpec, weights: Mapping[str, Tensor], folder: Path, windows: Tensor, known: dict[str, Any]
) -> dict[str, Any]:
    """Evaluate every predictor of the folder, with static and oracle, at each of `BUDGETS`.

    Args:
        known: result of an earlier call; selectors in it are not evaluated again.
    """
    predictors = {path.stem: Predictor.load(path) for path in sorted(folder.glob("*.safetensors"))}
    rows: list[dict[str, Any]] = known.get("results", [])
    left = {name: p for name, p in predictors.items() if name not in {row["selector"] for row in rows}}
    contenders = {name: make_selector(p.kind, Context(spec, weights, predictor=p)) for name, p in left.items()}
    if STATIC in left:
        contenders["oracle"] = make_selector("oracle", Context(spec, weights))
    dense = known.get("dense")
    if contenders:
        with progress("Evaluating", len(windows) * (1 + len(contenders) * len(BUDGETS))) as advance:
            results = evaluate(
                spec, weights, predictors[STATIC], contenders, windows, neuron_budgets=BUDGETS, advance=advance
            )
        dense, *found = ({k: v for k, v in result.row().items() if k != "layers"} for result in results)
        rows += [_described(predictors[row["selector"]]) | row if row["selector"] in left else row for row in found]
    logs = {(row["selector"], row["neuron_budget"]): math.log(row["perplexity"]) for row in rows}
    for row in rows:
        static, mine, oracle = (logs[name, row["neuron_budget"]] for name in (STATIC, row["selector"], "oracle"))
        row["gap_closure"] = (static - mine) / (static - oracle)
    return {"dense": dense, "results": rows}


def _described(predictor: Predictor) -> dict[str, Any]:
    size = sum(predictor.tensors[name].numel() for name in predictor.learned)
    return {"rank": predictor.rank, "parameters": size} | predictor.record


@script
def main() -> None:
    """Command line."""
    parser = script_parser("scaling", __doc__)
    parser.add_argument("model", help="folder or GGUF file")
    parser.add_argument("folder", type=Path, help="folder of the predictors")
    parser.add_argument("--points", nargs="*", default=POINTS, help="networks to train, e.g. layerwise:0.04:131072")
    parser.add_argument("--packages", nargs="*", default=(), metavar="NAME", help="also train on their docstrings")
    add_json(parser, "evaluate the predictors and write the results")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    points = [point for point in map(Point.parse, args.points) if not (args.folder / point.file).exists()]
    keep_freed_memory()
    spec, stored, checkpoint = load_model(args.model)
    weights, tokenizer = stored.load(), checkpoint.tokenizer()

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    static = args.folder / f"{STATIC}.safetensors"
    if points or not static.exists():
        windows = text_windows(encode, SEQLEN, SEED, args.packages)
        if points and max(point.tokens for point in points) > windows.numel():
            raise UserError(f"the text has {windows.numel()} tokens", "use points of fewer tokens, or add --packages")
        sample = Windows(windows[1 : STATISTICS // SEQLEN], windows[:1], "documentation that Python ships")
        traces = calibrate(spec, weights, sample, stored.fingerprint(), limit_bytes=0)
        train_static(spec, traces, weights=weights).save(static)
        train(spec, traces, points, Tracer(spec, weights, traces.criterion, traces.dense_layers), windows, args.folder)
    if args.json:
        passages = torch.tensor(passage(encode, EVALUATED)).view(-1, WINDOW)
        known = json.loads(args.json.read_text()) if args.json.exists() else {}
        found = judge(spec, weights, args.folder, passages, known)
        args.json.write_text(json.dumps({"environment": environment()} | found, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
