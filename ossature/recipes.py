"""The published recipes of the gpt-oss guides, as functions that return a `TrainConfig`.

Names, keywords and defaults are those of NVIDIA-NeMo/Megatron-Bridge (v0.3.0
`megatron/bridge/recipes/gpt_oss`); where published values contradict the published intent they are
corrected: the vocabulary is that of gpt-oss and not 32,000, weight decay is the stated 0.1 and
acts on matrices alone, the loss is per counted token, experts are balanced by a bias that is zero
at the end, data has to be given.  The same recipes as run files are in configs/.

No torch here: a recipe is a few numbers.
"""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ossature.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LogConfig,
    LoraConfig,
    OptimConfig,
    ParallelConfig,
    RouterConfig,
    TrainConfig,
)

EVAL_BATCHES = 32
"""Global batches of one validation."""

IDS = {"20b": "openai/gpt-oss-20b", "120b": "openai/gpt-oss-120b"}

PRETRAIN = {
    "debug": ParallelConfig(),
    "20b": ParallelConfig(tp=2, pp=4, ep=4),
    "120b": ParallelConfig(tp=2, pp=4, ep=16),
}
SFT = {
    "debug": ParallelConfig(),
    "20b": ParallelConfig(ep=8),
    "120b": ParallelConfig(pp=4, ep=8),
}
ADAPTERS = {
    "debug": ParallelConfig(),
    "20b": ParallelConfig(),
    "120b": ParallelConfig(ep=8),
}
LEARNING_RATE = {"full": 5e-6, "lora": 1e-4, "dora": 1e-4}

REFUSED = {
    "use_megatron_fsdp": "the engine is torch.distributed",
    "comm_overlap_config": "FSDP overlaps communication by itself; see parallel.prefetch",
    "cp_comm_type": "full layers gather keys and values, sliding layers exchange a halo",
}
"""Published keywords of another engine: accepted when off, refused by a sentence when set."""

AXES = {
    "tensor_model_parallel_size": "tp",
    "pipeline_model_parallel_size": "pp",
    "context_parallel_size": "cp",
    "expert_model_parallel_size": "ep",
    "expert_tensor_parallel_size": "etp",
}
"""Published names of the axes."""


def gpt_oss_20b_pretrain_config(**keywords: Any) -> TrainConfig:
    """20B from random weights: tp 2, pp 4, ep 4, on 16 GPUs and more."""
    return _pretrain("20b", **keywords)


def gpt_oss_120b_pretrain_config(**keywords: Any) -> TrainConfig:
    """120B from random weights: tp 2, pp 4, ep 16, on 64 GPUs and more."""
    return _pretrain("120b", **keywords)


def gpt_oss_debug_pretrain_config(**keywords: Any) -> TrainConfig:
    """The debug size from random weights, on one rank."""
    return _pretrain("debug", **keywords)


def gpt_oss_20b_finetune_config(**keywords: Any) -> TrainConfig:
    """20B on conversations: peft "lora" (default) and "dora" on 1 GPU, None (all weights) on 8."""
    return _finetune("20b", **keywords)


def gpt_oss_120b_finetune_config(**keywords: Any) -> TrainConfig:
    """120B on conversations: peft "lora" and "dora" on 8 GPUs, None (all weights) on 32."""
    return _finetune("120b", **keywords)


def gpt_oss_debug_finetune_config(**keywords: Any) -> TrainConfig:
    """The debug size on conversations, on one rank."""
    return _finetune("debug", **keywords)


def gpt_oss_20b_sft_config(**keywords: Any) -> TrainConfig:
    """`gpt_oss_20b_finetune_config` of all weights, as newer guides call it."""
    return _finetune("20b", peft=None, **keywords)


def gpt_oss_120b_sft_config(**keywords: Any) -> TrainConfig:
    """`gpt_oss_120b_finetune_config` of all weights, as newer guides call it."""
    return _finetune("120b", peft=None, **keywords)


def gpt_oss_20b_peft_config(peft_scheme: str = "lora", **keywords: Any) -> TrainConfig:
    """`gpt_oss_20b_finetune_config` of adapters, as newer guides call it."""
    return _finetune("20b", peft=peft_scheme, **keywords)


def gpt_oss_120b_peft_config(peft_scheme: str = "lora", **keywords: Any) -> TrainConfig:
    """`gpt_oss_120b_finetune_config` of adapters, as newer guides call it."""
    return _finetune("120b", peft=peft_scheme, **keywords)


def _pretrain(
    size: str,
    *,
    hf_path: str = "",
    dir: str | Path = "runs",
    name: str = "default",
    data_paths: Sequence[str | Path] | str | None = None,
    data_args_path: str | Path | None = None,
    train_data_path: Sequence[str] | str | None = None,
    valid_data_path: Sequence[str] | str | None = None,
    test_data_path: Sequence[str] | str | None = None,
    per_split_data_args_path: str | Path | None = None,
    dataset: DataConfig | None = None,
    mock: bool = False,
    train_iters: int = 1_000_000,
    global_batch_size: int = 512,
    micro_batch_size: int = 1,
    seq_length: int = 4096,
    lr: float = 3e-4,
    min_lr: float = 3e-5,
    lr_warmup_iters: int = 2000,
    lr_decay_iters: int | None = None,
    eval_interval: int = 2000,
    save_interval: int = 500,
    num_layers: int | None = None,
    pretrained_checkpoint: str | Path | None = None,
    use_null_tokenizer: bool = False,
    wandb_project: str | None = None,
    wandb_entity: str | None = None,
    wandb_exp_name: str | None = None,
    **rest: Any,
) -> TrainConfig:
    if use_null_tokenizer:
        raise ValueError(
            "use_null_tokenizer must be False: it stood for a vocabulary of 32,000, and gpt-oss "
            "has 201,088; data carries its own tokenizer"
        )
    data = dataset or _corpus(
        seq_length, data_paths, data_args_path,
        {"train": train_data_path, "validation": valid_data_path, "test": test_data_path},
        per_split_data_args_path, mock,
    )  # fmt: skip
    tokens = global_batch_size * seq_length
    return TrainConfig(
        run=Path(dir) / name,
        model=_model(size, hf_path),
        num_layers=num_layers or 0,
        init=None if pretrained_checkpoint is None else Path(pretrained_checkpoint),
        steps=train_iters,
        seed=1234,
        global_batch_tokens=tokens,
        micro_batch_tokens=micro_batch_size * seq_length,
        gc_every_steps=100,
        data=data,
        optim=OptimConfig(
            lr=lr,
            min_lr=min_lr,
            warmup_steps=lr_warmup_iters,
            decay_steps=_decay(lr_decay_iters, train_iters, lr_warmup_iters),
            beta2=0.95,
            eps=1e-5,
        ),
        # A router that was trained is not balanced anew.
        router=RouterConfig(
            bias_update_rate=1e-3 if pretrained_checkpoint is None else 0.0,
            bias_anneal_steps=min(2000, train_iters),
        ),
        eval=EvalConfig(every_steps=eval_interval, tokens=EVAL_BATCHES * tokens),
        checkpoint=CheckpointConfig(every_steps=save_interval),
        parallel=_parallel(PRETRAIN[size], rest),
        log=_log(10, wandb_project, wandb_entity, wandb_exp_name),
    )


def _finetune(
    size: str,
    *,
    hf_path: str = "",
    dir: str | Path = "runs",
    name: str = "default",
    pretrained_checkpoint: str | Path | None = None,
    peft: str | None = "lora",
    data_paths: Sequence[str | Path] | str | None = None,
    packed_sequence: bool = True,
    train_iters: int = 1000,
    global_batch_size: int = 128,
    micro_batch_size: int = 1,
    seq_length: int = 2048,
    finetune_lr: float | None = None,
    min_lr: float = 0.0,
    lr_warmup_iters: int = 50,
    lr_decay_iters: int | None = None,
    eval_interval: int = 50,
    save_interval: int = 250,
    wandb_project: str | None = None,
    wandb_entity: str | None = None,
    wandb_exp_name: str | None = None,
    **rest: Any,
) -> TrainConfig:
    scheme = "full" if peft in (None, "none") else str(peft)
    if scheme not in LEARNING_RATE:
        raise ValueError(f"peft ({peft}) must be one of 'lora', 'dora', None")
    if not packed_sequence:
        raise ValueError(
            "packed_sequence is a property of the data folder: build it with "
            "`ossature data chat --pack false`"
        )
    start = pretrained_checkpoint or (hf_path if Path(hf_path).is_dir() and hf_path else None)
    if start is None:
        raise ValueError(
            "give pretrained_checkpoint, the weights to start from (or a local folder as hf_path): "
            "nothing is downloaded, and fine-tuning random weights is no use"
        )
    tokens = global_batch_size * seq_length
    lora = {
        "full": LoraConfig(),
        "lora": LoraConfig(rank=32, alpha=32.0),
        "dora": LoraConfig(rank=32, alpha=64.0, dora=True),
    }[scheme]
    return TrainConfig(
        run=Path(dir) / name,
        model=_model(size, hf_path),
        init=Path(start),
        steps=train_iters,
        seed=5678,
        global_batch_tokens=tokens,
        micro_batch_tokens=micro_batch_size * seq_length,
        gc_every_steps=100,
        data=_corpus(seq_length, data_paths or "data/chats"),
        lora=lora,
        optim=OptimConfig(
            lr=LEARNING_RATE[scheme] if finetune_lr is None else finetune_lr,
            min_lr=min_lr,
            warmup_steps=lr_warmup_iters,
            decay_steps=_decay(lr_decay_iters, train_iters, lr_warmup_iters),
            beta2=0.98,
        ),
        eval=EvalConfig(every_steps=eval_interval, tokens=EVAL_BATCHES * tokens),
        checkpoint=CheckpointConfig(every_steps=save_interval),
        parallel=_parallel((SFT if scheme == "full" else ADAPTERS)[size], rest),
        log=_log(1, wandb_project, wandb_entity, wandb_exp_name),
    )


def _model(size: str, hf_path: str) -> str:
    """A named size, or the folder whose config.json says the shape."""
    if hf_path in ("", IDS.get(size)):
        return size
    if not Path(hf_path).is_dir():
        raise ValueError(f"hf_path ({hf_path}) must be {IDS.get(size, size)} or a local folder")
    return hf_path


def _decay(decay_iters: int | None, steps: int, warmup: int) -> int:
    """Published decays count from the first step; ours from the end of the warm-up."""
    if decay_iters is None or decay_iters >= steps:
        return 0
    return max(1, decay_iters - warmup)


def _corpus(
    seq_length: int,
    data_paths: Sequence[str | Path] | str | None,
    data_args_path: str | Path | None = None,
    splits: dict[str, Sequence[str] | str | None] | None = None,
    per_split_path: str | Path | None = None,
    mock: bool = False,
) -> DataConfig:
    """One blend for all splits, or one for each; mock data only when asked for."""
    given = {split: paths for split, paths in (splits or {}).items() if paths is not None}
    if per_split_path is not None:
        given |= json.loads(Path(per_split_path).read_text("utf-8"))
        given = {{"valid": "validation"}.get(split, split): v for split, v in given.items()}
    if data_args_path is not None:
        data_paths = Path(data_args_path).read_text("utf-8")
    sources = [bool(data_paths), bool(given), mock]
    if sum(sources) != 1:
        raise ValueError(
            "give exactly one of data_paths (or data_args_path), a blend for each split, and "
            f"mock=True ({sum(sources)} are given)"
        )
    if mock:
        return DataConfig(mock=True, seq_len=seq_length)
    if given:
        blends: dict[str, Any] = {f"{s}_blend": _words(paths) for s, paths in given.items()}
        return DataConfig(seq_len=seq_length, **blends)
    words = _words(data_paths or "")
    if len(words) == 1 and _is_folder_of_ours(words[0]):
        return DataConfig(path=Path(words[0]), seq_len=seq_length)
    return DataConfig(blend=words, split="9999,8,2", seq_len=seq_length)


def _words(paths: Sequence[str | Path] | str) -> tuple[str, ...]:
    words = paths.split() if isinstance(paths, str) else [str(path) for path in paths]
    for word in words:
        if word.endswith((".jsonl", ".nvjsonl", ".json", ".txt", ".parquet", ".zst")):
            raise ValueError(
                f"data_paths: {word} is text, not tokens: make a folder of tokens from it with "
                "`ossature data build` and give that"
            )
    return tuple(words)


def _is_folder_of_ours(path: str) -> bool:
    """A data folder brings its own split; a bare .bin/.idx prefix does not."""
    return not path.endswith("_document")


def _parallel(default: ParallelConfig, rest: dict[str, Any]) -> ParallelConfig:
    """The published layout with the axes that are given; the remaining keywords are checked."""
    axes = {name: getattr(default, name) for name in ("tp", "pp", "cp", "ep", "etp")}
    options: dict[str, Any] = {}
    for key, value in rest.items():
        if key in AXES:
            axes[AXES[key]] = value
        elif key == "virtual_pipeline_model_parallel_size":
            if value and value > 1:
                options = {"pp_schedule": "Interleaved1F1B", "pp_chunks": value}
        elif key == "sequence_parallel":
            if value and axes["tp"] == 1:
                continue  # nothing to divide
            if not value and axes["tp"] > 1:
                raise ValueError(
                    f"sequence_parallel must be True when tensor_model_parallel_size is "
                    f"{axes['tp']}: it is on whenever tp is"
                )
        elif key == "precision_config":
            if value != "bf16_mixed":
                raise ValueError(f'precision_config ({value}) must be "bf16_mixed"')
        elif key in REFUSED:
            if value:
                raise ValueError(f"{key} ({value}) is of another engine: {REFUSED[key]}")
        elif key == "pipeline_dtype":
            if value is not None and "bf" not in str(value):
                raise ValueError(f"pipeline_dtype ({value}) must be bfloat16, or not given")
        else:
            raise _unknown(key)
    return ParallelConfig(**axes, **options)


def _log(every_steps: int, project: str | None, entity: str | None, name: str | None) -> LogConfig:
    return LogConfig(
        every_steps=every_steps,
        wandb_project=project or "",
        wandb_entity=entity or "",
        wandb_name=name or "",
    )


def _unknown(key: str) -> TypeError:
    known = [*AXES, *REFUSED, "sequence_parallel", "precision_config"]
    for recipe in (_pretrain, _finetune):
        known += [name for name in inspect.signature(recipe).parameters if name != "rest"]
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return TypeError(f"a recipe has no keyword {key}{hint}")
