"""Random numbers as functions of a key and a counter: no state, the same integers in numpy and in torch."""

from rung.random.keys import name_key, step_key
from rung.random.normal import normal_from_bits_numpy, normal_from_bits_torch, normals_box, normals_numpy
from rung.random.philox import Key, philox_numpy, philox_torch
from rung_kernels.random import dropout_mask

__all__ = [
    "Key",
    "dropout_mask",
    "name_key",
    "normal_from_bits_numpy",
    "normal_from_bits_torch",
    "normals_box",
    "normals_numpy",
    "philox_numpy",
    "philox_torch",
    "step_key",
]
