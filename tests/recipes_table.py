"""The recipe behind every run file of configs/, with the paths that the files name."""

from collections.abc import Callable
from functools import partial

from ossature import recipes
from ossature.config import TrainConfig

CORPUS = ["data/dclm_01_text_document"]


def _tuned(size: str, scheme: str | None, word: str) -> Callable[[], TrainConfig]:
    make = {
        "20b": recipes.gpt_oss_20b_finetune_config,
        "120b": recipes.gpt_oss_120b_finetune_config,
    }
    return partial(
        make[size],
        name=f"{size}_{word}",
        peft=scheme,
        pretrained_checkpoint=f"models/gpt-oss-{size}",
    )


FILES: dict[str, Callable[[], TrainConfig]] = {
    "20b_pretrain": partial(
        recipes.gpt_oss_20b_pretrain_config, name="20b_pretrain", data_paths=CORPUS
    ),
    "120b_pretrain": partial(
        recipes.gpt_oss_120b_pretrain_config, name="120b_pretrain", data_paths=CORPUS
    ),
    **{
        f"{size}_{word}": _tuned(size, scheme, word)
        for size in ("20b", "120b")
        for scheme, word in ((None, "sft"), ("lora", "lora"), ("dora", "dora"))
    },
}
