"""Config -> the parts of a run, on this rank: data, sharded model, optimizer, and where they stand.

What can be wrong with a config is found first: layout, batch, corpus, tokenizer, checkpoint.  Then
the model is built without memory, sharded, and only then filled.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ossature.checkpoint.steps import OPTIMIZER, Saver
from ossature.checkpoint.store import load_weights, newest
from ossature.config import TrainConfig, to_json
from ossature.convert.adapters import Adapter
from ossature.convert.base import BASE, base_of, check_base, read_base
from ossature.convert.config import hugging_face_config, read_config
from ossature.convert.folder import open_source, resolve
from ossature.convert.hugging_face import generation_config, token_ids
from ossature.convert.open import fill_model
from ossature.convert.source import carried_files
from ossature.data.loader import Loader
from ossature.data.tokenizer import load as load_tokenizer
from ossature.kernels.mxfp4 import GROUP
from ossature.model.attention import Form
from ossature.model.config import SIZES, ModelConfig
from ossature.model.lora import adapt
from ossature.model.transformer import Transformer
from ossature.parallel import mesh as meshes
from ossature.parallel.float8 import check_device, check_float8
from ossature.parallel.fsdp import COMPUTE_DTYPE
from ossature.parallel.launch import Ranks
from ossature.parallel.pipeline import Pipeline
from ossature.parallel.plan import parallelize
from ossature.parallel.stages import check_pipeline
from ossature.parallel.weights import initialise
from ossature.train import optim
from ossature.train.adamw import LeanAdamW
from ossature.train.evaluate import validation_loader
from ossature.train.resume import Progress, check_config, read_state, state_text
from ossature.train.samples import check_prompts
from ossature.train.start import fill_adapted, first_adapter

FIRST_LOSS_SCALE = 2.0**15


@dataclass
class Parts:
    """Everything a run holds on this rank."""

    config: TrainConfig
    ranks: Ranks
    mesh: DeviceMesh
    model: Transformer
    pipeline: Pipeline | None
    weights: dict[str, nn.Parameter]
    """The masters of what is trained, this rank's parts: taken when nothing is gathered."""
    optimizer: torch.optim.Optimizer
    in_backward: optim.InBackward | None
    """What steps the weights, where that happens during backward."""
    loader: Loader
    validation: Loader | None
    tokenizer: Any
    """Of the data folder; None for mock data."""
    saver: Saver
    small_files: dict[str, bytes]
    """Copied into every checkpoint: config.json and the tokenizer."""
    progress: Progress
    data_state: dict[str, Any]
    """Where the loader stands after the last step that is done."""
    origin: str
    """Where the weights came from, for a person."""

    def optimizer_state(self) -> dict[str, Tensor]:
        """Moments, and the balancing biases: state of the training, with no place in weights."""
        return optim.state(self.optimizer) | dict(self.model.named_buffers())

    def save(self) -> None:
        state = state_text(self.progress, self.data_state, self.config)
        files = {**self.small_files, "state.json": state.encode()}
        step = self.progress.step
        self.saver.save(step, self.weights, self.optimizer_state(), files)


def build(config: TrainConfig, ranks: Ranks) -> Parts:
    """All parts, at the step they left off.

    Raises:
        ValueError: layout, batch, corpus, checkpoint and config do not fit together.
    """
    sizes, shape = check_layout(config, ranks.world)
    check_device(config, ranks.device)
    before = newest(config.run)
    if before is not None:
        if not config.resume:
            raise ValueError(f"{config.run}: has checkpoints and resume is false; give a new run")
        check_config(read_state(before)[2], config, before)
        if (base := read_base(before)) is not None:
            check_base(before, base, config.init)
    mesh = meshes.build(sizes, ranks.device.type)
    loader = train_loader(config, shape.vocab_size, *meshes.data_rank(mesh))
    validation = validation_loader(config, shape.vocab_size) if config.eval.every_steps else None
    adapter = None if before is not None else first_adapter(config, shape)
    tokenizer = tokenizer_of(config)
    if config.sample.every_steps:
        check_prompts(config, tokenizer)
    if config.eval.tasks and tokenizer is None:
        raise ValueError("eval.tasks needs a corpus with a tokenizer: data.mock has none")

    model, pipeline = divided_model(config, shape, mesh, ranks.device)
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = optim.build(weights.items(), config.optim, config.seed)
    in_backward = None
    if config.optim.in_backward:
        assert isinstance(optimizer, LeanAdamW)
        in_backward = optim.InBackward(optimizer)
    saver = Saver(config.run, config.checkpoint.keep, config.checkpoint.asynchronous)
    files = {}
    if ranks.first:
        files = small_files(shape, before or config.init, tokenizer, config.optim.weights)
        if config.lora.rank:
            files[BASE] = base_of(config.lora, config.init, config.seed).text().encode()
    scale = FIRST_LOSS_SCALE if config.precision == "fp16" else 1.0
    parts = Parts(
        config=config,
        ranks=ranks,
        mesh=mesh,
        model=model,
        pipeline=pipeline,
        weights=weights,
        optimizer=optimizer,
        in_backward=in_backward,
        loader=loader,
        validation=validation,
        tokenizer=tokenizer,
        saver=saver,
        small_files=files,
        progress=Progress(loss_scale=scale),
        data_state=loader.state(),
        origin=f"random weights, seed {config.seed}",
    )
    if before is None or config.lora.rank:
        begin(parts, adapter)
    if before is not None:
        resume(parts, before)
    return parts


def check_layout(config: TrainConfig, world: int) -> tuple[dict[str, int], ModelConfig]:
    """Ranks along every axis, and the model's shape, if this many ranks can train it so.

    Raises:
        ValueError: they cannot; one sentence with both numbers.
    """
    sizes = meshes.sizes(config.parallel, world)
    check_batch(config, sizes)
    if config.optim.in_backward and world > 1:
        raise ValueError(f"optim.in_backward: the number of ranks ({world}) must be 1")
    shape = model_config(config.model, config.num_layers)
    meshes.check_model(config.parallel, shape, config.data.seq_len)
    check_pipeline(config, shape.num_hidden_layers, micro_batches(config, sizes))
    check_lora(config, shape)
    check_float8(config, shape)
    return sizes, shape


def check_lora(config: TrainConfig, shape: ModelConfig) -> None:
    """Refuse a layout that adapters or a packed base do not go with."""
    lora, axes = config.lora, config.parallel
    if not lora.rank:
        return
    if lora.base == "mxfp4" and shape.intermediate_size % (GROUP * axes.etp):
        raise ValueError(
            f"lora.base = mxfp4 needs intermediate_size ({shape.intermediate_size}) to be a "
            f"multiple of {GROUP} x parallel.etp ({axes.etp})"
        )
    if axes.pp > 1 and set(lora.targets) <= {"embedding", "lm_head"}:
        raise ValueError(
            f"parallel.pp ({axes.pp}): lora.targets ({', '.join(lora.targets)}) must name what "
            "is in every block: there would be stages with nothing to train"
        )


def micro_batches(config: TrainConfig, sizes: dict[str, int]) -> int:
    """Of one rank in one optimizer step."""
    data_ranks = sizes["dp_replicate"] * sizes["dp_shard"]
    return config.global_batch_tokens // (config.micro_batch_tokens * data_ranks)


def whole_model(config: TrainConfig, shape: ModelConfig, **forms: Form) -> Transformer:
    """What the run trains, before it is divided: on the meta device, without values."""
    with torch.device("meta"):
        model = Transformer(shape, **forms)
        if config.lora.rank:
            adapt(model, config.lora, COMPUTE_DTYPE[config.precision])
        if config.optim.weights == "bf16":
            model.bfloat16()
    return model


def divided_model(
    config: TrainConfig, shape: ModelConfig, mesh: DeviceMesh, device: torch.device
) -> tuple[Transformer, Pipeline | None]:
    """This rank's part of the model, weights not yet filled, balancing biases at zero."""
    model = whole_model(config, shape)
    optim.check_states(model, config, {axis: mesh[axis].size() for axis in meshes.AXES})
    pipeline = parallelize(model, mesh, config)
    model.to_empty(device="cpu" if config.parallel.cpu_offload else device)
    if config.router.bias_update_rate:
        add_balance(model, device)
    return model, pipeline


def add_balance(model: Transformer, device: torch.device) -> None:
    """Give every router of the model the bias that balances its experts."""
    for block in model.blocks.values():
        bias = torch.zeros(model.config.num_local_experts, device=device)
        block.get_submodule("moe.router").register_buffer("balance_bias", bias)


def resume(parts: Parts, folder: Path) -> None:
    """Load weights, optimizer, loader and counters of a checkpoint, written by any number of ranks.

    The names in it must be exactly those of this run.
    """
    parts.progress, parts.data_state, _config = read_state(folder)
    load_weights(folder, parts.weights)
    load_weights(folder / OPTIMIZER, parts.optimizer_state())
    parts.loader.load_state(parts.data_state)
    parts.origin = f"{folder}, {parts.progress.step} steps done"


def begin(parts: Parts, adapter: Adapter | None = None) -> None:
    """Fill the model with what the run starts from: a checkpoint in any format, or random weights.

    With adapters that is done at every start: checkpoints of the run hold the adapters alone.

    Args:
        adapter: the values that adapters begin with; None for fresh ones.
    """
    config, model = parts.config, parts.model
    source = None if config.init is None else open_source(config.init)
    try:
        if source is not None:
            check_shape(source.folder, source.config, model.config)
            parts.origin = str(config.init)
        if config.lora.rank:
            fill_adapted(model, config, source, adapter)
            if adapter is not None:
                known = "" if (adapter.folder / BASE).is_file() else ", whose base is not known"
                parts.origin += f", adapters of {adapter.folder}{known}"
        elif source is not None:
            fill_model(model, source)
        else:
            initialise(model, config.seed)
    finally:
        if source is not None:
            source.close()


def check_shape(folder: Path, found: ModelConfig, wanted: ModelConfig) -> None:
    """Refuse a checkpoint of another model than the run's."""
    differ = [
        f"{f.name} ({getattr(found, f.name)}, model has {getattr(wanted, f.name)})"
        for f in fields(ModelConfig)
        if getattr(found, f.name) != getattr(wanted, f.name) and f.name not in _NOT_MATHEMATICS
    ]
    if differ:
        raise ValueError(f"{folder}: is not of this model: {', '.join(differ)}")


_NOT_MATHEMATICS = (
    "initializer_range", "router_aux_loss_coef", "eos_token_id", "pad_token_id", "bos_token_id",
    "max_position_embeddings",
)  # fmt: skip


def check_batch(config: TrainConfig, sizes: dict[str, int]) -> None:
    ranks = sizes["dp_replicate"] * sizes["dp_shard"]
    if config.global_batch_tokens % (config.micro_batch_tokens * ranks):
        raise ValueError(
            f"global_batch_tokens ({config.global_batch_tokens}) must be a multiple of "
            f"micro_batch_tokens ({config.micro_batch_tokens}) x dp_replicate x dp_shard ({ranks})"
        )


def model_config(name: str, num_layers: int = 0) -> ModelConfig:
    """Of a named size, or of a config.json; with its first `num_layers` layers, if not 0."""
    shape = _whole_model_config(name)
    if num_layers > shape.num_hidden_layers:
        raise ValueError(
            f"num_layers ({num_layers}) must be at most the layers of model {name} "
            f"({shape.num_hidden_layers})"
        )
    layers = num_layers or shape.num_hidden_layers
    return replace(shape, num_hidden_layers=layers, layer_types=shape.layer_types[:layers])


def _whole_model_config(name: str) -> ModelConfig:
    if name in SIZES:
        return SIZES[name]
    path = Path(name)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise ValueError(f"model = {name}: neither {', '.join(SIZES)} nor a config.json")
    return read_config(path)


def train_loader(config: TrainConfig, vocab_size: int, rank: int, world: int) -> Loader:
    return Loader(
        config.data,
        split="train",
        seed=config.seed,
        global_batch_rows=config.global_batch_tokens // config.data.seq_len,
        micro_batch_rows=config.micro_batch_tokens // config.data.seq_len,
        rank=rank,
        world=world,
        vocab_size=vocab_size,
    )


def tokenizer_of(config: TrainConfig) -> Any:
    """The tokenizer beside the corpus (of a blend: the first); None for mock data."""
    if config.data.mock:
        return None
    data = config.data
    words = [data.path] if data.path else " ".join(data.blend or data.train_blend).split()
    for path in map(Path, words):
        folder = path if path.is_dir() else path.parent
        if (folder / "tokenizer.json").is_file():
            return load_tokenizer(folder)
    return None


_NAMES = {"fp32": "float32", "bf16": "bfloat16"}


def small_files(
    shape: ModelConfig, origin: Path | None, tokenizer: Any, weights: str = "fp32"
) -> dict[str, bytes]:
    """What makes a checkpoint a model that others can read, and that ends its texts.

    Args:
        origin: checkpoint whose tokenizer and chat template are carried on, unless the corpus has
            a tokenizer of its own.
    """
    carried = [] if origin is None else carried_files(resolve(origin))
    files = {file.name: file.read_bytes() for file in carried}
    if tokenizer is not None:
        shape = replace(shape, **token_ids(tokenizer.special))
        before = json.loads(files.get("generation_config.json", b"{}"))
        generation = before | generation_config(tokenizer.special)
        files["generation_config.json"] = (json.dumps(generation, indent=2) + "\n").encode()
    text = json.dumps(hugging_face_config(shape, dtype=_NAMES[weights]), indent=2) + "\n"
    files["config.json"] = text.encode()
    if tokenizer is not None:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save(Path(folder))
            files |= {file.name: file.read_bytes() for file in Path(folder).iterdir()}
    return files


def write_config(config: TrainConfig) -> None:
    """The resolved config, as RUN/run.json."""
    text = json.dumps(to_json(config), indent=1) + "\n"
    beside = config.run / "run.json.partial"
    beside.write_text(text, encoding="utf-8")
    beside.replace(config.run / "run.json")
