"""The faults in the CUDA backend: its Hopper kernels and passes run on the CPU, and what nvcc makes of them."""

from __future__ import annotations

from faults.patch import NO_CODE, Absent, Check, Patch

CONV, PRODUCER, EPILOGUE, INDEX, PLAN, ROWS, PASSES, FOLD, STATS = (
    f"csrc/cuda/{name}"
    for name in (
        "sm90_conv.cuh", "sm90_producer.cuh", "sm90_epilogue.cuh", "sm90_index.h", "sm90_plan.h", "common_rows.cuh",
        "common_passes.cu", "common_fold.cu", "common_stats.cu",
    )
)  # fmt: skip
LAUNCH, LAUNCH_PASSES = "wrn_fast/kernels/cuda_launch.py", "wrn_fast/kernels/cuda_passes.py"

NARROW = "tests/cuda/test_sm90_narrow.py"
HOPPER = Check(NARROW, "random_calls")
BRUTE_FORCE = Check("tests/cuda/test_sm90_index.py", "every_index")
KERNELS = "tests/backends/test_cuda_kernels.py"
TABLE = Check(KERNELS, "affine_table")
BACKWARD = Check(KERNELS, "act_backward_is_exact")
EXACT, PRIMITIVES = "tests/backends/test_exact.py", "tests/backends/test_primitives.py"

STORE_Y = "if (p.has_y) store_rows<T>"
SIDE = "  if (p.has_side) add_side<T>(at, g, acc);\n"
LEFT = "  if (!p.sums) return;\n"
TO_ROUND = (
    SIDE
    + "  if (p.drop_y) drop_group<T>(p, at.mask, at.lane, g, acc);\n"
    + LEFT
    + """\
  float sum[4], square[4], pivot[4];
#pragma unroll
  for (int c = 0; c < 4; c += 2) {
    const int j = 2 * g + c / 2;
    float stored[2][2];
#pragma unroll
    for (int h = 0; h < 2; ++h) round_pair<T>(acc[acc_reg(j, h, 0)], acc[acc_reg(j, h, 1)], stored[h]);
"""
)
# The residual only after the values that the moments are of.
LATE_SIDE = TO_ROUND.replace(SIDE, "").replace(LEFT, "  if (!p.sums) {\n" + SIDE + "  return;\n  }\n") + SIDE.replace(
    "(p.has", "(c == 2 && p.has"
)
SOURCE = "    const Source& s = *k.source;\n    const int channel = k.chunk * kChunk + group * 8;\n"
WAITED = """  hw::wgmma_wait<0>();
#pragma unroll
  for (int m = 0; m < T::blocks; ++m) hw::pin(acc[m]);
  release();
"""
OTHERS = "  for (int i = 0; i < T::block_k / 2; ++i) acc[i] = 0.f;\n  for (int s = 0; s < splits; ++s) {\n"
DROP = """for (int j = 0; j < V; ++j) v[j] = widen(of_da[u].v[j]);
              if constexpr (kDrop) dropped.template drop<V>(v, at);
"""
ALTERED = DROP.replace("dropped.template", "{\n Dropped<W> other(mask);\n other.%s;\n other.template").replace(
    "at);", "at);\n }"
)
STREAM = 'return torch.cuda.current_stream(device.index).cuda_stream if device.type == "cuda" else 0'
GAMMA, BETA = "number<W>(f.gamma, f.affine_dtype, c)", "number<W>(f.beta, f.affine_dtype, c)"
RETURNED = "    e.channel_stats(**rows_of(x), x=ptr(x), stats=ptr(out), workspace=ptr(workspace), stream=stream)\n"
PREVIOUS = """    last = stats_of.__dict__
    out, last[x.shape[1]] = last.get(x.shape[1], out), out
"""

PATCHES: dict[int, Patch | Absent] = {
    1: Patch(PRODUCER, "v.word[i] = in ? ", "v.word[i] = in || true ? ", HOPPER),
    2: Patch(INDEX, "at.q >= 0 && at.q < e.Q &&", "at.q >= 0 &&", HOPPER),
    3: Patch(EPILOGUE, STORE_Y,
             "if (p.has_y && (p.schedule.k_blocks == 1 || j.k_block + 1 < p.schedule.k_blocks)) store_rows<T>", HOPPER),
    4: Patch(INDEX, "return s.splits * s.k_blocks * pixel_tiles(s);",
             "return s.splits * s.k_blocks * most(1, pixel_tiles(s) - 1);", HOPPER),
    5: Patch(PRODUCER, "main = chunks_of(p.source.channels, T::chunk) *",
             "main = (chunks_of(p.source.channels, T::chunk) - (p.source.channels > T::chunk)) *", HOPPER),
    6: Patch(INDEX, "return {0, 1, taps, -pad_low, 1};", "return {0, 1, most(1, taps - 1), -pad_low, 1};", BRUTE_FORCE),
    7: Patch(PRODUCER, "tap_of(s.columns[k.parity & 1], column), tap_of(s.rows[k.parity >> 1], i));",
             "tap_of(s.rows[k.parity >> 1], i), tap_of(s.columns[k.parity & 1], column));", HOPPER),
    8: Patch(INDEX, "const int first = (parity + pad_low) % step;",
             "const int first = (parity + pad_low + 1) % step;", BRUTE_FORCE),
    9: Patch(PLAN, "p.source_short.in_stride = f.short_stride;",
             "p.source_short.in_stride = f.short_stride;\n    p.source_short.rows[0] = fprop_axis(1, -1);", HOPPER),
    10: Patch(CONV, "job_of(p.schedule, hw::fresh(job)), c",
              "job_of(p.schedule, hw::fresh(jobs > 2 && job + 2 >= jobs ? 2 * jobs - 3 - job : job)), c", HOPPER),
    11: Patch(PLAN, "    take_prologue(p.source_short, f.short_prologue);\n", "", HOPPER),
    12: Patch(EPILOGUE, "h, 0)] += hw::low_half<T::fp16>(r);", "h, 0)] += hw::max_nan(hw::low_half<T::fp16>(r), 0.f);",
              HOPPER),
    13: Patch(EPILOGUE, SIDE, SIDE.replace("(p.has_side)", "(p.has_side && g + 1 < T::block_k / 16)"), HOPPER),
    14: Patch(ROWS, "sqrt(variance + eps)", "(sqrt(variance) + eps)", Check(KERNELS, "apply_of_silu")),
    15: Patch(ROWS, "sqrt(variance + eps)", "sqrt(variance + W(1e-3))", TABLE),
    16: Patch(FOLD, f"(f.beta ? {BETA} : W(0)) - mean", f"(f.beta && scale != W(0) ? {BETA} : W(0)) - mean", TABLE),
    17: Patch(FOLD, f"rstd * {GAMMA}", f"rstd * {GAMMA}".replace("c)", "c + 1 == f.C ? 0 : c)"), TABLE),
    18: Patch(FOLD, f"rstd * {GAMMA}", f"rstd * ({GAMMA} < W(0) ? -{GAMMA} : {GAMMA})", TABLE),
    19: Patch(PRODUCER, SOURCE, SOURCE.replace("Source& s", "Source& original")
              .replace(";\n", ";\n      Source s = original;\n", 1)
              + "      if (channel + 8 == s.channels && s.act == Act::relu) s.act = Act::silu;\n", HOPPER),
    20: Patch(EPILOGUE, SIDE, "  for (int i = 8 * g; i < 8 * (g + 1); ++i)\n"
              "    acc[i] = hw::low_half<T::fp16>(hw::pack<T::fp16>(acc[i], 0.f));\n" + SIDE, HOPPER),
    21: Patch(CONV, WAITED, WAITED + "#pragma unroll\n  for (int m = 0; m < T::blocks; ++m)\n"
              "    for (float& v : acc[m]) v = hw::low_half<false>(hw::pack<false>(v, 0.f));\n", HOPPER),
    22: Absent(NO_CODE, "convolutions of 16-bit operands alone; float32 is refused"),
    23: Absent(NO_CODE, "no Winograd"),
    26: Patch(STATS, "pivot[t][j] = s.first[j][column] / count;", "pivot[t][j] = W(0);",
              Check(KERNELS, "keep_their_digits")),
    28: Patch(STATS, "+ parts.offset(part, c)) * parts.counts[part];\n          rows += parts.counts[part];",
              "+ parts.offset(part, c));\n          rows += W(1);", Check(KERNELS, "merge_of_moments")),
    29: Patch(LAUNCH_PASSES, RETURNED, RETURNED + PREVIOUS, Check(PRIMITIVES, "channel_stats and cuda")),
    30: Patch(EPILOGUE, TO_ROUND, LATE_SIDE, HOPPER),
    32: Patch(EPILOGUE, "g[i] = v[i] <= 0.f ? 0.f : g[i];", "g[i] = v[i] < 0.f ? 0.f : g[i];", HOPPER),
    33: Patch(EPILOGUE, "const float v[2] = {hw::fused(x[0], scale[0], shift[0]), hw",
              "(void)scale, (void)shift;\n      const float v[2] = {x[0], true ? x[1] : hw", HOPPER),
    34: Patch(PASSES, "v = v - mean_g[j] - (", "v = v - (", Check(KERNELS, "bn_bwd_apply")),
    35: Patch(PASSES, "v = v - mean_g[j] - (widen(of_x[u].v[j]) - mean[j]) * of_xhat[j];", "v = v - mean_g[j];",
              Check(KERNELS, "bn_bwd_apply")),
    36: Patch(INDEX, "(parity + pad_low - first) / step, -1};",
              "(parity + pad_low - first) / step - (first < taps ? (taps - first - 1) / step : 0), 1};", HOPPER),
    37: Patch(LAUNCH, "source = _source(e, True, x, stats, gamma, beta, p.eps, p.act, p.slope, rng, dropping, stream)",
              "source = _Source(aligned(_widened(x)))", Check(EXACT, "integers_are_exact and cuda-wgrad")),
    38: Patch(LAUNCH, '"slabs": len(partial)', '"slabs": max(1, len(partial) - 1)',
              Check(PRIMITIVES, "test_parity and cuda-dgrad-statistics")),
    39: Patch(PASSES, DROP, ALTERED % "scale = W(1)", BACKWARD),
    40: Patch(PASSES, DROP, ALTERED % "offset += 1", BACKWARD),
    42: Patch(EPILOGUE, "v[i] = hw::max_nan(v[i], 0.f);", "v[i] = v[i] > 0.f ? v[i] : 0.f;",
              Check(NARROW, "not_numbers")),
    43: Patch("setup.py", '"-std=c++17 -O3 -Xcompiler', '"-std=c++17 -O3 -ftz=true -Xcompiler',
              Check("tests/backends/test_cuda_code.py", "denormals")),
    44: Patch(CONV, OTHERS, "  for (int n = 1; n < splits; ++n) {\n    const int s = (job % splits + n) % splits;\n",
              Check(NARROW, "schedule")),
    45: Patch(STATS, "if (i >= count) return;", "if (i > count) return;",
              Check("tests/backends/test_guards.py", "past_the_end and cuda-dgrad")),
    46: Patch(LAUNCH_PASSES, "y = torch.empty_like(x, memory_format=torch.channels_last)\n    e.apply(",
              "y = x if p == 0 else torch.empty_like(x, memory_format=torch.channels_last)\n    e.apply(",
              Check(EXACT, "inputs_stay and cuda-wgrad")),
    47: Patch(LAUNCH_PASSES, STREAM, "return 0", Check("tests/backends/test_cuda.py", "current_stream")),
    48: Patch(PRODUCER, "hw::barrier_wait(base + M::barrier(M::kBEmpty + b.index), b.phase ^ 1);", "", HOPPER),
}  # fmt: skip
