"""What the shipped kernels compile to, with no GPU: every row of aot.json, and a few of them compiled anew each run."""

import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import pytest
from kernels import aot

from wrn_fast.kernels.configs import ARCHS

TABLE = json.loads(aot.TABLE.read_text(encoding="utf-8"))
# Of the instructions in a main loop: with the Triton that the table is of, and with another.
SLACK, SLACK_OTHER = 1.05, 1.25
# Bytes. The widest tile, 128 x 320, lets values of its epilogue go to memory, once a tile; with a shortcut two others.
MAY_SPILL = 360
MAY_SPILL_TOO = {"sm_80 fp32 n128 160-320 conv2": 8, "sm_90 bf16 n128 32-64 conv2": 16}


@pytest.fixture(scope="session")
def compiler(tmp_path_factory):
    """A process whose triton compiles and does not interpret, with a cache of its own."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    changed = {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "TRITON_INTERPRET": ""}
    before = {name: os.environ.get(name) for name in changed}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        os.environ.update(changed)
        try:
            pool.submit(int).result()
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
        yield lambda function, *args: pool.submit(function, *args).result()


def rows():
    for name, kernels in TABLE["rows"].items():
        for row in kernels:
            yield name, row


def test_the_table_has_exactly_the_shipped_cases():
    assert set(TABLE["rows"]) == set(aot.cases())


def test_nothing_spills_beyond_what_is_written():
    for name, row in rows():
        wide = "m64n256k16" in row["tensor"]
        assert row["spilled"] <= (MAY_SPILL if wide else MAY_SPILL_TOO.get(name, 0)), (name, row)


def test_shared_memory_fits_the_chip():
    for name, row in rows():
        assert row["smem"] <= ARCHS[name.split()[0]].smem_bytes, (name, row)


def test_two_byte_loads_only_where_a_row_is_too_short_for_others():
    for name, row in rows():
        short = name.split()[3] == "3-16" or name.startswith("gfx942 bf16 n128 16 ")
        assert row["narrow"] == 0 or short, (name, row)


def test_every_convolution_uses_tensor_instructions():
    for name, kernels in TABLE["rows"].items():
        # At stride 2 three of the four classes of a 1x1 dgrad meet no tap.
        convolutions = [row for row in kernels if row["kernel"] in ("conv_kernel", "wgrad_kernel")]
        assert not convolutions or any(row["tensor"] for row in convolutions), name


@pytest.mark.parametrize(
    "width, columns", [("160", {"n128", "n32"}), ("320", {"n256", "n64"}), ("640", {"n256", "n64"})]
)
def test_hopper_multiplies_exact_widths(width, columns):
    (row,) = [r for r in TABLE["rows"][f"sm_90 bf16 n128 {width} eval"] if r["kernel"] == "conv_kernel"]
    assert {shape[3:].split("k")[0] for shape in row["tensor"]} == columns
    assert len(set(row["tensor"].values())) == 1


# Instructions issued a clock of the tensor cores in the main loop, at most: what is written in TRITON.md's terms as
# "issue". Beyond 1 the tensor cores must starve, near 0.7 they may.
ISSUE = {
    "sm_90 bf16 n128 160 conv1": 0.70, "sm_90 bf16 n128 160 eval": 0.70, "sm_90 bf16 n128 160 dgrad": 0.72,
    "sm_90 bf16 n128 160 wgrad": 0.78, "sm_90 bf16 n128 320 conv1": 0.65, "sm_90 bf16 n128 320 eval": 0.30,
    "sm_90 bf16 n128 320 dgrad": 0.50, "sm_90 bf16 n128 320 wgrad": 0.82, "sm_90 bf16 n128 640 eval": 0.30,
    "sm_90 bf16 n128 640 wgrad": 0.62,
    "sm_80 bf16 n128 160 conv1": 0.50, "sm_80 bf16 n128 160 dgrad": 0.60, "sm_80 bf16 n128 160 wgrad": 0.60,
}  # fmt: skip


@pytest.mark.parametrize("name", ISSUE)
def test_the_tensor_cores_are_fed(name):
    (issue,) = [row["issue"] for row in TABLE["rows"][name] if "issue" in row]
    assert issue <= ISSUE[name]


@pytest.mark.rotate(20)
@pytest.mark.parametrize("name", sorted(TABLE["rows"]))
def test_compiling_gives_the_written_numbers(compiler, name):
    """At most 60 compiles a run: three kernels a case. Another Triton than the table's may unroll and spill more."""
    written = TABLE["rows"][name]
    found = compiler(aot.compiled, aot.cases()[name])
    assert [row["kernel"] for row in found] == [row["kernel"] for row in written]
    same = importlib.metadata.version("triton") == TABLE["triton"]
    for now, then in zip(found, written):
        assert now["spilled"] <= (then["spilled"] if same else MAY_SPILL), (now, then)
        assert now["narrow"] <= then["narrow"], (now, then)
        assert now["smem"] <= (then["smem"] if same else ARCHS[name.split()[0]].smem_bytes), (now, then)
        assert now["tensor"].keys() == then["tensor"].keys(), (now, then)
        assert now["tensor"] == then["tensor"] or not same, (now, then)
        assert now.get("issue", 0.0) <= (SLACK if same else SLACK_OTHER) * then.get("issue", 0.0), (now, then)
