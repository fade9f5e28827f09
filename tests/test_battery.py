"""The GPU battery: its store and time limit on steps of our own, and every stage in a dry run on this CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import battery, gpu_battery

ROOT = Path(__file__).parents[1]
HEAD = {"gpu": "GPU", "cpu": "CPU", "versions": "1", "commit": "abc", "date": "today", "dry run": "True"}


@pytest.fixture
def stage(monkeypatch, tmp_path):
    """Runs the battery over given steps; what they did is in the report that it returns."""
    monkeypatch.setattr(gpu_battery, "head", lambda dry: dict(HEAD))
    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", ""))
    path = tmp_path / "battery.json"

    def run(steps, *words):
        monkeypatch.setattr(gpu_battery, "steps_of", lambda stage, dry: steps)
        status = gpu_battery.main(["--stage", "tune", "--dry-run", "--json", str(path), *words])
        return status, json.loads(path.read_text())["stages"].get("tune", {}) if path.exists() else {}

    run.path = path
    return run


def ok(text="fine"):
    return lambda seconds: battery.result("ok", text)


def never(seconds):
    raise AssertionError("a step ran again")


def test_steps_are_kept_and_failed_ones_run_again(stage):
    def broken(seconds):
        raise ValueError("out of luck\nmore")

    status, found = stage({"a": ok(), "b": broken})
    assert status == 1 and found["a"]["status"] == "ok"
    assert (found["b"]["status"], found["b"]["text"]) == ("failed", "ValueError: out of luck")
    status, found = stage({"a": never, "b": ok("at last")})
    assert status == 0 and found["b"]["text"] == "at last"
    assert stage({"a": never, "b": never})[0] == 0
    assert stage({"a": never}, "--again")[0] == 1


def test_a_step_that_is_not_run_is_no_failure(stage):
    assert stage({"a": lambda seconds: battery.result("not run", "no tool")})[0] == 0


def test_the_time_limit_leaves_steps_for_another_run(stage):
    status, found = stage({"a": ok(), "b": ok()}, "--limit", "0")
    assert status == 3 and found == {}
    assert stage({"a": ok(), "b": ok()})[0] == 0


@pytest.mark.parametrize("damage", [lambda text: text[: len(text) // 2], lambda text: "[]", lambda text: "",
                                    lambda text: text.replace('"abc"', '"another commit"')])  # fmt: skip
def test_a_damaged_report_or_one_of_other_code_is_begun_anew(stage, damage):
    stage({"a": ok("old")})
    stage.path.write_text(damage(stage.path.read_text()))
    assert stage({"a": ok("new")})[1]["a"]["text"] == "new"


def test_a_process_that_fails_or_hangs_is_a_failure():
    assert battery.python(["-c", "print('well')"], 60)["status"] == "ok"
    assert battery.python(["-c", "import sys; sys.exit('bad')"], 60)["text"] == "bad"
    assert "not finished" in battery.python(["-c", "import time; time.sleep(60)"], 1)["text"]


def test_without_a_gpu_the_battery_says_so():
    words = [sys.executable, "-m", "benchmarks.gpu_battery", "--stage", "parity"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment())
    assert done.returncode == 2 and "--dry-run" in done.stderr


def environment():
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("stage_name", gpu_battery.STAGES)
def test_dry_run(stage_name, tmp_path):
    if stage_name in ("sanitize", "tune", "parity"):
        pytest.importorskip("triton")
    path = tmp_path / "battery.json"
    words = [sys.executable, "-m", "benchmarks.gpu_battery", "--stage", stage_name, "--dry-run", "--json", str(path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=540, env=environment())
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(path.read_text())
    assert report["head"]["dry run"] == "True" and "torch" in report["head"]["versions"]
    results = report["stages"][stage_name]
    assert results and all(step["status"] == "ok" for step in results.values())
    assert all(name[:30] in done.stdout for name in results)
