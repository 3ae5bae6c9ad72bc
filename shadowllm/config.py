"""Every configuration: what to trace, train, export, build, tune and evaluate, and how.

The command line makes its flags of these classes: names, defaults, limits and help. Nothing heavy is imported.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shadowllm.errors import UserError
from shadowllm.limits import LARGEST_SEED
from shadowllm.models.sparsity import Budget, Fractions
from shadowllm.models.spec import HeadUnit
from shadowllm.option import check_numbers, option

Flavour = Literal["tensorrt_rtx", "tensorrt"]
Verbosity = Literal["none", "layer_names_only", "detailed"]
Selector = Literal["shadow", "layerwise", "quantized-shadow", "static", "random"]
Aggregate = Literal["token", "sequence", "last-token"]

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}  # by their short names
LOSSES = ("listnet", "weighted_bce", "bce", "mse")
DEFAULT_BUDGET = Budget(neurons=0.5, heads=0.75)
WIDEST = 1 << 16  # of a predictor's network: more would only exhaust the memory


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        model: folder with safetensors, .gguf file, or name on the hub: owner/name, owner/name:Q4_K_M.
        cache_dir: where downloads are kept.
        trust_remote_code: let transformers run code from the checkpoint.
    """

    model: str
    cache_dir: Path | None = option(None)
    trust_remote_code: bool = option(False)


@dataclass(frozen=True)
class Calibration:
    """How a model is traced.

    Attributes:
        texts: text files or a Hugging Face dataset id; none for the built-in text.
        tokens: tokens to trace.
        seqlen: tokens of a window.
        criterion: importance score: l2norm, plainact, grad_norm, fisher, snip, grasp, nwot, jacov or epenas.
        dense_layers: leading layers that stay dense.
        seed: of sampling and training.

    Raises:
        UserError: a number beyond its limits.
    """

    texts: Sequence[str] = option(
        (),
        flag="--calibration-text",
        metavar="FILE",
        help="text files or a Hugging Face dataset id",
        otherwise="text the model writes, and Python's documentation",
    )
    tokens: int = option(
        8192, flag="--calibration-tokens", metavar="N", least=1, called="the number of calibration tokens"
    )
    seqlen: int = option(
        128, flag="--calibration-seqlen", metavar="N", least=2, called="the length of a calibration window"
    )
    criterion: str = option("l2norm")
    dense_layers: int = option(1, metavar="N", least=1, called="the number of dense layers")
    seed: int = option(0, least=0, most=LARGEST_SEED, called="the seed")

    def __post_init__(self) -> None:
        check_numbers(self)


@dataclass(frozen=True)
class TrainConfig:
    """How to train a network.

    Attributes:
        budget: the fractions at which recall is judged, and membership is learned where the loss is one of
            membership; the scores rank all units and serve other budgets too.
        loss: listnet, weighted_bce, bce or mse.
        epochs: passes over the text; None for 4 over kept traces and 1 where every pass traces anew, which
            costs more than the training itself.
        learning_rate: peak of AdamW's; it falls to zero along a cosine.
        weight_decay: AdamW's, on the output weights: pulls towards the static ranking.
        batch_tokens: tokens of a step.
        rank: width of a network; None for the largest under 4% of the model's parameters.
        seed: of initial weights and order.

    Raises:
        UserError: no such loss, or a number beyond its limits.
    """

    budget: Budget = DEFAULT_BUDGET
    loss: str = option("listnet")
    epochs: int | None = option(None, least=1, help="passes over the text", otherwise="4, or 1 where it is traced anew")
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    batch_tokens: int = 128
    rank: int | None = option(
        None,
        least=1,
        most=WIDEST,
        help="width of a network",
        otherwise="all of them under 4% of the model's parameters",
    )
    seed: int = option(0, least=0, most=LARGEST_SEED, called="the seed")

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise UserError(f"no training loss {self.loss!r}", f"known: {', '.join(sorted(LOSSES))}")
        given = [value for value in (self.epochs, self.batch_tokens, self.rank) if value is not None]
        if min(given) < 1 or self.learning_rate <= 0:
            raise UserError("epochs, batch size, learning rate and rank must be positive", "mend the training options")
        check_numbers(self)

    def passes(self, anew: bool) -> int:
        """Epochs, where every one traces the text anew or not."""
        return self.epochs or (1 if anew else 4)


@dataclass(frozen=True)
class EngineOptions:
    """How engines are built; flags have the names that trtexec gives them.

    Attributes:
        flavour: which TensorRT, "tensorrt_rtx" or "tensorrt".
        sms: compute capabilities, as 89 for 8.9; none for all the flavour supports.
        capacity: positions of the KV cache.
        max_seqlen: longest prompt of one call.
        max_batch: most sequences at once.
        timing_cache: kept across builds (full TensorRT).
        workspace_bytes: scratch memory of a layer.
        verbosity: how much the engine tells an inspector.
        plugin_library: build with the C++ plugins (`make plugin`), not the Python ones.

    Raises:
        UserError: a size that is not positive.
    """

    flavour: Flavour
    sms: Sequence[int] = option(
        (),
        flag="--sm",
        metavar="SM",
        least=1,
        help="compute capabilities, as 89 for 8.9",
        otherwise="all the flavour supports",
    )
    capacity: int = option(1024, least=1)
    max_seqlen: int = option(512, least=1)
    max_batch: int = option(1, least=1)
    timing_cache: Path | None = option(None, flag="--timingCacheFile", metavar="FILE")
    workspace_bytes: int | None = option(
        None, flag="--memPoolSize", metavar="workspace:SIZE", help="scratch memory, as workspace:512M"
    )
    verbosity: Verbosity = option("layer_names_only", flag="--profilingVerbosity")
    plugin_library: Path | None = option(None, metavar="FILE")

    def __post_init__(self) -> None:
        check_numbers(self)


@dataclass(frozen=True)
class Target:
    """What is asked of a bundle: one of the two.

    Attributes:
        ppl_increase: largest increase in perplexity over dense, as a fraction of it.
        speedup: least speedup of a decode step over ``dense.onnx``, both on ONNX Runtime.

    Raises:
        UserError: both, neither, or one that no budget can meet.
    """

    ppl_increase: float | None = option(
        None,
        flag="--target-ppl-increase",
        metavar="SHARE",
        help="choose budgets that raise perplexity by at most this, as 2% or 0.02",
    )
    speedup: float | None = option(
        None,
        flag="--target-speedup",
        metavar="FACTOR",
        help="choose budgets that decode at least this many times as fast as dense here, as 1.2",
    )

    def __post_init__(self) -> None:
        if (self.ppl_increase is None) == (self.speedup is None):
            raise UserError("one target is needed", "give a perplexity increase or a speedup")
        if self.ppl_increase is not None and not 0 < self.ppl_increase < math.inf:
            raise UserError(f"the perplexity increase {self.ppl_increase} is not above 0", "2% or 0.02 asks for 2%")
        if self.speedup is not None and not 1 < self.speedup < math.inf:
            raise UserError(f"the speedup {self.speedup} is not above 1", "1.2 asks for 1.2 times as fast")


@dataclass(frozen=True)
class Export:
    """What an export makes.

    Attributes:
        selector: predictor to train where none is given; quantized-shadow needs no training, random measures
            speed alone.
        budget: default fractions to keep.
        dtype: of weights and activations: "float32", "float16" or "bfloat16".
        validate: hold the graphs against PyTorch.
        engines: one per flavour to build.
        weight_dtype: store matrices as integers with a scale per 32 of them (ONNX Runtime only).
        target: what to choose other default fractions for, once the bundle is written.
        head_unit: what is chosen among heads: each query head, or all that share a KV head together; budgets round
            to whole ones.
    """

    selector: Selector = option(
        "shadow",
        help="predictor to train; quantized-shadow needs no training, random measures speed alone",
    )
    budget: Budget = DEFAULT_BUDGET
    dtype: str = option("float32", values=DTYPES, help="of weights and activations")
    validate: bool = option(
        True,
        flag="--skip-validation",
        help="do not hold the graphs against PyTorch (the manifest then says so)",
    )
    engines: Sequence[EngineOptions] = ()
    weight_dtype: str | None = option(None, values={"int8": "int8", "int4": "int4"}, otherwise="as --dtype")
    target: Target | None = None
    head_unit: HeadUnit = option("query_head")


@dataclass(frozen=True)
class Evaluation:
    """What quality is measured of, and on which text.

    Attributes:
        texts: text files or a Hugging Face dataset id; none for Python module docs, which no calibration uses.
        tokens: tokens to evaluate.
        seqlen: tokens of a window.
        selectors: static, shadow, layerwise, oracle, random, quantized-shadow, or quantized-shadow-3 or -2 for fewer
            bits; none for static, the bundle's own and oracle.
        neurons, heads: fractions to keep, each with each; none for the bundle's own.
        head_unit: what is chosen among heads: each query head, or all that share a KV head together; budgets round
            to whole ones. None for the bundle's own.
        aggregate: what chooses: each token for itself as decoding does, or once for a whole window the mean of its
            tokens' scores (the paper's setting) or its last token's.

    Raises:
        UserError: a number beyond its limits, or less text than one window.
    """

    texts: Sequence[str] = option(
        (),
        flag="--text",
        metavar="FILE",
        help="text files or a Hugging Face dataset id",
        otherwise="Python module docs, not calibrated on",
    )
    tokens: int = option(2048, metavar="N", least=1)
    seqlen: int = option(512, metavar="N", least=2)
    selectors: Sequence[str] = option(
        (),
        flag="--selector",
        help="static, shadow, layerwise, oracle, random, quantized-shadow, or quantized-shadow-3 or -2 for fewer bits",
        otherwise="static, the bundle's own, oracle",
    )
    neurons: Sequence[Fractions] = option(
        (),
        flag="--neuron-budget",
        metavar="FRACTION",
        help="fractions to keep, each with each; layer by layer with commas",
        otherwise="the bundle's own",
    )
    heads: Sequence[Fractions] = option(
        (),
        flag="--head-budget",
        metavar="FRACTION",
        help="fractions to keep, each with each; layer by layer with commas",
        otherwise="the bundle's own",
    )
    head_unit: HeadUnit | None = option(
        None,
        help="what is chosen among heads: each query head, or all that share a KV head together; budgets round to "
        "whole ones",
        otherwise="the bundle's own",
    )
    aggregate: Aggregate = option("token")

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.tokens < self.seqlen:
            raise UserError(
                f"{self.tokens} tokens are less than one window of {self.seqlen}", "raise --tokens or lower --seqlen"
            )
