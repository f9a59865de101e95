"""Operations on batches of images, on any device."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def rotate(x: Tensor, degrees: np.ndarray) -> Tensor:
    """Rotates `(N, C, H, W)` about the centre, bilinear, 0 outside."""
    height, width = x.shape[-2:]
    radians = np.deg2rad(degrees)
    row = (np.arange(height) - (height - 1) / 2)[:, None]
    column = (np.arange(width) - (width - 1) / 2)[:, None]
    cos, sin = np.cos(radians)[:, None, None], np.sin(radians)[:, None, None]
    # As complex numbers, which add much faster than (x, y) pairs; both parts lie in [-1, 1].
    dx, dy = 2 / (width - 1), 2j / (height - 1)
    along_rows, along_columns = row * (cos * dy - sin * dx), (column * (cos * dx + sin * dy)).transpose(0, 2, 1)
    along_rows, along_columns = (
        torch.from_numpy(part.astype(np.complex64)).to(x.device) for part in (along_rows, along_columns)
    )
    grid = torch.view_as_real(along_rows + along_columns)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=True)


def shift(images: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Moves each image cyclically by `(N,)` px."""
    height, width = images.shape[-2:]
    rows = (torch.arange(height, device=images.device) - down[:, None]) % height
    columns = (torch.arange(width, device=images.device) - right[:, None]) % width
    moved = images.gather(2, rows[:, None, :, None].expand_as(images))
    return moved.gather(3, columns[:, None, None, :].expand_as(images))


def select(x: Tensor, rows: np.ndarray) -> Tensor:
    """`x[rows]` for a mask of rows; `x` itself if it selects all."""
    return x if rows.all() else x.index_select(0, torch.from_numpy(np.flatnonzero(rows)).to(x.device))


def replace(x: Tensor, rows: np.ndarray, values: Tensor) -> Tensor:
    """`x` with `values` in a mask of rows; `values` itself if it selects all."""
    return values if rows.all() else x.index_copy_(0, torch.from_numpy(np.flatnonzero(rows)).to(x.device), values)


def column(values: np.ndarray, like: Tensor) -> Tensor:
    """`(N, 1)` numbers as `(N, 1, 1, 1)` of a tensor's dtype and device."""
    return torch.from_numpy(values).to(like)[:, :, None, None]
