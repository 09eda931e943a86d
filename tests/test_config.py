"""Run files and flags: one parser, one set of one-line errors."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import tyro

from ossature.config import TrainConfig, flatten, parse, to_json

BASE = ["--run", "r", "--data.mock", "true"]


def run_file(folder: Path, text: str) -> str:
    path = folder / "run.toml"
    path.write_text('run = "r"\n' + text)
    return str(path)


def error_of(argv: list[str]) -> str:
    with pytest.raises(ValueError) as caught:
        parse(TrainConfig, argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_flag_wins_over_the_file_and_the_file_over_the_default(tmp_path):
    path = run_file(tmp_path, "steps = 7\nseed = 3\n[data]\nmock = true\n")
    config = parse(TrainConfig, [path, "--seed", "4"])
    assert (config.steps, config.seed, config.max_skipped_steps) == (7, 4, 20)
    assert parse(TrainConfig, [path, "--seed", "4", "--seed", "5"]).seed == 5


@pytest.mark.parametrize(("word", "value"), [("true", True), ("False", False)])
def test_every_boolean_takes_a_value_on_the_command_line(word, value):
    assert parse(TrainConfig, [*BASE, "--compile", word]).compile is value
    assert parse(TrainConfig, [*BASE, f"--compile={word}"]).compile is value


@pytest.mark.parametrize("value", ["true", "false"])
def test_booleans_of_toml_are_booleans(tmp_path, value):
    path = run_file(tmp_path, f"compile = {value}\ndata.mock = true\n")
    assert parse(TrainConfig, [path]).compile is (value == "true")


def test_a_tuple_takes_the_words_up_to_the_next_key():
    config = parse(TrainConfig, [*BASE, "--sample.prompts", "a b", "- c", "--steps", "3"])
    assert config.sample.prompts == ("a b", "- c")
    assert config.steps == 3


def test_a_list_of_toml_is_a_tuple_whatever_its_texts_begin_with(tmp_path):
    path = run_file(tmp_path, 'data.mock = true\nsample.prompts = ["--x", "-1", ""]\n')
    assert parse(TrainConfig, [path]).sample.prompts == ("--x", "-1", "")
    path = run_file(tmp_path, "data.mock = true\nsample.prompts = []\n")
    assert parse(TrainConfig, [path]).sample.prompts == ()


def test_dash_and_underscore_in_a_key_are_one():
    assert parse(TrainConfig, [*BASE, "--optim.min-lr", "0"]).optim.min_lr == 0.0


def test_negative_numbers_are_values():
    assert "optim.lr (-1e-05) must be at least 0" in error_of([*BASE, "--optim.lr", "-1e-5"])


def test_none_is_the_absent_value():
    assert parse(TrainConfig, [*BASE, "--init", "none"]).init is None
    assert parse(TrainConfig, [*BASE, "--init", "x"]).init == Path("x")


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--data.mock", "true"], "run is missing"),
        ([*BASE, "--stepz", "3"], "unknown option --stepz; did you mean steps?"),
        ([*BASE, "--steps", "three"], "--steps = three: must be a whole number"),
        ([*BASE, "--steps", "1e3"], "--steps = 1e3: must be a whole number"),
        ([*BASE, "--steps"], "--steps needs a value"),
        ([*BASE, "--optim.lr", "fast"], "--optim.lr = fast: must be a number"),
        ([*BASE, "--optim.lr", "nan"], "optim.lr (nan) must be at least 0"),
        ([*BASE, "--compile=yes"], "--compile = yes: must be true or false"),
        ([*BASE, "--precision", "fp8"], "--precision = fp8: must be one of bf16, fp32, fp16"),
        ([*BASE, "word"], "unexpected argument 'word'"),
        ([*BASE, "--steps", "0"], "steps (0) must be at least 1"),
        ([*BASE, "--data.seq_len", "100"], "micro_batch_tokens (16384) must be a multiple of "
         "data.seq_len (100)"),
        ([*BASE, "--micro_batch_tokens", "12288"], "global_batch_tokens (524288) must be "
         "a multiple of micro_batch_tokens (12288)"),
        (["--run", "r"], "data: give exactly one of data.path, data.blend, blends for "
         "each split and data.mock (0 are given)"),
        ([*BASE, "--data.path", "p"], "data: give exactly one of data.path, data.blend, "
         "blends for each split and data.mock (2 are given)"),
        ([*BASE, "--optim.beta2", "1"], "optim.beta2 (1.0) must be less than 1"),
        ([*BASE, "--optim.lr", "1e-6"], "optim.min_lr (3e-05) must be at most optim.lr (1e-06)"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_in_one_line(argv, sentence):
    assert error_of(argv) == sentence


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("stepz = 3\n", "run.toml: stepz: unknown key; did you mean steps?"),
        ("steps = 1.5\n", "run.toml: steps = 1.5: must be a whole number"),
        ("steps = [1]\n", "run.toml: steps takes one value, not a list"),
        ("compile = 1\n", "run.toml: compile = 1: must be true or false"),
        ("steps = \n", "run.toml: not TOML: Invalid value (at line 2, column 9)"),
        ("steps = 0\n[data]\nmock = true\n", "run.toml: steps (0) must be at least 1"),
        ("steps = 2024-01-01\n", "run.toml: steps = 2024-01-01: not a text, number or boolean"),
    ],
)
def test_an_error_in_a_file_names_the_file(tmp_path, text, sentence):
    path = run_file(tmp_path, text)
    assert error_of([path]) == f"{tmp_path}/{sentence}"


def test_a_missing_file_is_said_to_be_missing(tmp_path):
    assert error_of([f"{tmp_path}/no.toml"]) == f"{tmp_path}/no.toml: no such run file"


def test_the_balancing_bias_is_refused_in_fine_tuning():
    argv = [*BASE, "--init", "somewhere", "--router.bias_update_rate", "1e-3"]
    assert "router.bias_update_rate (0.001) must be 0 when init is given" in error_of(argv)


def test_published_coefficients_are_never_the_default():
    config = parse(TrainConfig, BASE)
    assert (config.router.aux_loss, config.router.z_loss) == (0.0, 0.0)
    assert config.router.bias_update_rate == 0.0


def test_what_is_written_beside_a_run_reads_back_as_the_same_config(tmp_path):
    """The resolved copy is the whole truth: every key, as it was used."""
    config = parse(TrainConfig, [*BASE, "--sample.prompts", "a", "b", "--optim.lr", "1e-3"])
    words = []
    for key, value in to_json(config).items():
        values = value if isinstance(value, list) else [value]
        words += [f"--{key}", *map(str, values)]
    assert parse(TrainConfig, words) == config
    assert dict(flatten(config))["data.seq_len"] == 4096


def test_help_names_the_keys(capsys):
    with pytest.raises(SystemExit) as ended:
        parse(TrainConfig, ["--help"], prog="ossature train")
    assert ended.value.code == 0
    assert "--micro-batch-tokens" in capsys.readouterr().out


@dataclass(frozen=True, kw_only=True)
class Inner:
    size: int = 1


@dataclass(frozen=True, kw_only=True)
class Options:
    inputs: tyro.conf.Positional[tuple[Path, ...]]
    to: Literal["bf16", "native"] = "bf16"
    inner: Inner = field(default_factory=Inner)


def test_positional_fields_take_the_words_without_a_key():
    options = parse(Options, ["a", "b", "--to", "native", "--inner.size", "2"])
    assert options == Options(inputs=(Path("a"), Path("b")), to="native", inner=Inner(size=2))
    with pytest.raises(ValueError, match="inputs is missing"):
        parse(Options, ["--to", "native"])
