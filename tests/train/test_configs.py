"""Every run file that is shipped runs: three steps, with a tiny model and mock data."""

from dataclasses import replace
from pathlib import Path

import pytest

from ossature.config import DataConfig, TrainConfig, parse
from ossature.train.loop import train
from tests.small_runs import change, records

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_run_file_runs(tmp_path, path):
    config = parse(TrainConfig, [str(path)])
    cut = change(
        config,
        run=tmp_path,
        model="tiny",
        init=None,
        steps=3,
        global_batch_tokens=128,
        micro_batch_tokens=64,
        data=DataConfig(mock=True, seq_len=32),
        eval__every_steps=2 if config.eval.every_steps else 0,
        eval__tokens=64,
        checkpoint__every_steps=2 if config.checkpoint.every_steps else 0,
        compile=False,  # tests/train/test_compile.py
        sample=replace(config.sample, every_steps=0),  # mock data has no tokenizer
    )
    train(cut)
    assert [line["step"] for line in records(tmp_path)] == [1, 2, 3]


def test_there_are_run_files():
    assert {"debug", "20b_pretrain"} <= {path.stem for path in CONFIGS}
