"""Sizes, coordinates and groups as arithmetic, and the logical tensor. Importing it imports no torch."""

from rung.layout.boxes import Box, chunk
from rung.layout.layout import Layout
from rung.layout.logical import Facts, LogicalTensor, Piece, Section, Shard, clean_name, local_view, logical_tensors

__all__ = [
    "Box",
    "Facts",
    "Layout",
    "LogicalTensor",
    "Piece",
    "Section",
    "Shard",
    "chunk",
    "clean_name",
    "local_view",
    "logical_tensors",
]
