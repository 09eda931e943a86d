"""Weights in the names and layouts of other projects."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ossature.convert.names import from_hugging_face, to_hugging_face

__all__ = ["from_hugging_face", "to_hugging_face"]


def __getattr__(name: str) -> object:
    """Imported at first use: `ossature convert --help` passes through here and needs no torch."""
    if name not in __all__:
        raise AttributeError(f"module 'ossature.convert' has no attribute {name!r}")
    from ossature.convert import names

    return getattr(names, name)
