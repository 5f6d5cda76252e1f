"""Feature rows belong to the sample they are assigned to, and show a photo: pixels are exchanged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from vkd_framework.errors import AdapterError, HookError
from vkd_framework.features import vision_forward
from vkd_framework.testing.compare import TOLERANCE, differs, few, relative_gap
from vkd_framework.testing.outcomes import Check, Wrong
from vkd_framework.testing.subject import SIDE, Subject, half_redrawn, noise, redrawn
from vkd_framework.types import Photo

MORE = 1.05
"""How much more repainted rows must change on average, as attention spreads a change; tiny models: 1.1 and up."""
PHOTOS = 8
"""How many photos are looked at where the first does not show where the rows lie."""
GRID = "vkd_feature_grid (docs/hooks.md); vkd_framework.generic.feature_grid"
ROWS = "vkd_feature_rows (docs/hooks.md); vkd_framework.generic.feature_rows"


def rows_belong_to_their_sample(subject: Subject) -> None:
    """With another photo in one sample, exactly the rows assigned to that sample change."""
    for layer in subject.mllm.layers:
        rows = len(subject.vision.tap.features[layer.name])
        assigned = subject.adapter.feature_rows(subject.mllm.model, subject.batch.inputs, layer, rows)
        for b, pair in enumerate(subject.pairs):
            moved = [subject.moved[b, i][layer.name] for i in range(len(pair.photos))]
            changed = torch.stack(moved).any(dim=0) if moved else torch.zeros(rows, dtype=torch.bool)
            own = (assigned.sample == b) & assigned.real
            strays, still = changed & assigned.real & ~own, own & ~changed
            if bool(strays.any() | still.any()):
                what = f"{layer.name}: another photo in sample {b} ({pair.id}) changes its {int(own.sum())} rows only"
                raise Wrong(what, f"{_rows(strays)} of other samples change, {_rows(still)} of its own do not")


def gradients_stay_in_their_sample(subject: Subject) -> None:
    """A sample's rows have a gradient at its own photo's pixels and at no other's."""
    inputs = dict(subject.batch.inputs)
    name = next(n for n, t in inputs.items() if t.is_floating_point())
    pixels = inputs[name] = inputs[name].detach().clone().requires_grad_(True)
    made = subject.record(lambda: vision_forward(subject.mllm, inputs))
    found = subject.rows(inputs, made)
    differ = {key: (changed[name] != subject.batch.inputs[name]) for key, changed in subject.exchanged.items()}
    for layer, features in found.items():
        for b, pair in enumerate(subject.pairs):
            if not pair.photos:
                continue
            energy = features.rows[features.sample == b].square().sum()
            (gradient,) = torch.autograd.grad(energy, pixels, retain_graph=True, allow_unused=True)
            touched = torch.zeros_like(pixels, dtype=torch.bool) if gradient is None else gradient != 0
            for (other, i), where in differ.items():
                if bool((touched & where).any()) != (other == b):
                    raise Wrong(
                        f"{layer}: sample {b} ({pair.id}) depends on its own pixels only",
                        f"{'it depends on' if other != b else 'it does not depend on'} photo {i} of sample {other}",
                    )


def text_only_samples_have_no_rows(subject: Subject) -> None:
    """No feature row is assigned to a sample without photos, nor beyond the batch."""
    due = {b for b, pair in enumerate(subject.pairs) if pair.photos}
    for layer, features in subject.features.items():
        got = set(features.sample.tolist())
        if got != due:
            raise Wrong(f"{layer}: rows of samples {sorted(due)}", f"rows of samples {sorted(got)}")


def photos_of_a_sample_come_in_order(subject: Subject) -> None:
    """In a sample of two photos, the rows of the first come before the rows of the second."""
    for b, pair in enumerate(subject.pairs):
        if len(pair.photos) < 2:
            continue
        for layer in subject.mllm.layers:
            first, second = (subject.moved[b, i][layer.name] for i in range(2))
            order = [*first.nonzero().flatten().tolist(), *second.nonzero().flatten().tolist()]
            if not bool(first.any()) or not bool(second.any()) or order != sorted(set(order)):
                raise Wrong(
                    f"{layer.name}: rows of the first photo, then rows of the second",
                    f"first photo: {_rows(first)}; second: {_rows(second)}",
                )


def neighbours_do_not_change_a_samples_rows(subject: Subject) -> None:
    """A sample has the same real rows, in number and value, in a mixed batch and alone."""
    for b, pair in enumerate(subject.pairs):
        if not pair.photos:
            continue
        sample = f"{pair.id!r} {' and '.join('{}x{}'.format(*photo.size) for photo in pair.photos)} alone"
        try:
            inputs = subject.mllm.tokenize([pair]).inputs
            alone = subject.rows(inputs, subject.look(inputs))
        except Exception as error:
            error.add_note(f"with {sample}")
            raise
        for layer, features in subject.features.items():
            rows = features.rows[features.sample == b]
            if rows.shape != alone[layer].rows.shape:
                raise Wrong(
                    f"{layer}: {len(alone[layer].rows)} real rows for sample {b}, as {sample}",
                    f"{len(rows)} in a mixed batch; padding counts as real",
                )
            gap = relative_gap(rows, alone[layer].rows)
            if gap > 10 * TOLERANCE:
                raise Wrong(f"{layer}: the rows of sample {b} as {sample}", f"{gap:.2g} apart")


def only_rows_that_show_a_photo_are_real(subject: Subject) -> None:
    """Before the first block, real rows depend on a photo, and of an unpadded one all that depend on it are real."""
    square = subject.mllm.tokenize(subject.plain[:1]).inputs
    other = subject.mllm.tokenize([replace(subject.plain[0], photos=(redrawn(subject.pictures["square"]),))]).inputs
    for inputs, exchanged, padded in (
        (square, [other], False),
        (subject.batch.inputs, list(subject.exchanged.values()), True),
    ):
        first = subject.mllm.layers[0].path
        before, *after = (_entering(subject, first, one) for one in (inputs, *exchanged))
        if before is None:
            return
        shows = torch.stack([differs(one, before) for one in after if one is not None]).any(dim=0)
        rows = len(shows)
        for layer in subject.mllm.layers:
            if layer.name == "projector":
                continue
            real = subject.adapter.feature_rows(subject.mllm.model, inputs, layer, rows).real
            strays, lost = real & ~shows, shows & ~real
            if bool(strays.any()) or (bool(lost.any()) and not padded):
                raise Wrong(
                    f"{layer.name}: {int(shows.sum())} of {rows} rows show a photo",
                    f"{_rows(strays)} real without showing one, {_rows(lost)} showing one but not real",
                )


def rows_lie_where_the_grid_says(subject: Subject) -> str | None:
    """Repainting the left or the upper part of a photo changes the rows that lie there more than those that do not.

    An adapter may refuse a layer or a photo, which is told; what it does say must hold. Three squares side by side and
    one more for the whole have as many rows as a larger square, in which they do not lie. Where one photo does not show
    it, the mean over several decides: of few rows, some see more than others wherever they lie.
    """
    refused: dict[str, list[str]] = {}
    for wide, high in [(SIDE, SIDE), (SIDE * 2 // 3, SIDE), (SIDE * 2, SIDE), (SIDE * 3, SIDE)]:
        for part, axis in (("left", 0), ("upper", 1)):
            changes = _changes(subject, wide, high, axis, photos=1)
            if any(change is not None and not change.tells for change in changes.values()):
                changes = _changes(subject, wide, high, axis, photos=PHOTOS)
            for layer, change in changes.items():
                if change is None:
                    if axis == 0:
                        refused.setdefault(layer, []).append(f"{wide}x{high}")
                elif not change.tells:
                    raise Wrong(
                        f"{layer}: with the {part} half of photos of {wide}x{high} pixels repainted, the "
                        f"{change.rows[0]} rows there change most",
                        f"they change {change.within:.2g} on average, and the {change.rows[1]} of the other half "
                        f"{change.without:.2g}",
                    )
    return f"refused: {', '.join(f'{name} at {few(keys, 4)}' for name, keys in refused.items())}" if refused else None


@dataclass(frozen=True)
class _Change:
    """How much rows change on average, those within the repainted half and those without, and how many they are."""

    within: float
    without: float
    rows: tuple[int, int]

    @property
    def tells(self) -> bool:
        """Whether the grid agrees with it; where no row lies in one of the halves, nothing is said."""
        return not all(self.rows) or self.within > MORE * self.without


def _changes(subject: Subject, wide: int, high: int, axis: int, *, photos: int) -> dict[str, _Change | None]:
    """Layer -> what repainting half of photos of that size changes, on average over the photos; None where refused."""
    found: dict[str, list[_Change]] = {layer.name: [] for layer in subject.mllm.layers}
    for seed in range(photos):
        photo = Photo(f"{wide}x{high} {seed}", noise(wide, high, seed))
        pair = replace(subject.plain[0], photos=(photo,))
        inputs = subject.mllm.tokenize([pair]).inputs
        before = subject.look(inputs).tap.features
        after = subject.look(subject.mllm.tokenize([replace(pair, photos=(half_redrawn(photo, axis),))]).inputs)
        for layer in subject.mllm.layers:
            assigned = subject.adapter.feature_rows(subject.mllm.model, inputs, layer, len(before[layer.name]))
            try:
                grid = subject.adapter.feature_grid(subject.mllm.model, inputs, layer, assigned, [[photo.size]])
            except HookError:
                raise
            except AdapterError:
                continue
            moved = (after.tap.features[layer.name] - before[layer.name]).norm(dim=1)
            within = assigned.real & (grid.box[:, axis + 2] <= 0.5)
            without = assigned.real & (grid.box[:, axis] >= 0.5)
            found[layer.name].append(
                _Change(
                    within=float(moved[within].mean()),
                    without=float(moved[without].mean()),
                    rows=(int(within.sum()), int(without.sum())),
                )
            )
    return {
        layer: _Change(fmean(c.within for c in each), fmean(c.without for c in each), each[0].rows) if each else None
        for layer, each in found.items()
    }


def real_rows_are_finite(subject: Subject) -> None:
    """Every real row holds finite numbers."""
    for layer, features in subject.features.items():
        bad = ~features.rows.isfinite().all(dim=1)
        if bool(bad.any()):
            raise Wrong(f"{layer}: finite features", f"{_rows(bad)} are not")


def _entering(subject: Subject, path: str, inputs: Mapping[str, Tensor]) -> Tensor | None:
    """`[R, D]`: the hidden states that a vision-only pass hands to a module, flattened; None when it takes none."""
    entered: list[Tensor] = []

    def note(_module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        first = positional[0] if positional else named.get("hidden_states")
        if isinstance(first, Tensor) and first.ndim > 1:
            entered.append(first.flatten(0, -2))

    handle = subject.mllm.model.get_submodule(path).register_forward_pre_hook(note, with_kwargs=True)
    try:
        subject.look(inputs)
    finally:
        handle.remove()
    return entered[0] if entered else None


def _rows(where: Tensor) -> str:
    """`no row`, or how many rows and the first few of them."""
    found = where.nonzero().flatten().tolist()
    return f"{len(found)} rows ({few(found)})" if found else "no row"


CHECKS = (
    Check(rows_belong_to_their_sample, ROWS),
    Check(gradients_stay_in_their_sample, ROWS),
    Check(text_only_samples_have_no_rows, ROWS),
    Check(photos_of_a_sample_come_in_order, ROWS),
    Check(neighbours_do_not_change_a_samples_rows, ROWS),
    Check(only_rows_that_show_a_photo_are_real, ROWS),
    Check(rows_lie_where_the_grid_says, GRID),
    Check(real_rows_are_finite, ROWS),
)
