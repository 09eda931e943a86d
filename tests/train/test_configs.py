"""Every run file that is shipped runs: three steps, with a tiny model and mock data."""

from dataclasses import replace
from pathlib import Path

import pytest

from ossature.config import DataConfig, ParallelConfig, TrainConfig, parse
from ossature.convert.model import save_model
from ossature.model.transformer import Transformer
from ossature.train.loop import train
from tests.recipes_table import FILES
from tests.small_runs import TINY, change, records

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_run_file_runs(tmp_path, path):
    config = parse(TrainConfig, [str(path)])
    base = None
    if config.init is not None:
        model = Transformer(TINY)
        model.init_weights(0)
        save_model(model, base := tmp_path / "base", "native")
    cut = change(
        config,
        run=tmp_path / "run",
        model="tiny",
        init=base,
        parallel=ParallelConfig(),  # tests/test_recipes.py runs them on their layouts
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
    assert [line["step"] for line in records(tmp_path / "run")] == [1, 2, 3]


def test_there_are_run_files():
    assert {"debug", *FILES} <= {path.stem for path in CONFIGS}
