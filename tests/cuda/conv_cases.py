"""Random calls for the host-run tool on data whose results are exact, and what they must give.

python tests/cuda/conv_cases.py '{"op": "fprop", ...}'    one call again; a failing run prints the line
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import hypothesis
import torch
import torch.nn.functional as F
from cuda import host_run
from cuda.host_run import ACTS, DTYPES, TILES, ConvShape, Dgrad, Fprop, Launch, Mask, Prologue, Tool, Wgrad, pointer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from wrn_fast import parity, random
from wrn_fast.backends.aten import act_backward, activate

PADS = ((1, 1, 1, 1), (1, 1, 1, 1), (0, 1, 0, 1), (0, 0, 0, 0), (2, 0, 1, 3))
# The widths that the packed filters are cut into, one of each.
WIDTHS = (16, 32, 48, 64, 80, 96, 128, 160, 320)
SHIFT3_WIDTHS = (64, 128, 160, 320)
SLOPE = 0.5


@dataclass
class Call:
    """One call: numbers, flags, seed; the tensors are drawn from the seed."""

    op: str = "fprop"
    tile: str = "fetch9"
    dtype: torch.dtype = torch.bfloat16
    N: int = 1
    H: int = 8
    W: int = 8
    C: int = 16
    K: int = 16
    R: int = 3
    S: int = 3
    stride: int = 1
    pad: tuple[int, int, int, int] = (1, 1, 1, 1)
    act: str = "identity"
    prologue: bool = False
    short_C: int = 0
    short_stride: int = 1
    short_prologue: bool = False
    bias: bool = False
    residual: bool = False
    act_out: str = "none"
    affine_out: bool = True
    want_y: bool = True
    want_sums: bool = False
    seed: int = 0
    blocks: int = 2
    splits: int = 1
    e4m3: bool = False
    drop_at: str = "none"
    p: float = 0.5
    tensors: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def P(self) -> int:
        return (self.H + self.pad[2] + self.pad[3] - self.R) // self.stride + 1

    @property
    def Q(self) -> int:
        return (self.W + self.pad[0] + self.pad[1] - self.S) // self.stride + 1

    @property
    def shape(self) -> ConvShape:
        return ConvShape(
            self.N, self.H, self.W, self.C, self.K, self.P, self.Q, self.R, self.S, self.stride, *self.pad
        )  # fmt: skip


@st.composite
def calls(draw: st.DrawFn, narrow: bool = False) -> Call:
    """A random small call; `narrow`: of the kernels that HOST_RUN_NARROW leaves."""
    pick = lambda *values: draw(st.sampled_from(values))
    op = pick("fprop", "fprop", "dgrad", "wgrad")
    c = Call(op=op, tile=pick("fetch9", "fetch9", "shift3") if op != "wgrad" else "fetch9")
    c.dtype, c.N, c.blocks = pick(*DTYPES), pick(1, 1, 2, 3, 5), draw(st.integers(1, 40 if op == "wgrad" else 3))
    # 112 and 224 are seven blocks of 16 and 32.
    reduced, written = pick(16, 32, 48, 64, 80), pick(16, 32, *((16, 32, 112, 224) if narrow else (48, 64, 80, 112)))
    if c.tile == "shift3":
        reduced, written = pick(16, 48, 80), 64
    else:
        c.R, c.S = pick((3, 3), (3, 3), (1, 1), (1, 3), (2, 5))
        c.stride = pick(1, 2)
    c.C, c.K = (written, reduced) if op == "dgrad" else (reduced, written)
    c.H, c.W = (max(draw(st.integers(2, 19)), least, c.stride) for least in (c.R, c.S))
    c.pad = pick(*PADS)
    c.prologue, c.act = pick(False, True, True), pick("identity", "relu", "leaky_relu")
    if op == "fprop":
        c.short_C = pick(0, 0, 0, 16, 80)
        c.short_stride, c.short_prologue = (pick(1, 2), draw(st.booleans())) if c.short_C else (1, False)
        c.bias, c.residual = draw(st.booleans()), draw(st.booleans())
        c.act_out, c.affine_out = pick("none", "identity", "relu", "leaky_relu"), draw(st.booleans())
        c.want_y = c.act_out == "none" or pick(True, True, True, False)
        c.drop_at = pick("none", "none", "output", "none" if c.act_out == "none" else "output_act")
        # Powers of two by which a kept number is multiplied, and none.
        c.p = pick(0.5, 0.5, 0.75, 1.0)
    c.want_sums = draw(st.booleans()) and c.want_y
    if op == "fprop" and pick(False, False, True):
        c.e4m3, c.prologue, c.short_prologue = True, False, False
        c.C = pick(c.C, c.C, 160)
    if op != "wgrad" and c.tile == "fetch9":
        c.splits = pick(1, 1, 1, 2, 3, 6)
    c.seed = draw(st.integers(0, 2**31 - 1))
    return c


def fuzz(tool: Tool, seed: int, count: int, narrow: bool = False) -> None:
    """`count` random calls; the first that is wrong is shrunk and raised with the line that runs it again."""

    @hypothesis.seed(seed)
    @settings(max_examples=count, deadline=None, database=None, print_blob=False,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(calls(narrow))
    def one(call: Call) -> None:
        check(tool, call)

    one()


def check(tool: Tool, call: Call) -> None:
    """Raises where the call is refused or gives anything but the exact result."""
    wrong = tool.refuses("fprop_fp8" if call.e4m3 else call.op, call.shape, call.dtype, call.tile) or run(tool, call)
    assert wrong is None, f"{wrong}\n{replay(call)}"


def replay(call: Call) -> str:
    """The command that runs a call again."""
    fields = asdict(replace(call, tensors={})) | {"dtype": str(call.dtype).removeprefix("torch.")}
    return f"python tests/cuda/conv_cases.py '{json.dumps(fields)}'"


def integers(g: torch.Generator, low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high + 1, shape, generator=g).double()


def aligned(v: Tensor, dtype: torch.dtype) -> Tensor:
    """`v` in `dtype` on a 16-byte boundary, with nothing behind it that a sanitizer would let pass."""
    own = torch.empty(v.shape, dtype=dtype).copy_(v)
    assert own.data_ptr() % 16 == 0
    return own


def poisoned(dtype: torch.dtype, *shape: int) -> Tensor:
    return aligned(torch.full(shape, torch.nan), dtype)


def channels_first(v: Tensor) -> Tensor:
    return v.permute(0, 3, 1, 2)


def affine_act(v: Tensor, scale: Tensor | None, shift: Tensor | None, act: str) -> Tensor:
    """act(v * scale + shift), channels last."""
    v = v if scale is None else v * scale
    return activate(v if shift is None else v + shift, act, SLOPE)


def tensors_of(c: Call) -> dict[str, Tensor]:
    """Small integers and halves in float64: every product, sum and prologue value is exact in fp32."""
    g = torch.Generator().manual_seed(c.seed)
    t = {"x": integers(g, -3, 3, c.N, c.H, c.W, c.C), "w": integers(g, -2, 2, c.K, c.R, c.S, c.C)}
    if c.prologue:
        t["scale"], t["shift"] = integers(g, 1, 2, c.C) * integers(g, 0, 1, c.C).mul(2).sub(1), integers(g, -2, 2, c.C)
    if c.op == "dgrad":
        t["dy"] = integers(g, -3, 3, c.N, c.P, c.Q, c.K)
        t["mean"], t["rstd"] = integers(g, -2, 2, c.C), integers(g, 1, 2, c.C) / 2
        return t
    if c.short_C:
        H, W = (c.P - 1) * c.short_stride + 1, (c.Q - 1) * c.short_stride + 1
        t["x_short"], t["w_short"] = integers(g, -3, 3, c.N, H, W, c.short_C), integers(g, -2, 2, c.K, 1, 1, c.short_C)
        if c.short_prologue:
            t["scale_short"], t["shift_short"] = integers(g, 1, 2, c.short_C), integers(g, -2, 2, c.short_C)
    if c.e4m3:
        t |= {name: 2 ** integers(g, -3, 2, c.K) for name in ("factor", "factor_short")}
    if c.bias:
        t["bias"] = integers(g, -8, 8, c.K)
    if c.drop_at != "none":
        t["rng"] = torch.randint(0, 2**63 - 1, (2,), generator=g)
    if c.residual:
        t["residual"] = integers(g, -20, 20, c.N, c.P, c.Q, c.K)
    if c.act_out != "none" and c.affine_out:
        t["out_scale"], t["out_shift"] = integers(g, 1, 3, c.K) / 2, integers(g, -9, 9, c.K)
    return t


def fprop_oracle(c: Call, t: dict[str, Tensor], rounded: bool = False) -> tuple[Tensor, Tensor | None]:
    """(y, y_act) in float64, [N,P,Q,K]; `rounded`: the convolution's source in the tested dtype, as eager has it."""
    a = affine_act(t["x"], t["scale"], t["shift"], c.act) if c.prologue else t["x"]
    a = a.to(c.dtype).double() if rounded else a
    factor, factor_short = (t[n][:, None, None] if c.e4m3 else 1.0 for n in ("factor", "factor_short"))
    y = factor * F.conv2d(F.pad(channels_first(a), c.pad), channels_first(t["w"]), stride=c.stride)
    if c.short_C:
        s = t["x_short"]
        if c.short_prologue:
            s = affine_act(s, t["scale_short"], t["shift_short"], "relu")
        y = y + factor_short * F.conv2d(channels_first(s), channels_first(t["w_short"]), stride=c.short_stride)
    y = y.permute(0, 2, 3, 1) + t.get("bias", 0.0) + t.get("residual", 0.0)
    y = dropped(c, t, y, "output")
    if c.act_out == "none":
        return y, None
    return y, dropped(c, t, affine_act(y, t.get("out_scale"), t.get("out_shift"), c.act_out), "output_act")


def dropped(c: Call, t: dict[str, Tensor], v: Tensor, where: str) -> Tensor:
    return v if c.drop_at != where else random.dropout(channels_first(v), t["rng"], c.p).permute(0, 2, 3, 1)


def dgrad_oracle(c: Call, t: dict[str, Tensor]) -> Tensor:
    """g exactly, [N,H,W,C]."""
    a = torch.zeros_like(channels_first(t["x"])).requires_grad_()
    F.conv2d(F.pad(a, c.pad), channels_first(t["w"]), stride=c.stride).backward(channels_first(t["dy"]))
    g = a.grad.permute(0, 2, 3, 1)
    if c.prologue:
        g = act_backward(g, t["x"] * t["scale"] + t["shift"], c.act, SLOPE)
    return g


def merged_moments(counts: Tensor, moments: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, M2) of all parts, by their definition."""
    n, mean, m2 = counts.double()[:, None], moments[:, 0].double(), moments[:, 1].double()
    whole = (n * mean).sum(0) / n.sum()
    return whole, (m2 + n * (mean - whole) ** 2).sum(0)


def run_fprop(tool: Tool, c: Call) -> str | None:
    """None, or a sentence about the first thing that is wrong."""
    exact = tensors_of(c)
    operands = dict.fromkeys(("x", "w", "x_short", "w_short"), torch.float8_e4m3fn) if c.e4m3 else {}
    t = {k: aligned(v, torch.float32 if v.dim() == 1 else operands.get(k, c.dtype)) for k, v in exact.items()}
    y, y_act = poisoned(c.dtype, c.N, c.P, c.Q, c.K), poisoned(c.dtype, c.N, c.P, c.Q, c.K)
    args = Fprop(shape=c.shape, dtype=DTYPES[c.dtype], tile=TILES.index(c.tile), x=pointer(t["x"]))
    w = tool.pack(t["w"])
    args.w = pointer(w)
    if c.prologue:
        args.prologue = Prologue(pointer(t["scale"]), pointer(t["shift"]), ACTS.index(c.act), SLOPE)
    if c.short_C:
        w_short = tool.pack(t["w_short"])
        args.x_short, args.w_short = pointer(t["x_short"]), pointer(w_short)
        args.short_H, args.short_W, args.short_C = t["x_short"].shape[1:]
        args.short_stride = c.short_stride
        if c.short_prologue:
            args.short_prologue = Prologue(pointer(t["scale_short"]), pointer(t["shift_short"]), ACTS.index("relu"))
    args.factor, args.factor_short = pointer(t.get("factor")), pointer(t.get("factor_short"))
    args.bias, args.residual = pointer(t.get("bias")), pointer(t.get("residual"))
    if c.drop_at != "none":
        below = min(random.threshold(c.p), 2**32 - 1)
        args.mask = Mask(pointer(exact["rng"]), below, 0.0 if c.p == 1 else 1 / (1 - c.p))
        args.drop_act = c.drop_at == "output_act"
    if c.want_y:
        args.y = pointer(y)
    if c.act_out != "none":
        args.y_act, args.act_out, args.slope_out = pointer(y_act), ACTS.index(c.act_out), SLOPE
        args.out_scale, args.out_shift = pointer(t.get("out_scale")), pointer(t.get("out_shift"))
    parts = tool.parts(c.shape, False, c.tile)
    counts, moments = poisoned(torch.float32, parts), poisoned(torch.float32, parts, 2, c.K)
    if c.want_sums:
        args.counts, args.moments = pointer(counts), pointer(moments)
    partials, counters = tool.scratch(c.shape, False, c.splits)
    args.launch = Launch(c.splits, pointer(partials), pointer(counters))
    wrong = tool.run("fprop", args, c.seed, c.blocks)
    if wrong:
        return wrong
    want, want_act = fprop_oracle(c, exact)
    checks = [("counters", "are not 0 again" if counters.any() else None)]
    eager, eager_act = fprop_oracle(c, exact, rounded=True)
    if c.want_y:
        checks.append(("y", differ(y, want) if c.act != "silu" else near(y, want, eager)))
    if want_act is not None:
        smooth = "silu" in (c.act, c.act_out)
        checks.append(("y_act", near(y_act, want_act, eager_act) if smooth else differ(y_act, want_act)))
    if c.want_sums:
        stored = y.double().flatten(0, 2)
        mean, m2 = merged_moments(counts, moments)
        checks.append(("counts", None if counts.sum() == len(stored) else f"add up to {counts.sum()}"))
        checks.append(("mean", far(mean, stored.mean(0), stored.abs().mean(0))))
        checks.append(("M2", far(m2, (stored - stored.mean(0)).square().sum(0), stored.square().sum(0))))
    return next((f"{name}: {why}" for name, why in checks if why), None)


def fprop_output(tool: Tool, c: Call, exact: dict[str, Tensor]) -> Tensor:
    """y of a call with a prologue and no epilogue, on given tensors."""
    t = {k: aligned(v, torch.float32 if v.dim() == 1 else c.dtype) for k, v in exact.items()}
    y, w = poisoned(c.dtype, c.N, c.P, c.Q, c.K), tool.pack(t["w"])
    args = Fprop(shape=c.shape, dtype=DTYPES[c.dtype], tile=TILES.index(c.tile), x=pointer(t["x"]))
    args.w, args.y = pointer(w), pointer(y)
    args.prologue = Prologue(pointer(t["scale"]), pointer(t["shift"]), ACTS.index(c.act), SLOPE)
    partials, counters = tool.scratch(c.shape, False, c.splits)
    args.launch = Launch(c.splits, pointer(partials), pointer(counters))
    assert tool.run("fprop", args, c.seed, c.blocks) == ""
    return y


def run_dgrad(tool: Tool, c: Call) -> str | None:
    """None, or a sentence about the first thing that is wrong."""
    exact = tensors_of(c)
    t = {k: aligned(v, torch.float32 if v.dim() == 1 else c.dtype) for k, v in exact.items()}
    g = poisoned(c.dtype, c.N, c.H, c.W, c.C)
    w = tool.pack(t["w"], transpose=True)
    args = Dgrad(shape=c.shape, dtype=DTYPES[c.dtype], tile=TILES.index(c.tile), dy=pointer(t["dy"]), w=pointer(w))
    args.g = pointer(g)
    if c.prologue or c.want_sums:
        args.x = pointer(t["x"])
    if c.prologue:
        args.prologue = Prologue(pointer(t["scale"]), pointer(t["shift"]), ACTS.index(c.act), SLOPE)
    sums = poisoned(torch.float32, tool.parts(c.shape, True, c.tile), 2, c.C)
    if c.want_sums:
        args.mean, args.rstd, args.sums = pointer(t["mean"]), pointer(t["rstd"]), pointer(sums)
    partials, counters = tool.scratch(c.shape, True, c.splits)
    args.launch = Launch(c.splits, pointer(partials), pointer(counters))
    wrong = tool.run("dgrad", args, c.seed, c.blocks)
    if wrong:
        return wrong
    want = dgrad_oracle(c, exact)
    checks = [("counters", "are not 0 again" if counters.any() else None)]
    checks.append(("g", near(g, want, want) if c.act == "silu" else differ(g, want)))
    if c.want_sums:
        stored, xhat = g.double().flatten(0, 2), ((exact["x"] - exact["mean"]) * exact["rstd"]).flatten(0, 2)
        for i, (name, v) in enumerate((("sum of g", stored), ("sum of g xhat", stored * xhat))):
            checks.append((name, far(sums[:, i].double().sum(0), v.sum(0), v.abs().sum(0))))
    return next((f"{name}: {why}" for name, why in checks if why), None)


def run_wgrad(tool: Tool, c: Call) -> str | None:
    """None, or a sentence about the first thing that is wrong. `c.blocks` is the number of multiprocessors."""
    exact = tensors_of(replace(c, op="dgrad"))
    t = {k: aligned(exact[k], c.dtype) for k in ("x", "dy")}
    dw = poisoned(torch.float32, c.K, c.R, c.S, c.C)
    workspace = poisoned(torch.float32, tool.wgrad_workspace(c.shape, c.blocks) // 4)
    args = Wgrad(c.shape, DTYPES[c.dtype], pointer(t["dy"]), pointer(t["x"]), pointer(workspace), pointer(dw))
    wrong = tool.run("wgrad", args, c.seed, c.blocks)
    if wrong:
        return wrong
    w = channels_first(exact["w"]).requires_grad_()
    a = F.pad(channels_first(exact["x"]), c.pad)
    F.conv2d(a, w, stride=c.stride).backward(channels_first(exact["dy"]))
    why = differ(dw, w.grad.permute(0, 2, 3, 1))
    return why and f"dw: {why}"


def run(tool: Tool, c: Call) -> str | None:
    return {"fprop": run_fprop, "dgrad": run_dgrad, "wgrad": run_wgrad}[c.op](tool, c)


def differ(got: Tensor, want: Tensor) -> str | None:
    """`got` must be the exact value rounded once; a clipped tile may well be all zero, so zeros are no objection."""
    why = parity.mismatch(got, want.to(got.dtype))
    return None if why is None or why.startswith(parity.MISTRUSTED) else why


def near(got: Tensor, want: Tensor, eager: Tensor) -> str | None:
    """Where a smooth activation rounds on the way: an error beyond eager's, which rounds its source and its result."""
    error = parity.error(got, want)
    bound = parity.one_seed_bound(parity.error(eager.to(got.dtype), want), got.dtype)
    return None if error <= bound else f"error {error:.1e}, bound {bound:.1e}"


def far(got: Tensor, want: Tensor, size: Tensor) -> str | None:
    """fp32 sums against their definition: an error beyond fp32's, measured by the size of what was added."""
    error = (got - want).norm().item() / max(size.norm().item(), 1.0)
    bound = parity.one_seed_bound(parity.UNIT[torch.float32], torch.float32)
    return None if error <= bound else f"off by {error:.1e} of what was added, bound {bound:.1e}"


if __name__ == "__main__":
    fields = json.loads(sys.argv[1])
    fields |= {"dtype": getattr(torch, fields["dtype"]), "pad": tuple(fields["pad"])}
    with tempfile.TemporaryDirectory() as folder:
        wrong = run(host_run.build(Path(folder)), Call(**fields))
    print(wrong or "nothing is wrong")
    sys.exit(bool(wrong))
