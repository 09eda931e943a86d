"""`ossature info FOLDER`: what a checkpoint holds, and what is odd about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from ossature.config import parse

if TYPE_CHECKING:
    from ossature.convert.source import Source


@dataclass(frozen=True, kw_only=True)
class InfoOptions:
    """Say what a checkpoint holds: format, size, parameters, shape, and what is odd."""

    folder: tyro.conf.Positional[Path]
    """Checkpoint in any format, a GGUF file, or the folder of a run (its newest checkpoint)."""


def main(argv: list[str]) -> int:
    options = parse(InfoOptions, argv, prog="ossature info")

    from ossature.convert.folder import open_source

    for line in describe(open_source(options.folder, balance_bias=True)):
        print(line)
    return 0


def describe(source: Source) -> Iterator[str]:
    """Lines of text; opening the source has checked all names, shapes and dtypes already."""
    from ossature.convert.layout import TITLES
    from ossature.convert.source import word
    from ossature.model.flops import active_parameters, parameters

    config = source.config
    yield f"folder      {source.folder}"
    yield f"format      {TITLES[source.format]}"
    files = weight_files(source.folder)
    size = sum(file.stat().st_size for file in files)
    yield f"size        {size / 1e9:.3f} GB in {len(files)} file{'s' * (len(files) != 1)}"
    dtypes = Counter(
        "MXFP4" if source.packed(name, 0, 0) is not None else word(source.spec(name).dtype)
        for name in source.names()
    )
    held = ", ".join(f"{count} {dtype}" for dtype, count in sorted(dtypes.items()))
    yield f"weights     {len(source.names())}: {held}"
    whole, active = parameters(config), active_parameters(config)
    yield f"parameters  {whole:,} ({active:,} active for a token)"
    yield f"beside them {', '.join(path.name for path in source.files) or 'nothing'}"
    for entry in fields(config):
        value = getattr(config, entry.name)
        if entry.name == "layer_types":
            kinds = Counter(word.removesuffix("_attention") for word in value)
            value = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        yield f"  {entry.name:<24}{value}"
    found = list(odd(source))
    yield f"odd         {found[0] if found else 'nothing'}"
    for line in found[1:]:
        yield f"            {line}"


def weight_files(folder: Path) -> list[Path]:
    if folder.is_file():
        return [folder]
    return sorted([*folder.glob("*.safetensors"), *folder.glob("*.distcp")])


def odd(source: Source) -> Iterator[str]:
    """Things that are allowed, and that one may want to know."""
    from ossature.convert.config import read_json
    from ossature.convert.native import NativeSource
    from ossature.convert.source import PublishedSource, word
    from ossature.model.config import ModelConfig

    config = source.config
    gguf = source.format == "gguf"  # one file: no config.json, no tokenizer.json
    table = {} if gguf else read_json(source.folder / "config.json")
    if source.format == "bf16" and table.get("quantization_config") is not None:
        yield "config.json has a quantization_config, the weights are not quantised"
    if source.format == "mxfp4" and table.get("quantization_config") is None:
        yield "config.json has no quantization_config, the weights are in MXFP4"
    architectures = table.get("architectures", ["GptOssForCausalLM"])
    if architectures != ["GptOssForCausalLM"]:
        yield f"config.json: architectures is {architectures}; transformers wants GptOssForCausalLM"
    stated = table.get("dtype", table.get("torch_dtype"))
    dtypes = Counter(word(source.spec(name).dtype) for name in source.names())
    if stated is not None and stated != dtypes.most_common(1)[0][0]:
        yield f"config.json says {stated}, most weights are {dtypes.most_common(1)[0][0]}"
    if len(dtypes) > 1 and not gguf:
        yield f"weights of several dtypes: {', '.join(sorted(dtypes))}"
    published = ModelConfig()
    for name in ("rms_norm_eps", "rope_truncate", "swiglu_alpha", "swiglu_limit", "rope_theta"):
        if getattr(config, name) != getattr(published, name):
            yield f"{name} is {getattr(config, name)}; {getattr(published, name)} as published"
    alternating = ModelConfig(num_hidden_layers=config.num_hidden_layers).layer_types
    if config.layer_types != alternating:
        yield "layers do not alternate sliding, full, as published"
    if not gguf and "tokenizer.json" not in {path.name for path in source.files}:
        yield "no tokenizer.json"
    if isinstance(source, PublishedSource):
        used = {place.file for place in source.reader.places.values()}
        for file in weight_files(source.folder):
            if file not in used:
                yield f"{file.name} is not named by the index"
    if isinstance(source, NativeSource):
        for name in source.balance_biases():
            yield f"{name} is not zero: training has not annealed it yet"
