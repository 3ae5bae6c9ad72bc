"""A bundle that is ready to generate text: its session and its tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from os import PathLike
from typing import TYPE_CHECKING, Self, Unpack

from shadowllm.bundle.manifest import read_manifest
from shadowllm.errors import UserError
from shadowllm.limits import check_path
from shadowllm.models.sparsity import Budget, check_budget
from shadowllm.runtime import open_session
from shadowllm.runtime.generation.completion import GenerateOptions, Request, make_request
from shadowllm.runtime.generation.text import load_tokenizer
from shadowllm.runtime.session import Prefill, Session

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Model:
    """A bundle on one backend, used as a context manager: entering loads it, leaving frees it.

    Args:
        bundle, backend, threads, prefill, prepack: as for `open_session`.
        budget: fractions to keep; None is the bundle's default.

    Attributes:
        bundle: folder of the bundle.
        backend: name of the backend.
        manifest: manifest of the bundle.
        budget: fractions that are kept at present.

    Raises:
        UserError: as `open_session`, or a budget for another number of layers.
    """

    def __init__(
        self,
        bundle: str | PathLike[str],
        backend: str = "ort",
        *,
        threads: int | None = None,
        budget: Budget | None = None,
        prefill: Prefill = "dense",
        prepack: bool = False,
    ) -> None:
        self.bundle, self.backend, self._entered = check_path("the bundle", bundle), backend, False
        self.manifest = read_manifest(self.bundle)
        self._session = open_session(self.bundle, backend, threads=threads, prefill=prefill, prepack=prepack)
        self.budget = self.manifest.budget
        if budget is not None:
            self.set_budget(budget)

    def __enter__(self) -> Self:
        self._session.__enter__()
        self._entered = True
        return self

    def __exit__(self, *error: object) -> None:
        self._entered = False
        self._session.__exit__(*error)

    @property
    def session(self) -> Session:
        """The session that runs the model.

        Raises:
            UserError: the context manager is not entered, or is left already.
        """
        if not self._entered:
            raise UserError("the model is not open", "use it inside `with shadowllm.load(...) as model:`")
        return self._session

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The bundle's tokenizer, loaded at the first use; see `load_tokenizer`."""
        return load_tokenizer(self.bundle, self.manifest)

    def set_budget(self, budget: Budget) -> None:
        """Set the fractions to keep, from the next step on.

        Raises:
            UserError: it is no `Budget`, or one for another number of layers.
        """
        self._session.set_budget(check_budget(budget))
        self.budget = budget

    def request(
        self, prompts: Sequence[str | Sequence[int]], max_new_tokens: int, **options: Unpack[GenerateOptions]
    ) -> Request:
        """See `make_request`."""
        return make_request(self.bundle, self.manifest, lambda: self.tokenizer, prompts, max_new_tokens, **options)
