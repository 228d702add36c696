"""Leading singular vectors of a dense matrix, when few of many are wanted."""

from __future__ import annotations

import torch
from torch import Tensor

# Columns beyond those wanted in every block of the Krylov space.
_OVERSAMPLING = 8
# From this share of the width on, all eigenvectors at once are faster.
_FEW = 1 / 32
# A vector counts as found when G v = theta v up to this share of the largest theta. Its energy is
# then the optimal one up to that share, and far closer where the next ones are clearly smaller.
_TOLERANCE = 1e-10


def leading_vectors(matrix: Tensor, count: int) -> Tensor:
    """Right singular vectors (d, count) of a float64 matrix (n, d), by falling singular value.

    Few of many: Rayleigh-Ritz in a growing block Krylov space of G = M^T M (Musco and Musco 2015,
    arXiv 1504.05477, algorithm 2), which is orthogonalised in full, until the residuals of all
    wanted vectors are negligible; that takes a fraction of the products of an eigendecomposition.
    Otherwise, and if they do not get there, the eigenvectors of G.
    """
    width = matrix.shape[1]
    if count <= _FEW * width:
        found = _krylov(matrix, count, limit=width // 4)
        if found is not None:
            return found
    return torch.linalg.eigh(matrix.T @ matrix).eigenvectors.flip(1)[:, :count]


def _krylov(matrix: Tensor, count: int, limit: int) -> Tensor | None:
    """The vectors, or None if a space of `limit` dimensions does not hold them."""
    draw = torch.Generator().manual_seed(0)
    block = torch.randn(matrix.shape[1], count + _OVERSAMPLING, generator=draw, dtype=matrix.dtype)
    block = torch.linalg.qr(block.to(matrix.device)).Q
    basis = block
    images = matrix.new_zeros(matrix.shape[1], 0)  # G times the basis
    while basis.shape[1] <= limit:
        image = matrix.T @ (matrix @ block)
        images = torch.cat([images, image], dim=1)
        values, rotation = torch.linalg.eigh(basis.T @ images)
        values, rotation = values.flip(0)[:count], rotation.flip(1)[:, :count]
        vectors = basis @ rotation
        residuals = torch.linalg.vector_norm(images @ rotation - vectors * values, dim=0)
        if residuals.max() <= _TOLERANCE * values[0]:
            return vectors
        for _ in range(2):  # once leaves rounding errors of the size of what is small by now
            image = image - basis @ (basis.T @ image)
            image = torch.linalg.qr(image).Q
        block = image
        basis = torch.cat([basis, block], dim=1)
    return None
