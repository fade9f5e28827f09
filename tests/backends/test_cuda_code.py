"""What nvcc makes of the memory-bound kernels: no spills, no local memory, 16-byte accesses. Needs nvcc, no GPU."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from backends.cuda_on_cpu import CUDA, ROOT

from benchmarks.battery import hopper
from faults.native import setup_constant

# Two blocks of 256 threads a multiprocessor: fewer cannot keep enough loads in flight.
MOST_REGISTERS = 128
FILES = ("common_stats", "common_passes", "common_pack", "common_fold", "common_head", "common_head_bwd", "common_fp8")
# Kernels that read or write rows of channels, by what they are called; of these the ones that only read; and the ones
# that have vectors though no template argument says so.
READING = ("ChannelStats", "ClassifyImage", "HeadSums", "FilterScales")
STREAMING = (*READING, "HeadGradient", "Apply", "BnBackward", "ActBackward", "PackFilters", "Quantize")
ALWAYS = STREAMING[-2:]


def tool(name):
    """A program of the CUDA toolkit: on PATH, under CUDA_HOME, or the one that Triton brings."""
    spec = importlib.util.find_spec("triton")
    folders = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"]
    if spec and spec.origin:
        folders.append(Path(spec.origin).parent / "backends" / "nvidia" / "bin")
    found = shutil.which(name) or next((str(f / name) for f in folders if (f / name).is_file()), None)
    if found is None:
        pytest.skip(f"{name} is not here")
    return found


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module", params=FILES)
def compiled(request, tmp_path_factory):
    """(ptxas's report, SASS, name) of one file for sm_90a."""
    cubin = tmp_path_factory.mktemp("cubin") / f"{request.param}.cubin"
    source = CUDA / f"{request.param}.cu"
    flags = [*setup_constant("CUDA_FLAGS"), *setup_constant("GENCODE_SM90"), "-Xptxas", "-v", f"-I{ROOT / 'csrc'}"]
    report = run(tool("nvcc"), *flags, "-cubin", str(source), "-o", str(cubin))
    return report, run(tool("cuobjdump"), "-sass", str(cubin)), request.param


def kernels(report):
    """(name, its lines) of each kernel in ptxas's report."""
    parts = re.split(r"Compiling entry function '(\S+)'", report)
    return list(zip(parts[1::2], parts[2::2], strict=True))


def test_no_spills_and_few_registers(compiled):
    found = kernels(compiled[0])
    assert found
    for name, lines in found:
        assert re.search(r"\b0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", lines), name
        assert int(re.search(r"Used (\d+) registers", lines).group(1)) <= MOST_REGISTERS, name


def test_no_local_memory_and_accesses_of_16_bytes(compiled):
    """A kernel of vectors (its last template argument but flags is above 1, or `ALWAYS`) moves 16 bytes at a time."""
    functions = re.split(r"Function : (\S+)", compiled[1])
    found = dict(zip(functions[1::2], functions[2::2], strict=True))
    assert len(found) == len(kernels(compiled[0]))
    seen = 0
    for name, sass in found.items():
        assert not re.search(r"\b(LDL|STL)\b", sass), name
        streaming = next((kind for kind in STREAMING if kind in name), None)
        width = re.search(r"Li(\d+)E", name)
        if streaming is None or (streaming not in ALWAYS and (width is None or width.group(1) == "1")):
            continue
        seen += 1
        assert re.search(r"\bLDG\.E\.128\b", sass), name
        if streaming not in READING:
            assert re.search(r"\bSTG\.E\.128\b", sass), name
    assert bool(seen) == (compiled[2] != "common_fold")


def test_denormals_are_kept(compiled):
    """Inside of square roots and divisions, which scale before, CUDA's own code may flush; a product and a sum not."""
    assert not re.search(r"\bFFMA\S*\.FTZ", compiled[1])


def test_the_experiments_for_hopper_compile_to_what_they_ask(tmp_path):
    """Straight-line products, no spills, one product of each kind, shared fetches: else they would not measure that."""
    tool("nvcc")
    program = tmp_path / "hopper"
    report = run(*hopper.compile_command(program), "-Xptxas", "-v")
    assert "C75" not in report and set(re.findall(r"(\d+) bytes spill stores", report)) == {"0"}
    functions = re.split(r"Function : (\S+)", run(tool("cuobjdump"), "-sass", str(program)))
    found = dict(zip(functions[1::2], functions[2::2], strict=True))
    products = [re.findall(r"\b([HQ]GMMA\S*) \S+ (gdesc\S+)", sass) for name, sass in found.items() if "once" in name]
    kinds = sorted((name, "tnspA.tnspB" in operands) for ((name, operands),) in products)
    assert kinds == [
        ("HGMMA.64x160x16.F32", False), ("HGMMA.64x160x16.F32.BF16", False), ("HGMMA.64x160x16.F32.BF16", True),
        ("QGMMA.64x160x32.F32.E4M3.E4M3", False),
    ]  # fmt: skip
    shared = {"MULTICAST" in sass for name, sass in found.items() if "box_pair" in name}
    alone = {"MULTICAST" in sass for name, sass in found.items() if "box_loop" in name}
    assert (shared, alone) == ({True}, {False})
    loop = next(sass for name, sass in found.items() if "supply" in name)
    assert len(re.findall("HGMMA", loop)) % 8 == 0 and not re.search(r"\b(LDL|STL)\b", loop)
