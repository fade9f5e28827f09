"""The Hopper kernels as ptxas makes them for sm_90a: no spill, nothing serialised, the matrix instructions counted."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from cuda import host_run

from faults.native import setup_constant

# (block_k, tile, 64-row blocks a warpgroup, filter rows a fetch serves): SM90_FETCH9 and SM90_SHIFT3 of sm90_plan.h.
CONV = [(k, 1, 1) for k in (16, 32, 48, 64, 80, 96, 128, 160)] + [(k, 2, 3) for k in (64, 128, 160)]
WGRAD = [(k, halo) for k in (16, 32, 48, 64, 80, 96, 128, 160) for halo in (True, False)]
DTYPES = {"BF16": "false", "F16": "true"}
# Batches of 1 to 4 steps of 16 channels.
BATCHES = (1, 2, 3, 4)
CONSUMER_REGISTERS = {"conv": 216, "e4m3": 224, "wgrad": 152}


def nvcc():
    found = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if found is None:
        pytest.skip("needs nvcc")
    return found


def nvdisasm():
    """CUDA's, or the one that Triton brings."""
    found = shutil.which("nvdisasm")
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.origin:
        found = shutil.which(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"))
    if found is None:
        pytest.skip("needs nvdisasm")
    return found


def compiled(folder, header, params, threads, body):
    """(ptxas's log, instructions) of one kernel."""
    source, cubin = folder / "kernel.cu", folder / "kernel.cubin"
    source.write_text(
        f'#include "{header}"\nusing namespace wrn_fast::sm90;\n'
        f"__global__ void __launch_bounds__({threads}, 1) kernel(const __grid_constant__ {params}<CUtensorMap> p) {{\n"
        f"  {body}(p);\n}}\n"
    )
    flags = [*setup_constant("CUDA_FLAGS"), *setup_constant("GENCODE_SM90"), "-Xptxas", "-v", f"-I{host_run.CSRC}"]
    command = [nvcc(), *flags, "-cubin"]
    result = subprocess.run([*command, str(source), "-o", str(cubin)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    sass = subprocess.run([nvdisasm(), "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    return result.stderr, re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", sass)


def count(instructions, word):
    return sum(bool(re.search(rf"\b{word}", line)) for line in instructions)


def check(log, instructions, kind, shape, products, batches):
    """What the plan of registers and instructions promises; `shape`: of the only matrix instruction."""
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in log
    assert not re.search(r"C75\d\d", log), log
    assert not count(instructions, "(LDL|STL)")
    assert not count(instructions, r"FFMA\S*\.FTZ"), "denormals are flushed"
    assert count(instructions, "[HQ]GMMA") == count(instructions, re.escape(shape)) == products
    assert count(instructions, r"WARPGROUP\.ARRIVE") == count(instructions, r"[HQ]GMMA.*gsb0") == batches
    assert count(instructions, "USETMAXREG") == 2
    highest = max(int(r) for line in instructions for r in re.findall(r"\bR(\d+)\b", line))
    assert highest < CONSUMER_REGISTERS[kind]
    for name in ("UTMALDG", "SYNCS", *(("UTMASTG", "UBLKCP", "STSM") if kind != "wgrad" else ())):
        assert count(instructions, name), f"no {name}"


def check_conv(folder, dgrad, block_k, blocks, row_taps, dtype):
    traits = f"ConvTraits<{dgrad}, {block_k}, {blocks}, {row_taps}, {DTYPES[dtype]}>"
    log, instructions = compiled(folder, "sm90_conv.cuh", "ConvParams", "kThreads", f"conv_body<{traits}>")
    shape = f"HGMMA.64x{block_k}x16.F32" + (".BF16" if dtype == "BF16" else "")
    check(log, instructions, "conv", shape, blocks * sum(BATCHES), len(BATCHES))


def check_e4m3(folder, block_k, blocks, row_taps, dtype):
    traits = f"ConvTraits<false, {block_k}, {blocks}, {row_taps}, {DTYPES[dtype]}, true>"
    log, instructions = compiled(folder, "sm90_conv.cuh", "ConvParams", "kThreads", f"conv_body<{traits}>")
    shape = f"QGMMA.64x{block_k}x32.F32.E4M3.E4M3"
    # Once for each source.
    check(log, instructions, "e4m3", shape, 2 * blocks * sum(BATCHES), 2 * len(BATCHES))


def check_wgrad(folder, block_k, halo, dtype):
    traits = f"WgradTraits<{block_k}, {str(halo).lower()}, {DTYPES[dtype]}>"
    log, instructions = compiled(folder, "sm90_wgrad.cuh", "WgradParams", "kWgradThreads", f"wgrad_body<{traits}>")
    shape = f"HGMMA.64x{block_k}x16.F32" + (".BF16" if dtype == "BF16" else "")
    check(log, instructions, "wgrad", shape, 8, 1)
    assert all("tnspA.tnspB" in line for line in instructions if "HGMMA" in line)


@pytest.mark.parametrize("dgrad", ["false", "true"])
@pytest.mark.parametrize("kernel", [(160, 1, 1), (160, 2, 3)])
def test_the_widest_kernels_compile_to_the_plan(tmp_path, kernel, dgrad):
    check_conv(tmp_path, dgrad, *kernel, "BF16")


@pytest.mark.parametrize("kernel", [(160, 1, 1), (160, 2, 3)])
def test_the_widest_kernels_of_8_bits_compile_to_the_plan(tmp_path, kernel):
    check_e4m3(tmp_path, *kernel, "BF16")


@pytest.mark.parametrize("halo", [True, False])
def test_wgrad_compiles_to_the_plan(tmp_path, halo):
    check_wgrad(tmp_path, 160, halo, "BF16")


@pytest.mark.rotate(1)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dgrad", ["false", "true"])
@pytest.mark.parametrize("kernel", CONV)
def test_every_kernel_compiles_to_the_plan(tmp_path, kernel, dgrad, dtype):
    check_conv(tmp_path, dgrad, *kernel, dtype)


@pytest.mark.rotate(1)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", CONV)
def test_every_kernel_of_8_bits_compiles_to_the_plan(tmp_path, kernel, dtype):
    check_e4m3(tmp_path, *kernel, dtype)


@pytest.mark.rotate(1)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", WGRAD)
def test_every_wgrad_compiles_to_the_plan(tmp_path, kernel, dtype):
    check_wgrad(tmp_path, *kernel, dtype)
