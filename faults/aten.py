"""The faults in the plain backend. Where it has no tiles, the fault is what a lost or swapped tile would leave."""

from __future__ import annotations

from faults.patch import NO_CODE, Absent, Check, Patch

FILE = "wrn_fast/backends/aten.py"
EXACT, PRIMITIVES = "tests/backends/test_exact.py", "tests/backends/test_primitives.py"
INTEGERS = Check(EXACT, "integers_are_exact and aten-fprop and direct")
INTEGERS_DGRAD = Check(EXACT, "integers_are_exact and aten-dgrad and direct")
INTEGERS_WGRAD = Check(EXACT, "integers_are_exact and aten-wgrad and direct")
ROUNDING = Check(PRIMITIVES, "test_parity and aten-fprop-anything and float32")
MASKS = Check(PRIMITIVES, "test_parity and aten-dgrad-dropout")
SHORT = Check(PRIMITIVES, "test_parity and aten-fprop-activated and float64")
CHANNELS = Check(PRIMITIVES, "channel_stats and aten")
STATISTICS = Check(PRIMITIVES, "statistics and aten")
BATCH_NORM = Check(PRIMITIVES, "bn_bwd_apply and aten")

SOURCE = "a, padding = _padding(problem, _source(problem, x, stats, gamma, beta, rng))\n    y = torch.conv2d("
AFTER_CONV = "problem.stride, padding).to(wide)\n    if bias"
CONV = "y = torch.conv2d(a, w.to(problem.compute_dtype), None, problem.stride, padding).to(wide)"
BATCH_NORM_CALL = "return torch.batch_norm(v, gamma, beta, stats[0], stats[1], False, 0.0, eps, False)"
SHORTCUT = "s = activate(v, problem.short_act, problem.slope).to(problem.compute_dtype)"
RESIDUAL = "y = y + residual.to(wide)"
MOMENTS = "    var, mean = torch.var_mean(v, (0, 2, 3), correction=0)\n"
SUMS = "return out, torch.stack([g.sum((0, 2, 3)), (g * xhat).sum((0, 2, 3))])"
DROPPED = "        da = random.dropout(da, rng, problem.p)  # type: ignore[arg-type]\n    return da"
STATS_Y = "stats_y = moments(out.to(problem.stats_dtype)) if"


def after_convolution(lines: str) -> str:
    """The text behind the convolution with `lines` before the bias."""
    return f"problem.stride, padding).to(wide)\n    {lines}\n    if bias"


def before_convolution(lines: str) -> str:
    """The text that makes the source with `lines` behind it."""
    return SOURCE.replace("    y = torch", f"    {lines}\n    y = torch")


def planted(old: str, new: str, check: Check = INTEGERS) -> Patch:
    return Patch(FILE, old, new, check)


PATCHES: dict[int, Patch | Absent] = {
    1: planted(SOURCE, SOURCE.replace(
        "_padding(problem, _source(problem, x, stats, gamma, beta, rng))",
        "_source(problem, F.pad(x, problem.pad), stats, gamma, beta, None), [0, 0]",
    )),
    2: planted(SOURCE, SOURCE.replace(
        "_padding(problem, _source(problem, x, stats, gamma, beta, rng))",
        "F.pad(_source(problem, F.pad(x, (0, problem.pad[1])), stats, gamma, beta, None), "
        "(problem.pad[0], 0, *problem.pad[2:])), [0, 0]",
    )),
    3: planted(AFTER_CONV, after_convolution("y[:, problem.K - problem.K % 8 :] = torch.nan")),
    4: planted(AFTER_CONV, after_convolution("y[-1, :, -1] = torch.nan")),
    5: planted(SOURCE, before_convolution("w = w.clone(); w[:, problem.C - problem.C % 8 :] = 0")),
    6: planted(SOURCE, before_convolution("w = w.clone(); w[:, :, -1, -1] = 0")),
    7: planted(SOURCE, before_convolution("w = w.transpose(2, 3) if problem.R == problem.S else w")),
    8: planted(SOURCE, before_convolution("a = torch.roll(a, -1, 3) if problem.stride == 2 else a")),
    9: planted(SHORTCUT, SHORTCUT + "\n        s = F.pad(s, (1, 0, 1, 0))[:, :, :-1, :-1]", SHORT),
    10: planted(AFTER_CONV, after_convolution("y = torch.cat([y[..., :-2], y[..., -2:].flip(-1)], -1)")),
    11: planted(SHORTCUT, "s = x_short.to(problem.compute_dtype)", SHORT),
    12: planted(RESIDUAL, "y = y + torch.relu(residual.to(wide))"),
    13: planted(RESIDUAL, "y[..., :-1] += residual.to(wide)[..., :-1]"),
    14: planted(BATCH_NORM_CALL, BATCH_NORM_CALL.replace(
        "stats[1], False, 0.0, eps", "(stats[1].sqrt() + eps) ** 2, False, 0.0, 0.0"),
        Check(PRIMITIVES, "test_parity and aten-fprop-identity and float64")),
    15: planted(BATCH_NORM_CALL, BATCH_NORM_CALL.replace("0.0, eps", "0.0, 1e-3")),
    16: planted(BATCH_NORM_CALL, "beta = beta * (gamma != 0) if gamma is not None and beta is not None else beta\n    "
              + BATCH_NORM_CALL),
    17: planted(BATCH_NORM_CALL, "gamma = None if gamma is None else torch.cat([gamma[:-1], gamma[:1]])\n    "
              + BATCH_NORM_CALL),
    18: planted(BATCH_NORM_CALL, BATCH_NORM_CALL.replace("gamma,", "None if gamma is None else gamma.abs(),")),
    19: planted(
        "    if problem.drop_at == \"prologue\" and problem.p > 0:\n        a = random",
        "    if problem.act == \"relu\":\n        a = torch.cat([a[:, :-1], F.silu(v[:, -1:])], 1)\n"
        "    if problem.drop_at == \"prologue\" and problem.p > 0:\n        a = random",
    ),
    20: Absent(NO_CODE, "the library rounds its convolution before anything is added, as eager does; documented"),
    21: planted(CONV, "y = torch.zeros((), dtype=wide)\n    for c in range(0, problem.C, 4):\n        part = "
              "torch.conv2d(a[:, c : c + 4], w[:, c : c + 4].to(problem.compute_dtype), None, problem.stride, padding)"
              "\n        y = (y + part).bfloat16().to(wide)",
              ROUNDING),
    22: planted(SOURCE, before_convolution("a = (a.view(torch.int32) & ~0x1FFF).view(torch.float32) "
              "if a.dtype == torch.float32 else a"), ROUNDING),
    23: Absent(NO_CODE, "no Winograd of its own"),
    26: planted(MOMENTS, "    mean = v.mean((0, 2, 3))\n    var = (v * v).mean((0, 2, 3)) - mean * mean\n", STATISTICS),
    28: planted(MOMENTS, "    var, mean = (torch.stack(t).mean(0) for t in zip(*(torch.var_mean(part, (0, 2, 3), "
              "correction=0) for part in v.split(2, 2))))\n", STATISTICS),
    29: planted(
        "    return moments(x.to(problem.stats_dtype))",
        "    last = channel_stats.__dict__\n    now = moments(x.to(problem.stats_dtype))\n"
        "    before = last.get(problem.C, now)\n    last[problem.C] = now\n    return before",
        CHANNELS,
    ),
    30: planted(STATS_Y, "stats_y = moments(out.to(problem.stats_dtype) - (0 if residual is None else residual)) if",
              STATISTICS),
    32: planted("return torch.ops.aten.threshold_backward(g, v, 0)", "return g * (v >= 0)", INTEGERS_DGRAD),
    33: planted("        g = act_backward(g, v,", "        g = act_backward(g, x.to(wide),", INTEGERS_DGRAD),
    34: planted("v = v - channel(sums_g[0] / m) - xhat", "v = v - xhat", BATCH_NORM),
    35: planted(" - xhat * channel(sums_g[1] / m)", "", BATCH_NORM),
    36: planted("a.to(dtype), w.to(dtype), None,", "a.to(dtype), w.to(dtype).flip(2, 3), None,", INTEGERS_DGRAD),
    37: planted(
        "    a = _source(problem, x, stats, gamma, beta, rng)\n    w = a.new_empty",
        "    a = x.to(problem.compute_dtype)\n    w = a.new_empty",
        INTEGERS_WGRAD,
    ),
    38: planted(SUMS, SUMS.replace("(g * xhat)", "(g * xhat)[..., :-1]"),
              Check(PRIMITIVES, "test_parity and aten-dgrad-statistics")),
    39: planted(DROPPED, DROPPED.replace("problem.p)", "problem.p) * (1 - problem.p)"), MASKS),
    40: planted(DROPPED, DROPPED.replace("rng,", "rng + torch.tensor([0, 1]),"), MASKS),
    42: planted("        return torch.relu(v)\n", "        return torch.where(v > 0, v, torch.zeros_like(v))\n",
              Check(EXACT, "nan_and_infinity and aten-relu-nan")),
    43: planted("    a = activate(v, problem.act, problem.slope)\n    if problem.drop_at",
              "    a = activate(v, problem.act, problem.slope)\n    a = a * (a.abs() >= torch.finfo(a.dtype).tiny)\n"
              "    if problem.drop_at", Check(EXACT, "denormals and aten")),
    44: planted(CONV, "order = torch.randperm(problem.C)\n    " + CONV.replace(
        "conv2d(a, w.to", "conv2d(a[:, order], w[:, order].to"), Check(EXACT, "bits_do_not_depend and aten-fprop")),
    45: Absent(NO_CODE, "writes no memory by address"),
    46: planted(RESIDUAL, "y = y + residual.relu_().to(wide)", Check(EXACT, "strides_do_not_matter and aten-fprop")),
    47: Absent(NO_CODE, "ATen picks device and stream"),
    48: Absent(NO_CODE, "no threads of its own"),
}  # fmt: skip
