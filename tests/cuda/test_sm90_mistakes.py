"""Planted mistakes: the host-run tool must report a copy of the kernels with one line wrong, each in its own way."""

import shutil

import pytest
from cuda import conv_cases, host_run
from cuda.conv_cases import Call

# (file, right, wrong, what the report says)
MISTAKES = {
    "a phase is flipped the wrong way": (
        "sm90_conv.cuh", "M::kBFull + b.index), b.phase);", "M::kBFull + b.index), b.phase ^ 1);",
        "before the loads|nobody wrote|deadlock",
    ),
    "the producer does not wait for an empty buffer": (
        "sm90_producer.cuh", "hw::barrier_wait(base + M::barrier(M::kBEmpty + b.index), b.phase ^ 1);", "",
        "overrun|may still|write over",
    ),
    "a byte count is too high": (
        "sm90_producer.cuh", "hw::barrier_expect(filled, M::kBBytes);", "hw::barrier_expect(filled, M::kBBytes + 16);",
        "deadlock",
    ),
    "a byte count is too low": (
        "sm90_producer.cuh", "hw::barrier_expect(filled, M::kBBytes);", "hw::barrier_expect(filled, M::kBBytes - 16);",
        "not announced",
    ),
    "a buffer of filters goes back before its products are done": (
        "sm90_conv.cuh", "b_done = b.index;",
        "if (elected) hw::barrier_arrive(base + M::barrier(M::kBEmpty + b.index));",
        "may still read|overrun",
    ),
    "a buffer goes back twice": (
        "sm90_conv.cuh", "if (elected && a_done >= 0)",
        "if (elected && a_done >= 0) hw::barrier_arrive(base + M::barrier(M::kAEmpty + a_done));\n"
        "    if (elected && a_done >= 0)",
        "overrun|may still|write over|deadlock",
    ),
    "the prologue is not made visible to wgmma": (
        "sm90_producer.cuh", "        hw::fence_async();\n", "", "without fence.proxy.async",
    ),
    "the results are not made visible to TMA": (
        "sm90_epilogue.cuh", "  hw::fence_async();\n", "", "without fence.proxy.async",
    ),
    "the staging is written while a store reads it": (
        "sm90_epilogue.cuh", "if (hw::thread() % kWarpgroup == 0) hw::store_wait_read();", "", "may still read",
    ),
    "a store leaves before all warps wrote": (
        "sm90_epilogue.cuh", "  hw::fence_async();\n  sync_consumer(consumer);\n", "  hw::fence_async();\n",
        "nobody wrote|surely written|write over|may still read",
    ),
    "the products are not waited for": (
        "sm90_conv.cuh", "  hw::wgmma_wait<0>();\n", "", "may still|in flight|different wgmma|differ",
    ),
    "the prologue forgets the border": (
        "sm90_producer.cuh", "v.word[i] = in ? ", "v.word[i] = in || true ? ", "values differ",
    ),
    "a descriptor starts one image row off": (
        "sm90_index.h", "return offset_of(a, i) - lowest_offset(a);",
        "return a.count - 1 - offset_of(a, i) + lowest_offset(a);",
        "values differ",
    ),
    "a wrong swizzle": (
        "sm90_index.h", "(((address >> 7) & (swizzle_span(s) / 16 - 1)) << 4)",
        "(((address >> 8) & (swizzle_span(s) / 16 - 1)) << 4)", "values differ",
    ),
    "a pixel outside counts for the moments": (
        "sm90_epilogue.cuh", "at.valid[1] ? stored[1][b] - pivot[c + b] : 0.f", "stored[1][b] - pivot[c + b]",
        "mean|M2",
    ),
    "the counter of a split reduction is left": (
        "sm90_conv.cuh", "if (last) *counter = 0;", "", "not 0 again",
    ),
    "the residual is asked for while the grid before still writes it": (
        "sm90_conv.cuh", "    hw::wait_for_prior_grid();\n    consume", "    consume", "before griddepcontrol.wait",
    ),
    "the mask of a job is drawn over the one before": (
        "sm90_dropout.cuh", "hw::barrier_wait(base + M::barrier(M::kMaskEmpty), mask_phase(job) ^ 1);", "(void)job;",
        "surely written|write over|may still",
    ),
    "the mask is not waited for": (
        "sm90_conv.cuh", "hw::barrier_wait(base + M::barrier(M::kMaskFull), mask_phase(hw::fresh(job)));", "{}",
        "nobody wrote|surely written|differ",
    ),
    "a block whose split another one ends keeps its mask": (
        "sm90_conv.cuh", "          give_mask();\n", "", "deadlock",
    ),
    "the mask is given back before it is read": (
        "sm90_conv.cuh", "    if constexpr (T::blocks == 1) {\n      if (!whole)",
        "    if (draws<T>(p) && elected) hw::barrier_arrive(base + M::barrier(M::kMaskEmpty));\n"
        "    if constexpr (T::blocks == 1) {\n      if (!whole)",
        "surely written|overrun|write over|may still|deadlock",
    ),
    "a lane multiplies by its neighbour's bits": (
        "sm90_dropout.cuh", ">> (2 * (lane & 3))", ">> (2 * (lane & 1))", "values differ",
    ),
    "elements are counted over the tiles": (
        "sm90_index.h", "* e.P + at.p) * e.Q + at.q) * K + k;", "* e.P + at.p) * e.Q + at.q % 8) * K + k;",
        "values differ",
    ),
    "the main source's sums keep their unit before the shortcut": (
        "sm90_e4m3.cuh", "column < T::block_k ?", "column < 32 ?", "values differ",
    ),
    "a split reduction adds one piece twice": (
        "sm90_conv.cuh", "consumer, s, i, t));", "consumer, most(s, 1), i, t));", "values differ",
    ),
}  # fmt: skip

CALLS = (
    Call("fprop", "fetch9", H=9, W=11, N=3, C=80, K=32, prologue=True, act="relu", residual=True, act_out="relu",
         want_sums=True, blocks=1),
    Call("fprop", "shift3", H=9, W=11, N=3, C=80, K=64, prologue=True, act="relu", want_sums=True, blocks=1),
    Call("fprop", "fetch9", C=80, K=32, splits=3, drop_at="output"),
    Call("fprop", "shift3", N=3, H=9, W=11, C=160, K=64, short_C=16, act_out="relu", drop_at="output_act", e4m3=True,
         blocks=1),
)  # fmt: skip


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """The parts of the tool that know no kernel, compiled once."""
    return host_run.compile_machine(tmp_path_factory.mktemp("machine"))


def broken(name, folder):
    file, right, wrong, _ = MISTAKES[name]
    csrc = folder / "csrc" / "cuda"
    shutil.copytree(host_run.CSRC, csrc)
    shutil.copy(host_run.CSRC.parent / "problem.h", csrc.parent)
    text = (csrc / file).read_text()
    assert text.count(right) == 1, f"{file} has {text.count(right)} times: {right}"
    (csrc / file).write_text(text.replace(right, wrong))
    return csrc


@pytest.mark.rotate(4)
@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_reported(name, objects, tmp_path, seed):
    tool = host_run.build(tmp_path, csrc=broken(name, tmp_path), flags=host_run.NARROW, objects=objects)
    reports = []
    for call in CALLS:
        call.seed = seed
        reports.append(conv_cases.run(tool, call) or "")
    expected = MISTAKES[name][3].split("|")
    assert any(word in report for word in expected for report in reports), reports


def test_without_a_mistake_the_same_calls_are_right(tool, seed):
    for call in CALLS:
        call.seed = seed
        assert conv_cases.run(tool, call) is None
