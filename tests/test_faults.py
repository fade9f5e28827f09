"""Planted faults (faults/): twelve of the catalogue a run, drawn by the seed; `python -m faults` plants all."""

from __future__ import annotations

import pytest

from faults import native, plant, table
from faults.catalogue import BACKENDS, GROUPS, NAMES, SHARED, cells, entry
from faults.patch import NO_CODE, Absent, Stale

CELLS = list(cells())


@pytest.fixture(scope="module")
def copy():
    """A copy of the checkout, with an extension of its own where one can be built."""
    with plant.Copy() as copy:
        try:
            copy.link()
        except native.CannotCompile:
            pass
        yield copy


@pytest.mark.rotate(12)
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: f"{cell.backend}-{cell.fault}")
def test_a_planted_fault_is_noticed(copy, cell, seed):
    if cell.backend == "cpu":
        try:
            native.flags()
        except native.CannotCompile as reason:
            pytest.skip(str(reason))
    if cell.backend == "triton":
        pytest.importorskip("triton")
    outcome = copy.plant(cell, seed)
    if outcome.state == plant.SKIPPED:
        pytest.skip(outcome.by)
    assert outcome.ok, f"{outcome.state}: {cell}: {outcome.by}"


def test_every_patch_still_fits():
    """Patches go stale when the code changes: all of them are looked at in every run."""
    for cell in CELLS:
        patch = plant.patch_of(cell)
        text = (native.ROOT / patch.file).read_text(encoding="utf-8")
        assert text.count(patch.old) == 1, f"{cell}: {patch.file} has it {text.count(patch.old)} times"
        assert patch.new != patch.old
        assert (native.ROOT / patch.check.file).is_file()


def test_the_page_is_of_its_data_and_shows_every_fault_caught():
    assert table.PAGE.read_text(encoding="utf-8") == table.page()
    assert {name: cell["state"] for name, cell in table.load()["cells"].items()} == {
        f"{cell.fault} {cell.backend}": plant.CAUGHT for cell in CELLS
    }


def test_a_stale_patch_is_loud(tmp_path):
    patch = plant.patch_of(CELLS[0])
    file = tmp_path / patch.file
    file.parent.mkdir(parents=True)
    for text in ("nothing of it\n", 2 * patch.old):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(Stale, match="expected once"):
            patch.apply(tmp_path)
        assert file.read_text(encoding="utf-8") == text


def test_a_survivor_and_a_broken_patch_fail(copy, seed):
    """The judge itself: a change of no consequence survives, one that does not run proves nothing."""
    cell = next(cell for cell in CELLS if cell.backend == "aten")
    check = plant.patch_of(cell).check._replace(select="integers_are_exact and aten-fprop-1 and right and direct")
    harmless = plant.patch_of(cell)._replace(check=check, old="def moments(", new="def  moments(")
    assert copy.plant(cell, seed, harmless).state == plant.SURVIVED
    broken = harmless._replace(old="    var, mean = torch.var_mean(v,", new="    var, mean = torch.no_such_name(v,")
    broken = broken._replace(
        check=broken.check._replace(file="tests/backends/test_primitives.py", select="statistics and aten")
    )
    assert copy.plant(cell, seed, broken).state == plant.BROKEN_PATCH


def test_the_catalogue_is_whole():
    assert list(NAMES) == list(range(1, 49)) == [fault for numbers in GROUPS.values() for fault in numbers]
    planted = {cell.fault for cell in CELLS}
    for fault in NAMES:
        for backend in BACKENDS:
            found = entry(fault, backend)
            assert not isinstance(found, Absent) or found.reason
            assert fault in planted
    assert {cell.backend for cell in CELLS} == {SHARED, *BACKENDS}
    absent = [f for f in NAMES if isinstance(found := entry(f, "cpu"), Absent) and found.state == NO_CODE]
    assert absent == [47]
