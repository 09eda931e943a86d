"""A folder -> Transformer and back, one tensor at a time."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ossature.checkpoint.box import Box
from ossature.checkpoint.safetensors import Spec
from ossature.convert.adapters import CONFIG as ADAPTER_CONFIG
from ossature.convert.adapters import Adapter, open_adapter
from ossature.convert.base import Base, check_base, read_base
from ossature.convert.config import read_config
from ossature.convert.folder import MAX_SHARD_BYTES, open_source, resolve, write_folder
from ossature.convert.layout import Format
from ossature.convert.names import UnknownTensor, shapes, unknown_sentence
from ossature.convert.native import NativeSource, balance_sentence
from ossature.convert.source import FLOATS, Source, missing_sentence, word
from ossature.convert.transfer import Report, in_order, jobs
from ossature.kernels.mxfp4 import quantize
from ossature.model.attention import Form
from ossature.model.lora import adapt, pack
from ossature.model.transformer import Transformer


def load_model(
    folder: Path | str,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    *,
    attention_form: Form = "fast",
    moe_form: Form = "fast",
    experts: Literal["plain", "mxfp4"] = "plain",
    quantize_experts: bool = False,
) -> Transformer:
    """The model of a folder in any format, or of a run's newest checkpoint.

    The weights are read piece by piece into their final dtype and device.  A checkpoint that holds
    an adapter gives the base it belongs to, with the adapter beside it.

    Args:
        dtype: None keeps what each weight is stored in.
        experts: "mxfp4" keeps the experts' matrices packed, frozen, bit for bit as they are stored.
        quantize_experts: pack those of a folder that holds them otherwise; false refuses it.

    Raises:
        UnknownTensor, ValueError: the folder is damaged, or is not of this architecture.
    """
    folder = resolve(folder)
    forms: dict[str, Form] = {"attention_form": attention_form, "moe_form": moe_form}
    base = read_base(folder)
    if base is not None:
        model = _load_base(folder, base, dtype, device, forms, experts)
        load_adapter(model, folder)
        return model
    source = open_source(folder, balance_bias=True)
    try:
        if experts == "mxfp4" and not quantize_experts and not is_packed(source):
            raise ValueError(
                f"{folder}: its experts are not in MXFP4; `ossature convert --to mxfp4` rounds "
                "them (in Python: quantize_experts=True)"
            )
        with torch.device("meta"):
            model = Transformer(source.config, **forms)
            if experts == "mxfp4":
                pack(model)
        state = {
            name: torch.empty(
                p.shape,
                dtype=(dtype or source.spec(name).dtype) if p.is_floating_point() else p.dtype,
                device=device,
            )
            for name, p in model.named_parameters()
        }

        def read(job: tuple[str, int, int]) -> None:
            name, start, stop = job
            if name in state:
                state[name][start:stop].copy_(source.read(name, start, stop))
                return
            pair = source.packed(name, start, stop) or quantize(source.read(name, start, stop))
            matrix = name.removesuffix("weight")
            state[matrix + "blocks"][start:stop].copy_(pair[0])
            state[matrix + "scales"][start:stop].copy_(pair[1].mT)

        for _ in in_order(read, jobs(source)):
            pass
        if isinstance(source, NativeSource):
            for name, bias in source.balance_biases().items():
                router = model.get_submodule(name.rpartition(".")[0])
                router.register_buffer("balance_bias", bias.to(device))
                state[name] = bias.to(device)
    finally:
        source.close()
    model.load_state_dict(state, strict=True, assign=True)
    return model


@torch.no_grad()
def load_adapter(model: Transformer, folder: Path | str) -> Adapter:
    """Put an adapter on a model, in place: PEFT's folder, or a run that trained one.

    Raises:
        UnknownTensor, ValueError: the adapter is damaged, or is not of this model.
    """
    folder = Path(folder)
    if not (folder / ADAPTER_CONFIG).is_file():
        folder = resolve(folder)
    adapter = open_adapter(folder, model.config)
    adapt(model, replace(adapter.lora, base="plain", quantize_base=False))
    parameters = dict(model.named_parameters())
    for name in adapter.shapes:
        parameters[name].copy_(adapter.read(name))
    return adapter


def with_adapter(model: Transformer, folder: Path | str) -> Transformer:
    """Another model with the same weights, in the same memory, and an adapter beside them.

    Raises:
        UnknownTensor, ValueError: as `load_adapter`.
    """
    kept = itertools.chain(model.parameters(), model.buffers())
    other = copy.deepcopy(model, {id(tensor): tensor for tensor in kept})
    load_adapter(other, folder)
    return other.eval()


def is_packed(source: Source) -> bool:
    """Whether a source stores its experts' matrices in MXFP4."""
    return source.packed("blocks.0.moe.experts.down_weight", 0, 1) is not None


def _load_base(
    folder: Path,
    base: Base,
    dtype: torch.dtype | None,
    device: torch.device | str,
    forms: dict[str, Form],
    experts: Literal["plain", "mxfp4"],
) -> Transformer:
    """The model that the adapter in `folder` was trained on."""
    packed = base.packed or experts == "mxfp4"
    if base.folder:
        check_base(folder, base, Path(base.folder))
        return load_model(
            base.folder,
            dtype,
            device,
            **forms,  # type: ignore[arg-type]
            experts="mxfp4" if packed else "plain",
            quantize_experts=base.quantized,
        )
    model = Transformer(read_config(folder / "config.json"), **forms)
    model.init_weights(base.seed)
    if packed:
        pack(model)
    return model.to(device=device, dtype=dtype)


def save_model(
    model: Transformer,
    folder: Path | str,
    format: Format = "bf16",
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Report:
    """Write a model's weights and config.json to a new folder, in one of the four formats.

    "bf16" and "openai" round to bfloat16, "mxfp4" and "openai" quantise the experts, "native"
    keeps the dtype; the report says what changed.

    Raises:
        ValueError: the folder is not empty, or the format cannot hold this model.
    """
    return write_folder(ModelSource(model), folder, format, max_shard_bytes=max_shard_bytes)


class ModelSource:
    """The weights of a model in memory."""

    def __init__(self, model: Transformer) -> None:
        self.folder = Path(type(model).__name__)
        self.format: Format = "native"
        self.config = model.config
        self.files: list[Path] = []
        self._tensors = {name: p.detach() for name, p in model.named_parameters()}
        for name, buffer in model.named_buffers():
            if bool(buffer.any()):
                raise ValueError(balance_sentence(name))
        wanted = shapes(model.config)
        unknown = [name for name in self._tensors if name not in wanted]
        if unknown:
            raise UnknownTensor(unknown_sentence(unknown))
        missing = [name for name in wanted if name not in self._tensors]
        if missing:
            raise ValueError(f"the model {missing_sentence(missing)}")
        for name, tensor in self._tensors.items():
            if tensor.dtype not in FLOATS:
                raise ValueError(f"{name} has dtype {word(tensor.dtype)}, not bfloat16")
        self._names = list(wanted)

    def names(self) -> list[str]:
        return self._names

    def spec(self, name: str) -> Spec:
        tensor = self._tensors[name]
        return Spec(tensor.dtype, tuple(tensor.shape))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        return self._tensors[name][start:stop].cpu()

    def part(self, name: str, box: Box) -> Tensor:
        return self._tensors[name][box].cpu()

    def packed(
        self, name: str, start: int = 0, stop: int | None = None
    ) -> tuple[Tensor, Tensor] | None:
        return None

    def close(self) -> None:
        pass
