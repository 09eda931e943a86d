"""Ossature: the open training stack for gpt-oss models."""
