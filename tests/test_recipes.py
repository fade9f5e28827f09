"""Each section of docs/recipes.md runs, in a folder and a namespace of its own."""

import re
from pathlib import Path

import pytest

TEXT = (Path(__file__).resolve().parents[1] / "docs" / "recipes.md").read_text(encoding="utf-8")
SECTIONS = {s.split("\n", 1)[0]: s for s in re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]}


@pytest.mark.parametrize("title", SECTIONS)
def test_a_recipe_runs(title, tmp_path, monkeypatch):
    blocks = re.findall(r"^```python\n(.*?)^```", SECTIONS[title], re.MULTILINE | re.DOTALL)
    assert blocks
    monkeypatch.chdir(tmp_path)
    space = {}
    for block in blocks:
        exec(compile(block, f"docs/recipes.md: {title}", "exec"), space)
    wanted = {
        "Your own model": lambda: space["logits"].shape == (8, 10),
        "Train": lambda: space["start"] == 2 and space["loss"].isfinite(),
        "Attack": lambda: 0 < (space["adversarial"] - space["x"]).abs().max() <= space["radius"] * (1 + 2**-20),
        "Out-of-distribution scores with Monte-Carlo dropout": lambda: space["features"].shape == (8, 6, 64),
        "Semi-supervised": lambda: space["accuracy"].isfinite(),
        "Deploy a checkpoint": lambda: space["same"].shape == (1, 10),
    }
    assert wanted[title]()
