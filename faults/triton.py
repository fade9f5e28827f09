"""The faults in the Triton kernels, run by Triton's interpreter on a CPU."""

from __future__ import annotations

from faults.patch import BATTERY, NO_CODE, Absent, Check, Patch

TILE, CONV, EPILOGUE, STATS, FOLD, FPROP, DGRAD, WGRAD, APPLY = (
    f"wrn_fast/kernels/{name}.py"
    for name in ("tile", "conv", "epilogue", "stats", "triton_weights", "fprop", "dgrad", "wgrad", "bn_bwd_apply")
)
RANDOM = Check("tests/kernels/test_interpreted.py", "every_pair or random_cases")
LOW = Check("tests/kernels/test_interpreted.py", "lower_precisions and float32 and fprop")
VALUES = "tests/kernels/test_values.py"
MASKS = Check(VALUES, "mask_of_the_rule")

STORE_Y = "tl.store(y + base + index, v_out, mask=valid)"
RESIDUAL = "v += tl.load(residual + base + index, mask=valid, other=0.0).to(WIDE)"
TAP = "tap = (spec.tap_first_h + spec.tap_step * r) * spec.filter_s + spec.tap_first_w + spec.tap_step * s"
DOT = "acc0 = dot(a, _load_filter(w_step, b0, b0_mask & cm, EVEN_B), acc0, PREC, WIDE)"
RSTD = "rstd = rsqrt(var + EPS, WIDE)"
SCALE = "scale = rstd * tl.load(gamma + c, mask=m, other=0.0).to(WIDE)"
SHIFT = "shift = tl.load(beta + c, mask=m, other=0.0).to(WIDE)"
COUNT = "count = tl.where(left > tile_rows, tile_rows, tl.where(left > 0, left, 0)).to(WIDE)"
DROPPED = "v = drop(v, kept, keep, keep_low, WIDE)\n    if spec.in_act"


PATCHES: dict[int, Patch | Absent] = {
    1: Patch(TILE, "        if HALO:\n            shift = tl.where(inside[:, None], shift, 0.0)\n", "", RANDOM),
    2: Patch(CONV, " & (vs >= 0) & (vs < W)\n", " & (vs >= 0)\n", RANDOM),
    3: Patch(EPILOGUE, STORE_Y, STORE_Y.replace("valid", "valid & (k < COLS // 16 * 16)[None, :]"), RANDOM),
    4: Patch(EPILOGUE, STORE_Y, STORE_Y.replace("valid", "valid & (tl.sum(rows.to(tl.int32), 0) == rows.shape[0])"),
             RANDOM),
    5: Patch(CONV, "am = inside[:, None] & (c < RED)[None, :]",
             "am = inside[:, None] & (c < RED // BLOCK_RED * BLOCK_RED)[None, :]", RANDOM),
    6: Patch(CONV, "STEPS: tl.constexpr = TAPS_H * TAPS_W * (",
             "STEPS: tl.constexpr = (TAPS_H * TAPS_W - (1 if TAPS_H * TAPS_W > 1 else 0)) * (", RANDOM),
    7: Patch(CONV, TAP, TAP.replace("tap_step * r", "tap_step * S").replace("tap_step * s", "tap_step * r")
             .replace("tap_step * S", "tap_step * s"), RANDOM),
    8: Patch(FPROP, "in_first_h=-top,", "in_first_h=-top + (problem.stride == 2),", RANDOM),
    9: Patch(CONV, "+ j * spec.short_step)[:, None] * C2", "+ tl.maximum(j * spec.short_step - 1, 0))[:, None] * C2",
             RANDOM),
    10: Patch(CONV, "tile = tl.program_id(0) // column_tiles\n",
              "tile = tl.program_id(0) % (tl.num_programs(0) // column_tiles)\n", RANDOM),
    11: Patch(FPROP, "short_source = not e4m3 and (", "short_source = False and (", RANDOM),
    12: Patch(EPILOGUE, RESIDUAL, "v += tl.maximum(" + RESIDUAL.removeprefix("v += ") + ", 0.0)", RANDOM),
    13: Patch(EPILOGUE, RESIDUAL, RESIDUAL.replace("mask=valid", "mask=valid & (k < COLS - 1)[None, :]"), RANDOM),
    14: Patch(FOLD, RSTD, "root = tl.sqrt(var) + EPS\n    rstd = rsqrt(root * root, WIDE)", RANDOM),
    15: Patch(FOLD, RSTD, RSTD.replace("EPS", "1e-3"), RANDOM),
    16: Patch(FOLD, SHIFT, SHIFT + " * (scale != 0).to(WIDE)", RANDOM),
    17: Patch(FOLD, SCALE, SCALE.replace("gamma + c", "gamma + tl.where(c == CHANNELS - 1, 0, c)"), RANDOM),
    18: Patch(FOLD, SCALE, SCALE.replace("tl.load(", "tl.abs(tl.load(").replace(".to(WIDE)", ").to(WIDE)"), RANDOM),
    19: Patch(TILE, "    v = act_fwd(v, ACT, SLOPE)\n    if SELECT",
              "    last = (c == CHANNELS - 1)[None, :] & (ACT == 1)\n"
              "    v = tl.where(last, v / (1.0 + tl.exp(-v)), act_fwd(v, ACT, SLOPE))\n    if SELECT", RANDOM),
    20: Patch(EPILOGUE, "        " + RESIDUAL,
              "        v = round_to(v, y.dtype.element_ty).to(WIDE)\n        " + RESIDUAL,
              Check(VALUES, "rounded_once")),
    21: Patch(CONV, DOT, DOT.replace("dot(a", "round_to(dot(a") + ", tl.bfloat16).to(WIDE)", LOW),
    22: Patch("wrn_fast/backends/triton.py", 'if both == ("tf32", "tf32"):', 'if "tf32" in both:',
              Check("tests/backends/test_triton.py", "tf32")),
    23: Absent(NO_CODE, "no Winograd"),
    26: Patch(TILE, "return pivot, offset, sum_rows(d * d) - count * offset * offset",
              "return pivot, offset, sum_rows(tl.where(valid, v * v, 0.0)) - count * pivot * pivot",
              Check(VALUES, "large_mean")),
    28: Patch(STATS, COUNT, "count = tl.where(left > 0, tile_rows, 0).to(WIDE)", RANDOM),
    29: Patch(STATS, "    return merge(partial, rows, block_rows)",
              "    last = channel_stats.__dict__\n    now = merge(partial, rows, block_rows)\n"
              "    before = last.get(problem.C, now)\n    last[problem.C] = now\n    return before", RANDOM),
    30: Patch(EPILOGUE, "tile_stats(v, rows, valid, WIDE)", "tile_stats(acc, rows, valid, WIDE)", RANDOM),
    32: Patch(TILE, "g = tl.where(v <= 0, 0.0, g)", "g = tl.where(v < 0, 0.0, g)",
              Check("tests/kernels/test_selfcheck.py", "right_kernel")),
    33: Patch(EPILOGUE, "u = affine_tile(xv, affine_in, k, COLS, spec.center)\n", "u = xv\n", RANDOM),
    34: Patch(APPLY, "v = v - mean_g[None, :] - xhat", "v = v - xhat", RANDOM),
    35: Patch(APPLY, " - xhat * mean_gx[None, :]", "", RANDOM),
    36: Patch(DGRAD, "contiguous(w.permute(1, 2, 3, 0), dy.dtype) if",
              "contiguous(w.flip(2, 3).permute(1, 2, 3, 0), dy.dtype) if", RANDOM),
    37: Patch(WGRAD, "        if spec.source:\n", "        if False:\n", RANDOM),
    38: Patch(DGRAD, "sums = add(partial)", "sums = add(partial[: max(1, len(partial) - 1)])", RANDOM),
    39: Patch(EPILOGUE, DROPPED, DROPPED.replace("keep, keep_low", "1.0, 0.0"), RANDOM),
    40: Patch(DGRAD, "rng=rng if spec.drops else None,", "rng=rng + 1 if spec.drops else None,", MASKS),
    42: Patch(TILE, "propagate_nan=tl.PropagateNan.ALL", "propagate_nan=tl.PropagateNan.NONE",
              Check(VALUES, "nan_and_infinity and relu and float32")),
    43: Absent(BATTERY, "the interpreter keeps them; special values of parity-triton runs test_denormals_are_kept"),
    44: Absent(BATTERY, "the interpreter runs programs in order; special values of parity-triton compares runs"),
    45: Patch(EPILOGUE, STORE_Y, STORE_Y.replace("mask=valid", "mask=rows[:, None] & (k <= COLS)[None, :]"),
              Check(VALUES, "past_the_end")),
    46: Patch(EPILOGUE, RESIDUAL, RESIDUAL + "\n        tl.store(residual + base + index, "
              "round_to(v, residual.dtype.element_ty), mask=valid)", Check(VALUES, "inputs_stay")),
    47: Patch("wrn_fast/kernels/bound.py", "key = (triton.runtime.driver.active.get_current_device(), warps",
              "key = (0, warps", Check("tests/kernels/test_bound.py", "another_gpu")),
    48: Absent(NO_CODE, "the compiler places the barriers"),
}  # fmt: skip
