"""How state is written and read: checkpoints that any layout loads, and Hugging Face folders.

Importing this package imports nothing: the process that writes checkpoints, and commands that only look at them, do
without torch. The names below are imported when they are asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rung.checkpoint.config import CheckpointConfig
    from rung.checkpoint.format import CheckpointError, Manifest
    from rung.checkpoint.gather import gathered_tensors
    from rung.checkpoint.huggingface import HuggingFaceFolder, export_huggingface, load_huggingface
    from rung.checkpoint.load import load_state
    from rung.checkpoint.reader import Reader
    from rung.checkpoint.save import Checkpointer
    from rung.checkpoint.storage import Storage, locate, open_storage

__all__ = [
    "CheckpointConfig",
    "CheckpointError",
    "Checkpointer",
    "HuggingFaceFolder",
    "Manifest",
    "Reader",
    "Storage",
    "export_huggingface",
    "gathered_tensors",
    "load_huggingface",
    "load_state",
    "locate",
    "open_storage",
]

_MODULES = {
    "config": ("CheckpointConfig",),
    "format": ("CheckpointError", "Manifest"),
    "gather": ("gathered_tensors",),
    "huggingface": ("HuggingFaceFolder", "export_huggingface", "load_huggingface"),
    "load": ("load_state",),
    "reader": ("Reader",),
    "save": ("Checkpointer",),
    "storage": ("Storage", "locate", "open_storage"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
