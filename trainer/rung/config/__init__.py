"""Typed settings: composed once by Hydra, checked against dataclasses, plain dataclasses from then on."""

from rung.config.compose import Node, compose
from rung.config.reference import Setting, field_docs, literal, markdown, settings
from rung.config.tree import differences, flatten, key_of, nested, to_yaml
from rung.config.validate import choice_problem, positive_problems

__all__ = [
    "Node",
    "Setting",
    "choice_problem",
    "compose",
    "differences",
    "field_docs",
    "flatten",
    "key_of",
    "literal",
    "markdown",
    "nested",
    "positive_problems",
    "settings",
    "to_yaml",
]
