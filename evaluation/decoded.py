"""Compare a bundle's decoding with its dense model: the texts that both write, and the problems that both solve."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shadowllm.bundle.manifest import Manifest, read_manifest
from shadowllm.eval_config import Generation
from shadowllm.evaluation.default_text import passage
from shadowllm.evaluation.generation import Agreement, check_positions, compare_texts, greedy_texts
from shadowllm.evaluation.reasoning import Score, encode_problems, make_problems, score, solve
from shadowllm.models.sparsity import Budget
from shadowllm.predictor.calibration import token_windows
from shadowllm.progress import progress
from shadowllm.runtime.generation.text import load_tokenizer, plain_encoder
from shadowllm.runtime.ort.session import OrtSession
from shadowllm.runtime.recomputed_rows import RecomputedRows

FIGURES = ("identical", "agreement", "mean_divergence", "median_divergence", "divergences", "lengths")


@dataclass(frozen=True)
class Decoded:
    """How decoding at one budget compares with the dense model.

    Attributes:
        budget: the budget of the sparse session.
        agreement: of long texts.
        scores: of each reasoning task.
        recomputed_rows: over the decode steps of the long texts, see `RecomputedRows.summary`.
    """

    budget: Budget
    agreement: Agreement
    scores: Sequence[Score]
    recomputed_rows: Mapping[str, float] = field(default_factory=dict)


class Decoding:
    """A comparison of a bundle's decoding on ONNX Runtime with its dense model.

    What can be refused is refused when it is made, before anything is decoded. Decoding is sparse even where a session
    would decode dense because the budget saves too little.

    Args:
        bundle: folder of the bundle.
        budgets: the bundle's own if empty.
        options: numbers of texts, tokens and problems; defaults if None.
        texts: files or a Hugging Face dataset id, whose windows are continued; Python module docs, which no
            calibration uses, if empty.

    Raises:
        UserError: no bundle, no tokenizer in it, a text or budget that cannot be used, or prompts that are longer
            than the model has positions.
    """

    def __init__(
        self,
        bundle: Path,
        budgets: Sequence[Budget] = (),
        options: Generation | None = None,
        texts: Sequence[str] = (),
    ) -> None:
        self._bundle, self._options = bundle, options or Generation()
        manifest = read_manifest(bundle)
        self._budgets = budgets or [manifest.budget]
        for budget in self._budgets:
            budget.counts(manifest.sparse_layers)
        self._tokenizer = load_tokenizer(bundle, manifest)
        encode = plain_encoder(self._tokenizer, manifest)
        self._prompts = _prompts(encode, manifest, self._options, texts)
        self._problems = make_problems(self._options.problems, self._options.seed)
        self._encoded = encode_problems(self._problems, self._tokenizer, manifest)

    def run(self) -> list[Decoded]:
        """Decode dense and at each budget, and compare.

        Raises:
            UserError: a damaged file in the bundle, or logits that are NaN or infinite.
        """
        passes = (1 + len(self._budgets)) * (len(self._prompts) + len(self._encoded))
        with progress("Decoding texts and answers", passes) as advance:
            with OrtSession(self._bundle, "dense") as session:
                texts = greedy_texts(session, self._prompts, self._options.new_tokens, advance)
                answers = solve(session, self._encoded, self._tokenizer, advance)
            found = []
            with OrtSession(self._bundle, "sparse") as session:
                for budget in self._budgets:
                    session.set_budget(budget)
                    recomputed = RecomputedRows(budget)
                    agreement = compare_texts(session, self._prompts, texts, advance, recomputed)
                    solved = solve(session, self._encoded, self._tokenizer, advance)
                    found.append(
                        Decoded(budget, agreement, score(self._problems, answers, solved), recomputed.summary())
                    )
        return found


def rows(found: Sequence[Decoded]) -> dict[str, list[dict[str, Any]]]:
    """Return the keys ``generation`` and ``reasoning`` of the JSON that ``shadowllm eval --generate`` writes.

    A row of ``generation`` is for one budget, a row of ``reasoning`` for one budget and task.
    """
    generation: list[dict[str, Any]] = []
    reasoning: list[dict[str, Any]] = []
    for one in found:
        mean = one.budget.mean()
        kept = {
            "neuron_budget": mean.neurons,
            "head_budget": mean.heads,
            "shortlist": one.budget.shortlist,
            "rest": one.budget.rest,
            "certify": one.budget.certify,
        }
        texts = {name: getattr(one.agreement, name) for name in FIGURES}
        generation.append(kept | texts | {"recomputed_rows": one.recomputed_rows})
        reasoning.extend(kept | asdict(score) for score in one.scores)
    return {"generation": generation, "reasoning": reasoning}


def _prompts(
    encode: Callable[[str], list[int]], manifest: Manifest, options: Generation, texts: Sequence[str]
) -> list[list[int]]:
    """Return the starts of texts: windows of ``prompt_tokens`` tokens, or fewer to leave room for the new."""
    room = manifest.spec.max_seqlen - options.new_tokens
    length, count = min(options.prompt_tokens, max(1, room)), options.prompts
    if texts:
        found = token_windows(texts, encode, length, count).tolist()
    else:
        ids = passage(encode, length * count)
        found = [ids[start : start + length] for start in range(0, len(ids), length)]
    check_positions(found, options.new_tokens, manifest.spec.max_seqlen)
    return list(found)
