"""The folders most tests start from, made once."""

from pathlib import Path

import pytest

from tests.convert.folders import convert, theirs


@pytest.fixture(scope="session")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written by transformers; no two dimensions equal."""
    folder = tmp_path_factory.mktemp("folders") / "bf16"
    theirs(folder)
    return folder


@pytest.fixture(scope="session")
def mxfp4(bf16: Path) -> Path:
    return convert(bf16, bf16.parent / "mxfp4", "mxfp4")


@pytest.fixture(scope="session")
def openai(mxfp4: Path) -> Path:
    return convert(mxfp4, mxfp4.parent / "openai", "openai")
