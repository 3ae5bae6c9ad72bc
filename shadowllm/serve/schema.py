"""Bodies of requests, with the names and meanings of OpenAI's API and a few more fields."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from shadowllm.limits import LARGEST, LARGEST_SEED
from shadowllm.models.sparsity import Rest
from shadowllm.serve.errors import ApiError

# Fields that cannot change the text.
IGNORED = {
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}
# Fields that would change the text and are not supported, each with the values that have no effect.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}

Item = TypeVar("Item")
# A list with one error at most, because the errors of all items of a large body would take a thousand times its memory.
Items = Annotated[list[Item], Field(fail_fast=True)]
Whole = Annotated[int, Field(ge=0, le=LARGEST)]
Fractions = float | Items[float]
Nothing = Annotated[list[Any], Field(max_length=0)] | None


class Part(BaseModel):
    """A part of a body. Values are not converted from other types, and numbers are finite."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Sparsity(Part):
    """The budget of a request; a field that is not given is the server's. See `Budget`."""

    neurons: Fractions | None = None
    heads: Fractions | None = None
    shortlist: int | Literal["all"] | None = None
    rest: Rest | None = None
    certify: bool | None = None


class StreamOptions(Part):
    """Options of a stream."""

    include_usage: bool = False
    include_obfuscation: bool = False  # accepted for OpenAI's client, and not done


class Extension(Part):
    """What is given beside OpenAI's fields."""

    selection: bool = False


class Body(BaseModel):
    """Fields that both kinds of requests have."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1, le=LARGEST)] | None = None
    n: Annotated[int, Field(ge=1, le=LARGEST)] | None = None
    stop: str | Items[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    seed: Annotated[int, Field(ge=0, le=LARGEST_SEED)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Whole | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: Whole | None = None
    lossless: bool | None = None
    draft_length: Whole | None = None
    sparsity: Sparsity | Literal["exact"] | None = None
    shadowllm: Extension | None = None

    @property
    def top_logprobs_wanted(self) -> int | None:
        """How many alternatives are given with each token; None gives no probabilities."""
        raise NotImplementedError

    @property
    def most_tokens(self) -> int | None:
        """The largest number of new tokens; None if it is not given."""
        return self.max_tokens

    @property
    def default_tokens(self) -> int | None:
        """As many are generated at most if `most_tokens` is None; None is what the server allows."""
        return None

    @property
    def limit_name(self) -> str:
        """The name of the field that `most_tokens` comes from."""
        return "max_tokens"

    def refuse_unsupported(self) -> None:
        """Refuse fields that are not known, or that would change the text and are not supported.

        Raises:
            ApiError: there is one.
        """
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options needs stream: true", param="stream_options")
        for name, value in (self.model_extra or {}).items():
            if name not in IGNORED and value is not None and value not in UNSUPPORTED.get(name, ()):
                raise ApiError(400, f"{name} is not supported; leave it out", param=name, code="unsupported_parameter")


class CompletionBody(Body):
    """The body of ``/v1/completions``."""

    prompt: str | Items[str] | Items[int] | Items[Items[int]]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def top_logprobs_wanted(self) -> int | None:
        return self.logprobs

    @property
    def default_tokens(self) -> int | None:
        return 16  # as OpenAI's

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each as text or as token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if all(isinstance(item, int) for item in self.prompt) and self.prompt:
            return [[item for item in self.prompt if isinstance(item, int)]]
        return [item for item in self.prompt if not isinstance(item, int)]


class TextPart(Part):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class Message(Part):
    """A message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Items[TextPart]
    name: str | None = None
    # Of answers that a client sends back. They have no effect if they are empty, and are refused if they are not.
    annotations: Nothing = None
    audio: None = None
    function_call: None = None
    refusal: None = None
    tool_calls: Nothing = None

    def plain(self) -> dict[str, str]:
        """The message as chat templates expect it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        named = {} if self.name is None else {"name": self.name}
        return {"role": "system" if self.role == "developer" else self.role, "content": content} | named


class ChatBody(Body):
    """The body of ``/v1/chat/completions``."""

    messages: Annotated[Items[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=LARGEST)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def top_logprobs_wanted(self) -> int | None:
        if not self.logprobs and self.top_logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def most_tokens(self) -> int | None:
        if self.max_tokens is None or self.max_completion_tokens in (None, self.max_tokens):
            return self.max_completion_tokens if self.max_tokens is None else self.max_tokens
        raise ApiError(400, "max_completion_tokens and max_tokens differ; give one of them", param="max_tokens")

    @property
    def limit_name(self) -> str:
        return "max_completion_tokens" if self.max_tokens is None else "max_tokens"
