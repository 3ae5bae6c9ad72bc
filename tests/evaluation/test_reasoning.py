"""Generated problems: they have right answers, and a session's answers are what it generates."""

from __future__ import annotations

import pytest

from shadowllm.bundle.manifest import read_manifest
from shadowllm.errors import UserError
from shadowllm.evaluation.reasoning import TASKS, Problem, encode_problems, make_problems, score, solve
from shadowllm.models.sparsity import Budget
from shadowllm.runtime import generate
from shadowllm.runtime.generation.text import load_tokenizer
from shadowllm.runtime.ort.session import OrtSession
from tests.tokenizers import KINDS, export


@pytest.fixture(scope="module", params=["llama3", "llama2"])
def opened(request, tmp_path_factory):
    """A bundle with room for the problems, its manifest and its tokenizer."""
    folder = export(KINDS[request.param](), tmp_path_factory.mktemp(request.param), max_position_embeddings=1024)
    manifest = read_manifest(folder)
    return folder, manifest, load_tokenizer(folder, manifest)


def test_problems_are_the_same_for_a_seed():
    assert make_problems(4, seed=1) == make_problems(4, seed=1)
    assert make_problems(4, seed=1)[:4] == make_problems(9, seed=1)[:4]
    assert make_problems(4, seed=1) != make_problems(4, seed=2)
    assert [problem.task for problem in make_problems(2)] == [task for task in TASKS for _ in range(2)]


def test_answers_are_right():
    for problem in make_problems(20):
        if problem.task == "addition":
            left, right = problem.question.removesuffix("=").split("+")
            assert int(left) + int(right) == int(problem.answer)
        elif problem.task == "copying":
            assert problem.question == f"Words: {problem.answer}\nCopy:"
        else:
            assert f"\n{problem.question} {problem.answer}\n" in f"\n{problem.context}"
            assert problem.context.count(problem.question) == 1  # it is not one of the examples
    for line in make_problems(1)[0].context.splitlines():
        left, right, total = map(int, line.replace("+", "=").split("="))
        assert left + right == total


def test_encoded_problems(opened):
    _, manifest, tokenizer = opened
    problems = make_problems(2)
    for problem, encoded in zip(problems, encode_problems(problems, tokenizer, manifest), strict=True):
        text = problem.context + problem.question
        assert encoded.prompt == tokenizer(text).input_ids
        before, after = encoded.prompt[: encoded.context], encoded.prompt[encoded.context :]
        assert problem.context.startswith(tokenizer.decode(before, skip_special_tokens=True).strip())
        assert len(tokenizer.decode(after)) <= len(problem.question) + 4
        assert encoded.new_tokens > len(problem.answer.split())


def test_answers_are_generated_lines(opened):
    folder, manifest, tokenizer = opened
    encoded = encode_problems(make_problems(2), tokenizer, manifest)
    advanced = []
    with OrtSession(folder, "dense") as session:
        answers = solve(session, encoded, tokenizer, advanced.append)
        for one, answer in zip(encoded, answers, strict=True):
            steps = generate(session, [one.prompt], one.new_tokens, stop_ids=manifest.spec.eos_token_ids)
            tokens = [token for (token,) in steps]
            start = len(tokenizer.decode(one.prompt, skip_special_tokens=True))
            whole = tokenizer.decode([*one.prompt, *tokens], skip_special_tokens=True)
            assert answer == whole[start:].split("\n")[0].strip()
    assert advanced == [1] * 6
    with OrtSession(folder, "sparse") as session:
        session.set_budget(Budget())
        assert solve(session, encoded, tokenizer) == answers
        session.set_budget(Budget(heads=0.5, neurons=0.05))
        assert solve(session, encoded, tokenizer) != answers


def test_a_right_answer_is_recognised(opened, monkeypatch):
    folder, manifest, tokenizer = opened
    encoded = encode_problems(make_problems(1), tokenizer, manifest)
    lines = {one.problem.answer: tokenizer(f" {one.problem.answer}\n", add_special_tokens=False) for one in encoded}
    with OrtSession(folder, "dense") as session:
        for one in encoded:
            written = iter(lines[one.problem.answer].input_ids)
            monkeypatch.setattr("shadowllm.evaluation.generation.Feed.greedy", lambda self, most, w=written: w)
            assert solve(session, [one], tokenizer) == [one.problem.answer]


def test_scores_by_hand():
    problems = [Problem("copying", "", "", answer) for answer in "abcd"] + [Problem("addition", "", "", "1")]
    copying, addition = score(problems, ["a", "b", "x", "y", "1"], ["a", "z", "x", "d", "2"])
    assert (copying.task, copying.problems) == ("copying", 4)
    assert (copying.dense, copying.sparse, copying.agreement) == (0.5, 0.5, 0.5)
    assert (addition.dense, addition.sparse, addition.agreement) == (1, 0, 0)


def test_too_few_positions(bundle):
    folder = bundle()
    manifest = read_manifest(folder)
    with pytest.raises(UserError, match="exceed the model's 64 positions"):
        encode_problems(make_problems(1), load_tokenizer(folder, manifest), manifest)
