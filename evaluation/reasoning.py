"""Generated problems whose answers need the prompt: addition, copying and retrieval. Nothing is downloaded.

A sparse model can lose these abilities while its perplexity stays good. Each prompt has a few examples and then the
problem, so that models without instruction tuning can answer too.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shadowllm.bundle.manifest import Manifest
from shadowllm.evaluation.generation import Feed, check_positions
from shadowllm.models.files.tokenizer import encode
from shadowllm.progress import Advance, no_progress
from shadowllm.runtime.generation.text import TextStream
from shadowllm.runtime.session import Session

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EXAMPLES = 8  # of an addition
COPIED, COPY_EXAMPLES = 5, 4  # words of a copy
PAIRS, PAIRS_ASKED = 8, 2  # of a retrieval: all, and those that are asked before as examples
VOCABULARY = """
    apple basket bread bridge candle cloud coin copper doctor dragon flower forest garden green hammer horse island
    kitchen lemon letter light market mirror music orange paper pencil pepper planet rabbit river saddle silver stone
    summer table ticket tunnel violin window winter yellow
"""
WORDS = VOCABULARY.split()


@dataclass(frozen=True)
class Problem:
    """A prompt and the right answer.

    Attributes:
        task: "addition", "copying" or "retrieval".
        context: text before the question.
        question: end of the prompt.
        answer: what the next line should be, without spaces around it.
    """

    task: str
    context: str
    question: str
    answer: str


@dataclass(frozen=True)
class EncodedProblem:
    """A problem as token ids.

    Attributes:
        prompt: token ids of context and question, with the tokenizer's special tokens.
        context: number of leading tokens that belong to the context.
        new_tokens: enough new tokens for the answer and the end of its line.
    """

    problem: Problem
    prompt: Sequence[int]
    context: int
    new_tokens: int


@dataclass(frozen=True)
class Score:
    """How well one task is solved.

    Attributes:
        task: name of the task.
        problems: number of problems.
        dense, sparse: share of problems that the dense model and the session answer exactly right.
        agreement: share of problems to which both give the same answer, right or wrong.
    """

    task: str
    problems: int
    dense: float
    sparse: float
    agreement: float


def make_problems(count: int, seed: int = 0) -> list[Problem]:
    """Return ``count`` problems of each task; the same seed gives the same problems."""
    found: list[Problem] = []
    for task, make in TASKS.items():
        generator = random.Random(f"{task} {seed}")  # a string, so that a task does not depend on the others
        found.extend(Problem(task, *make(generator)) for _ in range(count))
    return found


def _addition(generator: random.Random) -> tuple[str, str, str]:
    pairs = [(generator.randint(1, 20), generator.randint(1, 9)) for _ in range(EXAMPLES + 1)]
    *examples, (left, right) = pairs
    return "".join(f"{a} + {b} = {a + b}\n" for a, b in examples), f"{left} + {right} =", str(left + right)


def _copying(generator: random.Random) -> tuple[str, str, str]:
    lists = [" ".join(generator.sample(WORDS, COPIED)) for _ in range(COPY_EXAMPLES + 1)]
    *examples, last = lists
    return "".join(f"Words: {words}\nCopy: {words}\n\n" for words in examples), f"Words: {last}\nCopy:", last


def _retrieval(generator: random.Random) -> tuple[str, str, str]:
    lines = [f"{word}: {generator.randint(100, 999)}\n" for word in generator.sample(WORDS, PAIRS)]
    *examples, last = generator.sample(lines, PAIRS_ASKED + 1)
    word, number = last.split()
    return "".join((*lines, "\n", *examples)), word, number


TASKS: dict[str, Callable[[random.Random], tuple[str, str, str]]] = {
    "addition": _addition,
    "copying": _copying,
    "retrieval": _retrieval,
}


def encode_problems(
    problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase, manifest: Manifest
) -> list[EncodedProblem]:
    """Encode problems with a bundle's tokenizer.

    Raises:
        UserError: the tokenizer cannot encode them, or one is longer than the model has positions.
    """
    rows = manifest.spec.vocab_size
    found = []
    for problem in problems:
        prompt = encode(tokenizer, problem.context + problem.question, rows, special=True)
        alone = encode(tokenizer, problem.context, rows, special=True)
        # A token may reach over the end of the context, and some tokenizers end a text with a special token.
        pairs = enumerate(zip(alone, prompt, strict=False))
        context = next((i for i, (one, other) in pairs if one != other), min(len(alone), len(prompt)))
        answer = encode(tokenizer, f" {problem.answer}\n", rows, special=False)
        found.append(EncodedProblem(problem, prompt, max(1, context), len(answer) + 1))
    longest = max(found, key=lambda one: len(one.prompt) + one.new_tokens)
    remedy = "the generated problems need a model with more positions"
    check_positions([longest.prompt], longest.new_tokens, manifest.spec.max_seqlen, remedy)
    return found


def solve(
    session: Session,
    problems: Sequence[EncodedProblem],
    tokenizer: PreTrainedTokenizerBase,
    advance: Advance = no_progress,
) -> list[str]:
    """Return the session's greedy answers: the rest of the line after the prompt, without spaces around it.

    A sparse session decodes the question token by token, as if it was generated text. The prefill is always dense, so
    after it a short answer would hardly depend on the selection.

    Args:
        session: an open session; it is reset for each problem.
        advance: called with 1 after each problem.

    Raises:
        UserError: logits are NaN or infinite.
    """
    found = []
    for one in problems:
        feed = Feed(session, one.prompt, None if session.decodes == "dense" else one.context)
        stream, text = TextStream(tokenizer, one.prompt, ["\n"]), ""
        for token in feed.greedy(one.new_tokens):
            text += stream.push(token)
            if stream.stopped:
                break
        found.append((text + stream.finish()).strip())
        advance(1)
    return found


def score(problems: Sequence[Problem], dense: Sequence[str], sparse: Sequence[str]) -> list[Score]:
    """Score the answers of the dense model and of a session, by task."""
    found = []
    for task in dict.fromkeys(problem.task for problem in problems):
        rows = [
            (problem.answer, one, other)
            for problem, one, other in zip(problems, dense, sparse, strict=True)
            if problem.task == task
        ]
        right, kept, same = (
            sum(hits) / len(rows)
            for hits in (
                [one == answer for answer, one, _ in rows],
                [other == answer for answer, _, other in rows],
                [one == other for _, one, other in rows],
            )
        )
        found.append(Score(task, len(rows), right, kept, same))
    return found
