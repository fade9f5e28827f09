"""Every bound of the project: how far a result may be from the float64 oracle, and how that is judged.

    err(v) = ||v - oracle|| / ||oracle||            on the same inputs, computed in float64
    rms(err fast) <= 1.25 * rms(err eager) + u      over at least 8 seeds

`fast` is what is under test, `eager` plain PyTorch in the same dtype and channels_last, `oracle` plain PyTorch in
float64, u one unit roundoff of the dtype. No tolerance is written anywhere else.

Why pooled: near 2u the error of either side is luck. Code that is right but sums in another order breaks 1.25x in 11 %
of single cells, worst 7.9x; with the squared errors of 8 seeds pooled, and u added, right code scored 0.75 to 0.79 of
the bound in six batches while 34 of 42 planted faults were still caught. With 2 seeds it fails on right code, so fewer
than 8 raise.

Why channels_last: eager's own float32 error is 1.7e-7 in NCHW and 4.8 to 8.8e-7 in channels_last. The layout that is
used is the peer; the NCHW ratio is reported beside it.

Why gradients of a whole ReLU network have a rule of their own (`rule="median"`): one pre-activation near zero that
changes its sign moves a gradient by 1e-3, whichever side it happens to. Eager's own error is 2e-6 on a seed without
such a flip and 1e-4 to 1e-2 on one with, so a mean is the worst seed. The medians over seeds are compared instead. Even
they lie on this or that side of the gap by luck (two right codes, 27 gradients of a WRN-10-4 at batch 8: 83 % of 200
draws of 8 seeds had a median above 1.25x somewhere), so a broken median counts where it is no luck: where a fast error
is beyond 1.25 times an eager one + u in at least 15 of 16 pairs of seeds. Right code does that less than once in 1,000
(Mann and Whitney, Ann. Math. Stat. 18, 1947); of those draws none did. What this cannot see is judged on a network with
a smooth activation, pooled, and for each operator with the mask given.

float64 cells have one absolute bound, 1e-12, and convolutions with fewer multiplications one for the operator
(`WINOGRAD`). What no ratio can see (a double rounding that eager has too, a result that is NaN on both sides) is for
exact integers, special values and guards: `mismatch` is the comparison with threshold 0.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from wrn_fast.errors import WrnFastError

UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
FLOAT64 = 1e-12
RATIO = 1.25
SEEDS = 8
# Relative L2 against float64 of one convolution, C up to 640, channel sums cut every 16 (wgrad: every 32 tiles).
WINOGRAD = {"f4": 1.0e-6, "f3": 6e-7, "f2": 4e-7, "f2s2": 4e-7, "wgrad": 1.2e-6}
# What all outputs of a convolution may be scaled by besides 1, as inexact constants would: layers add that up.
SCALE = 2.0**-26
# One seed alone, as the gate before a timing: right code was seen at 7.9 times eager's error, most faults far beyond.
ONE_SEED = 8.0
# A few pre-activations near zero whose sign differs; eager's own gradients of a network were seen at 7e-3.
FLIPS = 2e-2
# No wider than this: a result that has nothing to do with the oracle is off by 1 or more.
MEANINGLESS = 0.5
# A 16-bit path rounds an operand, a convolution, a sum and what it stores, in a row.
ROUNDINGS = 4
# A wrong value can hide among so many exact zeros.
MOSTLY_ZERO = 0.7
# Share of pairs (fast, eager) beyond the bound from which a broken median is no luck.
NO_LUCK = 15 / 16

OK = "ok"
OUT_OF_BOUNDS = "out of bounds"
MISTRUSTED = "mistrusted"


def error(got: Tensor, want: Tensor) -> float:
    """Relative L2 distance to the oracle: ||got - want|| / ||want||.

    Args:
        got: any shape, floating dtype, layout and device.
        want: the oracle of the same shape.

    Returns:
        The distance; 0 where both are all zero or empty; inf where the shapes differ, where anything is NaN or
        infinite, and where only the oracle is all zero.

    Numerics:
        Computed in float64.
    """
    if got.shape != want.shape:
        return math.inf
    want = want.detach().double()
    distance = (got.detach().to(want.device).double() - want).norm().item()
    size = want.norm().item()
    if distance == 0.0 and math.isfinite(size):
        return 0.0
    return distance / size if size > 0.0 and math.isfinite(distance) and math.isfinite(size) else math.inf


def mismatch(got: Tensor, want: Tensor) -> str | None:
    """The comparison with threshold 0, for data on which the result is exact (small integers, powers of two).

    Args:
        got: the result, any floating dtype.
        want: what it must be, value for value: the exact result, rounded once to got's dtype where it does not fit.

    Returns:
        None if every value is equal (NaN equals NaN, -0 equals 0), else a sentence with the first difference. Also a
        sentence where more than 70 % of `want` is zero: such a comparison cannot fail as it should.
    """
    if got.shape != want.shape:
        return f"expected shape {list(want.shape)}, got {list(got.shape)}"
    got, want = got.detach().double(), want.detach().to(got.device).double()
    wrong = ~((got == want) | (got.isnan() & want.isnan()))
    if wrong.any():
        where = tuple(int(i) for i in wrong.nonzero()[0])
        return (
            f"{int(wrong.sum())} of {wrong.numel()} values differ, the first at {where}: "
            f"expected {want[where].item()!r}, got {got[where].item()!r}"
        )
    if zero_share(want) > MOSTLY_ZERO:
        return f"{MISTRUSTED}: {zero_share(want):.0%} of the expected values are zero"
    return None


def zero_share(v: Tensor) -> float:
    """The share of exact zeros, 0 for an empty tensor."""
    return 1.0 - v.count_nonzero().item() / v.numel() if v.numel() else 0.0


def rms(errors: Sequence[float]) -> float:
    """Root mean square: the pooled error of several seeds."""
    return math.sqrt(math.fsum(e * e for e in errors) / len(errors))


def one_seed_bound(err_eager: float, dtype: torch.dtype, gradient: bool = False) -> float:
    """The bound of a single run, for benchmarks: coarse, see `ONE_SEED`; a proof is a `Pool`.

    A gradient through a ReLU gets `FLIPS` in any case: on one seed eager may be lucky and the other not.
    """
    if dtype == torch.float64:
        return FLOAT64
    bound = min(ONE_SEED * err_eager + UNIT[dtype], MEANINGLESS)
    return max(bound, FLIPS) if gradient else bound


def term_bound(dtype: torch.dtype) -> float:
    """The bound of a fuzzed case: of its distance to the oracle, relative to the same sums over absolute values.

    Cancellation costs any code its digits, and a small random case may be nothing else; of the size of its terms right
    code is off by no more than its algorithm and its roundings, and a misplaced element by all of it.
    """
    if dtype == torch.float64:
        return FLOAT64
    return max(ROUNDINGS * UNIT[dtype], *WINOGRAD.values())


_SUMMARY: dict[str, Callable[[Sequence[float]], float]] = {"pooled": rms, "median": statistics.median}


@dataclass(frozen=True)
class Cell:
    """One line of a parity table: what was compared, both errors, and the verdict.

    `ratio` is err_fast / err_eager (nan where eager is exact); `ratio_nchw` the same to eager in NCHW, where it was
    measured. The verdict is `ok`, `out of bounds`, or `mistrusted` where nearly everything compared was zero. Under the
    rule "median" `beyond` is the share of pairs of seeds in which fast is beyond 1.25 eager + u.
    """

    name: str
    dtype: torch.dtype
    err_fast: float
    err_eager: float
    ratio: float
    bound: float
    verdict: str
    rule: str = "pooled"
    seeds: int = SEEDS
    ratio_nchw: float | None = None
    beyond: float | None = None

    @property
    def ok(self) -> bool:
        """Within the bound, on data that could have shown the contrary."""
        return self.verdict == OK

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.name} {dtype}: {self.verdict}, {self.rule} over {self.seeds} seeds: "
            f"err(fast) {self.err_fast:.3g}, err(eager) {self.err_eager:.3g}, ratio {self.ratio:.3g}, "
            f"bound {self.bound:.3g}"
        )


@dataclass
class Pool:
    """The errors of one quantity over several seeds, and their judgement.

    Usage: `pool = Pool("dgrad", torch.float32)`; per seed `pool.add(fast, eager, oracle)`; then
    `cell = pool.judge()` and `assert cell.ok, cell`.

    Args:
        name: of the quantity.
        dtype: the dtype under test (that of autocast where the model's own is float32).
        rule: "pooled" (rms) or "median" (gradients of a whole ReLU network).
        algorithm: a key of `WINOGRAD` if the operator under test may be that: its own bound is allowed as well, except
            in float64, where nothing has fewer multiplications.
    """

    name: str
    dtype: torch.dtype
    rule: str = "pooled"
    algorithm: str | None = None
    fast: list[float] = field(default_factory=list)
    eager: list[float] = field(default_factory=list)
    nchw: list[float] = field(default_factory=list)
    zeros: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.dtype != torch.float64 and self.dtype not in UNIT:
            raise WrnFastError(f"`dtype`: expected float64, float32, float16 or bfloat16, got {self.dtype}")
        if self.rule not in _SUMMARY:
            raise WrnFastError(f"`rule`: expected one of {', '.join(_SUMMARY)}, got {self.rule!r}")
        if self.algorithm is not None and self.algorithm not in WINOGRAD:
            raise WrnFastError(f"`algorithm`: expected one of {', '.join(WINOGRAD)}, got {self.algorithm!r}")

    def add(self, fast: Tensor, eager: Tensor, want: Tensor, nchw: Tensor | None = None) -> None:
        """One seed's results: under test, eager in channels_last, the float64 oracle, eager in NCHW if there is one."""
        self.add_errors(error(fast, want), error(eager, want), None if nchw is None else error(nchw, want))
        self.zeros.append(zero_share(want))

    def add_errors(self, fast: float, eager: float, nchw: float | None = None) -> None:
        """One seed's errors, computed elsewhere by `error`."""
        self.fast.append(fast)
        self.eager.append(eager)
        if nchw is not None:
            self.nchw.append(nchw)

    def judge(self) -> Cell:
        """The cell.

        Raises:
            WrnFastError: fewer than 8 seeds, except in float64, whose bound is absolute.
        """
        seeds = len(self.fast)
        if seeds < (1 if self.dtype == torch.float64 else SEEDS):
            raise WrnFastError(f"`seeds`: expected at least {SEEDS} (fewer fail right code by luck), got {seeds}")
        summary = _SUMMARY[self.rule]
        fast, eager = summary(self.fast), summary(self.eager)
        bound = FLOAT64 if self.dtype == torch.float64 else RATIO * eager + UNIT[self.dtype]
        if self.algorithm is not None and self.dtype != torch.float64:
            bound = max(bound, WINOGRAD[self.algorithm])
        beyond = self._beyond() if self.rule == "median" else None
        good = fast <= bound or (beyond is not None and beyond < NO_LUCK)
        verdict = OK if good and math.isfinite(fast) else OUT_OF_BOUNDS
        if verdict == OK and self.zeros and statistics.fmean(self.zeros) > MOSTLY_ZERO:
            verdict = MISTRUSTED
        nchw = _ratio(fast, summary(self.nchw)) if self.nchw else None
        ratio = _ratio(fast, eager)
        return Cell(self.name, self.dtype, fast, eager, ratio, bound, verdict, self.rule, seeds, nchw, beyond)

    def _beyond(self) -> float:
        """Share of pairs (fast, eager) in which fast is beyond the bound that eager sets; 1 or 0 for float64."""
        if self.dtype == torch.float64:
            return float(statistics.median(self.fast) > FLOAT64)
        limits = [RATIO * e + UNIT[self.dtype] for e in self.eager]
        return sum(f > limit for f in self.fast for limit in limits) / (len(self.fast) * len(limits))


def _ratio(fast: float, eager: float) -> float:
    return fast / eager if eager > 0.0 else math.nan
