"""How many tokens a round of lossless decoding drafts: a given number, or one that adapts to what pays."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import linear_regression, mean, median
from typing import Any

from shadowllm.draft_config import Drafting, TunedDrafts

MOST = 8  # tokens of an adapted draft
# Drafts stay accepted with this share until rounds are seen; it counts as much as this number of drafted tokens. A
# tuned share counts as much as the other number.
ASSUMED, ASSUMED_TOKENS, TUNED_TOKENS = 0.75, 2.0, 4.0
FORGET = 0.97  # the weight of all earlier rounds falls by this factor with each round
START = 1  # tokens of a draft until one is accepted; a longer one would lose too much if it is rejected
SAMPLES = 5  # latest times of a step, of which the median counts
DENSE_EVERY = 64  # rounds after which the time of a dense step is measured again
# Drafts must promise this many times the speed of dense steps: measured times are uncertain, and the first verification
# of a length is slow.
GAIN = 1.05
# What drafts that do not pay may cost: a number of dense steps, and a share of the decoding time.
CREDIT, SHARE = 1.0, 0.005


@dataclass(frozen=True)
class Round:
    """One round: drafted tokens, and their verification by one dense step.

    Attributes:
        length: number of drafted tokens per sequence; 0 for a plain dense step.
        accepted: of each running sequence, the number of drafted tokens that were accepted.
        draft_seconds, verify_seconds: time of all draft steps, and of the verification with the choice of tokens.
    """

    length: int
    accepted: Sequence[int]
    draft_seconds: float
    verify_seconds: float


@dataclass
class DraftRecord:
    """What the drafts of a generation gave, counted for each sequence.

    Attributes:
        lengths: number of verified drafts by their length; the length 0 counts plain dense steps.
        drafted, accepted: number of tokens.
    """

    lengths: Counter[int] = field(default_factory=Counter)
    drafted: int = 0
    accepted: int = 0

    def add(self, done: Round) -> None:
        """Count a round."""
        self.lengths[done.length] += len(done.accepted)
        self.drafted += done.length * len(done.accepted)
        self.accepted += sum(done.accepted)

    @property
    def drafts(self) -> int:
        """Number of drafts with at least one token."""
        return sum(count for length, count in self.lengths.items() if length)

    def to_dict(self) -> dict[str, Any]:
        """Return the counts, and the share and the mean number of drafted tokens that were accepted, as JSON."""
        return {
            "drafts": self.drafts,
            "dense_steps": self.lengths[0],
            "drafted": self.drafted,
            "accepted": self.accepted,
            "acceptance": self.accepted / self.drafted if self.drafted else None,
            "accepted_per_draft": self.accepted / self.drafts if self.drafts else None,
            "draft_lengths": {str(length): count for length, count in sorted(self.lengths.items())},
        }

    def __str__(self) -> str:
        dense = f"dense steps without a draft: {self.lengths[0]}"
        if not self.drafts:
            return f"lossless: no drafts; {dense}"
        used = [length for length in self.lengths if length]
        span = f"{min(used)} to {max(used)}" if len(used) > 1 else f"{used[0]}"
        return (
            f"lossless: {self.drafts} drafts of {span} tokens, {self.accepted / self.drafts:.2f} accepted per draft "
            f"({self.accepted / self.drafted:.0%}); {dense}"
        )


def draft_length_of(drafting: Drafting) -> DraftLength | None:
    """Return the draft length of a generation; None if it is not lossless."""
    if not drafting.lossless:
        return None
    if drafting.draft_length is not None:
        return DraftLength(drafting.draft_length)
    return AdaptiveLength(drafting.tuned)


def expected_tokens(acceptance: float, length: int) -> float:
    """Return the expected number of tokens of a round (Leviathan et al., arXiv 2211.17192, equation 1).

    Args:
        acceptance: probability that a drafted token is accepted, if those before it are.
        length: number of drafted tokens.
    """
    return sum(acceptance**i for i in range(length + 1))


class DraftLength:
    """Drafts of one length.

    Attributes:
        record: what the rounds so far gave.
    """

    def __init__(self, length: int = 0) -> None:
        self._length, self.record = length, DraftRecord()

    def choose(self) -> int:
        """The number of tokens to draft in the next round."""
        return self._length

    def observe(self, done: Round) -> None:
        """Take note of a round."""
        self.record.add(done)


class AdaptiveLength(DraftLength):
    """Drafts of the length that gives the most tokens per second, by the acceptance and the times of earlier rounds.

    The first rounds are plain dense steps, which measure their time. Until a drafted token is accepted, drafts have one
    token. If no length pays, all rounds are plain dense steps, with a rare draft of one token to notice if that
    changes. Both kinds of drafts are made only if the time that drafts have lost is less than `CREDIT` dense steps at
    first, and later less than `SHARE` of the time since then.

    Args:
        tuned: acceptance and times, relative to a dense step, that stand for measured ones until there are some; None
            measures all of them.
    """

    def __init__(self, tuned: TunedDrafts | None = None) -> None:
        super().__init__()
        self._tuned = tuned
        self._first = min(START, tuned.length if tuned else START)
        self._tested = TUNED_TOKENS if tuned else ASSUMED_TOKENS
        self._accepted = self._tested * (tuned.acceptance if tuned else ASSUMED)
        self._step: deque[float] = deque(maxlen=SAMPLES)  # seconds of one draft step
        self._steps: dict[int, deque[float]] = {}  # seconds of a dense step, by its number of positions
        self._run: set[int] = set()  # numbers of positions of the dense steps so far
        self._lost, self._since_dense = 0.0, 0  # lost: seconds, negative while there is credit
        self._pays = False  # whether the last chosen length promised `GAIN`

    @property
    def acceptance(self) -> float:
        """The estimated probability that a drafted token is accepted, if those before it are."""
        return self._accepted / self._tested

    def choose(self) -> int:
        """See `DraftLength.choose`."""
        if not self._measured(1) or self._since_dense >= DENSE_EVERY:
            return 0
        knows_verification = any(self._measured(size) for size in self._steps if size > 1)
        if not self.record.accepted:
            return self._first if self._lost <= 0 else 0
        if not (self._step and knows_verification):
            return self._first
        best = max(range(1, MOST + 1), key=self._rate)
        self._pays = self._rate(best) >= GAIN * self._rate(0)
        if self._pays:
            return best
        return 1 if self._lost <= 0 else 0

    def observe(self, done: Round) -> None:
        """See `DraftLength.observe`."""
        super().observe(done)
        seconds = done.draft_seconds + done.verify_seconds
        self._lose(-SHARE * seconds)
        size = done.length + 1
        # The first step of a size is slower, because buffers are bound in it. So its time does not count.
        if size in self._run:
            first = not self._measured(1)
            self._steps.setdefault(size, deque(maxlen=SAMPLES)).append(done.verify_seconds)
            if first and size == 1:
                self._begin(done.verify_seconds)
        self._run.add(size)
        if not done.length:
            self._since_dense = 0
            return
        self._since_dense += 1
        if self.record.drafts > len(done.accepted):  # nor does that of the first draft
            self._step.append(done.draft_seconds / done.length)
        self._accepted = FORGET * self._accepted + sum(done.accepted)
        self._tested = FORGET * self._tested + sum(min(n + 1, done.length) for n in done.accepted)
        # A draft that only tests whether drafts pay counts as lost even if it is accepted: such drafts must be rare.
        self._lose(seconds - (1 + mean(done.accepted) * self._pays) * self._seconds(1))

    def _begin(self, dense: float) -> None:
        """Take the credit and the tuned times, when the time of a dense step is known.

        Tuned times count twice, so that one measurement that is disturbed does not end the drafts.
        """
        self._lost = -CREDIT * dense
        if self._tuned:
            self._step.extend([self._tuned.draft * dense] * 2)
            self._steps[self._tuned.length + 1] = deque([self._tuned.verify * dense] * 2, maxlen=SAMPLES)

    def _lose(self, seconds: float) -> None:
        """Add to the time that drafts have lost. What they win is not saved up for losses."""
        self._lost = max(min(self._lost, 0.0), self._lost + seconds)

    def _measured(self, size: int) -> bool:
        return bool(self._steps.get(size))

    def _rate(self, length: int) -> float:
        """Expected tokens per second of rounds of a length."""
        drafting = length * median(self._step)
        return expected_tokens(self.acceptance, length) / (drafting + self._seconds(length + 1))

    def _seconds(self, size: int) -> float:
        """Seconds of a dense step over ``size`` positions: measured for 1, on a line through measured sizes above.

        If there is one size above, the line is that through 1 and this size: it may promise too little for a long
        draft, which is cheaper than to promise too much.
        """
        if size == 1:
            return median(self._steps[1])
        sizes = [other for other in self._steps if other > 1 and self._measured(other)]
        if len(sizes) == 1:
            sizes.append(1)
        times = [median(self._steps[other]) for other in sizes]
        slope, start = linear_regression(sizes, times)
        return max(start + slope * size, min(times))
