"""The training program: it learns, is resumed bit for bit, leaves whole files, and runs on several processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import wrn_fast
from wrn_fast.recipes import files, train

pytest.importorskip("sklearn")
ROOT = Path(__file__).resolve().parents[1]
TINY = ["--depth", "10", "--width", "1", "--limit", "192", "--batch", "32", "--dropout", "0.1", "--ema", "0.8"]


def run(folder, *words):
    return train.train(train.parse([*TINY, "--out", str(folder), "--device", "cpu", *words]))


def without_seconds(history):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in history]


@pytest.mark.parametrize("amp", ["off", "bf16", pytest.param("fp16", marks=pytest.mark.long)])
def test_it_learns_and_its_files_load(amp, tmp_path):
    history = run(tmp_path, "--epochs", "3", "--amp", amp)
    assert [row["epoch"] for row in history] == [1, 2, 3] and history[-1]["loss"] < history[0]["loss"]
    assert json.loads((tmp_path / "history.json").read_text()) == history
    assert sorted(f.name for f in tmp_path.iterdir()) == ["best.pt", "history.json", "last.pt"]
    model, report = wrn_fast.load_checkpoint(tmp_path / "best.pt")
    assert not report.left and type(model) is wrn_fast.WideResNet and "WRN-10-1" in str(report)
    options = train.parse([*TINY])
    split = train.data.load(None, limit=options.limit, seed=options.seed)
    with torch.no_grad(), train.Run(options, split, 1, torch.device("cpu")).autocast():
        right = (model(split.test_x).argmax(1) == split.test_y).double().mean().item()
    if amp == "off":
        assert right == max(row["average_accuracy"] for row in history)


@pytest.mark.parametrize("amp", ["off", pytest.param("fp16", marks=pytest.mark.long)])
def test_a_run_cut_short_goes_on_bit_for_bit(amp, tmp_path, monkeypatch):
    words = ("--epochs", "3", "--amp", amp)
    want = run(tmp_path / "whole", *words)
    epoch = train.Run.epoch

    def cut(self, rank, progress):
        if len(self.history) == 1:
            raise KeyboardInterrupt
        return epoch(self, rank, progress)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.Run, "epoch", cut)
        run(tmp_path / "cut", *words)
    assert without_seconds(run(tmp_path / "cut", *words, "--resume")) == without_seconds(want)
    a, b = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "cut"))
    for part in ("model", "average"):
        assert all(torch.equal(v, b[part][k]) for k, v in a[part].items()), part
    momenta = zip(a["optimizer"]["state"].values(), b["optimizer"]["state"].values())
    assert all(torch.equal(x["momentum_buffer"], y["momentum_buffer"]) for x, y in momenta)
    assert without_seconds(run(tmp_path / "cut", *words, "--resume")) == without_seconds(want)  # nothing left to do


def test_a_crash_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "last.pt"
    files.save_checkpoint(path, {"epoch": 1})
    for error in (OSError, KeyboardInterrupt):

        def crash(file, error=error):
            file.write(b"half")
            raise error

        with pytest.raises(error):
            files.replace(path, crash)
        assert torch.load(path, weights_only=True) == {"epoch": 1}
        assert [f.name for f in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--depth", "11"), "`depth`: expected 6n"),
        (("--epochs", "0"), "--epochs: expected at least 1"),
        (("--batch", "1000"), "--batch: expected at most 192"),
        (("--ema", "1"), "--ema: expected at least 0 and below 1"),
        (("--data", "nowhere"), "--data: expected a folder"),
    ],
)
def test_bad_options_are_a_sentence(words, said, tmp_path, capsys):
    assert train.main([*TINY, "--out", str(tmp_path), *words]) == 1
    assert said in capsys.readouterr().err


def test_only_its_own_run_is_resumed(tmp_path, capsys):
    run(tmp_path, "--epochs", "1")
    words = [*TINY, "--out", str(tmp_path), "--epochs", "1", "--resume"]
    assert train.main([*words, "--lr", "0.5"]) == 1
    assert "lr 0.1 there, 0.5 here" in capsys.readouterr().err
    (tmp_path / "last.pt").write_bytes(b"half a file")
    assert train.main(words) == 1
    assert "no checkpoint of this program" in capsys.readouterr().err


def test_augmentation_moves_by_whole_pixels_and_mirrors():
    x = torch.arange(1.0, 1 + 3 * 32 * 32).view(1, 3, 32, 32).expand(64, -1, -1, -1)
    padded = torch.nn.functional.pad(x[0], (4, 4, 4, 4))
    crops = {(i, j): padded[:, i : i + 32, j : j + 32] for i in range(9) for j in range(9)}
    seen = set()
    for flip in (False, True):
        for image in train.augment(x, flip):
            found = [
                (at, mirrored)
                for at, crop in crops.items()
                for mirrored in ((False, True) if flip else (False,))
                if torch.equal(image, crop if not mirrored else mirror(padded, *at))
            ]
            assert len(found) == 1
            seen.add(found[0])
    assert len({at for at, _ in seen}) > 30 and {mirrored for _, mirrored in seen} == {False, True}


def mirror(padded, i, j):
    """Mirrored first, then cropped."""
    return padded.flip(2)[:, i : i + 32, j : j + 32]


def test_each_process_gets_its_share_of_one_permutation():
    split = train.data.Split("x", 10, torch.zeros(100, 1), *[torch.zeros(100)] * 3)
    parts = [train.batches(split, 8, rank, 3, seed=5) for rank in range(3)]
    rows = torch.cat([part for batches in parts for part in batches])
    assert len(rows) == len(rows.unique()) == 96 and {len(p) for batches in parts for p in batches} == {8}
    assert not torch.equal(train.batches(split, 8, 0, 3, seed=6)[0], parts[0][0])


def test_two_processes_under_torchrun(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [*TINY, "--epochs", "2", "--out", str(tmp_path), "--device", "cpu"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "-m", "wrn_fast.recipes.train", *words], env=env, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    history = json.loads((tmp_path / "history.json").read_text())
    assert [row["images"] for row in history] == [192, 192] and history[1]["loss"] < history[0]["loss"]
    assert done.stderr.count("average_accuracy") == 2  # one process talks
    assert torch.load(tmp_path / "last.pt", weights_only=True)["plan"]["processes"] == 2
