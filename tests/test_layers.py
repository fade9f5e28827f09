"""Who may import whom: the layers of the package, what `import wrn_fast` loads, where a device may be asked about."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "wrn_fast"

# A module may import lower layers; `SIDEWAYS` are the only steps inside a layer, `NARROW` are tighter than the rule.
LAYERS = {
    0: {
        "errors",
        "checks",
        "masks",
        "measured",
        "problem",
        "tuned",
        "precision",
        "random",
        "scales",
        "setting",
        "steps",
        "cache",
        "_build",
        "machine",
    },
    1: {"kernels", "packing", "held", "native"},
    2: {"backends"},
    3: {"dispatch"},
    4: {"ops", "autograd", "autograd_head"},
    5: {"functional", "activated", "chain"},
    6: {"reference", "block", "model", "convert", "parity", "mc", "graphs", "fp8"},
    7: {"tune", "tune_cpu", "verify", "cli", "demo", "recipes"},
}
SIDEWAYS = {
    "checks": {"errors", "masks", "problem"},
    "problem": {"errors"},
    "scales": {"errors"},
    "precision": {"errors", "setting"},
    "steps": {"problem"},
    "held": {"packing"},
    "chain": {"activated"},
    "autograd": {"ops"},
    "autograd_head": {"autograd", "ops"},
    "cache": {"errors"},
    "tuned": {"errors", "problem", "cache"},
    "measured": {"errors", "problem", "cache", "machine"},
    "tune_cpu": {"tune"},
    "random": {"errors"},
    "model": {"block", "reference"},
    "convert": {"block", "model", "reference", "parity"},
    "parity": {"reference"},
    "fp8": {"parity"},
    "mc": {"block", "model", "convert", "reference"},
    "verify": set(),
    "cli": {"tune", "tune_cpu", "verify"},
    "demo": {"cli"},
    "recipes": {"demo"},
}
NARROW = {"reference": {"errors"}, "kernels": LAYERS[0] | {"packing", "held"}, "dispatch": LAYERS[0] | {"backends"}}

# Third-party modules beside torch, and who may import them (at any depth, also inside functions).
OUTSIDERS = {
    "triton": {"kernels", "backends"},
    "rich": {"cli", "tune", "tune_cpu", "demo", "verify", "mc", "recipes"},
    "numpy": {"demo", "convert"},
    "matplotlib": {"demo"},
    "sklearn": {"demo"},
    "scipy": {"demo"},
}
MAY_ASK_THE_DEVICE = {"backends", "cli", "native"}


def module_files():
    return sorted(path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts)


def room(path):
    """The module or folder directly under wrn_fast that a file belongs to."""
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def layer_of(name):
    for number, rooms in LAYERS.items():
        if name in rooms:
            return number
    raise AssertionError(f"wrn_fast/{name} has no layer: add it to LAYERS in {Path(__file__).name}")


def imported(path):
    """Every (module, line) that a file imports, relative imports resolved."""
    parents = ["wrn_fast", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                deeper = module == "wrn_fast" and rooms_named(alias.name)
                yield (f"{module}.{alias.name}" if deeper else module), node.lineno


def rooms_named(name):
    return (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file() or name in ("_cpu", "_cuda")


def inside(path):
    """The rooms of wrn_fast that a file imports."""
    for module, line in imported(path):
        if module == "wrn_fast":
            yield "__init__", line
        elif module.startswith("wrn_fast."):
            yield module.split(".")[1], line


@pytest.mark.parametrize("path", module_files(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_go_down(path):
    here = room(path)
    if here in ("__init__", "__main__"):
        return
    allowed = {name for number, rooms in LAYERS.items() if number < layer_of(here) for name in rooms}
    allowed = NARROW.get(here, allowed) | SIDEWAYS.get(here, set()) | {here}
    if here == "backends":
        allowed |= {"_cpu", "_cuda"}
    if here == "native":
        allowed |= {"_cpu"}
    if layer_of(here) == 7:
        allowed |= {"__init__"}
    for name, line in inside(path):
        assert name in allowed, f"{path.name}:{line}: {here} (layer {layer_of(here)}) may not import {name}"


def test_backends_do_not_know_each_other():
    for path in (PACKAGE / "backends").glob("*.py"):
        for module, line in imported(path):
            match = re.fullmatch(r"wrn_fast\.backends\.(\w+)", module)
            assert path.stem == "__init__" or not match, f"backends/{path.name}:{line} imports {module}"


@pytest.mark.parametrize("path", module_files(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_third_party_imports(path):
    for module, line in imported(path):
        top = module.split(".")[0]
        if top in ("torch", "wrn_fast", "__future__") or top in sys.stdlib_module_names:
            continue
        assert room(path) in OUTSIDERS.get(top, set()), f"{path.name}:{line}: {room(path)} may not import {top}"


def test_only_backends_and_the_command_line_ask_about_devices():
    for path in module_files():
        if room(path) in MAY_ASK_THE_DEVICE:
            continue
        text = path.read_text(encoding="utf-8")
        for word in ("is_cuda", "get_device_capability"):
            assert not re.search(rf"\b{word}\b", text), f"{path.name} says {word}"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Try):
                tried = [
                    n.lineno for s in node.body for n in ast.walk(s) if isinstance(n, (ast.Import, ast.ImportFrom))
                ]
                assert not tried, f"{path.name}:{tried[0]}: an import is tried"


def run_python(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_loads_torch_and_nothing_heavy_else():
    loaded = run_python(
        "import sys, torch\nbefore = set(sys.modules)\nimport wrn_fast\nprint(*sorted(set(sys.modules) - before))"
    ).split()
    heavy = {"torch._dynamo", "torch._inductor", "torch.onnx", "torch.distributed", "torch.testing"}
    for name in loaded:
        top = name.split(".")[0]
        assert top in ("torch", "wrn_fast") or top in sys.stdlib_module_names, f"import wrn_fast loads {name}"
        assert name not in heavy, f"import wrn_fast loads {name}"
        assert name not in ("wrn_fast._cpu", "wrn_fast._cuda", "wrn_fast.backends.triton", "wrn_fast.kernels"), name


@pytest.mark.native
def test_the_extension_leaves_the_floating_point_mode_alone():
    """After import and after calls. A library linked with -ffast-math flushes denormals in the whole process.

    stmxcsr [rdi]; ret reads the mode.
    """
    import platform

    if platform.machine() != "x86_64":
        pytest.skip("MXCSR is a register of x86-64")
    before, after = run_python(
        "import ctypes, mmap, torch\n"
        "page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)\n"
        "page.write(bytes.fromhex('0fae1fc3'))\n"
        "address = ctypes.addressof(ctypes.c_char.from_buffer(page))\n"
        "stmxcsr = ctypes.CFUNCTYPE(None, ctypes.POINTER(ctypes.c_uint32))(address)\n"
        "def mode():\n"
        "    value = ctypes.c_uint32()\n"
        "    stmxcsr(ctypes.byref(value))\n"
        "    return value.value & ~0x3F  # without the sticky exception flags\n"
        "before = mode()\n"
        "import wrn_fast\n"
        "x, w = torch.randn(2, 16, 9, 9, requires_grad=True), torch.randn(20, 16, 3, 3, requires_grad=True)\n"
        "y = wrn_fast.bn_act_conv(x, w, wrn_fast.channel_stats(x), batch_stats=True, p=0.5).y\n"
        "torch.autograd.grad(y.sum(), [x, w])\n"
        "assert torch.tensor(1e-40).mul(0.5) > 0\n"
        "print(before, mode())"
    ).split()
    assert before == after
