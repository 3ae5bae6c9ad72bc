"""The model that is served, and what a request asks of it."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from shadowllm.bundle.manifest import Manifest
from shadowllm.draft_config import Drafting
from shadowllm.evaluation.speed.traffic import traffic_of
from shadowllm.models.sparsity import Budget, check_neuron_budget
from shadowllm.runtime.generation.completion import Request, make_request
from shadowllm.runtime.generation.sampling import Sampling, bundle_sampling, generation_config
from shadowllm.runtime.generation.text import encode_chat, encode_prompt, load_tokenizer
from shadowllm.runtime.inputs import check_appended
from shadowllm.runtime.serving.engine import Engine
from shadowllm.serve.errors import ApiError, blame
from shadowllm.serve.schema import Body, ChatBody, CompletionBody, Sparsity
from shadowllm.serve_config import ServeConfig

OPTIONS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "lossless",
    "draft_length",
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Plan:
    """What to generate for a request.

    Attributes:
        requests: one per text: n texts of the first prompt, then of the next.
        budget: of the decode steps.
        prompt_tokens: of all prompts, each counted once.
        step_bytes, verification_bytes: bytes that a decode step of each text reads, and a dense step, see `traffic_of`.
    """

    requests: Sequence[Request]
    budget: Budget
    prompt_tokens: int
    step_bytes: Sequence[int]
    verification_bytes: Sequence[int]


@dataclass(frozen=True)
class ServedModel:
    """A bundle that is served.

    Attributes:
        name: for clients.
        backend: one of `shadowllm.runtime.SLOT_BACKENDS`.
        budget: of requests that do not give one.
        generation_config: contents of the bundle's file. It is read once, so that the bundle's folder may be renamed.
    """

    name: str
    bundle: Path
    backend: str
    manifest: Manifest
    tokenizer: PreTrainedTokenizerBase
    engine: Engine
    budget: Budget
    config: ServeConfig
    generation_config: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        bundle: Path,
        backend: str,
        manifest: Manifest,
        engine: Engine,
        config: ServeConfig,
        budget: Budget | None = None,
    ) -> Self:
        """Return the model of a bundle, with all files that requests need.

        Args:
            budget: of requests that do not give one; None is the bundle's own.

        Raises:
            UserError: a file is damaged or has a value that cannot be used, or the bundle cannot have the budget.
        """
        found = generation_config(bundle, manifest)
        for temperature in (0.0, 1.0):  # some values are used only with a temperature
            bundle_sampling(bundle, manifest, None, found, temperature=temperature)
        tokenizer, name = load_tokenizer(bundle, manifest), config.model_name or manifest.model
        model = cls(name, bundle, backend, manifest, tokenizer, engine, budget or manifest.budget, config, found)
        model.budget_of(None)
        return model

    def plan(self, body: CompletionBody | ChatBody) -> Plan:
        """Make the requests for the engine. It may take long, as it tokenizes, so it must not run in the event loop.

        Raises:
            ApiError: the body breaks a limit, or asks for something unsupported.
            UserError: a value cannot be used.
        """
        body.refuse_unsupported()
        if body.model not in (None, self.name):
            raise ApiError(404, f"there is no model {body.model!r:.80}", param="model", code="model_not_found")
        prompts, n = self._prompts(body), body.n or 1
        if len(prompts) * n > self.config.max_choices:
            raise ApiError(400, f"more than {self.config.max_choices} texts in one request", param="n")
        if len(prompts) * n > self.engine.capacity:
            raise ApiError(400, f"the server holds {self.engine.capacity} texts at once", param="n")
        param = "messages" if isinstance(body, ChatBody) else "prompt"
        with blame(param):
            encoded = [self._encoded(prompt, param) for prompt in prompts]
        # Without a seed, texts are drawn differently each time, as OpenAI does it.
        seed = random.SystemRandom().getrandbits(62) if body.seed is None and body.temperature else body.seed or 0
        options = self._options(body)
        requests = [self._request(ids, body, options, seed + index) for ids in encoded for index in range(n)]
        with blame("sparsity"):
            budget = self.budget_of(body.sparsity, bool(body.lossless))
        sizes = [(len(request.prompts[0]), request.max_new_tokens) for request in requests]
        read = [{size: self._step_bytes(each, *size) for size in set(sizes)} for each in (budget, Budget())]
        return Plan(requests, budget, sum(map(len, encoded)), *([found[size] for size in sizes] for found in read))

    def budget_of(self, given: Sparsity | str | None, lossless: bool = False) -> Budget:
        """Return the budget of a request; of its drafts, if it is lossless.

        Raises:
            UserError: the model cannot have it.
        """
        if given == "exact":
            return Budget()
        fields: dict[str, Any] = given.model_dump(exclude_none=True) if isinstance(given, Sparsity) else {}
        if fields.get("shortlist") == "all":
            fields["shortlist"] = None
        own = self.manifest.draft_budget if lossless and self.budget == self.manifest.budget else self.budget
        budget = replace(own, **fields)
        budget.counts(self.manifest.sparse_layers)
        budget.rest_with(self.manifest.rest == "shadow")
        check_neuron_budget(self.manifest.predictor["kind"], budget)
        return budget

    def _step_bytes(self, budget: Budget, prompt_tokens: int, new_tokens: int) -> int:
        return traffic_of(self.manifest, self.backend, budget, prompt_tokens, new_tokens).total

    def _prompts(self, body: CompletionBody | ChatBody) -> Sequence[str | list[int] | list[dict[str, str]]]:
        if isinstance(body, ChatBody):
            return [[message.plain() for message in body.messages]]
        if not body.prompts:
            raise ApiError(400, "the list of prompts is empty", param="prompt")
        return body.prompts

    def _encoded(self, prompt: str | list[int] | list[dict[str, str]], param: str) -> list[int]:
        if isinstance(prompt, str):
            ids = encode_prompt(self.name, self.manifest, self.tokenizer, prompt)
        elif prompt and isinstance(prompt[0], dict):
            messages = [message for message in prompt if isinstance(message, dict)]
            ids = encode_chat(self.name, self.manifest, self.tokenizer, messages)
        else:
            ids = [token for token in prompt if isinstance(token, int)]
        most = self.config.max_prompt_tokens or self.manifest.spec.max_seqlen
        if len(ids) > most:
            message = f"the prompt has {len(ids)} tokens, and at most {most} are possible"
            raise ApiError(400, message, param=param, code="context_length_exceeded")
        check_appended(ids, 0, self.manifest.spec)  # refuses tokens that the model lacks
        return ids

    def _options(self, body: Body) -> dict[str, Any]:
        """Options of the generation, within the server's limits."""
        stops = [body.stop] if isinstance(body.stop, str) else body.stop
        if stops is not None and len(stops) > self.config.max_stops:
            raise ApiError(400, f"more than {self.config.max_stops} stop strings", param="stop")
        if any(len(stop) > self.config.max_stop_length for stop in stops or ()):
            raise ApiError(400, f"a stop string has more than {self.config.max_stop_length} characters", param="stop")
        options = {name: getattr(body, name) for name in OPTIONS}
        # Each alone, because an error of all together does not tell which one it is about.
        for name, value in options.items():
            with blame(name):
                if name == "draft_length":
                    Drafting(bool(body.lossless), value)
                elif name != "lossless" and value is not None:
                    Sampling(**{name: value})
        return {"stop": stops} | options

    def _request(self, ids: list[int], body: Body, options: dict[str, Any], seed: int) -> Request:
        most, limit = body.most_tokens, self.config.max_tokens
        if most is not None and most > limit:
            raise ApiError(
                400, f"{most} new tokens are asked for, and at most {limit} are possible", param=body.limit_name
            )
        if most is None:
            # The last token of a text takes no position.
            most = max(1, min(limit, body.default_tokens or limit, self.engine.positions + 1 - len(ids)))
        request = make_request(
            self.bundle,
            self.manifest,
            lambda: self.tokenizer,
            [ids],
            most,
            self.generation_config,
            seed=seed,
            **options,
        )
        return replace(request, tokenizer=self.tokenizer)
