from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import asked_about, changed, make_recipe, mean_loss, picture, weights

from vkd_framework.batches import shared_out
from vkd_framework.errors import RecipeError
from vkd_framework.objective import Objective
from vkd_framework.plugins import MLLM
from vkd_framework.recipe import Recipe, UnlearnConfig
from vkd_framework.saliency import Mask
from vkd_framework.simulated_attack import SimulatedAttacker
from vkd_framework.types import ImageQuestionPair, Splits
from vkd_framework.unlearn import History, Stepper, active_parameters, phase_at, rate_factor, retain_batches, unlearn


class Killed(Exception):
    """Stands for whatever ends a process in the middle of a run."""


def unlearned(mllm: MLLM, splits: Splits, recipe: Recipe, folder: Path, mask: Mask | None = None) -> History:
    return unlearn(mllm, recipe, splits, mask, resume=folder / "state.pt", record=lambda _: None)


@pytest.mark.parametrize("train", [("encoder",), ("projector",), ("encoder", "projector")])
def test_only_the_parts_that_are_trained_move(
    student: MLLM, splits: Splits, tmp_path: Path, train: tuple[str, ...]
) -> None:
    before = weights(student)
    unlearned(student, splits, make_recipe(train=train), tmp_path)
    expected = {name for part in train for name in student.parts[part]}  # type: ignore[index]
    assert changed(before, weights(student)) == expected


def test_the_language_model_stays_bit_identical_under_weight_decay(
    student: MLLM, splits: Splits, tmp_path: Path
) -> None:
    before, other = weights(student), student.copy()
    settings = {"steps": 3, "forget_batch": 2, "retain_batch": 2, "weight_decay": 0.5, "learning_rate": 0.01}
    unlearned(student, splits, make_recipe(unlearn=settings), tmp_path / "decay")
    unlearned(other, splits, make_recipe(unlearn={**settings, "weight_decay": 0.0}), tmp_path / "none")
    assert changed(weights(other), weights(student)) >= set(student.parts["projector"])  # it does decay
    assert not changed(before, weights(student)) & set(student.parts["language_model"])
    assert not any(parameter.requires_grad for parameter in student.model.parameters())


def test_the_gradient_of_a_step_is_no_longer_than_the_recipe_says(student: MLLM, splits: Splits) -> None:
    recipe = make_recipe(unlearn={"clip": 1e-3, "forget_batch": 2, "retain_batch": 2})
    stepper = Stepper(student, recipe, splits, None)
    entry, _ = stepper.step(0)
    gradients = [parameter.grad for parameter in student.parameters(recipe.train).values()]
    assert entry["gradient_norm"] > 1e-2
    assert torch.nn.utils.get_total_norm([g for g in gradients if g is not None]) == pytest.approx(1e-3, rel=1e-2)


def test_a_batch_of_text_alone_forgets_nothing_and_text_alone_is_refused(
    student: MLLM, splits: Splits, tmp_path: Path
) -> None:
    text = replace(splits.text[0], id="text")
    mixed = replace(splits, forget=(splits.forget[0], text))
    one_by_one = make_recipe(unlearn={"steps": 2, "warmup": 0, "forget_batch": 1, "retain_batch": 2})
    assert len(unlearned(student, mixed, one_by_one, tmp_path)) == 2
    with pytest.raises(RecipeError, match="has no influence on the forget terms"):
        unlearned(student.copy(), replace(splits, forget=(text,)), one_by_one, tmp_path / "text")


@pytest.mark.slow
def test_small_steps_lead_a_model_in_bfloat16_where_they_lead_one_in_float32(
    student: MLLM, splits: Splits, tmp_path: Path
) -> None:
    student.model.to(torch.bfloat16)

    def moved(dtype: torch.dtype, **settings: Any) -> torch.Tensor:
        mllm = student.copy()
        mllm.model.to(dtype)
        before = {name: p.detach().clone() for name, p in mllm.model.named_parameters()}
        settings = {"steps": 20, "learning_rate": 1e-4, "warmup": 0, "forget_batch": 4, "retain_batch": 4} | settings
        recipe = make_recipe(unlearn=settings, losses={"repel": {"weight": 0}})  # which at first has no direction
        unlearned(mllm, splits, recipe, tmp_path / f"{dtype}{len(settings)}")
        after = mllm.parameters(recipe.train)
        return torch.cat([(p.detach() - before[name]).flatten() for name, p in after.items()]).float()

    wanted = moved(torch.float32)
    found, rounded = moved(torch.bfloat16), moved(torch.bfloat16, master_weights=False)
    alike, without = (float(torch.cosine_similarity(one, wanted, dim=0)) for one in (found, rounded))
    assert without < 0.8 < 0.95 < alike


def forgetting(steps: int = 20, **phase: float) -> Recipe:
    settings = {"steps": steps, "learning_rate": 3e-3, "warmup": 0, "forget_batch": 5, "retain_batch": 5}
    return make_recipe(unlearn={**settings, "phases": [{"share": 1, **phase}]})


def test_forgotten_answers_become_unlikely_while_retained_ones_stay(knowing: MLLM, few: Splits, tmp_path: Path) -> None:
    mllm = knowing.copy()
    assert mean_loss(mllm, few.forget) < 0.5
    unlearned(mllm, few, forgetting(forget=1.0), tmp_path)
    assert mean_loss(mllm, few.forget) > 2.0
    assert mean_loss(mllm, few.retain) < 0.5


@pytest.mark.slow
def test_with_the_forget_terms_at_zero_strength_it_does_not_matter_what_is_to_be_forgotten(
    knowing: MLLM, few: Splits, tmp_path: Path
) -> None:
    others = replace(few, forget=few.forget[:3])

    def apart(**phase: float) -> float:
        ends = []
        for splits in (few, others):
            mllm = knowing.copy()
            unlearned(mllm, splits, forgetting(steps=5, **phase), tmp_path)
            ends.append(torch.cat([parameter.detach().flatten() for parameter in mllm.model.parameters()]))
        return float((ends[0] - ends[1]).abs().max())

    assert apart(forget=0.0) < 1e-5  # not 0: kernels round by where in memory a batch happens to lie
    assert apart(forget=1.0) > 1e-4


def test_text_only_answers_do_not_change(taught: MLLM, splits: Splits, tmp_path: Path) -> None:
    mllm = taught.copy()
    texts = splits.columns["retain_qa"][:4]
    batch = mllm.tokenize(texts)
    with torch.no_grad():
        before = mllm.model(**batch.inputs).logits
    unlearned(mllm, splits, make_recipe(), tmp_path)
    with torch.no_grad():
        assert torch.equal(mllm.model(**batch.inputs).logits, before)


@pytest.mark.parametrize(
    ("at", "turns"),
    [
        (1, False),
        pytest.param(2, True, marks=pytest.mark.slow),
        pytest.param(3, False, marks=pytest.mark.slow),
        pytest.param(3, True, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_was_killed_and_resumed_equals_an_uninterrupted_one(
    tiny: MLLM, splits: Splits, tmp_path: Path, at: int, turns: bool
) -> None:
    settings = {"steps": 5, "warmup": 2, "forget_batch": 7, "retain_batch": 5, "weight_decay": 0.1}
    phases = [{"share": 0.6, "forget": 1.0}, {"share": 0.4, "forget": 0.1}]
    attack = {"weight": 0.5, "horizon": [1, 3], "head_start": 0, "batch_size": 3, "turns": turns}
    recipe = make_recipe(unlearn={**settings, "phases": phases, "checkpoint_every": at}, simulated_attack=attack)
    straight, killed, resumed = tiny.copy(), tiny.copy(), tiny.copy()
    expected = unlearned(straight, splits, recipe, tmp_path / "straight")
    saved: list[History] = []

    def kill(history: History) -> None:
        saved.append(list(history))
        raise Killed

    resume = tmp_path / "killed" / "state.pt"
    with pytest.raises(Killed):
        unlearn(killed, recipe, splits, None, resume=resume, record=kill)
    assert saved == [expected[:at]]
    history = unlearn(resumed, recipe, splits, None, resume=resume, record=lambda _: None)
    assert history == expected
    assert not changed(weights(straight), weights(resumed))


@pytest.mark.slow
def test_forget_terms_and_attacker_take_turns_with_twice_their_weight(
    tiny: MLLM, splits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attack = {"weight": 1.0, "head_start": 0, "batch_size": 4}
    settings = {"steps": 5, "warmup": 0, "forget_batch": 4, "retain_batch": 4, "cosine_share": 0.0}
    turns = make_recipe(unlearn=settings, simulated_attack=attack | {"turns": True})
    history = unlearned(tiny.copy(), splits, turns, tmp_path / "turns")
    assert ["forget_output" in entry for entry in history] == [True, False, True, False, True]
    assert ["attacked" in entry for entry in history] == [False, True, False, True, False]
    assert all("retain_output" in entry for entry in history)
    weighed: list[float] = []
    add = SimulatedAttacker.add_gradient

    def noted(self: SimulatedAttacker, step: int, weight: float) -> float:
        weighed.append(weight)
        return add(self, step, weight)

    monkeypatch.setattr(SimulatedAttacker, "add_gradient", noted)
    strong = {**settings, "phases": [{"share": 1.0, "forget": 0.1}]}
    unlearned(tiny.copy(), splits, make_recipe(unlearn=strong, simulated_attack=attack | {"turns": True}), tmp_path)
    assert weighed == pytest.approx([0.2, 0.2])
    monkeypatch.undo()

    def after(steps: int, strength: float, **attacker: Any) -> dict[str, torch.Tensor]:
        mllm = tiny.copy()
        phases = [{"share": 1.0, "forget": strength}]
        changes = {"unlearn": settings | {"steps": steps, "phases": phases}, "simulated_attack": attack | attacker}
        unlearned(mllm, splits, make_recipe(**changes), tmp_path / f"{steps}{strength}{attacker}")
        return weights(mllm)

    first = after(1, 0.1, turns=True)
    assert not changed(first, after(1, 0.2, weight=0))
    assert changed(first, after(1, 0.1, turns=False))


def test_taking_turns_leaves_no_forget_pair_out(
    tiny: MLLM, splits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    forget = Objective.forget

    def noted(self: Objective, pairs: list[ImageQuestionPair], *more: Any) -> Any:
        asked.extend(pair.question for pair in pairs)
        return forget(self, pairs, *more)

    monkeypatch.setattr(Objective, "forget", noted)
    first = splits.forget[0]
    twelve = tuple(replace(first, question=f"Who is this, {number}?") for number in range(12))
    recipe = make_recipe(
        simulated_attack={"weight": 1.0, "batch_size": 2, "turns": True},
        unlearn={"steps": 8, "forget_batch": 3, "retain_batch": 2},
    )
    unlearned(tiny.copy(), replace(splits, forget=twelve), recipe, tmp_path)
    assert sorted(asked) == sorted(pair.question for pair in twelve)


def test_a_resumed_run_keeps_masked_weights_at_the_starting_model(tiny: MLLM, splits: Splits, tmp_path: Path) -> None:
    recipe = make_recipe(
        mask={"kind": "random", "density": 0.5, "scope": "all"},
        unlearn={"steps": 3, "forget_batch": 2, "retain_batch": 2, "checkpoint_every": 1, "weight_decay": 0.1},
    )
    start = tiny.parameters(("encoder", "projector"))
    generator = torch.Generator().manual_seed(0)
    mask = {name: torch.rand(p.shape, generator=generator) > 0.5 for name, p in start.items()}

    def kill(_: History) -> None:
        raise Killed

    resumed = tiny.copy()
    with pytest.raises(Killed):
        unlearn(tiny.copy(), recipe, splits, mask, resume=tmp_path / "state.pt", record=kill)
    unlearned(resumed, splits, recipe, tmp_path, mask)
    for name, parameter in resumed.parameters(("encoder", "projector")).items():
        assert torch.equal(parameter[~mask[name]], start[name][~mask[name]])


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tiny: MLLM, splits: Splits, tmp_path: Path) -> None:
    ends = []
    for i, seed in enumerate((0, 0, 1)):
        mllm = tiny.copy()
        unlearned(mllm, splits, make_recipe(seed=seed), tmp_path / str(i))
        ends.append(weights(mllm))
    assert not changed(ends[0], ends[1])
    assert changed(ends[0], ends[2])


def calls_of_the_language_model(mllm: MLLM, splits: Splits, recipe: Recipe, folder: Path) -> tuple[int, History]:
    calls: list[int] = []
    place = mllm.model.get_submodule(mllm.modules.language_model[0])
    handle = place.register_forward_hook(lambda *_: calls.append(1))
    history = unlearned(mllm, splits, recipe, folder)
    handle.remove()
    return len(calls), history


@pytest.mark.parametrize(
    ("off", "passes"),
    [
        ((), 2),
        (("forget_output",), 1),
        (("retain_output",), 1),
        (("forget_output", "retain_output"), 0),
        (("attract", "repel"), 2),
    ],
)
def test_a_weight_of_zero_switches_a_term_and_its_cost_off(
    student: MLLM, splits: Splits, tmp_path: Path, off: tuple[str, ...], passes: int
) -> None:
    # decay, because a student who starts where his teacher is would not be moved by terms on features alone
    settings = {"steps": 4, "forget_batch": 4, "retain_batch": 4, "weight_decay": 0.01}
    recipe = make_recipe(losses={term: {"weight": 0} for term in off}, unlearn=settings)
    calls, history = calls_of_the_language_model(student, splits, recipe, tmp_path)
    assert calls == passes * recipe.unlearn.steps
    terms = {"forget_output", "retain_output", "attract", "repel"}
    assert all(terms & set(entry) == terms - set(off) for entry in history)


def test_history_names_every_step_its_phase_and_its_rate(student: MLLM, splits: Splits, tmp_path: Path) -> None:
    recipe = make_recipe()
    history = unlearned(student, splits, recipe, tmp_path)
    assert [entry["step"] for entry in history] == [0, 1, 2, 3]
    assert [entry["phase"] for entry in history] == [0, 0, 1, 1]
    assert {entry["lr"] for entry in history} == {recipe.unlearn.learning_rate}


def test_at_the_start_student_and_teacher_agree(tiny: MLLM, splits: Splits) -> None:
    objective = Objective(tiny, make_recipe(), splits)
    assert objective.forget(splits.forget[:3])[1]["repel"] == pytest.approx(0, abs=1e-6)
    assert objective.retain(splits.retain[:3])[1]["attract"] == pytest.approx(0, abs=1e-6)


def test_a_visible_question_about_a_forgotten_person_keeps_its_answer_but_not_its_features(
    student: MLLM, splits: Splits
) -> None:
    about_forgotten = [pair for pair in splits.retain if pair.subject in splits.forget_subjects]
    about_others = [pair for pair in splits.retain if pair.subject not in splits.forget_subjects][:2]
    assert about_forgotten
    objective = Objective(student, make_recipe(), splits)
    assert set(objective.retain(about_forgotten)[1]) == {"retain_output"}
    for parameter in student.parameters(["encoder"]).values():
        parameter.data.mul_(1.1)
    mixed = objective.retain([*about_forgotten[:2], *about_others])[1]["attract"]
    alone = objective.retain(about_others)[1]["attract"]
    assert mixed == pytest.approx(alone, rel=1e-4)
    assert alone > 0


def test_of_the_pairs_that_attract_holds_only_a_share_is_asked_and_all_others_are(
    student: MLLM, splits: Splits
) -> None:
    about_forgotten = [pair for pair in splits.retain if pair.subject in splits.forget_subjects][:2]
    about_others = [pair for pair in splits.retain if pair.subject not in splits.forget_subjects][:8]
    pairs = [*about_others[:4], *about_forgotten, *about_others[4:]]
    for parameter in student.parameters(["encoder"]).values():
        parameter.data.mul_(1.1)

    def terms(share: float, asked: list[ImageQuestionPair]) -> tuple[float, dict[str, float]]:
        objective = Objective(student, make_recipe(losses={"retain_output": {"share": share}}), splits)
        loss, found = objective.retain(asked)
        return loss.item(), found

    loss, quarter = terms(0.25, pairs)
    _, chosen = terms(1, [about_others[0], *about_forgotten, about_others[4]])
    _, all_seen = terms(1, pairs)
    assert quarter["retain_output"] == pytest.approx(chosen["retain_output"], rel=1e-5)
    assert quarter["attract"] == pytest.approx(all_seen["attract"], rel=1e-5)
    assert loss == pytest.approx(quarter["retain_output"] + quarter["attract"], rel=1e-5)
    fewest, one = terms(0.01, about_others)[1], terms(1, about_others[:1])[1]
    assert fewest["retain_output"] == pytest.approx(one["retain_output"], rel=1e-5)


def test_attract_alone_asks_nobody_and_passes_over_what_it_does_not_hold(student: MLLM, splits: Splits) -> None:
    text = splits.columns["retain_qa"][0]
    about_others = [pair for pair in splits.retain if pair.subject not in splits.forget_subjects][:2]
    losses = {"retain_output": {"weight": 0, "share": 0.25}}
    objective = Objective(student, make_recipe(losses=losses), splits)
    for parameter in student.parameters(["encoder"]).values():
        parameter.data.mul_(1.1)
    mixed, alone = objective.retain([text, *about_others])[1], objective.retain(about_others)[1]
    assert set(mixed) == {"attract"}
    assert mixed["attract"] == pytest.approx(alone["attract"], rel=1e-5)
    assert objective.retain([text])[1] == {}


def test_where_attract_is_off_every_retain_pair_is_asked(student: MLLM, splits: Splits) -> None:
    pairs = splits.retain[:8]
    off = {"retain_output": {"share": 0.25}, "attract": {"weight": 0}}
    found = [
        Objective(student, make_recipe(losses=losses), splits).retain(pairs)[1]["retain_output"]
        for losses in (off, {"retain_output": {"share": 1}})
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_feature_terms_use_their_own_layers_where_they_name_some(student: MLLM, splits: Splits) -> None:
    repel = {"layers": ["vision.0"]}
    objective = Objective(student, make_recipe(layers=["projector"], losses={"repel": repel}), splits)
    for parameter in student.parameters(["projector"]).values():
        parameter.data.mul_(1.1)
    assert objective.forget(splits.forget[:2])[1]["repel"] == pytest.approx(0, abs=1e-9)
    assert objective.retain(splits.retain[:2])[1]["attract"] > 1e-4


def test_retain_batches_without_any_photo_are_trained_through(student: MLLM, splits: Splits, tmp_path: Path) -> None:
    texts = splits.columns["retain_qa"]
    only_text = Splits(splits.forget, texts, splits.columns, splits.forget_subjects, splits.subjects)
    history = unlearned(student, only_text, make_recipe(), tmp_path)
    assert "attract" not in history[0]
    assert history[0]["retain_output"] > 0


def test_photos_of_different_sizes_can_be_unlearnt_together(student: MLLM, splits: Splits, tmp_path: Path) -> None:
    pairs = tuple(asked_about(picture(*size)) for size in ((48, 48), (32, 16), (16, 64), (20, 20)))
    sized = Splits(pairs[:2], pairs[2:], splits.columns, ("nobody",), ("nobody",))
    history = unlearned(student, sized, make_recipe(), tmp_path)
    assert history[-1]["attract"] > 0


def config(**changes: Any) -> UnlearnConfig:
    return UnlearnConfig.model_validate({"steps": 100, **changes})


def test_phases_follow_each_other_and_the_last_one_takes_the_rest() -> None:
    thirds = [{"share": 1 / 3}, {"share": 1 / 3}, {"share": 1 / 3}]
    phases = [phase_at(step, config(phases=thirds)) for step in range(100)]
    assert phases == sorted(phases)
    assert [phases.count(phase) for phase in range(3)] == [33, 34, 33]
    assert phase_at(0, config(phases=[{"share": 1}])) == phase_at(99, config(phases=[{"share": 1}])) == 0


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_every_step_of_a_short_run_has_a_phase(steps: int) -> None:
    settings = config(steps=steps, phases=[{"share": 0.5}, {"share": 0.5}])
    assert {phase_at(step, settings) for step in range(steps)} <= {0, 1}


def test_the_rate_warms_up_holds_and_falls_to_nearly_zero() -> None:
    settings = config(warmup=10, cosine_share=0.4)
    factors = [rate_factor(step, settings) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9:61] == [1.0] * 52
    assert factors[60:] == sorted(factors[60:], reverse=True)
    assert 0 < factors[99] < 0.01


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_rate_is_defined_without_warm_up_and_at_both_ends_of_the_cosine(share: float) -> None:
    factors = [rate_factor(step, config(warmup=0, cosine_share=share)) for step in range(100)]
    assert factors[0] == 1.0
    assert (factors[-1] == 1.0) == (share == 0.0)
    assert all(0 <= factor <= 1 for factor in factors)


def test_active_parameters_are_those_that_a_mask_of_scope_all_lets_move(tiny: MLLM) -> None:
    parameters = tiny.parameters(["projector"])
    mask = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in parameters.items()}
    mask[next(iter(mask))].view(-1)[:5] = True
    assert active_parameters(parameters, mask) == 5
    assert active_parameters(parameters, None) > 1000


@pytest.mark.parametrize(
    ("size", "shares", "expected"),
    [
        (8, {"a": 0.5, "b": 0.25, "c": 0.25}, {"a": 4, "b": 2, "c": 2}),
        (7, {"a": 2, "b": 1, "c": 1}, {"a": 3, "b": 2, "c": 2}),
        (1, {"a": 0.6, "b": 0.4}, {"a": 1, "b": 0}),
    ],
)
def test_a_batch_is_shared_out_completely(size: int, shares: dict[str, float], expected: dict[str, int]) -> None:
    assert shared_out(size, shares) == expected


def test_a_retain_batch_is_made_up_as_the_recipe_says(splits: Splits) -> None:
    config = UnlearnConfig(retain_batch=8, retain_shares={"others": 0.5, "strangers": 0.25, "forgotten": 0.25})
    for step in range(3):
        subjects = [pair.subject for pair in retain_batches(splits, config, 0).batch(step)]
        assert sum(subject is None for subject in subjects) == 2
        assert sum(subject in splits.forget_subjects for subject in subjects) == 2
        assert len(subjects) == 8


def test_shares_of_kinds_that_the_data_does_not_have_are_refused(splits: Splits) -> None:
    nameless = replace(splits, retain=tuple(pair for pair in splits.retain if pair.subject is None))
    with pytest.raises(RecipeError, match=r"retain_shares: every kind .* is missing .* 0 of others, [1-9]"):
        retain_batches(nameless, UnlearnConfig(retain_batch=4, retain_shares={"others": 1.0}), 0)


def test_a_kind_that_the_data_does_not_have_leaves_its_share_to_the_others(few: Splits) -> None:
    config = UnlearnConfig(retain_batch=4, retain_shares={"others": 0.5, "strangers": 0.5})
    assert [pair.subject for pair in retain_batches(few, config, 0).batch(0)] == [few.subjects[1]] * 4
