"""The adapter: what it refuses and why, what it chooses, and a whole model through it in the interpreter."""

import dataclasses
import inspect
import subprocess
import sys

import pytest
import torch

from wrn_fast import tuned
from wrn_fast.backends import BACKENDS, aten, triton
from wrn_fast.kernels import configs
from wrn_fast.kernels.configs import ARCHS, TileConfig
from wrn_fast.precision import precision
from wrn_fast.problem import ConvProblem

PLAIN = ConvProblem("cuda", torch.bfloat16, torch.bfloat16, 128, 32, 32, 160, 160, 3, 3, 1, (1, 1, 1, 1))
SOURCE = PLAIN._replace(prologue=True, affine=True, act="relu")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
WIDTHS = (3, 16, 32, 48, 64, 96, 128, 160, 192, 256, 320, 512, 640, 1024, 7, 100)


@pytest.fixture
def gpu(monkeypatch):
    """Pretends that the machine has GPUs of the given compute capabilities."""

    def pretend(*capabilities):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU{index}")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(triton, "_failed_proof", lambda op, problem: None)
        triton._refused_gpu.cache_clear()

    yield pretend
    triton._refused_gpu.cache_clear()


def test_it_has_the_functions_of_aten():
    for op in ("fprop", "dgrad", "wgrad", "bn_bwd_apply", "channel_stats", "dropout", "unsupported"):
        ours, theirs = (inspect.signature(getattr(module, op)) for module in (triton, aten))
        assert list(ours.parameters) == list(theirs.parameters), op


def test_it_stands_before_the_backends_of_the_cpu():
    assert BACKENDS.index("triton") < BACKENDS.index("cpu") < BACKENDS.index("aten")


def test_a_tensor_of_the_cpu_is_refused_without_importing_triton():
    code = (
        "import sys, torch, wrn_fast\n"
        "wrn_fast.bn_act_conv(torch.randn(1, 4, 5, 5), torch.randn(4, 4, 3, 3))\n"
        "print('triton' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["False"], done.stderr
    assert "TRITON_INTERPRET" in triton.unsupported("fprop", PLAIN._replace(device="cpu"))


def test_old_gpus_dtypes_and_sizes_are_refused_with_a_sentence(gpu):
    gpu((9, 0))
    assert triton.unsupported("fprop", PLAIN) is None
    assert "float64" in triton.unsupported("fprop", PLAIN._replace(dtype=torch.float64))
    assert "pixels" in triton.unsupported("fprop", PLAIN._replace(N=2**21))
    assert "taps" in triton.unsupported("fprop", PLAIN._replace(R=7, S=7))
    assert "xpu" in triton.unsupported("fprop", PLAIN._replace(device="xpu"))
    gpu((9, 0), (7, 5))
    reason = triton.unsupported("fprop", PLAIN)
    assert "cuda:1" in reason and "7.5" in reason and "8.0" in reason


def test_without_triton_the_reason_says_how_to_get_it(gpu, monkeypatch):
    gpu((9, 0))
    monkeypatch.setattr(triton, "_missing", lambda: "triton is not installed (pip install triton)")
    assert triton.unsupported("fprop", PLAIN) == "triton is not installed (pip install triton)"


@pytest.fixture
def tf32(monkeypatch):
    """Sets the two flags and puts them back."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    def set_to(matmul, cudnn):
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn

    yield set_to
    set_to(*before)


def test_tf32_only_where_both_flags_allow_it(tf32, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    full = PLAIN._replace(dtype=torch.float32)
    for matmul, cudnn, want in ((0, 0, "tf32x3"), (0, 1, "tf32x3"), (1, 0, "tf32x3"), (1, 1, "tf32")):
        tf32(bool(matmul), bool(cudnn))
        assert triton.dot_precision(full, 0) == want
        assert triton.dot_precision(PLAIN, 0) == "ieee"
        with precision("direct"):
            assert triton.dot_precision(full, 0) == "ieee"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    tf32(False, True)
    assert triton.dot_precision(full, 0) == "bf16x6"


@pytest.mark.parametrize(
    "capability, name",
    [
        ((8, 0), "sm_80"),
        ((8, 6), "sm_86"),
        ((8, 9), "sm_86"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_90"),
        ((12, 0), "sm_86"),
    ],
)
def test_capabilities_have_the_shared_memory_of_their_chips(capability, name):
    arch = configs.arch_of(capability, 77)
    assert (arch.name, arch.sms) == (name, 77)


def every_problem():
    for width in WIDTHS:
        for op in ("fprop", "dgrad", "wgrad"):
            for n in (1, 8, 128, 4096):
                for dtype in DTYPES:
                    for image, stride in ((32, 1), (32, 2), (8, 1), (7, 1)):
                        yield op, SOURCE._replace(C=width, K=width, N=n, H=image, W=image, stride=stride, dtype=dtype)


@pytest.mark.parametrize("arch", ARCHS.values(), ids=ARCHS)
def test_the_rule_gives_legal_tiles_everywhere(arch):
    for op, problem in every_problem():
        reason = configs.illegal(configs.heuristic(op, problem, arch), op, problem, arch)
        assert reason is None, f"{op} {problem}: {reason}"


@pytest.mark.parametrize(
    "width, cols", [(160, (128, 32)), (320, (256, 64)), (640, (256, 64)), (64, (64, 0)), (16, (16, 0))]
)
def test_columns_are_exact_on_hopper(width, cols):
    problem = SOURCE._replace(C=width, K=width, N=512)
    assert configs.heuristic("fprop", problem, ARCHS["sm_90"]).cols == cols
    assert width % sum(cols) == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", [ARCHS[name] for name in ("sm_80", "sm_86", "sm_90", "gfx942")], ids=lambda a: a.name)
def test_wide_networks_waste_no_column_at_any_batch(arch, dtype):
    """Tiles shrink where a batch is too small to fill the GPU, by widths that divide these."""
    for width, image in ((160, 32), (320, 16), (640, 8)):
        for n in (*range(1, 33), 48, 64, 96, 128, 256, 512, 1024):
            for op in ("fprop", "dgrad", "wgrad"):
                problem = SOURCE._replace(C=width, K=width, N=n, H=image, W=image, dtype=dtype, w_dtype=dtype)
                config = configs.heuristic(op, problem, arch)
                assert width % config.width == 0, (op, width, n, config)


def test_small_batches_get_smaller_tiles():
    big, small = (configs.heuristic("fprop", PLAIN._replace(N=n), ARCHS["sm_90"]) for n in (128, 1))
    assert (big.rows, big.width) == (128, 160)
    tiles = lambda c, n: -(-n * 1024 // c.rows) * -(-160 // c.width)
    assert tiles(small, 1) > tiles(big, 1)


def test_the_apply_pass_stands_in_where_the_loop_would_starve():
    rule = lambda k, **parts: configs.heuristic("fprop", SOURCE._replace(C=k, K=k, **parts), ARCHS["sm_90"]).apply
    assert rule(160) and not rule(320) and not rule(64)
    assert not rule(160, R=1, S=1) and not rule(160, prologue=False, affine=False, act="identity")


@pytest.mark.parametrize(
    "change, word",
    [({"rows": 96}, "rows"), ({"red": 8}, "red"), ({"cols": (128, 8)}, "cols[1]"), ({"warps": 3}, "warps"),
     ({"stages": 9}, "stages"), ({"splits": 2}, "splits"), ({"rows": 256, "cols": (256, 64)}, "rows"),
     ({"red": 128, "stages": 8}, "stages")],
)  # fmt: skip
def test_illegal_tiles_are_named(change, word):
    config = dataclasses.replace(TileConfig(128, 64, (128, 32), 8, 3), **change)
    assert f"`{word}`" in configs.illegal(config, "fprop", PLAIN, ARCHS["sm_90"])


@pytest.mark.parametrize("op", ["fprop", "dgrad", "wgrad"])
def test_variations_are_legal_and_differ_in_the_knob(op):
    arch = ARCHS["sm_90"]
    config = configs.heuristic(op, SOURCE, arch)
    found = [c for knob in configs.KNOBS for c in configs.variations(knob, config, op, SOURCE, arch)]
    assert len(found) > 8 and len(set(found)) == len(found)
    assert all(configs.legal(c, op, SOURCE, arch) and c != config for c in found)


def test_a_tuned_row_goes_before_the_rule_and_an_illegal_one_is_left_out(monkeypatch):
    tile = {"rows": 64, "red": 32, "cols": [32, 16], "warps": 4, "stages": 1, "apply": False, "splits": 1, "box": False}
    monkeypatch.setattr(tuned, "lookup", lambda *args: tile)
    triton.config.cache_clear()
    assert triton.config("fprop", PLAIN, None) == configs.from_row(tile)
    tile["rows"] = 63
    triton.config.cache_clear()
    with pytest.warns(UserWarning, match="rows"):
        assert triton.config("fprop", PLAIN, None) == configs.heuristic("fprop", PLAIN, ARCHS["interpreter"])
    triton.config.cache_clear()
