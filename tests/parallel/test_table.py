"""The page that says which test proves what names tests that there are."""

import re

import pytest

from tests.golden import ROOT

PAGE = (ROOT / "docs" / "parallelism.md").read_text("utf-8")
FILES = {path.stem: path.read_text("utf-8") for path in (ROOT / "tests").rglob("test_*.py")}
AXES = ["dp_shard", "dp_replicate", "tp", "ep", "etp", "cp", "pp"]


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(test_\w+)", PAGE))))
def test_every_test_that_the_page_names_is_there(name: str):
    assert name in FILES or any(f"def {name}(" in text for text in FILES.values())


def test_every_pair_of_axes_has_a_cell_with_a_test():
    rows = re.findall(r"^\| `(\w+)` x \|(.*)\|$", PAGE, flags=re.MULTILINE)
    assert [axis for axis, _ in rows] == AXES[:-1]
    for number, (axis, cells) in enumerate(rows):
        filled = ["`test_" in cell for cell in cells.split("|")]
        assert filled == [column > number for column in range(1, len(AXES))], axis
