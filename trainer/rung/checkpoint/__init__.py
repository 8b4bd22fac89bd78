"""How state is written and read: today, weights as Hugging Face folders."""

from rung.checkpoint.gather import gathered_tensors
from rung.checkpoint.huggingface import export_huggingface, load_huggingface

__all__ = ["export_huggingface", "gathered_tensors", "load_huggingface"]
