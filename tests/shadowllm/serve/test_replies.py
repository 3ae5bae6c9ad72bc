"""The texts of tokens in answers."""

from __future__ import annotations

import pytest

from shadowllm.runtime.generation.text import TextStream
from shadowllm.runtime.serving.job import Token
from tests.tokenizers import KINDS

pytest.importorskip("fastapi", reason="the server needs packages (pip install '.[serve]')")


@pytest.mark.parametrize("kind", KINDS)
def test_the_texts_of_tokens_are_the_text(kind):
    """Also with a decoder that removes the space at the start of a text."""
    from shadowllm.serve.replies import Replies

    tokenizer = KINDS[kind]()
    prompt, ids = tokenizer("the").input_ids, tokenizer(" small sea", add_special_tokens=False).input_ids
    stream = TextStream(tokenizer, prompt)
    tokens = [Token(token, stream.push(token), -1.0, ((token, -1.0),)) for token in ids]
    found = Replies(False, "tiny", tokenizer, True, False)._probabilities(tokens)
    assert "".join(found["tokens"]) == "".join(token.text for token in tokens)
    chat = Replies(True, "tiny", tokenizer, True, False)._probabilities(tokens)["content"]
    assert [bytes(entry["bytes"]).decode() for entry in chat] == found["tokens"]


@pytest.mark.parametrize("kind", KINDS)
def test_each_token_has_its_own_text(kind):
    """Tokens that differ by a space are two alternatives."""
    from shadowllm.serve.replies import Replies

    tokenizer = KINDS[kind]()
    known = tokenizer.get_vocab()
    inner, first = known["s"], next(known[space + "s"] for space in "\u2581\u0120" if space + "s" in known)
    token = Token(first, " s", -1.0, ((first, -1.0), (inner, -2.0)))
    (top,) = Replies(False, "tiny", tokenizer, True, False)._probabilities([token])["top_logprobs"]
    assert top == {" s": -1.0, "s": -2.0}
