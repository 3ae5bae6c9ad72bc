"""Configurations of an evaluation: what to evaluate, and on which text. See `config`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from shadowllm.config_fields import check_values, option
from shadowllm.errors import UserError
from shadowllm.limits import check_seed, check_whole
from shadowllm.models.sparsity import Fractions, Rest
from shadowllm.models.spec import HeadUnit

Aggregate = Literal["token", "sequence", "last-token"]


@dataclass(frozen=True)
class Evaluation:
    """What to evaluate, and on which text.

    Attributes:
        texts: text files or a Hugging Face dataset id; Python module docs, which no calibration uses, if empty.
        tokens: number of tokens to evaluate.
        seqlen: tokens per window.
        selectors: static, shadow, layerwise, oracle, random, quantized-shadow, or quantized-shadow-3 or -2 for fewer
            bits; static, the bundle's own and oracle if empty.
        neurons, heads: fractions to keep, in all combinations; the bundle's own if empty.
        rest: what the other units contribute, "shadow" or "drop", in all combinations; the bundle's own if empty.
        shortlist: rows of the output table that are computed exactly, in all combinations; the bundle's own if empty.
            A number above the size of the vocabulary means all.
        certify: prove that the largest logit is that of the whole table, by computing more rows exactly where needed.
        head_unit: unit of head selection: each query head, or all query heads of one KV head; budgets are rounded to
            whole units. None for the bundle's own.
        aggregate: scores that select: those of each token, as in decoding, or once per window the mean of its tokens'
            scores (the paper's setting) or those of its last token.

    Raises:
        UserError: a number is outside its limits, or ``tokens`` is less than one window.
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
        help="fractions to keep, in all combinations; one per sparse layer, separated by commas",
        otherwise="the bundle's own",
    )
    heads: Sequence[Fractions] = option(
        (),
        flag="--head-budget",
        metavar="FRACTION",
        help="fractions to keep, in all combinations; one per sparse layer, separated by commas",
        otherwise="the bundle's own",
    )
    rest: Sequence[Rest] = option(
        (),
        help="what the other units contribute: their low-bit copy, or nothing; in all combinations",
        otherwise="the bundle's own",
    )
    shortlist: Sequence[int] = option(
        (),
        metavar="N",
        least=1,
        help="rows of the output table that are computed exactly, or all, in all combinations",
        otherwise="the bundle's own",
    )
    certify: bool = option(False)
    head_unit: HeadUnit | None = option(
        None,
        help="unit of head selection: each query head, or all query heads of one KV head; budgets are rounded to "
        "whole units",
        otherwise="the bundle's own",
    )
    aggregate: Aggregate = option("token")

    def __post_init__(self) -> None:
        check_values(self)
        if self.tokens < self.seqlen:
            raise UserError(
                f"{self.tokens} tokens are less than one window of {self.seqlen}", "raise tokens or lower seqlen"
            )


@dataclass(frozen=True)
class Generation:
    """How to compare decoded text and answers with the dense model's.

    Attributes:
        prompts: number of texts that are continued.
        prompt_tokens: length of the start of each text, in tokens; fewer if the model has too few positions.
        new_tokens: tokens that continue each text.
        problems: number of problems of each reasoning task.
        seed: seed of the problems.

    Raises:
        UserError: a number is outside its limits.
    """

    prompts: int = option(16, metavar="N", least=1)
    prompt_tokens: int = 64
    new_tokens: int = option(256, metavar="N", least=2)
    problems: int = option(30, metavar="N", least=1)
    seed: int = 0

    def __post_init__(self) -> None:
        check_values(self)
        check_whole("prompt_tokens", self.prompt_tokens)
        check_seed(self.seed)
