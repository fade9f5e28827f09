"""Planting one fault in a copy of the checkout, and running the tests that must notice."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults import native
from faults.catalogue import Cell, patch_of
from faults.patch import Patch

COPIED = ("wrn_fast", "tests", "csrc", "faults", "benchmarks")
FILES = ("pyproject.toml", "setup.py", "README.md")
# What tests/backends/cuda_on_cpu.py has compiled, by its hash.
BUILT = Path("build", "cuda_on_cpu")
# A patch that does not run proves nothing about the tests.
BROKEN = re.compile(r"- (Syntax|Indentation|Name|UnboundLocal|Import|ModuleNotFound|Attribute)Error\b")
LIMIT_SECONDS = 400

CAUGHT = "caught"
SURVIVED = "survived"
BROKEN_PATCH = "broken patch"
SKIPPED = "skipped"


@dataclass(frozen=True)
class Outcome:
    """What became of one fault in one backend."""

    cell: Cell
    state: str
    by: str
    seconds: float

    @property
    def ok(self) -> bool:
        """Did a test notice, or can none of them run on this machine?"""
        return self.state in (CAUGHT, SKIPPED)


class Copy:
    """A copy of the checkout in a temporary folder, unfaulted between two calls of `plant`."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="wrn_fast-faults-")
        self.root = Path(self.folder.name)
        ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.png", "results")
        for name in COPIED:
            shutil.copytree(native.ROOT / name, self.root / name, ignore=ignore)
        for name in FILES:
            shutil.copy(native.ROOT / name, self.root / name)
        if (native.ROOT / BUILT).is_dir():
            shutil.copytree(native.ROOT / BUILT, self.root / BUILT, ignore=shutil.ignore_patterns("*.part"))
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "WRN_FAST_"))}
        # pytest cuts its summary, and with it the kind of an error, to the width of a terminal.
        environment["COLUMNS"] = "400"
        self.server = subprocess.Popen(
            [sys.executable, "faults/server.py"], cwd=self.root, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def __enter__(self) -> Copy:
        return self

    def __exit__(self, *_: Any) -> None:
        self.server.communicate()
        self.folder.cleanup()

    def link(self, patch: Patch | None = None) -> None:
        """The extension of the copy: the sources that `patch` touches are compiled again."""
        objects = native.objects()
        changed = () if patch is None else patch.recompile or (Path(patch.file).name,)
        for name in changed:
            objects[name] = self.root / f"{Path(name).stem}.o"
            native.compile_source(self.root / "csrc" / "cpu" / name, objects[name])
        native.link(objects.values(), self.root / "wrn_fast" / native.LIBRARY)

    def plant(self, cell: Cell, seed: int, patch: Patch | None = None) -> Outcome:
        """Plants the fault of the cell (or `patch` in its place), runs its check, takes it out again."""
        patch = patch or patch_of(cell)
        begin = time.monotonic()
        text = patch.apply(self.root)
        try:
            if cell.backend == "cpu":
                self.link(patch if patch.file.startswith("csrc") else None)
            self.forget(patch.file)
            state, by = self.check(cell, patch, seed)
        finally:
            (self.root / patch.file).write_text(text, encoding="utf-8")
            self.forget(patch.file)
        return Outcome(cell, state, by, time.monotonic() - begin)

    def forget(self, file: str) -> None:
        """Compiled Python is told from old by seconds, and a fault may be gone within one."""
        path = self.root / file
        for compiled in path.parent.glob(f"__pycache__/{path.stem}.*"):
            compiled.unlink()

    def check(self, cell: Cell, patch: Patch, seed: int) -> tuple[str, str]:
        """(state, the test that noticed or what went wrong)."""
        status, said = self.pytest(cell.backend, seed, patch.check.file, "-k", patch.check.select)
        failed = re.search(r"^FAILED (\S+::.*)$", said, re.MULTILINE)
        if status == 1 and failed and not BROKEN.search(failed[0]):
            return CAUGHT, failed[1].split(" - ")[0]
        if status < 0:
            return CAUGHT, f"a crash in {patch.check.file}"
        skipped = re.search(r"^SKIPPED \[\d+\] \S+: (.*)$", said, re.MULTILINE)
        if status == 0 and skipped and not re.search(r"\d passed", said):
            return SKIPPED, skipped[1]
        if status == 0:
            return SURVIVED, f"{patch.check.file} -k '{patch.check.select}'"
        return BROKEN_PATCH, said[-2000:]

    def pytest(self, backend: str, seed: int, *arguments: str) -> tuple[int, str]:
        """pytest in the copy, on the code of the copy, until the first failure: its status and what it said."""
        log = self.root / "pytest.log"
        options = ["-q", "-x", "--tb=line", "-p", "no:cacheprovider", "--seed", str(seed), "--all-cases"]
        request = {
            "arguments": [*options, *arguments],
            "environment": {"WRN_FAST_ISA": "portable"} if backend == "cpu" else {},
            "log": str(log), "seconds": LIMIT_SECONDS,
        }  # fmt: skip
        assert self.server.stdin is not None and self.server.stdout is not None
        print(json.dumps(request), file=self.server.stdin, flush=True)
        return int(self.server.stdout.readline()), log.read_text(encoding="utf-8", errors="replace")
