"""The published recipe functions: what they say, what they refuse, and that they run."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ossature import recipes
from ossature.config import DataConfig, ParallelConfig, TrainConfig, parse
from ossature.convert.model import save_model
from ossature.model.config import SIZES
from ossature.model.transformer import Transformer
from ossature.train.loop import train
from tests.ranks import run_ranks
from tests.recipes_table import CORPUS, FILES
from tests.small_runs import TINY, change, records

CONFIGS = Path(__file__).parents[1] / "configs"
SIZES["tiny_wide"] = replace(TINY, num_hidden_layers=4, num_local_experts=16, layer_types=())


@pytest.mark.parametrize("name", FILES)
def test_a_run_file_is_its_recipe_written_down(name):
    assert parse(TrainConfig, [str(CONFIGS / f"{name}.toml")]) == FILES[name]()


def axes(config: TrainConfig) -> tuple[int, ...]:
    p = config.parallel
    return p.tp, p.pp, p.ep, p.cp


# tp, pp, ep, cp; rate and its end; warm-up; beta2; eps; tokens a step; seed
TABLE = {
    "20b_pretrain": ((2, 4, 4, 1), 3e-4, 3e-5, 2000, 0.95, 1e-5, 512 * 4096, 1234),
    "120b_pretrain": ((2, 4, 16, 1), 3e-4, 3e-5, 2000, 0.95, 1e-5, 512 * 4096, 1234),
    "20b_sft": ((1, 1, 8, 1), 5e-6, 0.0, 50, 0.98, 1e-8, 128 * 2048, 5678),
    "120b_sft": ((1, 4, 8, 1), 5e-6, 0.0, 50, 0.98, 1e-8, 128 * 2048, 5678),
    "20b_lora": ((1, 1, 1, 1), 1e-4, 0.0, 50, 0.98, 1e-8, 128 * 2048, 5678),
    "20b_dora": ((1, 1, 1, 1), 1e-4, 0.0, 50, 0.98, 1e-8, 128 * 2048, 5678),
    "120b_lora": ((1, 1, 8, 1), 1e-4, 0.0, 50, 0.98, 1e-8, 128 * 2048, 5678),
    "120b_dora": ((1, 1, 8, 1), 1e-4, 0.0, 50, 0.98, 1e-8, 128 * 2048, 5678),
}


@pytest.mark.parametrize("name", TABLE)
def test_defaults_are_the_published_ones_as_corrected(name):
    config = FILES[name]()
    optim = config.optim
    assert (
        axes(config), optim.lr, optim.min_lr, optim.warmup_steps, optim.beta2, optim.eps,
        config.global_batch_tokens, config.seed,
    ) == TABLE[name]  # fmt: skip
    assert (optim.weight_decay, optim.clip, optim.beta1) == (0.1, 1.0, 0.9)
    assert config.router.aux_loss == config.router.z_loss == 0.0
    assert (config.router.bias_update_rate > 0) is name.endswith("pretrain")
    scheme = name.split("_")[1]
    assert config.lora.rank == (32 if scheme in ("lora", "dora") else 0)
    if scheme == "dora":
        assert config.lora.dora and config.lora.alpha == 64
    assert config.model == name.split("_")[0]


def test_the_snippets_of_the_guide_hold(tmp_path):
    """Its own calls, with paths that exist here."""
    cfg = recipes.gpt_oss_20b_pretrain_config(
        name="gpt_oss_20b_pretrain",
        data_paths=["data/dclm_01_text_document"],
        dir="results/gpt_oss_20b",
        train_iters=500_000,
        global_batch_size=512,
        seq_length=4096,
    )
    assert (cfg.run, cfg.steps) == (Path("results/gpt_oss_20b/gpt_oss_20b_pretrain"), 500_000)
    cfg = recipes.gpt_oss_20b_finetune_config(
        hf_path="openai/gpt-oss-20b",
        name="gpt_oss_20b_lora_finetune",
        pretrained_checkpoint="path/to/gpt_oss/checkpoint",
        peft="lora",
        train_iters=1000,
        global_batch_size=128,
        finetune_lr=1e-4,
    )
    assert cfg.lora.rank == 32 and cfg.init == Path("path/to/gpt_oss/checkpoint")
    cfg = recipes.gpt_oss_20b_finetune_config(
        hf_path="openai/gpt-oss-20b", name="gpt_oss_20b_full_sft",
        pretrained_checkpoint="path/to/gpt_oss/checkpoint", peft=None, train_iters=1000,
        global_batch_size=128, finetune_lr=5e-6,
    )  # fmt: skip
    assert cfg.lora.rank == 0 and axes(cfg) == (1, 1, 8, 1)
    newer = recipes.gpt_oss_120b_peft_config("dora", pretrained_checkpoint="p")
    assert newer == recipes.gpt_oss_120b_finetune_config(peft="dora", pretrained_checkpoint="p")
    older = recipes.gpt_oss_20b_sft_config(pretrained_checkpoint="p")
    assert older == recipes.gpt_oss_20b_finetune_config(peft="none", pretrained_checkpoint="p")


def pretrain(**keywords) -> TrainConfig:
    return recipes.gpt_oss_20b_pretrain_config(**{"data_paths": CORPUS, **keywords})


def tune(**keywords) -> TrainConfig:
    return recipes.gpt_oss_20b_finetune_config(**{"pretrained_checkpoint": "p", **keywords})


def test_published_axes_have_our_names():
    config = pretrain(
        tensor_model_parallel_size=4, pipeline_model_parallel_size=2, context_parallel_size=2,
        expert_model_parallel_size=8, expert_tensor_parallel_size=2, sequence_parallel=True,
        virtual_pipeline_model_parallel_size=3, pipeline_dtype="bfloat16",
        precision_config="bf16_mixed", use_megatron_fsdp=False,
    )  # fmt: skip
    assert config.parallel == ParallelConfig(
        tp=4, pp=2, cp=2, ep=8, etp=2, pp_schedule="Interleaved1F1B", pp_chunks=3
    )


def test_data_is_given_in_any_of_the_published_ways(tmp_path):
    weighted = pretrain(data_paths="0.7 data/a_document 0.3 data/b_document").data
    assert weighted.blend == ("0.7", "data/a_document", "0.3", "data/b_document")
    assert weighted.split == "9999,8,2"
    (tmp_path / "args").write_text("1 data/a_document 2 data/b_document")
    read = pretrain(data_paths=None, data_args_path=tmp_path / "args").data
    assert read.blend == ("1", "data/a_document", "2", "data/b_document")
    each = pretrain(data_paths=None, train_data_path=["a_document"], valid_data_path="b_document")
    assert each.data.train_blend == ("a_document",)
    assert each.data.validation_blend == ("b_document",)
    (tmp_path / "each.json").write_text('{"train": ["a_document"], "valid": ["b_document"]}')
    again = pretrain(data_paths=None, per_split_data_args_path=tmp_path / "each.json")
    assert again.data == each.data
    assert pretrain(data_paths=None, mock=True).data == DataConfig(mock=True)
    assert pretrain(data_paths="data/mine").data.path == Path("data/mine")
    assert tune().data.path == Path("data/chats")


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: pretrain(data_paths=None), "exactly one of data_paths"),
        (lambda: pretrain(mock=True), r"exactly one of .* \(2 are given\)"),
        (lambda: pretrain(data_paths=["/path/to/dataset.nvjsonl"]), "text, not tokens"),
        (lambda: pretrain(use_null_tokenizer=True), "use_null_tokenizer must be False"),
        (lambda: pretrain(use_megatron_fsdp=True), "engine is torch.distributed"),
        (lambda: pretrain(precision_config="fp8"), "bf16_mixed"),
        (lambda: pretrain(sequence_parallel=False), "sequence_parallel must be True"),
        (lambda: pretrain(pipeline_dtype="float32"), "pipeline_dtype"),
        (lambda: pretrain(hf_path="openai/gpt-oss-120b"), "must be openai/gpt-oss-20b"),
        (lambda: tune(pretrained_checkpoint=None), "give pretrained_checkpoint"),
        (lambda: tune(peft="ia3"), r"peft \(ia3\) must be one of"),
        (lambda: tune(packed_sequence=False), "packed_sequence"),
    ],
)
def test_what_cannot_be_had_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    "key, near", [("train_iter", "train_iters"), ("seq_len", "seq_length"), ("xyzzy", None)]
)
def test_an_unknown_keyword_is_named_with_the_nearest_one(key, near):
    with pytest.raises(TypeError, match=rf"no keyword {key}(; did you mean {near}\?)?$") as error:
        pretrain(**{key: 1})
    assert (near is None) == ("did you mean" not in str(error.value))


def test_a_local_folder_gives_the_shape_and_the_weights(tmp_path):
    config = tune(hf_path=str(tmp_path), pretrained_checkpoint=None)
    assert config.model == str(tmp_path) and config.init == tmp_path


def test_recipes_load_no_torch():
    code = "import sys, ossature.recipes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# Ranks of the layout; the two that need 32 and 64 are cut to 8 and 16.
RANKS = {
    "20b_pretrain": (16, {}),
    "120b_pretrain": (16, {"ep": 4}),
    "20b_sft": (8, {}),
    "120b_sft": (8, {"pp": 2, "ep": 4}),
    "20b_lora": (1, {}),
    "20b_dora": (1, {}),
    "120b_lora": (8, {}),
    "120b_dora": (8, {}),
}


def _train(rank: int, world: int, config: TrainConfig) -> None:
    SIZES["tiny_wide"] = replace(TINY, num_hidden_layers=4, num_local_experts=16, layer_types=())
    train(config)


@pytest.mark.slow
@pytest.mark.parametrize("name", RANKS)
def test_every_recipe_trains_on_its_layout(tmp_path, name):
    ranks, cut = RANKS[name]
    config = FILES[name]()
    base = None
    if config.init is not None:
        model = Transformer(SIZES["tiny_wide"])
        model.init_weights(0)
        save_model(model, base := tmp_path / "base", "native")
    small = change(
        config, run=tmp_path / "run", model="tiny_wide", init=base, steps=3,
        global_batch_tokens=32 * 32, micro_batch_tokens=32, precision="fp32",
        data=DataConfig(mock=True, seq_len=32), eval__every_steps=0, checkpoint__every_steps=2,
        log__tensorboard=False, parallel=replace(config.parallel, **cut),
    )  # fmt: skip
    run_ranks(ranks, _train, small, seconds=240)
    assert [line["step"] for line in records(tmp_path / "run")] == [1, 2, 3]
