"""The adapter to `_cuda` without a GPU: what it refuses, what it hands over, errors, the self-check."""

from __future__ import annotations

import types
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from backends import cuda_on_cpu
from backends.harness import RUN
from kernels import oracle

import wrn_fast
from wrn_fast import cache, dispatch, ops, parity, tune, tuned
from wrn_fast.backends import aten, cuda
from wrn_fast.kernels import cuda_check, cuda_launch, cuda_passes, cuda_weights, passed
from wrn_fast.kernels.configs import TileConfig
from wrn_fast.kernels.cuda_launch import Tile
from wrn_fast.problem import ConvProblem

PLAIN = ConvProblem("cuda", torch.bfloat16, torch.bfloat16, 128, 32, 32, 160, 160, 3, 3, 1, (1, 1, 1, 1))
SOURCE = PLAIN._replace(prologue=True, affine=True, act="relu")
PASSES = ("bn_bwd_apply", "channel_stats", "dropout", "act_mask")
CONVOLUTIONS = ("fprop", "dgrad", "wgrad")


@pytest.fixture
def gpu(monkeypatch, recorder):
    """Pretends that the machine has GPUs of the given compute capabilities; nothing is launched on them."""

    def pretend(*capabilities):
        recorder.DEVICE = "cuda"
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU{index}")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(cuda, "_failed_check", lambda op, problem: None)
        monkeypatch.setattr(cuda_launch, "_multiprocessors", lambda index: 132)
        cuda._refused_gpu.cache_clear()

    return pretend


def case_of(dtype=torch.bfloat16, seed=1, **fixed):
    base = {"C": 32, "K": 16, "stride": 1, "taps": (3, 3), "pad": (1, 1, 1, 1), "p": 0.0, "drop_at": "none",
            "act_out": "none", "want_y": True, "short_C": 0, "w_dtype": torch.float32}  # fmt: skip
    return oracle.draw(seed, dtype, **{**base, **fixed})


# What it refuses.


@pytest.mark.parametrize(
    "op, change, word",
    [(op, {"dtype": torch.float32}, "float32") for op in CONVOLUTIONS]
    + [("fprop", {"dtype": torch.float64, "w_dtype": torch.float64}, "float64"),
       ("fprop", {"w_dtype": torch.float16}, "filters"), ("fprop", {"K": 40}, "K to be a multiple of 16, got 40"),
       ("dgrad", {"C": 20}, "C to be a multiple of 16"), ("wgrad", {"C": 3, "p": 0.5, "drop_at": "prologue"}, "C to"),
       ("fprop", {"short_C": 24}, "24"), ("fprop", {"short_C": 32, "short_stride": 3}, "stride 1 or 2"),
       ("fprop", {"stride": 3}, "stride"), ("fprop", {"R": 9, "S": 9, "pad": (4,) * 4}, "7x7"),
       ("fprop", {"device": "cpu"}, "cuda tensor"), ("dropout", {"device": "xpu"}, "xpu"),
       ("dropout", {"dtype": torch.int8}, "int8")],
)  # fmt: skip
def test_refusals_are_sentences(gpu, op, change, word):
    gpu((9, 0))
    base = SOURCE if op == "dgrad" else PLAIN
    assert cuda.unsupported(op, base) is None
    assert word in cuda.unsupported(op, base._replace(**change))


def test_the_first_convolution_and_float32_filters_are_served(gpu):
    gpu((9, 0))
    for op in CONVOLUTIONS:
        assert cuda.unsupported(op, PLAIN._replace(C=3, K=16)) is None
        assert cuda.unsupported(op, SOURCE._replace(w_dtype=torch.float32)) is None


@pytest.mark.parametrize("capability", [(7, 0), (7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_convolutions_are_for_hopper_and_passes_for_7_5_and_later(gpu, capability):
    gpu((9, 0), capability)
    text = f"{capability[0]}.{capability[1]}"
    for op in CONVOLUTIONS:
        reason = cuda.unsupported(op, PLAIN)
        assert reason is None if capability == (9, 0) else "cuda:1" in reason and text in reason
    for op in PASSES:
        reason = cuda.unsupported(op, PLAIN)
        assert reason is None if capability >= (7, 5) else "7.5" in reason and text in reason


def test_without_the_extension_the_reason_says_why(monkeypatch):
    monkeypatch.setattr(cuda, "_load", lambda: (None, "extension _cuda is not built: no nvcc"))
    assert cuda.unsupported("dropout", PLAIN) == cuda.missing() == "extension _cuda is not built: no nvcc"
    with wrn_fast.backend("cuda"), pytest.raises(wrn_fast.WrnFastError, match="no nvcc"):
        dispatch.choose("fprop", PLAIN)


def test_rocm_is_refused(gpu, monkeypatch):
    gpu((9, 0))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "NVIDIA" in cuda.unsupported("dropout", PLAIN)


# The tile.


def test_the_tile_fetches_a_filter_column_at_once_where_it_can(gpu):
    gpu((9, 0))
    assert cuda.config("fprop", SOURCE, None) == Tile(1)
    assert cuda.config("fprop", SOURCE._replace(stride=2), None) == Tile(0)
    assert cuda.config("dgrad", SOURCE._replace(R=1, S=1, pad=(0,) * 4), None) == Tile(0)
    assert cuda.config("wgrad", SOURCE, None) == Tile(0)
    assert cuda.config("fprop", SOURCE, 0) == Tile(1)
    assert cuda.config("fprop", SOURCE._replace(N=1), 0) == Tile(0), "split, to fill the GPU"


def test_the_tile_in_8_bits_is_chosen_like_that_in_16(gpu):
    gpu((9, 0))
    assert cuda.config("fprop_fp8", SOURCE, 0) == Tile(1)
    assert cuda.config("fprop_fp8", SOURCE._replace(stride=2), 0) == Tile(0)
    assert cuda.config("fprop_fp8", SOURCE._replace(N=1), 0) == Tile(0), "split, to fill the GPU"
    assert cuda.tiles("fprop_fp8", SOURCE) == [Tile(0), Tile(1)], "what precedes is in the pass that rounds"
    assert cuda.tiles("fprop_fp8", SOURCE._replace(K=48)) == [Tile(0)]


def test_a_tuned_row_names_the_tile_in_8_bits(gpu, monkeypatch):
    gpu((9, 0))
    rows = {("cuda", "fprop_fp8"): {"rows": 128, "apply": False}}
    monkeypatch.setattr(tuned, "lookup", lambda name, op, problem, chip, arch: rows.get((name, op)))
    cuda.config.cache_clear()
    assert cuda.config("fprop_fp8", SOURCE, 0) == Tile(0)
    rows["cuda", "fprop_fp8"] = {"rows": 128, "apply": True}
    cuda.config.cache_clear()
    assert cuda.config("fprop_fp8", SOURCE, 0) == Tile(1), "a row that is not legal gives way"


def test_a_tuned_row_names_the_tile_and_prefers_the_backend(gpu, monkeypatch):
    gpu((9, 0))
    rows = {}
    monkeypatch.setattr(tuned, "lookup", lambda name, op, problem, chip, arch: rows.get((name, op)))
    assert not cuda.faster("fprop", SOURCE)
    cuda.config.cache_clear()
    rows["cuda", "fprop"] = {"rows": 128, "apply": True}
    rows["cuda", "dgrad"] = {"rows": 64, "apply": False}
    assert cuda.faster("fprop", SOURCE) and cuda.config("fprop", SOURCE, 0) == Tile(0, True)
    assert not cuda.faster("dgrad", SOURCE) and not cuda.faster("dropout", SOURCE)
    assert not cuda.faster("fprop", SOURCE._replace(device="cpu"))
    rows["cuda", "fprop"] = {"rows": 256, "apply": False}
    cuda.config.cache_clear()
    assert cuda.config("fprop", SOURCE._replace(stride=2), 0) == Tile(0), "a row that is not legal gives way"


# What it hands over.


def test_pointers_and_sizes_of_a_forward_call(recorder):
    case = case_of(prologue=True, affine=True, residual=True, bias=True, short_C=16, short_prologue=True,
                   short_affine=True, short_act="relu", short_stride=2, act="relu", want_stats=True)  # fmt: skip
    y, stats, _ = RUN["fprop"](case)
    assert recorder.names() == ["pack", "pack", "affine_table", "affine_table", "fprop", "merge_moments"]
    call, x = recorder.of("fprop"), case.x
    assert (call["x"], call["residual"], call["bias"]) == (x.data_ptr(), case.residual.data_ptr(), case.bias.data_ptr())
    assert (call["x_short"], call["y"]) == (case.x_short.data_ptr(), y.data_ptr())
    assert (call["short_H"], call["short_W"]) == tuple(case.x_short.shape[2:])
    assert (call["short_C"], call["short_stride"], call["short_act"], call["act"]) == (16, 2, 1, 1)
    assert call["shift"] - call["scale"] == 4 * 32 and call["y_act"] == call["out_scale"] == 0
    merge = recorder.of("merge_moments")
    assert (merge["stats"], merge["moments"], merge["C"]) == (stats.data_ptr(), call["moments"], 16)
    assert {kwargs["stream"] for _, kwargs in recorder.calls} == {0}


@pytest.mark.parametrize("tile", [Tile(0, True), Tile(0, False)], ids=["pass", "in the kernel"])
def test_the_prologue_is_a_pass_of_its_own_where_the_tile_says_so(recorder, monkeypatch, tile):
    monkeypatch.setattr(cuda, "config", lambda *args: tile)
    RUN["fprop"](case_of(prologue=True, affine=True, act="silu", residual=False))
    assert recorder.names() == ["pack", "apply" if tile.apply else "affine_table", "fprop"]
    assert (recorder.of("fprop")["scale"] == 0) == tile.apply


def test_dropout_of_the_source_is_drawn_once(recorder):
    case = case_of(prologue=True, affine=True, act="relu", p=0.5, drop_at="prologue", residual=False)
    RUN["fprop"](case)
    RUN["dgrad"](case)
    assert recorder.names() == ["pack", "apply", "fprop", "pack", "dgrad", "act_backward"]
    assert recorder.of("apply")["rng"] == recorder.of("act_backward")["rng"] == case.rng.data_ptr()
    assert recorder.of("dgrad")["x"] == 0 and recorder.of("act_backward")["da"] == recorder.of("dgrad")["g"]


@pytest.mark.parametrize("drop_at", ["output", "output_act"])
def test_dropout_of_an_output_is_in_the_convolution(recorder, drop_at):
    """No pass; y, its statistics and the second output are those of a call that does not drop, times the mask."""
    case = case_of(p=0.5, drop_at=drop_at, act_out="relu", want_stats=True, prologue=False, affine=False,
                   act="identity", residual=True)  # fmt: skip
    case.tensors["out_shift"] = None
    y, stats, y_act = RUN["fprop"](case)
    assert recorder.names() == ["pack", "fprop", "merge_moments"]
    call = recorder.of("fprop")
    assert (call["rng"], call["p"], call["drop_act"]) == (case.rng.data_ptr(), 0.5, drop_at == "output_act")
    case.problem = case.problem._replace(p=0.0, drop_at="none")
    plain_y, _, plain_act = RUN["fprop"](case)
    times = 2 * wrn_fast.random.keep_mask(y.shape, case.rng, 0.5).to(y.dtype)
    assert plain_act.any() and torch.equal(y_act, plain_act * times)
    assert torch.equal(y, plain_y * times if drop_at == "output" else plain_y)
    assert parity.error(stats, oracle.moments(y.double())) <= parity.one_seed_bound(
        parity.UNIT[torch.float32], torch.float32
    )


@pytest.mark.parametrize("prologue", [False, True])
def test_a_small_call_is_split_and_starts_early_where_a_pass_follows_the_packing(recorder, monkeypatch, prologue):
    monkeypatch.setattr(cuda_launch, "splits_of", lambda *args: 4)
    monkeypatch.setattr(cuda_weights, "_counters", {})
    act = "relu" if prologue else "identity"
    case = case_of(prologue=prologue, affine=prologue, act=act, residual=False)
    for op in ("fprop", "dgrad", "fprop"):
        RUN[op](case)
    calls = [kwargs for name, kwargs in recorder.calls if name in ("fprop", "dgrad")]
    assert all(c["tile"] == 0 and c["splits"] == 4 and c["early"] == prologue and c["partials"] for c in calls)
    (counters,) = cuda_weights._counters.values()
    assert {c["counters"] for c in calls} == {counters.data_ptr()} and not counters.any()


def test_channels_of_the_image_are_filled_up(recorder):
    case = case_of(C=3, prologue=False, affine=False, act="identity", residual=False)
    y, *_ = RUN["fprop"](case)
    (dw,), (g, _) = RUN["wgrad"](case), RUN["dgrad"](case)
    assert recorder.of("fprop")["x"] != case.x.data_ptr()
    assert dw.shape == case.w.shape and g.shape == case.x.shape
    for v in (y, dw, g):
        assert v.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("op", RUN)
def test_slices_that_begin_anywhere(recorder, op):
    """Equal bits whether a tensor begins at a multiple of 16 bytes or not."""
    case = case_of(prologue=True, affine=True, act="relu", residual=True)
    want = RUN[op](case)
    moved = {}
    for name in ("x", "dy", "residual"):
        v = case.tensors[name]
        n, c, h, w = v.shape
        flat = torch.empty(v.numel() + 1, dtype=v.dtype)[1:]
        moved[name] = flat.view(n, h, w, c).permute(0, 3, 1, 2).copy_(v)
        assert moved[name].data_ptr() % 16
    assert all(map(torch.equal, RUN[op](case, **moved), want))


def test_calls_are_queued_on_the_current_stream_of_the_tensors_device(monkeypatch):
    """Of two GPUs; the first is the current one."""
    streams, entered = {0: 11, 1: 22}, []

    @contextmanager
    def device(index):
        entered.append(index)
        yield

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: types.SimpleNamespace(cuda_stream=streams[index]))
    monkeypatch.setattr(torch.cuda, "device", device)
    for index, expected in streams.items():
        x = types.SimpleNamespace(device=torch.device("cuda", index))
        with cuda_passes.queue("fprop", PLAIN, x) as stream:
            assert stream == expected
    assert entered == [1]


# Errors.


class Failing:
    """An extension whose launches fail."""

    def __init__(self, extension, error):
        self.extension, self.error, self.DEVICE = extension, error, "cpu"

    def __getattr__(self, name):
        if name in ("fprop", "channel_stats", "apply"):
            raise self.error
        return getattr(self.extension, name)


def test_an_error_names_operator_and_shapes(recorder, monkeypatch):
    failing = Failing(recorder.extension, RuntimeError("an illegal memory access was encountered"))
    monkeypatch.setattr(cuda, "_load", lambda: (failing, None))
    case = case_of(prologue=False, affine=False, act="identity", N=2, H=5, W=7)
    with pytest.raises(RuntimeError, match=r"fprop of x \[2,32,5,7\] and w \[16,32,3,3\].*bfloat16.*illegal memory"):
        RUN["fprop"](case)
    with pytest.raises(RuntimeError, match=r"channel_stats of x \[2,32,5,7\]"):
        ops.channel_stats(case.x)


def test_out_of_memory_stays_what_it_is(recorder, monkeypatch):
    failing = Failing(recorder.extension, torch.OutOfMemoryError("CUDA out of memory"))
    monkeypatch.setattr(cuda, "_load", lambda: (failing, None))
    with pytest.raises(torch.OutOfMemoryError):
        ops.dropout(torch.randn(1, 4, 4, 4), torch.tensor([1, 2]), 0.5)


def test_scratch_does_not_grow_with_the_batch():
    """Tiles are at most 4,096, and 13,108 images of WRN-28-10 pass 2^31 elements."""
    extension = cuda_on_cpu.build()
    sizes = [extension.channel_stats_workspace(dtype=1, rows=n * 1024, C=160) for n in (128, 13108, 10**7)]
    assert 0 < sizes[0] and sizes[1] <= sizes[2] <= 4200 * (3 * 160 + 1) * 4


# The self-check.


@pytest.fixture
def no_memory(monkeypatch):
    """Nothing remembered, nothing kept."""
    monkeypatch.setattr(cuda_check, "_seen", {})
    monkeypatch.setattr(cuda_check, "_file_name", lambda library, device: "none.json")
    monkeypatch.setattr(passed, "_read", lambda file: {})
    monkeypatch.setattr(passed, "_add", lambda file, name: None)


DROPS = PLAIN._replace(p=0.3, drop_at="output")


def test_the_self_check_drops_where_the_call_does(recorder):
    problem = DROPS._replace(device="cpu", C=32, K=48, N=2)
    for op in CONVOLUTIONS:
        assert cuda.wrong(op, problem, Tile(), torch.device("cpu")) is None
    assert recorder.of("fprop")["rng"] and recorder.of("fprop")["p"] > 0


@pytest.mark.parametrize(
    "problem", [PLAIN, SOURCE, SOURCE._replace(stride=2), DROPS], ids=["plain", "act", "stride 2", "drop"]
)
@pytest.mark.parametrize("op", CONVOLUTIONS)
def test_the_self_check_passes_right_kernels_and_no_others(recorder, no_memory, op, problem, monkeypatch):
    problem = problem._replace(device="cpu", C=32, K=48, N=2)
    recorder.__file__ = "library"
    place = torch.device("cpu")
    assert cuda.refused_tile(op, problem, Tile(), place) is None
    assert op in recorder.names()
    cuda_check._seen.clear()
    right = getattr(cuda_launch, op)

    def wrong(*args):
        out = right(*args)
        (out if op == "wgrad" else out[0])[-1, -1, -1, -1] = 1000
        return out

    monkeypatch.setattr(cuda_launch, op, wrong)
    assert "integers wrong" in cuda.refused_tile(op, problem, Tile(), place)


def test_a_kernel_that_fails_in_the_self_check_is_refused(recorder, no_memory, monkeypatch):
    recorder.__file__ = "library"
    monkeypatch.setattr(recorder, "extension", Failing(recorder.extension, RuntimeError("no kernel image")))
    problem = PLAIN._replace(device="cpu", C=32, K=48)
    assert "no kernel image" in cuda.refused_tile("fprop", problem, Tile(), torch.device("cpu"))


def test_it_has_the_functions_of_aten():
    for op in (*dispatch.OPS, "unsupported"):
        assert isinstance(getattr(cuda, op), types.FunctionType) and callable(getattr(aten, op)), op


# Whole models and tables.


def test_a_training_step_of_a_network(recorder):
    """Every convolution of a WideResNet in bfloat16 by this backend alone, the one on the image too."""
    torch.manual_seed(0)
    models = [wrn_fast.classic(10, 10, 1).bfloat16() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    exact = wrn_fast.classic(10, 10, 1).double()
    exact.load_state_dict(models[0].state_dict())
    x = torch.randn(2, 3, 32, 32).bfloat16()
    losses, gradients = [], []
    for model, name in ((models[0], "cuda"), (models[1], "aten"), (exact, "aten")):
        with wrn_fast.backend(name):
            y = model(x.to(next(model.parameters()).dtype))
            y.float().square().sum().backward()
        losses.append(y.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    called = set(recorder.names())
    assert called >= {"fprop", "dgrad", "wgrad", "bn_bwd_apply", "affine_table", "merge_moments", "pack"}
    for got, peer, want in (losses, gradients):
        bound = parity.one_seed_bound(parity.error(peer, want), torch.bfloat16, gradient=got.dim() == 1)
        assert parity.error(got, want) <= bound


@pytest.mark.parametrize("us", [1.0, 3.0])
def test_tune_writes_a_row_only_where_these_kernels_are_faster(monkeypatch, tmp_path, us):
    pytest.importorskip("triton")
    row = TileConfig(256, 64, (160, 0), 12, 2)
    monkeypatch.setattr(tune, "unsupported", lambda device: None)
    monkeypatch.setattr(tune, "_measure", lambda *args: [(2e-6, TileConfig(128, 64, (128, 32), 8, 3))])
    monkeypatch.setattr(tune, "_measure_cuda", lambda *args: [(us * 1e-6, row)])
    done = tune.run([("fprop", SOURCE._replace(device="cpu"))], folder=tmp_path)
    assert {r["backend"] for r in done["rows"]} == ({"triton", "cuda"} if us < 2 else {"triton"})
    tuned.validate(cache.read(Path(done["path"])))
