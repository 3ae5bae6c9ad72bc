"""Configuration of lossless decoding. See `config`."""

from __future__ import annotations

from dataclasses import dataclass

from shadowllm.config_fields import check_values, option
from shadowllm.errors import UserError
from shadowllm.limits import LONGEST_DRAFT


@dataclass(frozen=True)
class TunedDrafts:
    """What `tune --lossless` found: the best length of drafts, and what it was chosen from.

    Attributes:
        length: tokens of a draft; 0 if no draft pays.
        acceptance: probability that a drafted token is accepted, if those before it are.
        draft: time of a draft step, relative to a dense step.
        verify: time of a dense step over ``length + 1`` positions, relative to one over one position.
    """

    length: int
    acceptance: float
    draft: float
    verify: float


@dataclass(frozen=True)
class Drafting:
    """Lossless decoding: sparse steps draft tokens, and a dense step verifies them.

    Attributes:
        lossless: write the text of the dense model: sparse steps draft it, dense steps verify several tokens at once.
        draft_length: tokens drafted at once; None chooses the fastest, from acceptance and the times of the steps.
        tuned: where an adapted length begins; None if drafts were not tuned.

    Raises:
        UserError: a length is outside its limits, or given without ``lossless``.
    """

    lossless: bool = option(False)
    draft_length: int | None = option(
        None,
        metavar="N",
        least=0,
        most=LONGEST_DRAFT,
        called="the draft length",
        help="with --lossless: tokens drafted at once",
        otherwise="the fastest, found while it runs",
    )
    tuned: TunedDrafts | None = None

    def __post_init__(self) -> None:
        check_values(self)
        if self.draft_length is not None and not self.lossless:
            raise UserError("a draft length is given, but decoding is not lossless", "add --lossless or lossless=True")
