"""Rung: distributed training of language models where the layout never changes the answer."""

__version__ = "0.1.0"
