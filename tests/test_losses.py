from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vkd_framework.losses import (
    DISTANCES,
    Distance,
    answer_cross_entropy,
    answer_rows,
    ascent,
    attract,
    capped_ascent,
    cka,
    cosine,
    kl_divergence,
    level,
    npo,
    relative_squared,
    repel,
    similarity,
)

RELATIONAL_DISTANCES = pytest.mark.parametrize("distance", [cka, similarity])
ONE = torch.zeros(9, dtype=torch.long)


def test_cross_entropy_is_the_mean_over_each_samples_own_answer_tokens() -> None:
    probabilities = torch.tensor([[[0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]]] * 2)
    ids = torch.tensor([[0, 1, 2], [2, 0, 0]])
    answer = torch.tensor([[False, True, True], [False, False, True]])
    # The logits at a position predict the token after it.
    expected = [-(math.log(0.3) + math.log(0.1)) / 2, -math.log(0.1)]
    assert answer_cross_entropy(probabilities.log(), ids, answer).tolist() == pytest.approx(expected)


def test_cross_entropy_is_summed_in_float32_whatever_the_models_dtype() -> None:
    logits = torch.randn(1, 400, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    ids = torch.zeros(1, 400, dtype=torch.long)
    answer = torch.arange(400)[None] > 0
    loss = answer_cross_entropy(logits, ids, answer)
    assert loss.dtype == torch.float32
    exact = -logits.double().log_softmax(-1)[0, :-1, 0].mean()
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)


def test_only_logits_that_predict_an_answer_token_get_a_gradient() -> None:
    logits = torch.zeros(1, 5, 7, requires_grad=True)
    answer = torch.tensor([[False, False, False, True, False]])
    answer_cross_entropy(logits, torch.ones(1, 5, dtype=torch.long), answer).sum().backward()
    assert logits.grad is not None
    assert logits.grad[0].abs().sum(dim=1).nonzero().flatten().tolist() == [2]


def test_ascent_follows_the_loss_up_and_stops_at_the_cap() -> None:
    cross_entropy = torch.tensor([1.0, 7.0], requires_grad=True)
    term = capped_ascent(cross_entropy, cap=5.0)
    term.backward()
    assert term.item() == -3.0
    assert cross_entropy.grad is not None
    assert cross_entropy.grad.tolist() == [-0.5, 0.0]


def test_repel_is_bounded_by_its_cap_for_each_sample_and_layer() -> None:
    distance = torch.tensor([[0.5, 9.0], [2.5, 1.0]], requires_grad=True)
    term = repel(distance, cap=2.0)
    term.backward()
    assert term.item() == -(0.5 + 2.0 + 2.0 + 1.0) / 4
    assert distance.grad is not None
    assert distance.grad.tolist() == [[-0.25, 0.0], [0.0, -0.25]]


def test_attract_is_the_mean_over_layers_and_samples() -> None:
    assert attract(torch.tensor([[1.0, 2.0], [3.0, 6.0]])).item() == 3.0


def test_relative_squared_against_a_hand_computation() -> None:
    teacher = torch.tensor([[3.0, 4.0], [0.0, 2.0], [1.0, 0.0]])
    student = torch.tensor([[3.0, 5.0], [2.0, 2.0], [0.0, 0.0]])
    sample = torch.tensor([0, 0, 1])
    assert relative_squared(student, teacher, sample, 2).tolist() == pytest.approx([(1 + 4) / (25 + 4), 1.0])


def test_relative_squared_weighs_a_big_picture_as_much_as_a_small_one() -> None:
    row = torch.tensor([[1.0, 2.0]])
    teacher = row.repeat(11, 1)
    sample = torch.tensor([0] + [1] * 10)
    small, big = relative_squared(teacher * 1.5, teacher, sample, 2).tolist()
    assert small == pytest.approx(big) == pytest.approx(0.25)


def test_relative_squared_does_not_depend_on_the_scale_of_the_layer() -> None:
    teacher, student, sample = torch.randn(4, 3), torch.randn(4, 3), torch.zeros(4, dtype=torch.long)
    one, hundred = (
        relative_squared(student, teacher, sample, 1),
        relative_squared(100 * student, 100 * teacher, sample, 1),
    )
    torch.testing.assert_close(one, hundred)


def test_cosine_against_a_hand_computation() -> None:
    teacher = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    student = torch.tensor([[5.0, 0.0], [0.0, 3.0], [0.0, -1.0]])
    sample = torch.tensor([0, 0, 1])
    assert cosine(student, teacher, sample, 2).tolist() == pytest.approx([0.5, 2.0])


@pytest.mark.parametrize("distance", DISTANCES.values(), ids=DISTANCES.keys())
def test_a_sample_without_rows_has_distance_zero_and_disturbs_nobody(distance: Distance) -> None:
    teacher, student = torch.randn(3, 4), torch.randn(3, 4)
    values = distance(student, teacher, torch.tensor([0, 2, 2]), 3)
    assert values[1] == 0
    torch.testing.assert_close(values[2:], distance(student[1:], teacher[1:], torch.tensor([0, 0]), 1))


@pytest.mark.parametrize("distance", DISTANCES.values(), ids=DISTANCES.keys())
def test_distances_to_themselves_are_zero(distance: Distance) -> None:
    rows, sample = torch.randn(5, 8), torch.tensor([0, 0, 1, 1, 1])
    torch.testing.assert_close(distance(rows, rows, sample, 2), torch.zeros(2), atol=1e-6, rtol=0)


@pytest.mark.parametrize("distance", DISTANCES.values(), ids=DISTANCES.keys())
def test_a_teacher_of_zeros_gives_neither_nan_nor_infinity(distance: Distance) -> None:
    student = torch.randn(3, 4, requires_grad=True)
    values = distance(student, torch.zeros(3, 4), torch.tensor([0, 0, 1]), 2)
    repel(values, cap=2.0).backward()
    assert values.isfinite().all()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("distance", DISTANCES.values(), ids=DISTANCES.keys())
def test_repel_gives_a_finite_gradient_where_student_and_teacher_are_still_equal(distance: Distance) -> None:
    student = torch.ones(2, 4, requires_grad=True)
    repel(distance(student, student.detach().clone(), torch.tensor([0, 1]), 2), cap=2.0).backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("distance", DISTANCES.values(), ids=DISTANCES.keys())
def test_a_step_down_attract_pulls_and_a_step_down_repel_pushes(distance: Distance) -> None:
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(8, 6, generator=generator)
    start = teacher + 0.3 * torch.randn(8, 6, generator=generator)
    sample = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])

    def after_a_step(term: str) -> Tensor:
        student = start.clone().requires_grad_(True)
        values = distance(student, teacher, sample, 2)
        (attract(values) if term == "attract" else repel(values, cap=2.0)).backward()
        assert student.grad is not None
        return distance(start - 0.1 * student.grad, teacher, sample, 2)

    before = distance(start, teacher, sample, 2)
    assert (after_a_step("attract") < before).all()
    assert (after_a_step("repel") > before).all()


@pytest.mark.parametrize("distance", DISTANCES.values(), ids=DISTANCES.keys())
def test_distances_are_float32_for_half_precision_features(distance: Distance) -> None:
    teacher = torch.full((300, 64), 30.0, dtype=torch.float16)  # its squared length is not a float16
    values = distance(teacher * 1.5, teacher, torch.zeros(300, dtype=torch.long), 1)
    assert values.dtype == torch.float32
    assert values.isfinite().all()


def log_odds(z: float) -> float:
    """log sigmoid, by hand."""
    return -math.log(1 + math.exp(-z))


def test_ascent_without_a_cap_never_stops_and_weighs_every_sample_alike() -> None:
    cross_entropy = torch.tensor([1.0, 70.0], requires_grad=True)
    term = ascent(cross_entropy)
    term.backward()
    assert term.item() == -35.5
    assert cross_entropy.grad is not None
    assert cross_entropy.grad.tolist() == [-0.5, -0.5]


def test_a_level_pulls_from_both_sides_and_stops_there() -> None:
    cross_entropy = torch.tensor([1.0, 7.0, 4.0], requires_grad=True)
    term = level(cross_entropy, torch.tensor([4.0, 4.0, 4.0]))
    term.backward()
    assert term.item() == pytest.approx(2.0)
    assert cross_entropy.grad is not None
    assert cross_entropy.grad.tolist() == pytest.approx([-1 / 3, 1 / 3, 0.0])


def test_npo_is_the_formula_of_its_paper() -> None:
    log_p, before, beta = [-3.0, -8.0, -0.5], [-1.0, -2.0, -4.0], 0.4
    expected = -2 / beta * sum(log_odds(-beta * (p - r)) for p, r in zip(log_p, before, strict=True)) / 3
    assert npo(torch.tensor(log_p), torch.tensor(before), beta).item() == pytest.approx(expected, rel=1e-5)


def test_npo_pushes_answers_down_and_lets_go_of_forgotten_ones() -> None:
    log_p = torch.tensor([-1.0, -30.0], requires_grad=True)
    npo(log_p, torch.tensor([-1.0, -1.0]), 0.4).backward()
    assert log_p.grad is not None
    likely, forgotten = log_p.grad.tolist()
    assert likely == pytest.approx(0.5)  # 2 sigmoid(0) / 2 samples, as ascent's
    assert 0 < forgotten < 1e-4


def test_npo_with_a_small_beta_is_ascent_up_to_a_constant() -> None:
    log_p = torch.tensor([-1.0, -5.0, -2.0], dtype=torch.float64, requires_grad=True)
    before, beta = torch.tensor([-2.0, -1.0, -3.0], dtype=torch.float64), 1e-6
    term = npo(log_p, before, beta)
    (gradient,) = torch.autograd.grad(term, log_p)
    (of_ascent,) = torch.autograd.grad(ascent(-log_p), log_p)
    assert gradient.tolist() == pytest.approx(of_ascent.tolist(), abs=1e-5)
    constant = 2 * math.log(2) / beta - before.mean()
    assert (term - constant).item() == pytest.approx(ascent(-log_p).item(), abs=1e-4)


def test_kl_is_zero_for_equal_logits_and_the_formula_otherwise() -> None:
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    assert kl_divergence(logits, logits + 3).item() == pytest.approx(0, abs=1e-6)
    p, q = [[0.5, 0.5], [0.9, 0.1]], [[0.25, 0.75], [0.9, 0.1]]
    first = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert kl_divergence(torch.tensor(p).log(), torch.tensor(q).log()).item() == pytest.approx(first / 2, rel=1e-5)


def test_kl_pulls_towards_the_reference() -> None:
    student = torch.zeros(1, 2, requires_grad=True)
    kl_divergence(torch.tensor([[2.0, 0.0]]), student).backward()
    assert student.grad is not None
    assert student.grad[0, 0] < 0 < student.grad[0, 1]  # descent raises what the reference holds likelier


def test_answer_rows_are_those_before_each_answer_token_in_order() -> None:
    logits = torch.arange(2 * 4 * 3.0).view(2, 4, 3)
    answer = torch.tensor([[False, True, False, True], [False, False, True, False]])
    assert torch.equal(answer_rows(logits, answer), torch.stack([logits[0, 0], logits[0, 2], logits[1, 1]]))


def features(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def test_cka_against_its_formula_in_feature_space() -> None:
    x, y = features(9, 5).double(), features(9, 7, seed=1).double()
    x_centred, y_centred = x - x.mean(dim=0), y - y.mean(dim=0)
    between = (x_centred.T @ y_centred).norm() ** 2
    within = (x_centred.T @ x_centred).norm() * (y_centred.T @ y_centred).norm()
    assert cka(x.float(), y.float(), ONE, 1).item() == pytest.approx(1 - (between / within).item(), rel=1e-4)


def test_similarity_against_a_hand_computation() -> None:
    student = torch.tensor([[2.0, 0.0], [0.0, 3.0]])  # at right angles: cosine 0
    teacher = torch.tensor([[1.0, 0.0, 0.0], [5.0, 0.0, 0.0]])  # alike: cosine 1
    assert similarity(student, teacher, torch.zeros(2, dtype=torch.long), 1).item() == pytest.approx(2 / 4)


@RELATIONAL_DISTANCES
def test_relational_distances_do_not_see_rotation_or_scale(distance: Distance) -> None:
    student, teacher = features(9, 6), features(9, 4, seed=1)
    rotation, _ = torch.linalg.qr(features(6, 6, seed=2))
    before = distance(student, teacher, ONE, 1)
    torch.testing.assert_close(distance(30 * student @ rotation, 0.01 * teacher, ONE, 1), before, atol=1e-5, rtol=1e-4)
    stretched = student * torch.tensor([5.0, 1, 1, 1, 1, 1])
    assert not torch.allclose(distance(stretched, teacher, ONE, 1), before, atol=1e-3)


@RELATIONAL_DISTANCES
def test_relational_distances_see_rows_that_change_places(distance: Distance) -> None:
    rows = features(9, 6)
    assert distance(rows, rows.flip(0), ONE, 1).item() > 0.05


def test_cka_does_not_see_what_all_rows_of_a_photo_share_and_similarity_does() -> None:
    rows = features(9, 6)
    assert cka(rows + 2, rows, ONE, 1).item() == pytest.approx(0, abs=1e-5)
    assert similarity(rows + 2, rows, ONE, 1).item() > 0.05


@RELATIONAL_DISTANCES
def test_relational_distances_compare_no_rows_of_different_samples(distance: Distance) -> None:
    student, teacher = features(9, 6), features(9, 4, seed=1)
    sample = torch.tensor([0, 1, 0, 1, 1, 0, 1, 0, 0])
    together = distance(student, teacher, sample, 2)
    for b in (0, 1):
        alone = distance(student[sample == b], teacher[sample == b], ONE[: int((sample == b).sum())], 1)
        torch.testing.assert_close(together[b : b + 1], alone)
