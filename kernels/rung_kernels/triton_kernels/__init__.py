"""Triton kernels and what launches them. Only this package imports Triton, and nobody imports it before a kernel runs.

A launcher fills tensors that its caller allocated. Kernels read and write 64-bit offsets, take rows that lie ``stride``
elements apart, convert to float32 right after loading (Triton's interpreter has no bfloat16 arithmetic) and round once.
"""
