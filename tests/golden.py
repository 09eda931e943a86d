"""The numeric fixture: one tiny gpt-oss model in three formats, with logits and gradients.

It is not part of the repository.  Its folder is $OSSATURE_GOLDEN, or ../shared/golden beside the
checkout; a test that asks for it where it is absent is skipped.
"""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def golden(name: str = "") -> Path:
    """Path of a file or folder of the fixture; skips the calling test when there is no fixture."""
    folder = Path(os.environ.get("OSSATURE_GOLDEN", ROOT.parent / "shared" / "golden"))
    if not folder.is_dir():
        pytest.skip("golden fixture absent: set OSSATURE_GOLDEN to its folder")
    path = folder / name
    assert path.exists(), f"the golden fixture at {folder} has no {name}"
    return path
