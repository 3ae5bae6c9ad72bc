"""A bundle as a model of ``transformers``: ``generate``, streamers, logits processors and pipelines work on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from os import PathLike
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM, GenerationConfig, GenerationMixin, PretrainedConfig
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast

from shadowllm.errors import UserError
from shadowllm.models.sparsity import Budget
from shadowllm.runtime.generation.chooser import one_thread
from shadowllm.runtime.generation.sampling import generation_config
from shadowllm.runtime.model import Model
from shadowllm.runtime.session import Prefill

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATES, WAIT = "the model generates another text", "wait for its end, or open the bundle a second time"


class ShadowConfig(PretrainedConfig):
    """Sizes of a bundle's model, under the names of ``transformers``."""

    model_type = "shadowllm"


class ShadowForCausalLM(GenerationMixin):
    """A bundle behind the interface of a causal language model of ``transformers``, on one backend.

    Its session holds the KV cache, so there is no cache object. Each row of a batch has positions of its own: the
    tokens that the attention mask hides are left out. Prompts are prefilled dense, and each later token is a decode
    step at `budget`. A text ends at the latest when the longest of its batch has used all positions of the model.

    Args:
        model: the bundle; it is opened here. `close` or a ``with`` statement frees it.

    Attributes:
        config: a `ShadowConfig`.
        generation_config: the bundle's generation_config.json.
    """

    config_class = ShadowConfig
    main_input_name = "input_ids"
    base_model_prefix = ""
    input_modalities = ("text",)
    _is_stateful = True  # a session cannot take back what it appended, so transformers refuses assisted generation

    def __init__(self, model: Model) -> None:
        self._model, manifest = model.__enter__(), model.manifest
        spec = manifest.spec
        sizes = {
            "vocab_size": spec.vocab_size,
            "hidden_size": spec.hidden_size,
            "intermediate_size": spec.intermediate_size,
            "num_hidden_layers": spec.n_layers,
            "num_attention_heads": spec.n_heads,
            "num_key_value_heads": spec.n_kv_heads,
            "head_dim": spec.head_dim,
            "max_position_embeddings": spec.max_seqlen,
        }
        self.config = ShadowConfig.from_dict(sizes)
        self.name_or_path = self.config.name_or_path = str(model.bundle)
        ends = {"eos_token_id": list(spec.eos_token_ids) or None}
        self.generation_config = GenerationConfig.from_dict(ends | generation_config(model.bundle, manifest))
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self._used_positions, self._generates = 0, False

    @classmethod
    def from_pretrained(
        cls,
        bundle: str | PathLike[str],
        backend: str = "ort",
        *,
        threads: int | None = None,
        budget: Budget | None = None,
        prefill: Prefill = "dense",
        prepack: bool = False,
    ) -> Self:
        """Open a bundle.

        Args:
            bundle, backend, threads, budget, prefill, prepack: as for `shadowllm.load`.

        Raises:
            UserError: as `shadowllm.load`.
        """
        return cls(Model(bundle, backend, threads=threads, budget=budget, prefill=prefill, prepack=prepack))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._model.__exit__(*error)

    def close(self) -> None:
        """Free the session."""
        self.__exit__()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The bundle's tokenizer."""
        return self._model.tokenizer

    @property
    def budget(self) -> Budget:
        """Fractions to keep, from the next step on.

        Raises:
            UserError: at assignment, a budget for another number of layers.
        """
        return self._model.budget

    @budget.setter
    def budget(self, budget: Budget) -> None:
        self._model.set_budget(budget)

    @classmethod
    def can_generate(cls) -> bool:
        """Return True: a pipeline asks."""
        return True

    def eval(self) -> Self:
        """Return the model: it is never trained."""
        return self

    def tie_weights(self) -> None:
        """Do nothing: lm-evaluation-harness asks for it, and a bundle's weights are complete."""

    def to(self, *place: Any, **options: Any) -> Self:
        """Return the model: the backend decides where and in which type it computes."""
        return self

    def generate(self, *inputs: Any, budget: Budget | None = None, **options: Any) -> Any:
        """Generate tokens, see ``transformers.GenerationMixin.generate``.

        Args:
            inputs, options: as there.
            budget: fractions to keep in this call; None is `budget` of the model.

        Raises:
            UserError: beam search or assisted generation, an option that a session cannot follow (such as
                ``use_cache=False`` or ``guidance_scale``), a prompt that it refuses, a mask that hides a last token, or
                another call that has not ended, because there is one cache.
        """
        if self._generates:
            raise UserError(GENERATES, WAIT)
        for tokens in (*inputs[:1], options.get("inputs"), options.get("input_ids")):
            if tokens is not None:
                _check_shape(tokens)
        before = self.budget
        if budget is not None:
            self.budget = budget
        self._generates = True
        try:
            # PyTorch only chooses tokens here, unless it also runs the model.
            with nullcontext() if self._model.backend.startswith("torch") else one_thread():
                return super().generate(*inputs, **options)
        finally:
            self.budget, self._generates = before, False

    def __call__(self, *inputs: Any, **options: Any) -> CausalLMOutputWithPast:
        return self.forward(*inputs, **options)

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        continues: bool = False,
        logits_to_keep: int = 0,
        return_dict: bool = True,
        generates: bool = False,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """Run the model.

        Args:
            input_ids: int64 ``(batch, seqlen)``.
            attention_mask: ``(batch, seqlen)``, 0 for tokens to leave out; None for no such tokens.
            continues: append the last token of each row to the sequences of the call before.
            logits_to_keep: 1 prefills dense and returns the logits after the last token. 0 returns the logits after
                every token, each from a decode step as in generation, but the first one, which is dense.
            return_dict: always True.
            generates: only `generate` sets it, for its own steps.
            others: None.

        Returns:
            ``logits``, float32 ``(batch, 1 or seqlen, vocab_size)``; 0 where the mask is 0.

        Raises:
            UserError: as `generate`, other values of ``logits_to_keep`` and ``return_dict``, or another argument.
        """
        if self._generates and not generates:
            raise UserError(GENERATES, WAIT)
        if unknown := [name for name, value in others.items() if value is not None]:
            raise UserError(
                f"a bundle's forward does not take {', '.join(unknown)}",
                "leave that out; its output has the logits only",
            )
        if not return_dict or not isinstance(logits_to_keep, int) or logits_to_keep not in (0, 1):
            raise UserError(
                f"return_dict={return_dict} with logits_to_keep={logits_to_keep} is not supported",
                "use return_dict=True and logits_to_keep 0 or 1",
            )
        session = self._model.session
        if continues:
            logits = session.decode(input_ids[:, -1].cpu().numpy())
            self._used_positions += 1
            return CausalLMOutputWithPast(logits=torch.tensor(logits)[:, None])
        kept = _kept(input_ids, attention_mask, last=logits_to_keep == 1)
        if logits_to_keep == 0:
            return CausalLMOutputWithPast(logits=self._score(input_ids, kept))
        session.reset(len(input_ids))
        prompts = [row[mask].tolist() for row, mask in zip(input_ids, kept, strict=True)]
        logits = session.prefill(prompts)
        self._used_positions = max(map(len, prompts))
        return CausalLMOutputWithPast(logits=torch.tensor(logits)[:, None])

    def _score(self, input_ids: Tensor, kept: Tensor) -> Tensor:
        """The logits after every token, ``(batch, seqlen, vocab_size)``, one decode step per token."""
        session = self._model.session
        found = torch.zeros(*input_ids.shape, self.config.vocab_size)
        for row, mask in enumerate(kept):
            session.reset()
            for index, place in enumerate(mask.nonzero()[:, 0].tolist()):
                token = input_ids[row, place : place + 1].cpu().numpy()
                logits = session.decode(token) if index else session.prefill([token.tolist()])
                found[row, place] = torch.from_numpy(logits[0])
        return found

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        continues: bool = False,
        logits_to_keep: int = 1,
        generates: bool = False,  # an assistant of transformers 5.0 is given its own arguments
        **_: Any,
    ) -> dict[str, Any]:
        """The arguments of `forward` for the next step of ``generate``."""
        mask = None if continues else attention_mask
        step = {"continues": continues, "logits_to_keep": 1, "generates": True}
        return {"input_ids": input_ids, "attention_mask": mask, **step}

    def _update_model_kwargs_for_generation(self, outputs: Any, model_kwargs: Any, *more: Any, **options: Any) -> Any:
        updated = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *more, **options)
        return updated | {"continues": True}

    def _prepare_generation_config(self, *given: Any, **options: Any) -> Any:
        # transformers types self as a PreTrainedModel in this method.
        config, inputs = super()._prepare_generation_config(*given, **options)  # type: ignore[misc]
        refused = {
            "use_cache=False": config.use_cache is False,
            "cache_implementation='paged'": config.cache_implementation == "paged",
            "guidance_scale": config.guidance_scale not in (None, 1),
            "prefill_chunk_size": config.prefill_chunk_size is not None,
            "output_attentions": config.output_attentions,
            "output_hidden_states": config.output_hidden_states,
            "position_ids": _other_positions(inputs.get("position_ids"), inputs.get("attention_mask")),
            "continues": inputs.get("continues", False),
        }
        if any(refused.values()):
            names = ", ".join(name for name, given in refused.items() if given)
            raise UserError(f"a bundle does not generate with {names}", "leave that out")
        self._validate_generation_mode(config.get_generation_mode())
        tokens, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        if getattr(config, "is_assistant", False) and tokens is not None and mask is not None:
            # Version 5.0 of transformers gives an assistant the mask of the prompt in every round.
            inputs["attention_mask"] = pad(mask, (0, tokens.shape[1] - mask.shape[1]), value=1)
        return config, inputs

    def _validate_generation_mode(self, mode: GenerationMode, *_: Any) -> None:
        # transformers calls it again with the mode that an assistant model makes.
        if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            raise UserError(f"a bundle does not generate by {mode.value}", "use greedy search or sampling")

    def _get_stopping_criteria(self, *given: Any, **options: Any) -> Any:
        def at_the_last_position(input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
            full = self._used_positions >= self.config.max_position_embeddings
            return torch.full((len(input_ids),), full, device=input_ids.device)

        criteria = super()._get_stopping_criteria(*given, **options)  # type: ignore[misc]
        criteria.append(at_the_last_position)
        return criteria

    @contextmanager
    def _optimize_model_for_decode(self) -> Iterator[None]:
        yield  # transformers changes its mixtures of experts here

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the session holds the cache


def _check_shape(tokens: object) -> None:
    if not isinstance(tokens, Tensor) or tokens.ndim != 2:
        kind = (
            f"have the shape {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else f"are a {type(tokens).__name__}"
        )
        raise UserError(f"the tokens {kind}", "give a tensor of shape (batch, seqlen)")


def _kept(input_ids: Tensor, attention_mask: Tensor | None, *, last: bool) -> Tensor:
    """Which tokens of prompts are not hidden, bool ``(batch, seqlen)``.

    Args:
        last: whether the last token of each prompt must be one of them.

    Raises:
        UserError: the mask has another shape, or hides a prompt or its last token; or the prompts are empty, or not of
            two dimensions.
    """
    _check_shape(input_ids)
    kept = (torch.ones_like(input_ids) if attention_mask is None else attention_mask).bool()
    if kept.shape[-1:] != input_ids.shape[-1:] or kept.shape[:-1] not in ((1,), input_ids.shape[:-1]):
        raise UserError(
            f"an attention mask of shape {tuple(kept.shape)} for tokens of shape {tuple(input_ids.shape)}",
            "give one with the shape of the tokens",
        )
    if not input_ids.shape[1]:
        raise UserError("the prompt is empty", "give at least one token")
    kept = kept.expand_as(input_ids)
    if not kept.any(dim=1).all() or (last and not kept[:, -1].all()):
        raise UserError(
            "the attention mask hides the last token of a prompt",
            "pad on the left: tokenizer.padding_side = 'left'",
        )
    return kept


def _other_positions(position_ids: Tensor | None, attention_mask: Tensor | None) -> bool:
    """Whether positions are others than those of a session, which count the tokens of each row that are not hidden."""
    if position_ids is None:
        return False
    kept = (torch.ones_like(position_ids) if attention_mask is None else attention_mask).bool()
    return bool((kept & (position_ids != kept.cumsum(dim=-1) - 1)).any())


AutoModelForCausalLM.register(ShadowConfig, ShadowForCausalLM)  # pipelines warn about classes that they do not know
