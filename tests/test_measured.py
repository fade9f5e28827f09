"""The measured choice of algorithm on a CPU: off by default, its closed schema, damaged files, what writes it."""

from __future__ import annotations

import copy
import json
import os

import pytest
import torch

from wrn_fast import WrnFastError, cache, measured, tune_cpu
from wrn_fast.backends import cpu
from wrn_fast.cli import main
from wrn_fast.problem import ConvProblem

pytestmark = pytest.mark.skipif(tune_cpu.unsupported() is not None, reason="the extension is not built")

PROBLEM = ConvProblem("cpu", torch.float32, torch.float32, 2, 8, 8, 64, 64, 3, 3, 1, (1, 1, 1, 1))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache, and the measured choice asked for."""
    tmp_path.chmod(0o700)
    monkeypatch.setenv("WRN_FAST_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("WRN_FAST_PIN_ALGO", "measured")
    measured.forget()
    yield tmp_path
    measured.forget()


def path():
    return measured.path(cpu.isa(), torch.get_num_threads(), create=True)


def document(pin="direct", **changed):
    head = measured.head(cpu.isa(), torch.get_num_threads())
    row = {**measured.key("fprop", PROBLEM)._asdict(), "pin": pin, "us": {pin: 1.0}}
    return {"format": measured.FORMAT, "head": head | changed, "rows": [row]}


def chosen(op="fprop", problem=PROBLEM):
    measured.forget()
    return cpu.algorithm(op, problem)


def test_a_row_decides_for_its_shape_and_operator_alone(folder):
    assert chosen() == "f4"
    cache.write(path(), document())
    assert chosen() == "direct"
    assert chosen("dgrad") == "f4" and chosen("wgrad") == "f4"
    assert chosen(problem=PROBLEM._replace(N=3)) == "f4"


def test_it_is_off_unless_asked_for(folder, monkeypatch):
    cache.write(path(), document())
    monkeypatch.delenv("WRN_FAST_PIN_ALGO")
    assert chosen() == "f4"


@pytest.mark.parametrize("name", ["cpu", "isa", "threads"])
def test_a_file_of_another_machine_counts_for_nothing(folder, name):
    cache.write(path(), document(**{name: "another"}))
    assert chosen() == "f4"


@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_a_damaged_file_counts_for_nothing(folder, share):
    cache.write(path(), document())
    text = path().read_text()
    path().write_text(text[: int(share * len(text))])
    assert chosen() == "f4"


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(format=0),
        lambda d: d.update(more=1),
        lambda d: d["head"].pop("isa"),
        lambda d: d["rows"][0].update(pin="f8"),
        lambda d: d["rows"][0].update(op="head"),
        lambda d: d["rows"][0].update(N="2"),
        lambda d: d["rows"][0].pop("C"),
    ],
)
def test_the_schema_is_closed(folder, change):
    value = copy.deepcopy(document())
    measured.validate(value)
    change(value)
    with pytest.raises(WrnFastError, match="`"):
        measured.validate(value)


def test_candidates_are_no_less_exact_than_the_policy(folder):
    assert tune_cpu.candidates("fprop", PROBLEM) == ["f4", "f3", "f2", "direct"]
    assert tune_cpu.candidates("fprop", PROBLEM._replace(C=32)) == ["f3", "f2", "direct"]
    assert tune_cpu.candidates("fprop", PROBLEM._replace(C=8)) == ["direct"]
    # Where few tiles make the policy take F(2x2), F(4x4) is exact enough to be asked.
    wide = PROBLEM._replace(N=1, C=640, K=640)
    assert "f4" in tune_cpu.candidates("fprop", wide)


def test_tuning_goes_on_where_it_stopped_and_decides(folder, monkeypatch):
    """The clock is a stub by which the direct convolution always wins."""
    ticks = {"f4": 4.0, "f3": 3.0, "f2": 2.0, "direct": 1.0}

    def measure(op, problem):
        return dict(sorted(((pin, ticks[pin]) for pin in tune_cpu.candidates(op, problem)), key=lambda pair: pair[1]))

    monkeypatch.setattr(tune_cpu, "measure", measure)
    tasks = [("fprop", PROBLEM), ("dgrad", PROBLEM)]
    first = tune_cpu.run(tasks[:1])
    assert (first["measured"], first["kept"]) == (1, 0)
    assert chosen() == "direct" and chosen("dgrad") == "f4"
    second = tune_cpu.run(tasks)
    assert (second["measured"], second["kept"]) == (1, 1) and len(second["rows"]) == 2
    assert chosen("dgrad") == "direct"
    assert tune_cpu.run([("fprop", PROBLEM._replace(N=5))], limit_s=-1)["left"] == 1
    path().write_text("{")
    assert tune_cpu.run(tasks)["measured"] == 2


def test_measuring_gives_a_time_for_each_candidate_and_the_environment_back(folder):
    us = tune_cpu.measure("dgrad", PROBLEM)
    assert set(us) == {"f4", "f3", "f2", "direct"} and all(v > 0 for v in us.values())
    assert list(us.values()) == sorted(us.values())
    assert os.environ["WRN_FAST_PIN_ALGO"] == "measured"


def test_tasks_are_the_convolutions_with_a_choice(folder):
    tasks = tune_cpu.tasks(10, 4, 2, "fp32")
    assert tasks and all(op in measured.OPS and min(p.C, p.K) >= 16 for op, p in tasks)
    with pytest.raises(WrnFastError, match="`dtype`: expected fp32 or bf16"):
        tune_cpu.tasks(10, 4, 2, "fp16")


def test_command(folder, capsys):
    assert main(["tune", "--depth", "10", "--width", "1", "--batch", "1", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["device"] == "cpu" and data["measured"] == len(data["tuned"]) > 0
    assert path().is_file() and str(path()) == data["path"]
    assert main(["tune", "--depth", "10", "--width", "1", "--batch", "1"]) == 0
    assert "WRN_FAST_PIN_ALGO=measured" in capsys.readouterr().out.replace("\n", " ")
