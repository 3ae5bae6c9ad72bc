"""Answers in OpenAI's formats: whole texts, and chunks of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from shadowllm.runtime.serving.job import Token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Choice = dict[str, Any]


@dataclass
class Text:
    """One text of an answer: its tokens so far, and why it ended."""

    tokens: list[Token] = field(default_factory=list)
    rest: str = ""
    reason: str | None = None

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(token.text for token in self.tokens) + self.rest


class Replies:
    """Makes the answers to one request.

    Args:
        chat: whether it is a chat.
        model: name of the model.
        logprobs: whether probabilities are given.
        selection: whether selections are given.
        usage: whether a stream ends with the number of tokens.
    """

    def __init__(
        self,
        chat: bool,
        model: str,
        tokenizer: PreTrainedTokenizerBase,
        logprobs: bool,
        selection: bool,
        usage: bool = False,
    ) -> None:
        self._chat, self._tokenizer, self._logprobs, self._selection = chat, tokenizer, logprobs, selection
        self._streamed: dict[int, int] = {}  # characters of each text so far
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        # With `include_usage`, every chunk has the field, as OpenAI's have.
        self._no_usage: dict[str, Any] = {"usage": None} if usage else {}
        self._base = {"id": self.id, "created": int(time.time()), "model": model}

    def whole(self, texts: Sequence[Text], usage: dict[str, int]) -> dict[str, Any]:
        """Return the answer with all texts."""
        choices = []
        for index, text in enumerate(texts):
            content = (
                {"message": {"role": "assistant", "content": text.text, "refusal": None}}
                if self._chat
                else {"text": text.text}
            )
            choice = {"index": index, **content, "logprobs": self._probabilities(text.tokens)}
            choice["finish_reason"] = text.reason
            if self._selection:
                choice["shadowllm"] = {"selections": [_selection(token) for token in text.tokens]}
            choices.append(choice)
        kind = "chat.completion" if self._chat else "text_completion"
        return self._base | {"object": kind, "choices": choices, "usage": usage}

    def role(self, index: int) -> dict[str, Any] | None:
        """Return the first chunk of a text; None if this kind of stream has none."""
        if not self._chat:
            return None
        return self._chunk([self._choice(index, {"delta": {"role": "assistant", "content": ""}})])

    def token(self, index: int, token: Token) -> dict[str, Any] | None:
        """Return the chunk for a token; None if there is nothing to send."""
        if not (token.text or self._logprobs or self._selection):
            return None
        start = self._streamed.get(index, 0)
        self._streamed[index] = start + len(token.text)
        chunk = self._chunk([self._choice(index, self._content(token.text), self._probabilities([token], start))])
        if self._selection:
            chunk["shadowllm"] = {"token": self._text(token.token), "selection": _selection(token)}
        return chunk

    def end(self, index: int, rest: str, reason: str) -> dict[str, Any]:
        """Return the last chunk of a text."""
        content = self._content(rest) if rest or not self._chat else {"delta": {}}
        return self._chunk([self._choice(index, content, None, reason)])

    def usage(self, usage: dict[str, int]) -> dict[str, Any]:
        """Return the chunk with the number of tokens."""
        return self._chunk([]) | {"usage": usage}

    def _chunk(self, choices: list[Choice]) -> dict[str, Any]:
        return self._base | {
            "object": "chat.completion.chunk" if self._chat else "text_completion",
            "choices": choices,
            **self._no_usage,
        }

    def _content(self, text: str) -> Choice:
        return {"delta": {"content": text}} if self._chat else {"text": text}

    def _choice(
        self, index: int, content: Choice, logprobs: dict[str, Any] | None = None, reason: str | None = None
    ) -> Choice:
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": reason}

    def _probabilities(self, tokens: Sequence[Token], start: int = 0) -> dict[str, Any] | None:
        """Return the probabilities of tokens, of which the first one begins at the character ``start`` of its text."""
        if not self._logprobs:
            return None
        if self._chat:
            return {
                "content": [
                    self._entry(token.token, token.logprob)
                    | {"top_logprobs": [self._entry(*alternative) for alternative in token.top]}
                    for token in tokens
                ],
                "refusal": None,
            }
        return {
            "tokens": [self._text(token.token) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [self._alternatives(token) for token in tokens],
            "text_offset": list(accumulate((len(token.text) for token in tokens[:-1]), initial=start)),
        }

    def _alternatives(self, token: Token) -> dict[str, float | None]:
        """Return the most probable tokens and the chosen one, most probable first."""
        found: dict[str, float | None] = {}
        for other, logprob in (*token.top, (token.token, token.logprob)):
            # Several tokens may have the same text. The most probable one, which is the first, is given.
            found.setdefault(self._text(other), logprob)
        return found

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self._text(token)
        # A token may be a part of a character. Then it has no text, and its bytes are not known.
        return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}

    def _text(self, token: int) -> str:
        """Return the text of a token inside a text. At the start of one, some decoders remove its space."""
        alone = str(self._tokenizer.decode([token]))
        return str(self._tokenizer.decode([token, token]))[len(alone) :]


def count_tokens(prompt: int, new: int) -> dict[str, int]:
    """Return OpenAI's ``usage``."""
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def _selection(token: Token) -> dict[str, Any] | None:
    found = token.selection
    return None if found is None else {"heads": found.heads, "neurons": found.neurons, "bins": found.bins}
