"""A foreign teacher's features beside the student's: laid over the same patches, and reached through a linear map.

Shapes: `N` photos, `R` feature rows, `D` channels of the student, `E` of the teacher, `h` x `w` the teacher's grid.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from vkd_framework.types import FeatureGrid

SHRINK = 1e-4
"""By what share boxes are made smaller, so that one of exactly a cell is not rounded up to two."""
RIDGE = 1e-3
"""Penalty of the first fit, as a share of the mean squared value of the student's channels."""


def laid_over(maps: Tensor, grid: FeatureGrid) -> Tensor:
    """`[R, E]`: what each photo's map `[N, E, h, w]` holds where the student's rows lie, in float32.

    Bilinear where a row's box is smaller than a cell of the map, and the mean over the box where it is larger. `maps`
    must cover whole photos.
    """
    from torchvision.ops import roi_align

    high, wide = maps.shape[-2:]
    box = grid.box.to(maps)
    box = box + 0.5 * SHRINK * (box.roll(2, dims=1) - box)
    box = box * maps.new_tensor([wide, high, wide, high])
    places = torch.cat([grid.photo.to(maps)[:, None], box], dim=1)
    rows: Tensor = roi_align(maps.float(), places.float(), output_size=1, aligned=True)
    return rows.flatten(1)


class LinearMap:
    """A 1 x 1 map on the patch grid, from the student's channels to the teacher's. It is no part of the model.

    Source: Romero et al., arXiv 1412.6550, equation 3, there a small convolution trained from nothing. Ours begins with
    the ridge regression of the teacher's rows on those of the student, so that the first steps are not spent on it.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    @classmethod
    def fitted(cls, rows: Iterable[tuple[Tensor, Tensor]]) -> LinearMap:
        """The map that fits pairs of student rows `[R, D]` and teacher rows `[R, E]` best. Needs at least one row."""
        moments: list[Tensor] = []
        for student, teacher in rows:
            x = functional.pad(student.double(), (0, 1), value=1.0)
            found = [x.T @ x, x.T @ teacher.to(x)]
            moments = [a + b for a, b in zip(moments, found, strict=True)] if moments else found
        within, across = moments
        penalty = RIDGE * within.diagonal()[:-1].mean().clamp(min=1e-12)
        ridge = torch.full((len(within),), float(penalty), dtype=within.dtype, device=within.device)
        ridge[-1] = 0  # the bias is free
        solved = torch.linalg.lstsq(within + ridge.diag(), across).solution.float()
        return cls(solved[:-1].T.contiguous(), solved[-1].contiguous())

    def __call__(self, rows: Tensor, *, learning: bool) -> Tensor:
        """`[R, D]` -> `[R, E]`; the map itself gets a gradient only while `learning`."""
        weight, bias = (self.weight, self.bias) if learning else (self.weight.detach(), self.bias.detach())
        return functional.linear(rows.float(), weight, bias)


def parameters_of(maps: Mapping[str, LinearMap]) -> dict[str, nn.Parameter]:
    """Name -> parameter of the maps, by names that no parameter of a model has."""
    return {f"map:{layer}:{part}": getattr(each, part) for layer, each in maps.items() for part in ("weight", "bias")}
