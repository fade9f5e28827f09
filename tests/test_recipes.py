"""Each section of docs/recipes.md runs, in a folder and a namespace of its own; docs/networks.md as a whole."""

import re
from pathlib import Path

import pytest

from wrn_fast import reference

DOCS = Path(__file__).resolve().parents[1] / "docs"
TEXT = (DOCS / "recipes.md").read_text(encoding="utf-8")
SECTIONS = {s.split("\n", 1)[0]: s for s in re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]}


def run(text, name):
    """The names that a text's Python blocks leave, run one after the other."""
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert blocks
    space = {}
    for block in blocks:
        exec(compile(block, name, "exec"), space)
    return space


@pytest.mark.parametrize("title", SECTIONS)
def test_a_recipe_runs(title, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space = run(SECTIONS[title], f"docs/recipes.md: {title}")
    wanted = {
        "Your own model": lambda: space["logits"].shape == (8, 10),
        "Train": lambda: space["start"] == 2 and space["loss"].isfinite(),
        "Attack": lambda: 0 < (space["adversarial"] - space["x"]).abs().max() <= space["radius"] * (1 + 2**-20),
        "Out-of-distribution scores with Monte-Carlo dropout": lambda: space["features"].shape == (8, 6, 64),
        "Semi-supervised": lambda: space["accuracy"].isfinite(),
        "Deploy a checkpoint": lambda: space["same"].shape == (1, 10),
    }
    assert wanted[title]()


def test_the_page_of_networks_runs():
    space = run((DOCS / "networks.md").read_text(encoding="utf-8"), "docs/networks.md")
    assert set(reference.BLOCKS) == set(
        re.findall(r'"(B\([\d,]+\))"', (DOCS / "networks.md").read_text(encoding="utf-8"))
    )
    assert space["logits"].shape == (2, 10) and len(space["found"].accelerated) == 3 and not space["found"].left
