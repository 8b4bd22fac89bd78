"""Orthogonalisation of matrices by a Newton–Schulz iteration."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["orthogonalize", "orthogonalize_cost"]

# Keller Jordan's quintic (https://kellerjordan.github.io/posts/muon/): steepest at zero, so that five steps lift even
# small singular values into about [0.7, 1.2]. It never converges to 1, on purpose.
A, B, C = 3.4445, -4.7750, 2.0315
EPS = 1e-7

# Small matrices are too little work for a GPU one by one. Batches have this one size, filled up with zeros, because the
# library picks its kernel, and with it the rounding, by the size, and how many matrices a rank owns may not matter.
BATCH = 8
SMALL = 1024


def orthogonalize(matrices: Sequence[Tensor], steps: int, batch: int | None = None) -> list[Tensor]:
    """U·Vᵀ, roughly, of each matrix U·S·Vᵀ, in the matrices' dtype.

    ``batch``: matrices of one shape handled at a time; by default one on the CPU, where more does not help, and
    ``BATCH`` on other devices for matrices whose smaller side is below ``SMALL``.
    """
    results: list[Tensor] = list(matrices)
    by_shape: dict[tuple[int, int], list[int]] = {}
    for index, matrix in enumerate(matrices):
        by_shape.setdefault((min(matrix.shape), max(matrix.shape)), []).append(index)
    for (small, _), indices in by_shape.items():
        size = batch or (1 if matrices[0].device.type == "cpu" or small >= SMALL else BATCH)
        for start in range(0, len(indices), size):
            chunk = indices[start : start + size]
            wide = [matrices[i] if matrices[i].shape[0] == small else matrices[i].mT for i in chunk]
            wide += [torch.zeros_like(wide[0])] * (size - len(chunk))
            for i, result in zip(chunk, _newton_schulz(torch.stack(wide), steps), strict=False):
                results[i] = result if matrices[i].shape[0] == small else result.mT
    return results


def _newton_schulz(x_NRC: Tensor, steps: int) -> Tensor:
    """N matrices of R rows and C ≥ R columns; x ← A·x + (B·g + C·g²)·x with g = x·xᵀ, from unit Frobenius norm."""
    x_NRC = x_NRC / x_NRC.norm(dim=(-2, -1), keepdim=True).clamp(min=EPS)
    for _ in range(steps):
        gram_NRR = x_NRC @ x_NRC.mT
        polynomial_NRR = torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=B, alpha=C)
        x_NRC = torch.baddbmm(x_NRC, polynomial_NRR, x_NRC, beta=A)
    return x_NRC


def orthogonalize_cost(rows: int, columns: int) -> int:
    """Multiply-adds of one step of the iteration."""
    small, large = min(rows, columns), max(rows, columns)
    return 2 * small * small * large + small**3
