"""The benchmark suite's reports on small models: memory counters, tables, JSON, page, plot, command line."""

import dataclasses
import sys

import pytest
import torch
from rich.console import Console
from torch import nn

from benchmarks import __main__ as command
from benchmarks import machine, memory, peers, report
from benchmarks.cases import TASKS, Network, twin
from wrn_fast import native

TINY = Network(10, 1)


# Memory.


def test_saved_bytes_of_a_known_graph():
    class Known(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(16, 100))

        def forward(self, x):
            y = x * self.weight  # saves x; the parameter does not count
            z = y.exp()  # saves z
            return z.view(-1) * z.view(-1)  # the same storage twice more

    x = torch.randn(16, 100, requires_grad=True)
    module = Known()
    assert memory.saved_bytes(lambda: module(x), module) == 2 * 16 * 100 * 4
    with torch.no_grad():
        assert memory.saved_bytes(lambda: module(x), module) == 0


def test_a_saved_slice_costs_its_whole_storage():
    x = torch.randn(10, 100, requires_grad=True)
    assert memory.saved_bytes(lambda: x.exp()[:1].square(), nn.Identity()) == 10 * 100 * 4


@pytest.mark.parametrize("drop_rate", memory.DROP_RATES)
def test_the_drop_in_saves_at_most_its_share(drop_rate):
    network = Network(28, 1, drop_rate)
    ours, eager = (memory.training_bytes(name, network, 2) for name in (peers.FAST, peers.EAGER.name))
    assert 0 < ours <= memory.SAVED_LIMIT * eager


def test_resident_memory_is_measured_in_a_process_of_its_own():
    found = memory.resident(peers.EAGER.name, TINY, 2)
    assert found["peak_mib"] > found["over_model_mib"] >= 0.0


# Reports.


def made_row(case="WRN-10-1 inference batch 2 fp32", ours=2.0, task="inference", **other):
    def variant(name, ms, ratio):
        return {
            "name": name, "ms": ms, "p20_ms": 0.9 * ms, "p80_ms": 1.2 * ms, "rounds": 7, "ratio": ratio,
            "quantity": "y", "error": 1e-7, "bound": 1e-6,
        }  # fmt: skip

    return {
        "case": case, "subject": "WRN-10-1", "task": task, "batch": 2, "images": 2, "dtype": "fp32", "gflop": 3.0,
        "matmul_gflops": 200.0, "fastest_peer": "compile", "neighbours_cores": 0.0, "optimizer_ms": None,
        "variants": [variant("wrn_fast", 30.0 / ours, ours), variant("compile", 30.0, 1.0)],
        "missing": [{"name": "openvino", "reason": "openvino is not installed", "refused": False}],
    } | other  # fmt: skip


def made_report(*rows):
    head = {"device": "cpu", "cpu": "A CPU", "threads": "2", "command": "python -m benchmarks --quick"}
    saved = [{"drop_rate": 0.1, "fast_bytes": 2**20, "eager_bytes": 2**21, "ratio": 0.5}]
    resident = {"wrn_fast": {"peak_mib": 300.0, "over_model_mib": 20.0}}
    return {
        "schema": report.SCHEMA, "head": head, "rows": list(rows), "summary": report.summary(list(rows)),
        "left_out": [{"case": "WRN-70-16 inference", "reason": "the time budget of 5 s was used up"}],
        "memory": {"subject": "WRN-10-1", "batch": 2, "saved": saved, "resident": resident},
    }  # fmt: skip


def printed(function, *args):
    console = Console(width=110, record=True, file=open("/dev/null", "w"))
    function(console, *args)
    return console.export_text()


def test_summary_is_the_geometric_mean_and_the_worst_case():
    rows = [made_row("fast", 4.0), made_row("slow", 0.25), made_row("even", 8.0)]
    found = report.summary(rows)
    assert found["geomean"] == pytest.approx(2.0)
    assert (found["cases"], found["worst_case"], found["worst_ratio"]) == (3, "slow", 0.25)
    assert report.lost(rows) == ["slow"]
    assert report.summary([made_row(variants=[])]) is None


def test_the_table_has_every_figure():
    said = set()
    text = printed(report.print_row, made_row(), said)
    for words in (
        "WRN-10-1 inference",
        "15 (13.5-18)",
        "7.5",
        "200",
        "100 %",
        "2.00x",
        "50 %",
        "openvino is not installed",
    ):
        assert words in text
    assert "openvino" not in printed(report.print_row, made_row(), said)
    absent = [{"name": "openvino", "reason": "(pip install '.[bench]')", "refused": False}]
    assert "'.[bench]'" in printed(report.print_row, made_row(missing=absent), set())
    assert "used 1.5 cores" in printed(report.print_row, made_row(neighbours_cores=1.5), said)
    assert "SGD step 12 ms" in printed(report.print_row, made_row(optimizer_ms=12.0), said)


@pytest.mark.parametrize(
    "value, words", [(2012.4, "2012"), (999.7, "1000"), (214.0, "214"), (3.2264, "3.23"), (0.05, "0.05")]
)
def test_figures_have_three_digits_and_no_exponent(value, words):
    assert report.figure_of(value) == words


def test_lost_and_left_out_cases_are_said_and_the_summary_is_last():
    text = printed(report.print_end, made_report(made_row("good", 2.0), made_row("bad", 0.5)))
    assert "lost: bad" in text and "left out: WRN-70-16 inference" in text and "0.500x (limit 0.55: met)" in text
    assert text.strip().splitlines()[-1].startswith("wrn_fast against the fastest peer")
    refused = made_row("wrong", missing=[{"name": "wrn_fast", "reason": "refused", "refused": True}])
    assert "wrn_fast refused: wrong" in printed(report.print_end, made_report(refused))


def test_a_limit_that_is_passed_is_said():
    broken = made_report(made_row())
    broken["memory"]["saved"][0]["ratio"] = 0.56
    assert "NOT met" in "\n".join(report.memory_lines(broken["memory"]))


def test_json_round_trip(tmp_path):
    made = made_report(made_row())
    report.write_json(made, tmp_path / "new" / "report.json")
    assert report.read_json(tmp_path / "new" / "report.json") == made
    report.write_json(made | {"schema": 0}, tmp_path / "old.json")
    with pytest.raises(ValueError, match="expected schema 1, got 0"):
        report.read_json(tmp_path / "old.json")


def test_the_page_is_made_of_the_results(tmp_path):
    report.write_json(made_report(made_row("good", 2.0), made_row("bad", 0.5)), tmp_path / "results" / "cpu-a.json")
    assert report.write_docs(tmp_path / "results", tmp_path / "docs" / "page.md") == 1
    text = (tmp_path / "docs" / "page.md").read_text()
    assert "## A CPU" in text and "Lost: bad." in text and "**2.00x**" in text
    assert "openvino: openvino is not installed (good; bad)." in text
    assert all(f"| `{task}` |" in text for task in TASKS)
    body = [line for line in text.splitlines() if line.startswith("| ") and "compile" in line]
    assert len(body) == 2 and all(line.count("|") == len(report.COLUMNS) + 2 for line in body)


def test_the_committed_page_is_up_to_date(tmp_path):
    report.write_docs(command.RESULTS, tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text() == command.DOCUMENT.read_text(), "run python -m benchmarks --write-docs"


def test_the_plot_has_a_line_for_each_case(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    from benchmarks.plot import plot

    sizes = []
    for n in (1, 6):
        plot(made_report(*(made_row(f"case {i}", 0.5 + i) for i in range(n))), tmp_path / f"{n}.png")
        picture = image.imread(tmp_path / f"{n}.png")
        assert picture.std() > 0.05
        sizes.append(picture.shape)
    assert sizes[1][0] > sizes[0][0] and sizes[1][1] == sizes[0][1]


# The machine and the command line.


def test_head_names_the_machine_and_the_command():
    head = machine.head("cpu", 3, ["--preset", "readme"])
    assert head["threads"] == "3" and head["command"] == "python -m benchmarks --preset readme"
    assert torch.__version__ in head["versions"] and head["cpu"]
    assert machine.slug("cpu").startswith("cpu-") and machine.slug("cpu") == machine.slug("cpu").lower()


@pytest.mark.parametrize(
    "words, message",
    [
        (["--depth", "11", "--width", "1"], "6n + 4"),
        (["--depth", "10"], "need --width"),
        (["--depth", "10", "16", "--width", "1", "2", "3"], "one for each depth"),
        (["--preset", "everything"], "invalid choice"),
        (["--threads", "0"], "at least 1"),
        (["--peers", "wrn_slow"], "invalid choice"),
    ],
)
def test_bad_arguments_say_what_is_expected(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(words)
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--plot", "--roofline"])
def test_a_plot_that_cannot_be_drawn_is_refused_before_anything_is_measured(option, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as stop:
        command.main(["--quick", option, "x.png"])
    assert stop.value.code == 2 and "need matplotlib: pip install" in capsys.readouterr().err


def test_plain_pytorch_in_place_of_the_kernels_is_said(monkeypatch):
    monkeypatch.setattr(native, "load", lambda: (None, "no compiler [at all]"))
    assert "plain PyTorch here: no compiler [at all]" in printed(command.warn_if_plain, "cpu")
    assert not printed(command.warn_if_plain, "cuda")
    monkeypatch.setattr(native, "load", lambda: (native, None))
    assert not printed(command.warn_if_plain, "cpu")


def test_list_prints_the_cases(capsys):
    assert (
        command.main(["--list", "--depth", "16", "40", "--width", "4", "2", "--task", "inference", "--batch", "32"])
        == 0
    )
    assert capsys.readouterr().out.splitlines() == [
        "WRN-16-4 inference batch 32 fp32", "WRN-40-2 inference batch 32 fp32"
    ]  # fmt: skip


def test_quick_leaves_the_compilers_out_and_says_so():
    chosen, note = command.select_peers(command.parse(["--quick"]))
    assert not {"compile", "compile-max-autotune"} & {peer.name for peer in chosen} and "torch.compile" in note
    chosen, _ = command.select_peers(command.parse(["--preset", "readme", "--max-autotune", "--device", "cpu"]))
    assert {"compile", "compile-max-autotune"} <= {peer.name for peer in chosen}


@pytest.fixture
def same_threads():
    threads = torch.get_num_threads()
    yield str(threads)
    torch.set_num_threads(threads)


def test_a_run_from_the_command_line(tmp_path, capsys, same_threads):
    words = ["--depth", "10", "--width", "1", "--task", "inference", "training_step", "--batch", "2", "--peers"]
    words += ["eager-nchw", "eager-channels-last", "--reps", "2", "--threads", same_threads, "--device", "cpu"]
    words += ["--budget", "600", "--json", str(tmp_path / "r.json"), "--plot", str(tmp_path / "r.png")]
    pytest.importorskip("matplotlib")
    assert command.main(words) == 0
    out = capsys.readouterr().out
    found = report.read_json(tmp_path / "r.json")
    assert [row["case"] for row in found["rows"]] == [
        "WRN-10-1 inference batch 2 fp32", "WRN-10-1 training_step batch 2 fp32"
    ]  # fmt: skip
    for row in found["rows"]:
        assert {v["name"] for v in row["variants"]} == {"wrn_fast", "eager-nchw", "eager-channels-last"}
        assert all(v["p20_ms"] <= v["ms"] <= v["p80_ms"] and v["rounds"] >= 2 for v in row["variants"])
        assert row["fastest_peer"] in ("eager-nchw", "eager-channels-last")
    assert found["rows"][1]["optimizer_ms"] > 0 and found["summary"]["cases"] == 2
    assert (tmp_path / "r.png").stat().st_size > 10_000
    assert "geometric mean" in out.strip().splitlines()[-2] + out.strip().splitlines()[-1]


def test_cases_beyond_the_budget_are_left_out_by_name(tmp_path, same_threads):
    words = ["--depth", "10", "--width", "1", "--task", "inference", "--batch", "1", "2", "--peers", "eager-nchw"]
    words += ["--reps", "1", "--budget", "0", "--threads", same_threads, "--device", "cpu"]
    assert command.main([*words, "--json", str(tmp_path / "r.json")]) == 0
    found = report.read_json(tmp_path / "r.json")
    assert len(found["rows"]) == 1
    assert [absent["case"] for absent in found["left_out"]] == ["WRN-10-1 inference batch 2 fp32"]


def test_a_wrong_drop_in_fails_the_run(monkeypatch, same_threads):
    def build(module, x, case):
        copy = twin(module)
        with torch.no_grad():
            copy.fc.weight.mul_(1.01)
        return copy, copy

    wrong = dataclasses.replace(peers.OURS, build=build)
    monkeypatch.setattr(command, "PEERS", (wrong, *peers.PEERS[1:]))
    words = ["--depth", "10", "--width", "1", "--task", "inference", "--batch", "1", "--peers", "eager-nchw"]
    assert command.main([*words, "--reps", "1", "--threads", same_threads, "--device", "cpu"]) == 1
