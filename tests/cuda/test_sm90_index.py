"""The index header of the Hopper kernels against brute force, in C++: index_check.cpp and index_check_plan.cpp."""

import shutil
import subprocess

import pytest
from cuda import host_run


def run(folder, csrc):
    program = folder / "index_check"
    include = [f"-I{csrc}", f"-I{host_run.STUB}"]
    sources = [str(host_run.HERE / name) for name in ("index_check.cpp", "index_check_plan.cpp")]
    command = [host_run.compiler(), "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", *include, *sources]
    built = subprocess.run([*command, "-o", str(program)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-4000:]
    return subprocess.run([str(program)], capture_output=True, text=True)


def test_every_index_agrees_with_brute_force(tmp_path):
    result = run(tmp_path, host_run.CSRC)
    assert result.returncode == 0, result.stdout
    assert int(result.stdout.split()[0]) > 10_000_000


@pytest.mark.rotate(2)
@pytest.mark.parametrize(
    "right, wrong",
    [
        ("address >> 7", "address >> 8"),
        ("16 * warp + lane / 4", "16 * warp + lane / 8"),
        ("-1};\n}\nSM90_HD int tap_of", "1};\n}\nSM90_HD int tap_of"),
        ("(65536 / height + 1)", "(65536 / height)"),
        ("s.classes - 1 - t / per_class", "t / per_class"),
        ("(static_cast<int64_t>(at.n) * e.P + at.p)", "static_cast<int64_t>(at.n * e.P + at.p)"),
        ("row * mask_words(block_k) + channel / 32", "row * (block_k / 32) + channel / 32"),
        ("(lane & 15), 16 * pair", "(lane & 7), 16 * pair"),
    ],
)
def test_a_wrong_index_is_found(tmp_path, right, wrong):
    shutil.copytree(host_run.CSRC.parent, tmp_path / "csrc")
    header = tmp_path / "csrc" / "cuda" / "sm90_index.h"
    text = header.read_text()
    assert text.count(right) == 1, right
    header.write_text(text.replace(right, wrong))
    assert run(tmp_path, tmp_path / "csrc" / "cuda").returncode == 1
