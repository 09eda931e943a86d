"""Ossature: the open training stack for gpt-oss models, in plain PyTorch.

The public surface.  A name is imported when it is first used: `import ossature` loads no torch.

    model = ossature.load_model(folder)                        any format, or a training run
    logits = model(tokens, position=None, document=None)
    loss = ossature.language_model_loss(model, tokens, loss_mask)
    out = ossature.generate(model, prompt_tokens, max_new_tokens=16)
    theirs = ossature.convert.to_hugging_face({name: tensor})
    ossature.save_model(model, folder, format="bf16")
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ossature import convert, recipes
    from ossature.bridge import AutoBridge
    from ossature.convert.model import load_model, save_model
    from ossature.model.config import ModelConfig
    from ossature.model.transformer import Transformer
    from ossature.sample.generate import generate
    from ossature.train.loss import language_model_loss

__all__ = [
    "AutoBridge",
    "ModelConfig",
    "Transformer",
    "convert",
    "generate",
    "language_model_loss",
    "load_model",
    "recipes",
    "save_model",
]

_HOMES = {
    "AutoBridge": "ossature.bridge",
    "ModelConfig": "ossature.model.config",
    "Transformer": "ossature.model.transformer",
    "generate": "ossature.sample.generate",
    "language_model_loss": "ossature.train.loss",
    "load_model": "ossature.convert.model",
    "save_model": "ossature.convert.model",
}


def __getattr__(name: str) -> object:
    if name in ("convert", "recipes"):
        return importlib.import_module(f"ossature.{name}")
    if name == "__version__":
        from importlib.metadata import version

        return version("ossature")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'ossature' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
