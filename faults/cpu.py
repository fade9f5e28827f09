"""The faults in the C++ backend and its adapter."""

from __future__ import annotations

from faults.patch import NO_CODE, Absent, Check, Patch

EXACT, PRIMITIVES, CPU = (f"tests/backends/test_{name}.py" for name in ("exact", "primitives", "cpu"))
DIRECT = Check(EXACT, "integers_are_exact and cpu-fprop and direct")
WINOGRAD = Check(CPU, "test_the_oracle and f4")
GEMM = Check(PRIMITIVES, "test_parity and cpu-fprop-anything and float32 and direct")
INTEGERS_DGRAD = Check(EXACT, "integers_are_exact and cpu-dgrad and direct")
INTEGERS_WGRAD = Check(EXACT, "integers_are_exact and cpu-wgrad")
SHORT = Check(PRIMITIVES, "test_parity and cpu-fprop-activated")
CHANNELS = Check(PRIMITIVES, "channel_stats and cpu")
STATISTICS = Check(PRIMITIVES, "statistics and cpu")
BATCH_NORM = Check(PRIMITIVES, "bn_bwd_apply and cpu")
MASKS = Check(PRIMITIVES, "test_parity and cpu-dgrad-dropout")
GUARDS = Check("tests/backends/test_guards.py", "past_the_end and cpu-fprop")
SUMS = Check(PRIMITIVES, "test_parity and cpu-dgrad-statistics")

PLAN, EPILOGUE, GEMM_FILE, FILL, DIRECT_FILE, WINOGRAD_FILE, FILTER, PASSES = (
    f"csrc/cpu/{name}.cpp"
    for name in ("plan", "epilogue", "gemm", "direct_fill", "direct", "winograd", "filter", "elementwise")
)
# Who calls fill_affine of conv.h.
AFFINE = ("direct.cpp", "winograd.cpp", "wgrad_direct.cpp", "wgrad_winograd.cpp")
HALO = "memset(out, 0, sizeof(float) * static_cast<size_t>(s.padded));"
SHIFTED = (
    "for (int64_t c = 0; c < s.padded; c += VL)\n"
    "        store(out + c, AFFINE ? activate<act>(load(s.affine.shift + c), zero()) : zero());"
)
ACTIVATED = "v = activate<act>(fma(v - load(s.affine.center + c)"
RESIDUAL = "if (RESIDUAL) v += load_upto(residual + at, n);"
RSTD = "const double r = 1. / std::sqrt(static_cast<double>(v[c]) + eps);"
TAIL = "      fprop_channels<T, RESIDUAL, SUMS, RARE>(e, t, c, t.kn - c);"
SCALE = "a.scale[c] = real && p.scale ? p.scale[c] : 1.f;"
SHIFT = "a.shift[c] = real && p.shift ? p.shift[c] : 0.f;"
OPERAND = "const Vec av = broadcast(a[offset[m] + k]);"
STORE_Y = "if (!RARE || y) store_upto(y + at, v, n);"
DGRAD_DROPOUT = "DropAt::prologue);\n  args.g = at"
RELU_GRAD = "v = select(less_equal(pre, zero()), zero(), v);"
ROTATED = (
    "const void* last = offset(w.data, w.dtype, (R - 1) * w.stride_r + (S - 1) * w.stride_s);\n"
    "  return {last, w.dtype, C, K, R, S, w.stride_c, w.stride_k, -w.stride_r, -w.stride_s};"
)
POINTS = "const Vec a = broadcast(5.f / 8), b = broadcast(3.f / 2);\n    const Vec aa"
PREVIOUS = """
    previous = channel_stats.__dict__.get(problem.C, stats)
    channel_stats.__dict__[problem.C] = stats
    return previous
"""

PATCHES: dict[int, Patch | Absent] = {
    1: Patch("csrc/cpu/winograd_input.cpp", "d[i] = zero();", "d[i] = AFFINE ? activate<act>(shift, slope) : zero();",
             WINOGRAD),
    2: Patch(FILL, f"if (w < 0 || w >= s.W)\n      {HALO}",
             f"if (w < 0) {HALO}\n    else if (w >= s.W)\n      {SHIFTED}", DIRECT),
    3: Patch(EPILOGUE, "    else\n" + TAIL, "", DIRECT),
    4: Patch(WINOGRAD_FILE, "t.rows = static_cast<int>(strips.height - top < m ? strips.height - top : m);",
             "t.rows = strips.height - top < m && tiles > 1 ? 0 : m;", WINOGRAD),
    5: Patch(GEMM_FILE, "if (k < g.length) cut<", "if (k < g.length && g.length < kCut) cut<",
             Check(EXACT, "integers_are_exact and cpu-fprop and direct")),
    6: Patch(DIRECT_FILE, "        int64_t from_row, from_col;",
             "        if (r && r + 1 == t.R && q + 1 == t.S) continue;\n        int64_t from_row, from_col;", DIRECT),
    7: Patch(FILTER, "R, S, w.stride_k, w.stride_c, w.stride_r, w.stride_s};",
             "R, S, w.stride_k, w.stride_c, w.stride_s, w.stride_r};", DIRECT),
    8: Patch(DIRECT_FILE, "return begin * t.stride - t.pad_top;",
             "return begin * t.stride - t.pad_top + (t.stride == 2);", DIRECT),
    9: Patch(DIRECT_FILE, "c.tap[1] = {1, 1, a.short_stride, 0, 0};", "c.tap[1] = {1, 1, a.short_stride, 1, 1};",
             SHORT),
    10: Patch(WINOGRAD_FILE, "t.pixel = pixel(strip, j);",
              "t.pixel = pixel(strip, tiles > 2 && j + 3 > tiles && j + 1 < tiles ? 2 * tiles - 5 - j : j);",
              Check(EXACT, "integers_are_exact and cpu-fprop and f4")),
    11: Patch(PLAN, "    args.short_prologue = affine_short.prologue;\n", "", SHORT),
    12: Patch(EPILOGUE, RESIDUAL, "if (RESIDUAL) v += max(zero(), load_upto(residual + at, n));", DIRECT),
    13: Patch(EPILOGUE, RESIDUAL, "if (RESIDUAL && n == VL) v += load_upto(residual + at, n);", DIRECT),
    14: Patch(PLAN, RSTD, "const double r = 1. / (std::sqrt(static_cast<double>(v[c])) + eps);",
              Check(PRIMITIVES, "test_parity and cpu-fprop-identity and float32 and direct")),
    15: Patch(PLAN, RSTD, RSTD.replace("eps", "1e-3"), DIRECT),
    16: Patch("csrc/cpu/conv.h", SHIFT, SHIFT.replace("p.shift ?", "p.shift && !(p.scale && p.scale[c] == 0.f) ?"),
              DIRECT, AFFINE),
    17: Patch("csrc/cpu/conv.h", SCALE, SCALE.replace(
        "p.scale[c] :", "p.scale[c + 1 == channels ? c / VL * VL : c] :"), DIRECT, AFFINE),
    18: Patch(PLAN, "r * static_cast<double>(g[c]) : r", "r * std::fabs(static_cast<double>(g[c])) : r", DIRECT),
    19: Patch(FILL, ACTIVATED, ACTIVATED.replace(
        "activate<act>(", "activate(act == Act::relu && s.C - c < VL ? Act::silu : act, "), DIRECT),
    20: Patch(EPILOGUE, RESIDUAL, "if (RESIDUAL) v = rounded(y, v) + load_upto(residual + at, n);",
              Check(EXACT, "rounded_once and cpu-fprop")),
    21: Patch(GEMM_FILE, "    for (int n = 0; n < NV; ++n) sum[m][n] += acc[m][n];",
              "    for (int n = 0; n < NV; ++n)\n"
              "      sum[m][n] = rounded(static_cast<bf16*>(nullptr), sum[m][n] + acc[m][n]);", GEMM),
    22: Patch(GEMM_FILE, OPERAND,
              "uint32_t bits;\n      memcpy(&bits, a + offset[m] + k, 4);\n      bits &= 0xffffe000u;\n"
              "      float tf32;\n      memcpy(&tf32, &bits, 4);\n      const Vec av = broadcast(tf32);", GEMM),
    23: Patch("csrc/cpu/winograd_points.h", POINTS, POINTS.replace("5.f", "5.05f"), WINOGRAD, ("winograd_input.cpp",)),
    26: Patch("csrc/cpu/tiles.h", "for (int v = 0; v < NV; ++v) shift[v] *= count_inverse;",
              "for (int v = 0; v < NV; ++v) shift[v] = zero() * count_inverse;",
              Check(PRIMITIVES, "channel_stats and cpu and 1000"), ("elementwise.cpp",)),
    28: Patch(EPILOGUE, "const double n = static_cast<double>(e.counts[s]);",
              "const double n = static_cast<double>(e.counts[0]);", STATISTICS),
    29: Patch("wrn_fast/backends/cpu.py",
              "channel_stats(threads(x.numel()), _ptr(x), _ptr(stats))\n    return stats\n",
              "channel_stats(threads(x.numel()), _ptr(x), _ptr(stats))" + PREVIOUS, CHANNELS),
    30: Patch(EPILOGUE, "        total += v;\n        store(acc + j * t.acc_col, v);",
              "        const Vec alone = RESIDUAL ? v - load_upto(residual + at, n) : v;\n        total += alone;\n"
              "        store(acc + j * t.acc_col, alone);", STATISTICS),
    32: Patch(EPILOGUE, RELU_GRAD, "v = select(greater(zero(), pre), zero(), v);", INTEGERS_DGRAD),
    33: Patch(EPILOGUE, RELU_GRAD, "v = select(less_equal(load_upto(x + at, n), zero()), zero(), v);", INTEGERS_DGRAD),
    34: Patch(PASSES, "mean_gx, v - mean_g);", "mean_gx, v - zero() * mean_g);", BATCH_NORM),
    35: Patch(PASSES, "mean_gx, v - mean_g);", "zero() * mean_gx, v - mean_g);", BATCH_NORM),
    36: Patch(FILTER, ROTATED, "return {w.data, w.dtype, C, K, R, S, w.stride_c, w.stride_k, w.stride_r, w.stride_s};",
              WINOGRAD),
    37: Patch(PLAN, "args.algo = wgrad_algo;\n  args.threads = threads;\n  args.dy = at<const void>(dy);\n"
                    "  args.x = at<const void>(x);\n  args.prologue = affine.prologue;",
              "args.algo = wgrad_algo;\n  args.threads = threads;\n  args.dy = at<const void>(dy);\n"
              "  args.x = at<const void>(x);", INTEGERS_WGRAD),
    38: Patch(EPILOGUE, "      second[c] += static_cast<double>(record[2 * e.padded + c])",
              "      if (s + 1 < e.strips)\n      second[c] += static_cast<double>(record[2 * e.padded + c])", SUMS),
    39: Patch(PLAN, DGRAD_DROPOUT, "DropAt::prologue);\n  args.prologue.dropout.scale = 1.f;\n  args.g = at", MASKS),
    40: Patch(PLAN, DGRAD_DROPOUT, "DropAt::prologue);\n  args.prologue.dropout.offset += 1;\n  args.g = at", MASKS),
    42: Patch("csrc/cpu/act.h", "return max(zero(), v);", "return max(v, zero());",
              Check(EXACT, "nan_and_infinity and cpu-relu-nan"), ("winograd_input.cpp", "direct_fill.cpp")),
    43: Patch("csrc/cpu/isa.cpp", "const Kernels& choose() {\n",
              "const Kernels& choose() {\n  __builtin_ia32_ldmxcsr(__builtin_ia32_stmxcsr() | 0x8040);\n",
              Check("tests/test_layers.py", "floating_point_mode")),
    44: Patch(GEMM_FILE, "const Segment& g = segments[s];",
              "static int calls = 0;\n    const Segment& g = segments[s == 0 ? calls++ % n_segments : "
              "s == (calls - 1) % n_segments ? 0 : s];", Check(CPU, "bits_do_not_depend and direct")),
    45: Patch(EPILOGUE, STORE_Y, STORE_Y + "\n      if (y && at + n == e.fprop->shape.N * e.fprop->shape.P * "
              "e.fprop->shape.Q * e.channels) y[at + n] = T();", GUARDS),
    46: Patch(EPILOGUE, RESIDUAL, RESIDUAL + "\n      if (RESIDUAL) store_upto(const_cast<T*>(residual) + at, v, n);",
              Check(EXACT, "strides_do_not_matter and cpu-fprop")),
    47: Absent(NO_CODE, "the CPU has one device and no streams"),
    48: Patch("csrc/cpu/wgrad_direct.cpp",
              "#pragma omp for schedule(dynamic, 1)\n      for (int64_t i = begin; i < end; ++i) {",
              "#pragma omp for schedule(dynamic, 1) nowait\n      for (int64_t i = begin; i < end; ++i) {",
              Check("tests/csrc/test_threads.py", "no_race")),
}  # fmt: skip
