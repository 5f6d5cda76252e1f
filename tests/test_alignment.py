from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import texts_of
from torch import Tensor
from torch.nn import functional

from vkd_framework.alignment import LinearMap, laid_over, parameters_of
from vkd_framework.errors import AdapterError
from vkd_framework.generic import feature_grid, grid_boxes
from vkd_framework.plugins import load_adapter
from vkd_framework.testing.checks.rows import rows_lie_where_the_grid_says
from vkd_framework.testing.outcomes import Wrong
from vkd_framework.testing.subject import QUESTIONS, Subject
from vkd_framework.types import DistillationLayer, FeatureGrid, FeatureRows, Splits

LAYER = DistillationLayer("vision.0", "blocks.0", 8, 0)


def whole(high: int, wide: int, photo: int = 0) -> FeatureGrid:
    return FeatureGrid(torch.full((high * wide,), photo), grid_boxes(high, wide))


@pytest.mark.parametrize(
    ("teacher", "student"), [((2, 2), (4, 4)), ((3, 2), (6, 7)), ((5, 5), (5, 5)), ((7, 4), (7, 9))]
)
def test_a_coarser_map_is_laid_over_the_rows_bilinearly(teacher: tuple[int, int], student: tuple[int, int]) -> None:
    maps = torch.randn(1, 3, *teacher)
    expected = functional.interpolate(maps, student, mode="bilinear", align_corners=False)
    torch.testing.assert_close(laid_over(maps, whole(*student)), expected[0].flatten(1).T, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("teacher", "student"), [((6, 8), (3, 4)), ((4, 9), (2, 3)), ((8, 8), (1, 1))])
def test_a_finer_map_is_averaged_over_each_row(teacher: tuple[int, int], student: tuple[int, int]) -> None:
    maps = torch.randn(1, 3, *teacher)
    expected = functional.adaptive_avg_pool2d(maps, student)
    torch.testing.assert_close(laid_over(maps, whole(*student)), expected[0].flatten(1).T, atol=1e-3, rtol=1e-3)


def test_rows_may_come_in_any_order_and_from_several_photos() -> None:
    maps = torch.randn(2, 3, 4, 5)
    one, other = whole(2, 3, photo=1), whole(3, 2, photo=0)
    both = FeatureGrid(torch.cat([one.photo, other.photo]), torch.cat([one.box, other.box]))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    found = laid_over(maps, FeatureGrid(both.photo[order], both.box[order]))
    expected = torch.cat([laid_over(maps[1:], whole(2, 3)), laid_over(maps[:1], whole(3, 2))])
    torch.testing.assert_close(found, expected[order])


def assigned(*counts: int) -> FeatureRows:
    sample = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return FeatureRows(sample, torch.ones_like(sample, dtype=torch.bool))


def placed(rows: FeatureRows, photos: list[list[tuple[int, int]]], tile: int | None = None) -> FeatureGrid:
    return feature_grid(None, {}, LAYER, rows, photos, tile=tile)  # type: ignore[arg-type]


def test_the_generic_grid_counts_photos_through_the_batch_and_skips_text() -> None:
    grid = placed(assigned(4, 0, 18), [[(48, 48)], [], [(48, 48), (30, 60)]])
    assert grid.photo.tolist() == [0] * 4 + [1] * 9 + [2] * 9
    torch.testing.assert_close(grid.box[4:13], grid_boxes(3, 3))


def test_rows_that_are_not_real_have_no_place_in_the_generic_grid() -> None:
    rows = assigned(5, 5)
    rows.real[::5] = False
    grid = placed(rows, [[(48, 48)], [(48, 48)]])
    torch.testing.assert_close(grid.box[rows.real], grid_boxes(2, 2).repeat(2, 1))


def test_rows_that_are_no_square_are_left_to_the_adapter() -> None:
    with pytest.raises(AdapterError, match=r"6 feature rows of vision\.0 .*vkd_feature_grid"):
        placed(assigned(6), [[(48, 32)]])


def test_tiles_lie_side_by_side_and_the_whole_photo_comes_last() -> None:
    grid = placed(assigned(7 * 4), [[(200, 300)]], tile=4)
    torch.testing.assert_close(grid.box[-4:], grid_boxes(2, 2))
    assert grid.box[0].tolist() == pytest.approx([0, 0, 1 / 4, 1 / 6])
    assert grid.box[4].tolist() == pytest.approx([1 / 2, 0, 3 / 4, 1 / 6])  # the second tile is beside the first
    assert grid.box[8].tolist() == pytest.approx([0, 1 / 3, 1 / 4, 1 / 2])


@pytest.mark.parametrize("photos", [[[(48, 48), (48, 96)]], [[(48, 48)]]])
def test_tiles_that_cannot_be_told_apart_are_refused(photos: list[list[tuple[int, int]]]) -> None:
    with pytest.raises(AdapterError, match="is not known"):
        placed(assigned(14 if len(photos[0]) == 2 else 6), photos, tile=4)


@pytest.fixture
def windowed(tmp_path: Path) -> Subject:
    """A Qwen2.5-VL that looks through windows so small that its rows are reordered."""
    adapter = load_adapter("qwen_vl")
    mllm = adapter.tiny_model(QUESTIONS, 48, 0, "qwen2_5_vl")
    mllm.model.config.vision_config.window_size = mllm.model.model.visual.window_size = 32
    return Subject(adapter, "tiny:qwen2_5_vl", tmp_path, mllm, mllm)


def test_rows_in_window_order_are_placed_where_they_look(windowed: Subject) -> None:
    rows_lie_where_the_grid_says(windowed)


def test_rows_in_window_order_are_found_out_when_placed_line_by_line(windowed: Subject) -> None:
    windowed.mllm.model.config.vision_config.window_size = 10_000  # what the adapter reads; the model reads its own
    with pytest.raises(Wrong, match="change"):
        rows_lie_where_the_grid_says(windowed)


def test_a_resampler_has_no_grid(splits: Splits) -> None:
    mllm = load_adapter("idefics").tiny_model(texts_of(splits), 48, 0, "idefics2")
    rows = FeatureRows(torch.zeros(9, dtype=torch.long), torch.ones(9, dtype=torch.bool))
    with pytest.raises(AdapterError, match="resampler"):
        mllm.adapter.feature_grid(mllm.model, {}, mllm.layer("projector"), rows, [[(48, 48)]])


def fitted(student: Tensor, teacher: Tensor) -> LinearMap:
    return LinearMap.fitted([(student[:20], teacher[:20]), (student[20:], teacher[20:])])


def test_a_map_begins_at_the_best_linear_fit() -> None:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(60, 6, generator=generator)
    teacher = student @ torch.randn(6, 4, generator=generator) + 3
    found = fitted(student, teacher)(student, learning=False)
    assert (found - teacher).norm() < 0.01 * teacher.norm()


def test_a_map_of_few_rows_or_dead_channels_is_finite() -> None:
    student = torch.zeros(3, 8)
    student[:, 0] = 1
    assert fitted(student, torch.randn(3, 4)).weight.isfinite().all()


def test_a_map_passes_the_gradient_on_and_learns_only_when_it_is_told_to() -> None:
    student = torch.randn(30, 6, requires_grad=True)
    one = fitted(student.detach(), torch.randn(30, 4))
    torch.autograd.backward(one(student, learning=False).sum())
    assert student.grad is not None and one.weight.grad is None
    torch.autograd.backward(one(student, learning=True).sum())
    assert one.weight.grad is not None and one.bias.grad is not None
    assert list(parameters_of({"vision.0": one})) == ["map:vision.0:weight", "map:vision.0:bias"]
