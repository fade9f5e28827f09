"""Planting one fault in a copy of the checkout, and running the tests that must notice."""

from __future__ import annotations

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
# A patch that does not run proves nothing about the tests.
BROKEN = re.compile(r"- (Syntax|Indentation|Name|UnboundLocal|Import|ModuleNotFound|Attribute)Error\b")
LIMIT_SECONDS = 240

CAUGHT = "caught"
SURVIVED = "survived"
BROKEN_PATCH = "broken patch"


@dataclass(frozen=True)
class Outcome:
    """What became of one fault in one backend."""

    cell: Cell
    state: str
    by: str
    seconds: float

    @property
    def ok(self) -> bool:
        """Did a test notice?"""
        return self.state == CAUGHT


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

    def __enter__(self) -> Copy:
        return self

    def __exit__(self, *_: Any) -> None:
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
        done = self.pytest(cell.backend, seed, patch.check.file, "-k", patch.check.select)
        failed = re.search(r"^FAILED (\S+::.*)$", done.stdout, re.MULTILINE)
        text = failed[1] if failed else done.stdout[-2000:] + done.stderr[-2000:]
        if done.returncode == 1 and failed and not BROKEN.search(failed[0]):
            return CAUGHT, text.split(" - ")[0]
        if done.returncode < 0:
            return CAUGHT, f"a crash in {patch.check.file}"
        if done.returncode == 0:
            return SURVIVED, f"{patch.check.file} -k '{patch.check.select}'"
        return BROKEN_PATCH, text

    def pytest(self, backend: str, seed: int, *arguments: str) -> subprocess.CompletedProcess[str]:
        """pytest in the copy, on the code of the copy, until the first failure."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "WRN_FAST_"))}
        environment |= {"WRN_FAST_ISA": "portable"} if backend == "cpu" else {}
        command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=line", "-p", "no:cacheprovider"]
        command += ["--seed", str(seed), "--all-cases", *arguments]
        try:
            return subprocess.run(
                command, cwd=self.root, env=environment, capture_output=True, text=True, errors="replace",
                timeout=LIMIT_SECONDS,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            return subprocess.CompletedProcess(command, 124, str(error.stdout), str(error.stderr))
