"""Weights in the names and layouts of other projects."""

from ossature.convert.names import from_hugging_face, to_hugging_face

__all__ = ["from_hugging_face", "to_hugging_face"]
