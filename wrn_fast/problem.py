"""One operator call as a hashable description: what backends are chosen by, tuned by and launched from.

Letters are the field's (CUTLASS): activation x [N,C,H,W], filter w [K,C,R,S], output y [N,K,P,Q]; in memory NHWC, KRSC,
NPQK. As an implicit GEMM:

    op     GEMM_M  GEMM_N  GEMM_K
    fprop  N*P*Q   K       R*S*C
    dgrad  N*H*W   C       R*S*K
    wgrad  K       R*S*C   N*P*Q
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from wrn_fast.errors import WrnFastError

ACTS = ("identity", "relu", "silu", "leaky_relu")
DROP_AT = ("none", "prologue", "output", "output_act")
ACTS_OUT = ("none", *ACTS)
NORM_EPS = 1e-12  # of the cosine head: a feature shorter than this is divided by it, as F.normalize does


class FpropArgs(NamedTuple):
    """The arguments of fprop, by the names and in the order of its schema: tensors first."""

    x: Tensor
    w: Tensor
    stats: Tensor | None
    gamma: Tensor | None
    beta: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    x_short: Tensor | None
    w_short: Tensor | None
    stats_short: Tensor | None
    gamma_short: Tensor | None
    beta_short: Tensor | None
    rng: Tensor | None
    out_scale: Tensor | None
    out_shift: Tensor | None
    stride: int
    pad: Sequence[int]
    act: str
    slope: float
    eps: float
    batch_stats: bool
    p: float
    drop_at: str
    short_stride: int
    short_act: str
    short_eps: float
    short_batch_stats: bool
    act_out: str
    want_y: bool
    want_stats: bool


# The arguments of fprop that are tensors.
TENSORS = FpropArgs._fields[:15]


class ConvProblem(NamedTuple):
    """Every scalar of one call of a primitive. Built once a call (about 1 us), never changed."""

    device: str  # torch device type
    dtype: torch.dtype  # of x and y
    w_dtype: torch.dtype  # of w and dw: that of x, or float32 beside a 16-bit x
    N: int
    H: int
    W: int
    C: int
    K: int
    R: int
    S: int
    stride: int = 1
    pad: tuple[int, int, int, int] = (0, 0, 0, 0)  # left, right, top, bottom, as in F.pad
    act: str = "identity"
    slope: float = 0.0  # of leaky_relu
    eps: float = 0.0
    prologue: bool = False  # statistics given: BatchNorm before act
    affine: bool = False  # gamma or beta given
    batch_stats: bool = False  # the statistics are those of x itself, so they have a gradient
    p: float = 0.0  # dropout probability
    drop_at: str = "none"
    bias: bool = False
    residual: bool = False
    short_C: int = 0  # channels of the 1x1 shortcut's source; 0: none
    short_stride: int = 1
    short_prologue: bool = False
    short_affine: bool = False
    short_act: str = "identity"
    short_eps: float = 0.0
    short_batch_stats: bool = False
    act_out: str = "none"  # activation of the second output; none: there is no second output
    want_y: bool = True
    want_stats: bool = False  # fprop: statistics of y; dgrad, head_bwd: sums of g and g*xhat
    cosine: bool = False  # head: K classes by the angle to the feature instead of by the product with it

    @property
    def P(self) -> int:
        """Output height."""
        return (self.H + self.pad[2] + self.pad[3] - self.R) // self.stride + 1

    @property
    def Q(self) -> int:
        """Output width."""
        return (self.W + self.pad[0] + self.pad[1] - self.S) // self.stride + 1

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of the GEMM operands: x's. A float32 filter beside a 16-bit x is cast when it is packed."""
        return self.dtype

    @property
    def stats_dtype(self) -> torch.dtype:
        """Statistics and accumulation: float32, float64 for float64."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def index64(self) -> bool:
        """Does an element index of x, y or the shortcut's source pass 2^31?"""
        n = self.N
        short = n * self.P * self.Q * self.short_stride**2 * self.short_C
        return max(n * self.H * self.W * self.C, n * self.P * self.Q * self.K, short) >= 2**31

    @property
    def flops(self) -> int:
        """Multiplications and additions of the convolution and its shortcut, as direct convolution counts them."""
        return 2 * self.N * self.P * self.Q * self.K * (self.R * self.S * self.C + self.short_C)

    @property
    def bytes(self) -> int:
        """Least traffic with main memory of fprop: each source, filter and output once."""
        size = self.dtype.itemsize
        pixels = self.N * self.P * self.Q
        outputs = self.want_y + (self.act_out != "none") + self.residual
        return size * (self.N * self.H * self.W * self.C + pixels * (self.K * outputs + self.short_C)) + (
            self.w_dtype.itemsize * self.K * (self.R * self.S * self.C + self.short_C)
        )

    def check(self) -> None:
        """Raise WrnFastError if a scalar is outside what the operator means."""
        if self.act not in ACTS:
            raise WrnFastError(f"`act`: expected one of {', '.join(ACTS)}, got {self.act!r}")
        if self.short_act not in ACTS:
            raise WrnFastError(f"`short_act`: expected one of {', '.join(ACTS)}, got {self.short_act!r}")
        if self.act_out not in ACTS_OUT:
            raise WrnFastError(f"`act_out`: expected one of {', '.join(ACTS_OUT)}, got {self.act_out!r}")
        if self.drop_at not in DROP_AT:
            raise WrnFastError(f"`drop_at`: expected one of {', '.join(DROP_AT)}, got {self.drop_at!r}")
        if self.drop_at == "output_act" and self.act_out == "none":
            raise WrnFastError("`drop_at`: expected a second output for 'output_act', got `act_out` 'none'")
        if not 0.0 <= self.p <= 1.0:
            raise WrnFastError(f"`p`: expected a probability in [0, 1], got {self.p}")
        if self.stride < 1:
            raise WrnFastError(f"`stride`: expected at least 1, got {self.stride}")
        if self.short_stride < 1:
            raise WrnFastError(f"`short_stride`: expected at least 1, got {self.short_stride}")
        if min(self.pad) < 0:
            raise WrnFastError(f"`pad`: expected four numbers of at least 0, got {list(self.pad)}")
        if not 0.0 <= self.eps < inf:
            raise WrnFastError(f"`eps`: expected a finite number of at least 0, got {self.eps}")
        if not 0.0 <= self.short_eps < inf:
            raise WrnFastError(f"`short_eps`: expected a finite number of at least 0, got {self.short_eps}")
        if not -inf < self.slope < inf:
            raise WrnFastError(f"`slope`: expected a finite number, got {self.slope}")
        if self.P < 1 or self.Q < 1:
            raise WrnFastError(
                f"`x`: expected an image of at least {self.R}x{self.S} after padding {list(self.pad)}, "
                f"got {self.H}x{self.W}"
            )
