"""Adapters on disk: folders in PEFT's format, and the checkpoints of a run that trained some.

What PEFT calls a parameter, prefix `base_model.model.`:

    model.layers.N.self_attn.q_proj.lora_A.weight (rank, in)  .lora_B.weight (out, rank)
                                   .lora_magnitude_vector (out), DoRA
    model.layers.N.mlp.router.lora_A.weight ...          lm_head.lora_A.weight ...
    model.embed_tokens.lora_embedding_A (rank, vocab)  .lora_embedding_B (hidden, rank)
    model.layers.N.mlp.experts.lora_A.weight (experts x rank, in), expert by expert
                              .lora_B.weight (out, rank x experts), the expert running fastest

The last two are down_proj's if both matrices of the experts are adapted; gate_up_proj's are then
under `experts.base_layer.`.  With one of them alone there is no `base_layer.`, and only
adapter_config.json says which it is.

Source: tuners/lora/layer.py (ParamWrapper) and utils/save_and_load.py of huggingface/peft 0.21.2;
tests/convert/test_adapters.py loads what is written with peft, and reads what peft wrote.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ossature.checkpoint.store import INDEX, list_weights, read_weight
from ossature.config import LORA_TARGETS, LoraConfig
from ossature.convert.config import read_json
from ossature.convert.destination import new_folder
from ossature.convert.folder import resolve
from ossature.convert.names import UnknownTensor, dims, rows, unknown_sentence
from ossature.convert.source import missing_sentence
from ossature.model.config import ModelConfig

PREFIX = "base_model.model."
DTYPES = ("F32", "F16", "BF16", "F64")
"""Of tensors in PEFT's format, by safetensors' words."""
FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
EXPERTS = ("gate_up", "down")
ENDS = ("lora_a", "lora_b", "lora_magnitude")
START = "start"
"""The key of LoraConfig that says nothing of what the adapters are, but of what they were."""


@dataclass(frozen=True)
class Adapter:
    """Adapters of a model, one parameter at a time, under their native names."""

    folder: Path
    lora: LoraConfig
    base: str
    """Path or name of the model they belong to, as it was written down."""
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], Tensor]

    def of(self, weight: str) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """A, B and DoRA's magnitude of a weight by its native name; None if it has no adapter."""
        a, b, magnitude = (parameter(weight, end) for end in ENDS)
        if a not in self.shapes:
            return None
        return (
            self.read(a), self.read(b), self.read(magnitude) if magnitude in self.shapes else None
        )  # fmt: skip


def parameter(weight: str, end: str) -> str:
    """`...q_proj.weight` -> `...q_proj.lora_a`, `...experts.down_weight` -> `...down_lora_a`."""
    return weight.removesuffix("weight") + end


def is_adapter_folder(folder: Path) -> bool:
    """In PEFT's format, or a checkpoint that holds adapters alone."""
    if (folder / CONFIG).is_file():
        return True
    return (folder / INDEX).is_file() and all("lora_" in name for name in list_weights(folder))


def open_adapter(folder: Path, config: ModelConfig) -> Adapter:
    """Adapters of a model of this shape.

    Raises:
        UnknownTensor: a tensor is no adapter of this model.
        ValueError: one is missing or has another shape, or the settings are not ours to compute.
    """
    adapter = _open_peft(folder, config) if (folder / CONFIG).is_file() else _open_run(folder)
    wanted = adapter_shapes(config, adapter.lora)
    unknown = [name for name in adapter.shapes if name not in wanted]
    if unknown:
        raise UnknownTensor(f"{folder}: {', '.join(unknown[:3])} are no adapters of this model")
    missing = [name for name in wanted if name not in adapter.shapes]
    if missing:
        raise ValueError(f"{folder}: {missing_sentence(missing)}")
    for name, shape in adapter.shapes.items():
        if shape != wanted[name]:
            raise ValueError(
                f"{folder}: {name} has shape {shape}, the model makes it {wanted[name]}"
            )
    return adapter


def find_adapter(path: Path | str, config: ModelConfig) -> Adapter:
    """`open_adapter` of a folder in PEFT's format, or of a run's newest checkpoint.

    Raises:
        ValueError: there is none, as well.
    """
    path = Path(path)
    folder = path if (path / CONFIG).is_file() else resolve(path)
    if not is_adapter_folder(folder):
        raise ValueError(f"{folder}: holds no adapter: neither PEFT's nor a run's with lora.rank")
    return open_adapter(folder, config)


def adapter_shapes(config: ModelConfig, lora: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Native name and shape of every parameter that adapters with these settings have."""
    size, found = dims(config), {}
    for name, row in rows(config).items():
        if target_of(name) not in lora.targets:
            continue
        *experts, out, inner = (size[word] for word in row.shape)
        if name == "embedding.weight":
            out, inner = inner, out  # its rows are looked up: the matrix is (hidden, vocab)
        a, b, magnitude = (parameter(name, end) for end in ENDS)
        found |= {a: (*experts, lora.rank, inner), b: (*experts, out, lora.rank)}
        if lora.dora:
            found[magnitude] = (*experts, out)
    return found


def target_of(weight: str) -> str:
    """The word for a weight in `lora.targets`; "" for what cannot be adapted."""
    *_, module, leaf = f".{weight}".split(".")
    word = leaf.removesuffix("_weight") if module == "experts" else module
    return word if word in LORA_TARGETS and leaf.endswith("weight") else ""


def _open_run(folder: Path) -> Adapter:
    path = folder / "state.json"
    config = read_json(path).get("config")
    if not isinstance(config, dict) or "init" not in config:
        raise ValueError(f"{path}: not the state of a run: it has no config with an init")
    settings: dict[str, Any] = {}
    kept = [entry for entry in fields(LoraConfig) if entry.name != START]
    for entry in kept:
        value, kind = config.get(f"lora.{entry.name}"), type(entry.default)
        value = tuple(value) if isinstance(value, list) else value
        if type(value) is not kind:
            raise ValueError(f"{path}: lora.{entry.name} ({value!r}) must be of {kind.__name__}")
        settings[entry.name] = value
    known = {f"lora.{name}" for name in (*settings, START)}
    unknown = [key for key in config if key.startswith("lora.") and key not in known]
    if unknown:
        raise ValueError(f"{path}: {unknown[0]} is no setting of adapters that we know")
    try:
        lora = LoraConfig(**settings)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    shapes = {name: shape for name, (shape, _) in list_weights(folder).items()}
    return Adapter(
        folder, lora, str(config["init"]), shapes, lambda name: read_weight(folder, name)
    )


class Place(NamedTuple):
    """Where PEFT keeps a parameter."""

    native: str
    kind: str
    """plain, or expert_a and expert_b."""


def peft_places(config: ModelConfig, lora: LoraConfig) -> dict[str, Place]:
    """PEFT's name -> our parameter, for all that adapters with these settings have."""
    places: dict[str, Place] = {}
    for name, row in rows(config).items():
        target = target_of(name)
        if target not in lora.targets:
            continue
        module = PREFIX + row.hugging_face.removesuffix(".weight")
        a, b = ".lora_A.weight", ".lora_B.weight"
        if target == "embedding":
            a, b = ".lora_embedding_A", ".lora_embedding_B"
        if target in EXPERTS:
            module = module.rpartition(".")[0]
            if target == "gate_up" and "down" in lora.targets:
                module += ".base_layer"
        kinds = ("expert_a", "expert_b", "plain") if target in EXPERTS else ("plain",) * 3
        keys = (module + a, module + b, module + ".lora_magnitude_vector")
        for key, end, kind in zip(keys, ENDS, kinds, strict=True):
            if end != "lora_magnitude" or lora.dora:
                places[key] = Place(parameter(name, end), kind)
    return places


def _open_peft(folder: Path, config: ModelConfig) -> Adapter:
    settings = read_json(folder / CONFIG)
    if not (folder / FILE).is_file():
        raise ValueError(f"{folder}: has {CONFIG} and no {FILE}")
    try:
        file = safe_open(folder / FILE, "pt")
    except SafetensorError as error:
        raise ValueError(f"{folder / FILE}: {error}") from None
    found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    lora = peft_settings(settings, set(found), folder / CONFIG)
    places = peft_places(config, lora)
    unknown = [key for key in found if key not in places]
    if unknown:
        raise UnknownTensor(f"{folder / FILE}: {unknown_sentence(unknown)}")
    keys = {place.native: key for key, place in places.items() if key in found}
    wanted = adapter_shapes(config, lora)

    def read(name: str) -> Tensor:
        tensor, shape = file.get_tensor(keys[name]), wanted[name]
        kind = places[keys[name]].kind
        if kind == "expert_a":
            return tensor.reshape(shape)
        if kind == "expert_b":
            experts, out, rank = shape
            return tensor.reshape(out, rank, experts).permute(2, 0, 1)
        return tensor

    shapes = {}
    for name, key in keys.items():
        stored = _stored_shape(wanted[name], places[key].kind)
        if found[key] != stored:
            raise ValueError(f"{folder / FILE}: {key} has shape {found[key]}, not {stored}")
        if (dtype := file.get_slice(key).get_dtype()) not in DTYPES:
            raise ValueError(f"{folder / FILE}: {key} is {dtype}, not {', '.join(DTYPES)}")
        shapes[name] = wanted[name]
    return Adapter(folder, lora, str(settings.get("base_model_name_or_path") or ""), shapes, read)


def _stored_shape(shape: tuple[int, ...], kind: str) -> tuple[int, ...]:
    if kind == "expert_a":
        return shape[0] * shape[1], shape[2]
    if kind == "expert_b":
        return shape[1], shape[2] * shape[0]
    return shape


READ = (
    "peft_type", "bias", "init_lora_weights", "target_parameters", "base_model_name_or_path",
    "r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora",
)  # fmt: skip
SAYS_NOTHING = (
    "task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_config", "megatron_core",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size",
    "runtime_config", "ensure_weight_tying", "unsloth_fixed",
)  # fmt: skip
"""Settings of what has been, or that the names of the tensors say too.  Any other that is on
changes what is computed, in a way that we do not: modules_to_save or rank_pattern, say."""


def peft_settings(settings: dict[str, Any], keys: set[str], path: Path) -> LoraConfig:
    """Our settings for those of an adapter_config.json.

    Args:
        keys: of the tensors beside it: they, and not patterns of names, say what is adapted.
    """
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type ({settings.get('peft_type')}) must be LORA")
    if settings.get("bias", "none") != "none":
        raise ValueError(f"{path}: bias ({settings['bias']}) must be none")
    for key in settings:
        if key not in (*READ, *SAYS_NOTHING) and settings[key]:
            raise ValueError(f"{path}: {key} ({settings[key]}) is not supported")
    start = settings.get("init_lora_weights", True)
    if isinstance(start, str) and start not in ("gaussian", "orthogonal"):
        raise ValueError(f"{path}: init_lora_weights ({start}) has changed the base model too")
    parts = {part for key in keys for part in key.split(".")}
    targets = {"embed_tokens": "embedding"}
    names = [targets.get(part, part) for part in sorted(parts)]
    chosen = [name for name in names if name in LORA_TARGETS and name not in EXPERTS]
    if "experts" in parts:
        chosen += _expert_targets(
            settings.get("target_parameters") or [], "base_layer" in parts, path
        )
    for key, kind in PEFT_TYPES.items():
        value = settings.get(key)
        if value is None and key in ("r", "lora_alpha"):
            raise ValueError(f"{path}: lacks {key}")
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise ValueError(f"{path}: {key} ({value!r}) must be a number")
    for key in ("use_dora", "use_rslora"):
        if settings.get(key) not in (None, False, True):
            raise ValueError(f"{path}: {key} ({settings[key]!r}) must be true or false")
    if settings["r"] < 1:
        raise ValueError(f"{path}: r ({settings['r']}) must be at least 1")
    try:
        return LoraConfig(
            rank=settings["r"], alpha=float(settings["lora_alpha"]),
            dropout=float(settings.get("lora_dropout") or 0.0),
            dora=bool(settings.get("use_dora")), rank_stabilised=bool(settings.get("use_rslora")),
            targets=tuple(target for target in LORA_TARGETS if target in chosen),
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


PEFT_TYPES = {"r": int, "lora_alpha": (int, float), "lora_dropout": (int, float)}


def _expert_targets(named: Any, both: bool, path: Path) -> list[str]:
    if both:
        return list(EXPERTS)
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise ValueError(f"{path}: target_parameters ({named!r}) must be a list of names")
    leaves = {name.rpartition(".")[2] for name in named}
    found = [target for target in EXPERTS if f"{target}_proj" in leaves]
    if len(found) != 1:
        raise ValueError(
            f"{path}: target_parameters ({', '.join(named) or 'none'}) must name one of "
            "gate_up_proj and down_proj: the file has one adapter of the experts"
        )
    return found


def write_peft(
    adapter: Adapter, config: ModelConfig, folder: Path, files: Mapping[str, str] | None = None
) -> list[str]:
    """A folder that `peft.PeftModel.from_pretrained` loads onto transformers' GptOss.

    Returns what a server may refuse, in sentences.

    Args:
        files: name and text of what goes beside: PEFT looks at none of it.

    Raises:
        ValueError: PEFT itself refuses such adapters.
    """
    lora = adapter.lora
    params = [target for target in ("gate_up", "down", "router") if target in lora.targets]
    if lora.dora and (params or "embedding" in lora.targets):
        refused = [target for target in (*params, "embedding") if target in lora.targets]
        raise ValueError(
            f"{adapter.folder}: PEFT refuses DoRA on {', '.join(refused)}: merge the adapter into "
            "the weights instead (`ossature merge`)"
        )
    modules = {"embedding": "embed_tokens"}
    names = {"gate_up": "mlp.experts.gate_up_proj", "down": "mlp.experts.down_proj"}
    names["router"] = "mlp.router.weight"
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": 0.0 if params else lora.dropout,  # PEFT has none on parameters
        "bias": "none",
        "use_dora": lora.dora,
        "use_rslora": lora.rank_stabilised,
        "target_modules": [modules.get(t, t) for t in lora.targets if t not in names],
        "target_parameters": [names[target] for target in params] or None,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "init_lora_weights": True,
        "inference_mode": True,
    }
    tensors = {}
    for key, (name, kind) in peft_places(config, lora).items():
        tensor = adapter.read(name)
        if kind == "expert_a":
            tensor = tensor.flatten(0, 1)
        elif kind == "expert_b":
            tensor = tensor.permute(1, 2, 0).flatten(1)
        tensors[key] = tensor.contiguous()
    with new_folder(folder, sum(tensor.nbytes for tensor in tensors.values())) as partial:
        save_file(tensors, partial / FILE, metadata={"format": "pt"})
        texts = {CONFIG: json.dumps(settings, indent=2) + "\n", **(files or {})}
        for name, text in texts.items():
            (partial / name).write_text(text, encoding="utf-8")
    return list(servers(lora))


def servers(lora: LoraConfig) -> list[str]:
    """What vLLM refuses of adapters with these settings (vllm-project/vllm `lora/`)."""
    experts = [target for target in EXPERTS if target in lora.targets]
    others = [target for target in ("router", "embedding", "lm_head") if target in lora.targets]
    sentences = []
    if lora.dora:
        sentences.append("vLLM does not load DoRA: merge the adapter into the weights for it")
    if len(experts) == 1:
        sentences.append(
            f"vLLM wants adapters on gate_up and down together, not on {experts[0]} alone"
        )
    if others:
        sentences.append(f"vLLM may not load adapters on {', '.join(others)}")
    return sentences
