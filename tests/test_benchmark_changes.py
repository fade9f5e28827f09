"""Two reports compared, layers under a roofline, and what comes before the first result."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from benchmarks import __main__ as command
from benchmarks import compare, report, roofline, startup


def row(case, ms, spread=0.02, matmul=100.0, name="wrn_fast", subject="WRN-10-1", gflop=1.0):
    variant = {"name": name, "ms": ms, "p20_ms": ms * (1 - spread), "p80_ms": ms * (1 + spread), "rounds": 9,
               "ratio": 2.0, "quantity": "y", "error": 1e-7, "bound": 1e-6}  # fmt: skip
    return {"case": case, "subject": subject, "task": "inference", "batch": 1, "images": 1, "dtype": "fp32",
            "gflop": gflop, "matmul_gflops": matmul, "fastest_peer": "eager-nchw", "neighbours_cores": 0.0,
            "optimizer_ms": None, "variants": [variant], "missing": []}  # fmt: skip


def made(*rows, **head):
    return {"schema": report.SCHEMA, "head": {"cpu": "a CPU", "threads": "2", "commit": "abc", **head},
            "rows": list(rows), "left_out": [], "memory": None, "summary": report.summary(list(rows))}  # fmt: skip


@pytest.mark.parametrize(
    "old, new, verdict",
    [
        (row("a", 10.0), row("a", 12.0), compare.SLOWER),
        (row("a", 10.0), row("a", 8.0), compare.FASTER),
        (row("a", 10.0), row("a", 10.3), compare.EQUAL),
        # The spreads touch: no verdict on a noisy machine.
        (row("a", 10.0, spread=0.2), row("a", 12.0, spread=0.2), compare.EQUAL),
        (row("a", 10.0), row("a", 10.0, name="eager-nchw"), compare.GONE),
        (row("a", 10.0), row("b", 10.0), compare.GONE),
        (row("a", 10.0, name="eager-nchw"), row("a", 10.0), compare.NEW),
    ],
)
def test_a_change_is_called_by_its_name(old, new, verdict):
    assert compare.changes(made(old), made(new))[0].verdict == verdict


def test_the_command_shows_regressions_and_fails(tmp_path, capsys):
    old, same, slow = (tmp_path / name for name in ("old.json", "same.json", "slow.json"))
    report.write_json(made(row("a", 10.0), row("b", 5.0)), old)
    report.write_json(made(row("a", 10.0), row("b", 5.0)), same)
    report.write_json(made(row("a", 10.1), row("b", 7.0)), slow)
    assert command.main(["--compare", str(old), "--against", str(same)]) == 0
    assert "slower" not in capsys.readouterr().out
    assert command.main(["--compare", str(old), "--against", str(slow)]) == 1
    out = capsys.readouterr().out
    assert "slower" in out and "1.40x" in out


def test_what_else_differs_is_said():
    old, new = made(row("a", 10.0)), made(row("a", 12.0, matmul=80.0), cpu="another CPU")
    assert any("another CPU now" in line for line in compare.differences(old, new))
    assert any("0.80 of its rate then" in line for line in compare.differences(old, new))
    assert not compare.differences(old, old)
    console = Console(file=io.StringIO(), width=110)
    assert compare.show(console, old, new) == ["a"]
    assert "another CPU" in console.file.getvalue()


def test_bad_arguments_and_files(tmp_path, capsys):
    with pytest.raises(SystemExit):
        command.parse(["--against", "new.json"])
    assert "--against needs --compare" in capsys.readouterr().err
    (tmp_path / "no.json").write_text(json.dumps({"schema": 0}))
    with pytest.raises(ValueError, match="expected schema 1"):
        command.main(["--compare", str(tmp_path / "no.json")])


def test_bytes_and_intensity_of_a_layer(tmp_path):
    assert roofline.bytes_of("layer 160->320 @32 /2", 2, "fp32") == 4 * (
        2 * 32 * 32 * 160 + 9 * 160 * 320 + 2 * 16 * 16 * 320
    )
    assert roofline.bytes_of("WRN-28-10", 1, "fp32") is None
    layer = made(row("a layer", 10.0, subject="layer 16->16 @8", gflop=0.5))
    (point,) = roofline.points(layer)
    assert point.rates == {"wrn_fast": pytest.approx(50.0)}
    assert point.intensity == pytest.approx(0.5e9 / (4 * (2 * 64 * 16 + 9 * 256)))
    with pytest.raises(ValueError, match="needs layers"):
        roofline.plot(layer, tmp_path / "x.png")
    pytest.importorskip("matplotlib")
    roofline.plot(layer | {"copy_gbytes": 20.0}, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_a_copys_rate_is_one_of_memory():
    assert 1e8 < roofline.copy_rate("cpu") < 1e13


def test_what_comes_before_the_first_result(monkeypatch):
    monkeypatch.setattr(startup, "FIRST_CALL", startup.FIRST_CALL.replace("make(28, 10, 10)", "make(10, 10, 1)"))
    found = startup.measure(runs=1)
    assert found["import_ms"] > 0 and set(found["first_ms"]) == {"wrn_fast", "eager"}
    assert all(v > 0 for side in ("first_ms", "later_ms") for v in found[side].values())
    assert 0.05 < found["wheel_mib"] < 100
    words = "\n".join(startup.lines(found))
    assert "import wrn_fast" in words and "first call" in words and "MiB" in words
