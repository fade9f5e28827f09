"""The GPU battery: its store, limits and goals on steps of our own, every stage in a dry run on this CPU."""

import inspect
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import battery, gpu_battery
from benchmarks.battery import Goal, Step, layers, parity

ROOT = Path(__file__).parents[1]
HEAD = {"gpu": "GPU", "cpu": "CPU", "versions": "1", "commit": "abc", "date": "today", "dry run": "True"}


@pytest.fixture
def stage(monkeypatch, tmp_path):
    """Runs the battery over given steps; what they did is in the report that it returns."""
    monkeypatch.setattr(gpu_battery, "head", lambda dry: dict(HEAD))
    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", ""))
    path = tmp_path / "battery.json"

    def run(steps, *words):
        steps = {name: step if isinstance(step, Step) else Step(step, 1) for name, step in steps.items()}
        monkeypatch.setattr(gpu_battery, "steps_of", lambda stage, dry: steps)
        status = gpu_battery.main(["--stage", "chip", "--dry-run", "--json", str(path), *words])
        return status, json.loads(path.read_text())["stages"].get("chip", {}) if path.exists() else {}

    run.path = path
    return run


def ok(text="fine", **figures):
    return lambda seconds: battery.result("ok", text, **figures)


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


def test_a_step_that_is_not_run_is_no_failure_and_is_tried_again(stage):
    assert stage({"a": lambda seconds: battery.result("not run", "no tool")})[0] == 0
    assert stage({"a": ok("the tool is there")})[1]["a"]["text"] == "the tool is there"


def test_the_time_limit_leaves_steps_for_another_run(stage):
    status, found = stage({"a": ok(), "b": ok()}, "--limit", "0")
    assert status == 3 and found == {}
    assert stage({"a": ok(), "b": ok()})[0] == 0


def test_a_step_that_would_not_end_in_time_waits_unless_it_is_the_first(stage):
    long = Step(ok(), 1000)
    build = Step(ok(), 1, always=True)
    status, found = stage({"build": build, "a": ok(), "b": long, "c": ok()})
    assert status == 3 and set(found) == {"build", "a", "c"}
    status, found = stage({"build": build, "a": never, "b": long, "c": never})
    assert status == 0 and "b" in found


def test_the_log_goes_on_where_the_report_begins_anew(stage):
    stage({"a": ok("first | with a bar")})
    stage.path.write_text(stage.path.read_text().replace('"abc"', '"another commit"'))
    stage({"a": ok("second")})
    stage({"a": never})
    lines = stage.path.with_suffix(".md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| today")]
    assert len(rows) == 2 and all(line.count("|") == lines[2].count("|") for line in rows)
    assert "first / with a bar" in rows[0] and rows[1].startswith("| today | abc | chip | a | ok |")


def test_all_stages_together_may_have_a_limit(stage, monkeypatch):
    """The clock moves by 50 s whenever it is looked at."""
    clock = iter(range(0, 10**6, 50))
    monkeypatch.setattr(gpu_battery.time, "monotonic", lambda: next(clock))
    status, _ = stage({"a": Step(ok(), 90)}, "--stage", "all", "--within", "700")
    done = len(json.loads(stage.path.read_text())["stages"])
    assert status == 3 and 1 < done < len(gpu_battery.STAGES)
    stage({"a": Step(ok(), 90)}, "--stage", "all", "--within", "700")
    assert len(json.loads(stage.path.read_text())["stages"]) > done


class Restarted(Exception):
    """In the place of a new process."""


@pytest.fixture
def restarts(monkeypatch):
    """The words of each new process."""
    found = []

    def execv(program, words):
        assert program == words[0] == sys.executable and words[1:3] == ["-m", "benchmarks.gpu_battery"]
        found.append(gpu_battery.parse(words[3:]))
        raise Restarted

    monkeypatch.setattr(gpu_battery.os, "execv", execv)
    return found


def test_after_a_fatal_error_a_new_process_goes_on_behind_the_step(stage, monkeypatch, restarts):
    states = iter([True, False])
    monkeypatch.setattr(gpu_battery, "usable", lambda: next(states))
    with pytest.raises(Restarted):
        stage({"a": ok(), "b": lambda seconds: battery.result("failed", "illegal address"), "c": never},
              "--within", "500", "--again")  # fmt: skip
    (words,) = restarts
    assert (words.stage, words.json, words.dry_run, words.again) == ("chip", stage.path, True, False)
    assert 400 < words.within <= 500
    monkeypatch.setattr(gpu_battery, "usable", lambda: True)
    status, found = stage({"a": never, "b": never, "c": ok()})
    assert status == 1 and found["b"]["text"] == "illegal address" and found["c"]["status"] == "ok"
    assert stage({"a": ok(), "b": ok(), "c": ok()}, "--again")[0] == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_step_that_hangs_has_failed(stage, monkeypatch, restarts):
    monkeypatch.setattr(gpu_battery, "PATIENCE_S", 0.1)
    texts = []

    def hang(seconds):
        deadline = time.monotonic() + 30
        while not restarts and time.monotonic() < deadline:
            time.sleep(0.01)
        texts.append(json.loads(stage.path.read_text())["stages"]["chip"]["a"])
        return battery.result("ok", "")

    stage({"a": Step(hang, 0.01)})
    assert len(restarts) == 1 and texts[0]["status"] == "failed" and texts[0]["fatal"]
    assert "a hang: not finished after" in texts[0]["text"]


def test_a_step_that_compiles_hangs_later(stage, monkeypatch, restarts):
    """What another library's compiler takes depends on the machine, and a hang is final."""
    monkeypatch.setattr(gpu_battery, "PATIENCE_S", 0.05)

    def slow(seconds):
        time.sleep(0.3)
        return battery.result("ok", "compiled")

    assert stage({"a": Step(slow, 0.01, compiles=True)})[1]["a"]["text"] == "compiled" and not restarts


def test_a_step_may_take_less_than_what_is_called_a_hang(stage):
    stage({"a": Step(lambda seconds: battery.result("ok", str(seconds)), 1)})
    assert float(json.loads(stage.path.read_text())["stages"]["chip"]["a"]["text"]) < gpu_battery.PATIENCE_S


def test_what_a_fresh_machine_lacks_is_done_in_every_run(stage):
    done = []

    def build(seconds):
        done.append(seconds)
        return battery.result("ok", "built")

    for _ in range(2):
        assert stage({"build": Step(build, 1, always=True), "a": ok()})[0] == 0
    assert len(done) == 2


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
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    begin = time.monotonic()
    assert "not finished" in battery.python(["-c", child], 1)["text"] and time.monotonic() - begin < 30


@pytest.mark.parametrize("status", ["ok", "failed"])
def test_a_build_that_fails_leaves_no_older_one_to_be_measured(monkeypatch, tmp_path, status):
    file = tmp_path / "wrn_fast" / "_cuda.cpython.so"
    file.parent.mkdir()
    file.touch()
    monkeypatch.setattr(parity, "ROOT", tmp_path)
    monkeypatch.setattr(parity, "python", lambda *_: battery.result(status, ""))
    parity.build(1.0)
    assert file.exists() == (status == "ok")


# Goals.


@pytest.mark.parametrize("got, met, within", [(2.0, True, True), (2.1, True, False), (1.9, False, True),
                                              (math.nan, False, False)])  # fmt: skip
def test_a_goal_is_met_from_the_wanted_number_on(got, met, within):
    assert Goal("g", 2.0, got).met == met
    assert Goal("g", 2.0, got, at_most=True).met == within


def test_a_missed_goal_is_stated_and_no_failure(stage, capsys):
    status, found = stage({"a": ok(goals=[Goal("fast", 2.0, 3.0), Goal("small", 1.0, 5.0, at_most=True)])})
    assert status == 0 and [goal["met"] for goal in found["a"]["goals"]] == [True, False]
    assert "fast: 3, goal >= 2, met" in found["a"]["text"] and "small: 5, goal <= 1, MISSED" in found["a"]["text"]
    out = capsys.readouterr().out
    assert "1 of 2 goals met" in out and "missed: a: small" in out


# Stages.


@pytest.fixture(scope="module")
def stages():
    pytest.importorskip("triton")
    return {name: gpu_battery.steps_of(name, False) for name in gpu_battery.STAGES}


def test_every_stage_fits_in_its_limit(stages):
    for name, steps in stages.items():
        assert steps and sum(step.seconds for step in steps.values()) <= gpu_battery.STAGE_S, name
    assert gpu_battery.STAGE_S <= 540


def test_every_step_takes_its_seconds_and_nothing_else(stages):
    """What a dry run does not call is called right, too."""
    for steps in stages.values():
        for name, step in steps.items():
            given = inspect.signature(step.run).bind(1.0)
            assert list(given.arguments) == ["seconds"], name


def test_what_compiles_is_not_taken_for_a_hang(stages):
    """Autotuned rivals, Triton's kernels of whole models, the extension itself, and all under sanitizers."""
    for stage, steps in stages.items():
        for name, step in steps.items():
            slow = stage.startswith(("bench", "models-triton", "parity-triton")) or name.endswith("check")
            slow = slow or name == "extensions" or (stage == "targets" and "one graph" not in name)
            assert step.compiles or not slow, (stage, name)
            assert not (stage == "layers" and step.compiles and name != "extensions")


def test_stages_have_what_was_asked_for(stages):
    assert [f"E{i}" for i in range(6)] == sorted({name.split()[0] for name in stages["chip"]} - {"extensions"})
    tools = [name for name in stages["sanitize-cuda"] if name.endswith("check")]
    assert len(tools) == 8
    for n in (128, 256, 512):
        assert all(f"fprop {layer} batch {n}" in stages["layers"] for layer in layers.REGULAR)
    for op in ("dgrad", "wgrad"):
        shapes = (*layers.REGULAR, *layers.WIDENING, *layers.SHORTCUTS)
        assert all(f"{op} {layer} batch 256" in stages["layers"] for layer in shapes)
    assert {"WRN-28-10 inference batch 512 bf16", "WRN-28-10 training_step batch 256 bf16",
            "latency batch 1"} <= set(stages["targets"])  # fmt: skip
    wide = " ".join(stages["bench-wide"])
    assert "WRN-34-10 inference" in wide and "WRN-70-16 inference" in wide


def test_the_primitives_of_one_dtype_are_not_those_of_another():
    words = [
        *parity.PRIMITIVES,
        "--collect-only",
        "-q",
        "--all-cases",
        "-k",
        f"cuda and float16{parity.NO_OTHER['float16']}",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    found = [line for line in done.stdout.splitlines() if "::" in line]
    ops = {"dgrad", "wgrad", "fprop", "input_grad", "channel_stats", "bn_bwd_apply", "dropout", "mask", "test_head"}
    assert found and all("-float16" in line or "float16-" in line for line in found)
    assert not any("bfloat16" in line for line in found) and all(any(op in line for line in found) for op in ops)


def test_without_a_gpu_the_battery_says_so():
    words = [sys.executable, "-m", "benchmarks.gpu_battery", "--stage", "chip"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment())
    assert done.returncode == 2 and "--dry-run" in done.stderr


def environment():
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def test_dry_run_of_every_stage(tmp_path):
    pytest.importorskip("triton")
    path = tmp_path / "battery.json"
    words = [sys.executable, "-m", "benchmarks.gpu_battery", "--stage", "all", "--dry-run", "--json", str(path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=540, env=environment())
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(path.read_text())
    assert report["head"]["dry run"] == "True" and "torch" in report["head"]["versions"]
    assert set(report["stages"]) == set(gpu_battery.STAGES)
    for results in report["stages"].values():
        # Without a C++ compiler there is no cuda backend for the CPU.
        assert results and all(step["status"] in ("ok", "not run") for step in results.values())
        assert all(name[:12] in done.stdout for name in results)
