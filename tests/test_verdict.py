from __future__ import annotations

import copy
from typing import Any

import pytest

from vkd_framework.intervals import wilson
from vkd_framework.verdict import KINDS, Verdict, hiding, verdict

N = 160


def cell(exact: float, n: int = N) -> dict[str, Any]:
    return {"exact_match": exact, "n": n, "interval_95": list(wilson(exact * n, n))}


def columns(test: float, **others: float) -> dict[str, Any]:
    kept = {"retain_vqa": 0.95, "realworld_vqa": 0.95, "forget_visible_vqa": 0.95}
    return {"test_vqa": cell(test), **{name: cell(value) for name, value in {**kept, **others}.items()}}


def row(*ahead: float, scope: str = "full", pool: str = "known", share: float = 1.0) -> dict[str, Any]:
    return {"scope": scope, "pool": pool, "share": share, "steps": [10, 30, 60][: len(ahead)], "advantage": list(ahead)}


def good(**changes: Any) -> dict[str, Any]:
    """Metrics of a run at which there is nothing to find; `changes` replace whole blocks."""
    return {
        "models": {"vanilla": columns(0.97), "unlearned": columns(0.02), "retain_only": columns(0.04)},
        "train": ["encoder", "projector"],
        "proofs": {"text_only_max_logit_difference": 0.0, "reload_identical": True},
        "relearn": {
            "average_recovery": 0.3,
            "advantage_over_retain_only": -0.02,
            "advantage_by_step": [row(-0.1, 0.0, 0.02)],
            "curves": [],
        },
        "text_only": {"changed": 0.0, "n": 80},
        "degenerate": {"vanilla": 0.0, "unlearned": 0.0, "n": 600},
        "over_forgotten": {"excess": -0.3, "interval_95": [-0.5, -0.1]},
        **changes,
    }


def unlearned(test: float = 0.02, **others: float) -> dict[str, Any]:
    metrics = good()
    metrics["models"]["unlearned"] = columns(test, **others)
    return metrics


def choosing(share: float, reference: float = 0.13) -> dict[str, Any]:
    """Choice accuracy on Test VQA, and that of the model that never knew."""
    metrics = good()
    metrics["models"]["unlearned"]["test_vqa"]["choice_accuracy"] = share
    metrics["models"]["retain_only"]["test_vqa"]["choice_accuracy"] = reference
    return metrics


def relearnt(average: float | None, *rows: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return good(relearn={"advantage_over_retain_only": average, "advantage_by_step": list(rows), **changes})


def alone(*rises: float, pool: str = "known") -> dict[str, Any]:
    """Without a retain-only model; each attack rises from 0 by so much after ten steps."""
    curves = [
        {"model": "unlearned", "scope": "full", "pool": pool, "steps": [0, 10, 30], "exact_match": [0.0, rise, 1.0]}
        for rise in rises
    ]
    metrics = relearnt(None, curves=curves, average_recovery=0.6)
    del metrics["models"]["retain_only"]
    return metrics


def words(found: Verdict) -> str:
    return " ".join((found.sentence, *found.reasons)).replace("\N{NO-BREAK SPACE}", " ")


def test_nothing_found_is_forgotten_with_the_figures_that_say_so() -> None:
    found = verdict(good())
    assert (found.kind, found.reasons) == ("forgotten", ())
    assert words(found).startswith("Forgotten: 2.0 % exact answers about the forgotten people on unseen photos")
    for figure in ("before: 97.0 %", "never knew: 4.0 %", "from 95.0 % to 95.0 %", "\N{MINUS SIGN}2.0 points"):
        assert figure in words(found)


@pytest.mark.parametrize(("scopes", "said"), [(["visual"], True), (["visual", "full"], False)])
def test_an_attack_that_was_not_tried_on_every_weight_is_told(scopes: list[str], said: bool) -> None:
    found = verdict(relearnt(-0.02, curves=[{"model": "unlearned", "scope": scope} for scope in scopes]))
    assert found.kind == "forgotten"
    assert ("attack on every weight (`relearn.scopes`) was not tried" in words(found)) == said


def test_a_lead_of_attackers_who_only_have_others_is_a_lead_and_no_suspicion() -> None:
    hidden = relearnt(None, row(0.0, 0.6, pool="others"), recovery_from_others=0.4)
    found = verdict(hidden)
    assert found.kind == "hidden" and "at most +60.0 points, scope full, other people only, after 30" in words(found)
    assert "only be suspected" not in words(found) and hiding(hidden["relearn"]) == found.sentence
    level = relearnt(None, row(0.0, 0.01, pool="others"), recovery_from_others=0.0)
    assert verdict(level).kind == "forgotten" and "only be suspected" not in words(verdict(level))
    assert hiding(level["relearn"]).startswith("Not hidden, by attackers without pairs of the forgotten: at most")


def test_photos_are_called_unseen_only_where_they_were() -> None:
    found = verdict(good(unseen={"test_vqa": ["phrasings"]}))
    assert "exact answers about the forgotten people on unseen phrasings (" in words(found)


@pytest.mark.parametrize(
    ("metrics", "kind"),
    [
        (unlearned(0.10), "forgotten"),
        (unlearned(0.11), "not_forgotten"),
        (relearnt(0.0), "forgotten"),
        (relearnt(0.001), "hidden"),
        (relearnt(0.04, advantage_interval_95=[-0.001, 0.081]), "forgotten"),
        (relearnt(0.04, advantage_interval_95=[0.001, 0.079]), "hidden"),
        (relearnt(-0.1, row(0.06), advantage_interval_95=[-0.2, 0.0]), "hidden"),
        (choosing(0.13), "forgotten"),
        (choosing(wilson(0.13 * N, N)[0] + 0.001), "forgotten"),
        (choosing(wilson(0.13 * N, N)[0] - 0.001), "over_forgotten"),
        (choosing(wilson(0.13 * N, N)[1] - 0.001), "forgotten"),
        (choosing(wilson(0.13 * N, N)[1] + 0.001), "hidden"),
        (relearnt(-0.1, row(0.0, 0.05), row(-0.2, -0.2)), "forgotten"),
        (relearnt(-0.1, row(0.0, 0.051), row(-0.2, -0.2)), "hidden"),
        (relearnt(-0.1, row(0.06, pool="others")), "hidden"),
        (unlearned(retain_vqa=0.93), "forgotten"),
        (unlearned(retain_vqa=0.929), "damaged"),
        (unlearned(realworld_vqa=0.92), "forgotten"),
        (unlearned(realworld_vqa=0.919), "damaged"),
        (unlearned(forget_visible_vqa=0.92), "forgotten"),
        (unlearned(forget_visible_vqa=0.919), "damaged"),
        (unlearned(retain_vqa=0.99), "forgotten"),
        (good(text_only={"changed": 0.02, "n": 80}), "forgotten"),
        (good(text_only={"changed": 0.03, "n": 80}), "damaged"),
        (good(degenerate={"vanilla": 0.02, "unlearned": 0.07, "n": 600}), "forgotten"),
        (good(degenerate={"vanilla": 0.02, "unlearned": 0.08, "n": 600}), "damaged"),
        (good(proofs={"reload_identical": False}), "damaged"),
        (good(over_forgotten={"excess": 1.0, "interval_95": [0.5, 1.5]}), "forgotten"),
        (good(over_forgotten={"excess": 1.1, "interval_95": [0.5, 1.5]}), "over_forgotten"),
        (good(over_forgotten={"excess": 1.1, "interval_95": [-0.1, 2.3]}), "forgotten"),
    ],
)
def test_each_rule_decides_on_both_sides_of_its_threshold(metrics: dict[str, Any], kind: str) -> None:
    assert verdict(metrics).kind == kind


def test_a_model_within_the_interval_of_one_that_never_knew_has_forgotten() -> None:
    metrics = unlearned(0.18)
    metrics["models"]["retain_only"] = columns(0.15)
    assert verdict(metrics).kind == "forgotten"
    metrics["models"]["retain_only"] = columns(0.05)
    found = verdict(metrics)
    assert found.kind == "not_forgotten"
    assert "18.0 % exact answers" in found.sentence.replace("\N{NO-BREAK SPACE}", " ")


def test_what_nobody_knew_is_not_called_forgotten() -> None:
    metrics = unlearned(0.0)
    metrics["models"]["vanilla"] = columns(0.05)
    found = verdict(metrics)
    assert found.kind == "not_forgotten"
    assert "nothing to forget" in found.sentence


@pytest.mark.parametrize(("n", "kind"), [(20, "forgotten"), (40, "damaged")])
def test_one_question_is_no_damage(n: int, kind: str) -> None:
    metrics = good()
    metrics["models"]["vanilla"]["retain_vqa"] = cell(1.0, n)
    metrics["models"]["unlearned"]["retain_vqa"] = cell(0.95, n)
    assert verdict(metrics).kind == kind


def test_logits_that_differ_are_no_damage_where_the_language_model_is_trained_and_answers_stay() -> None:
    proofs = {"text_only_max_logit_difference": 0.1}
    everything = ["encoder", "projector", "language_model"]
    assert verdict(good(proofs=proofs)).kind == "damaged"
    assert verdict(good(proofs=proofs, train=everything)).kind == "forgotten"
    changed = verdict(good(proofs=proofs, train=everything, text_only={"changed": 0.4, "n": 80}))
    assert changed.kind == "damaged"
    assert "40.0 % of the answers to text-only questions" in words(changed)


def test_hiding_says_which_attack_brings_most_back() -> None:
    rows = (row(0.02, 0.06), row(0.2, 0.3, scope="visual", pool="new"), row(0.1, 0.1, share=0.05))
    said = words(verdict(relearnt(0.1, *rows)))
    assert "10.0 points better on average" in said
    assert "at most +30.0 points, scope visual, new photos, after 30 steps" in said
    said = words(verdict(relearnt(-0.1, row(0.09, share=0.05))))
    assert "scope full, 5.0 % of the pairs that unlearning used, after 10 steps" in said
    assert "not on average (\N{MINUS SIGN}10.0 points)" in said


def test_the_interval_of_the_advantage_is_told() -> None:
    said = words(verdict(relearnt(0.1, row(0.1), advantage_interval_95=[0.05, 0.15])))
    assert "10.0 points better on average than one that never knew, 95 % interval +5.0 points to +15.0 points" in said
    said = words(verdict(relearnt(0.04, advantage_interval_95=[-0.01, 0.09])))
    assert said.startswith("Forgotten") and "attacked alike, 95 % interval \N{MINUS SIGN}1.0 points to +9.0" in said


def test_options_that_are_ranked_as_by_one_who_knows_or_avoids_are_told_with_the_limit() -> None:
    assert "right option first for 30.0 % of the questions" in words(verdict(choosing(0.3)))
    assert "at most 19.1 %" in words(verdict(choosing(0.3)))
    assert "right option comes first for 1.0 % of the questions" in words(verdict(choosing(0.01)))
    assert "at least 8.6 %" in words(verdict(choosing(0.01)))
    alone = choosing(0.9)
    del alone["models"]["retain_only"]
    assert verdict(alone).kind == "forgotten"


@pytest.mark.parametrize(
    ("metrics", "start"),
    [
        (relearnt(0.1, row(0.1)), "Hidden: under the same relearning attacks"),
        (relearnt(-0.1, row(0.1)), "Hidden: under one relearning attack"),
        (relearnt(0.01, advantage_interval_95=[-0.01, 0.03]), "Not hidden, by these attacks: after them"),
        (alone(0.9), "Hidden, as it seems"),
        (alone(0.1), "Nothing came back fast. Without a retain-only model"),
    ],
)
def test_relearning_alone_says_whether_something_was_hidden(metrics: dict[str, Any], start: str) -> None:
    assert hiding(metrics["relearn"]).startswith(start)


def test_what_was_never_attacked_is_not_said_to_hide_nothing() -> None:
    metrics = good()
    del metrics["relearn"]
    found = verdict(metrics)
    assert found.kind == "forgotten"
    assert "`vkd relearn` tries it" in found.reasons[-1]


@pytest.mark.parametrize(("rises", "kind"), [((0.2, 0.3), "forgotten"), ((0.2, 0.31), "hidden"), ((), "forgotten")])
def test_without_a_reference_fast_recovery_makes_hiding_suspected(rises: tuple[float, ...], kind: str) -> None:
    found = verdict(alone(*rises))
    assert found.kind == kind
    assert "can only be suspected" in found.reasons[-1]
    assert ("Hidden, as it seems: 10 steps" in words(found)) == (kind == "hidden")


def test_recovery_from_other_people_alone_raises_no_suspicion() -> None:
    assert verdict(alone(0.9, pool="others")).kind == "forgotten"


def test_the_worst_decides_and_the_others_follow_in_order() -> None:
    everything = {
        "models": {"vanilla": columns(0.97), "unlearned": columns(0.5, retain_vqa=0.5), "retain_only": columns(0.04)},
        "relearn": {"advantage_over_retain_only": 0.2, "advantage_by_step": []},
        "over_forgotten": {"excess": 3.0, "interval_95": [2.0, 4.0]},
    }
    metrics = good(**copy.deepcopy(everything))
    starts = {"not_forgotten": "Not f", "hidden": "Hidden", "damaged": "Damaged", "over_forgotten": "Over-f"}
    mended = {
        "not_forgotten": lambda: metrics["models"]["unlearned"].update(test_vqa=cell(0.0)),
        "hidden": lambda: metrics["relearn"].update(advantage_over_retain_only=-0.1),
        "damaged": lambda: metrics["models"]["unlearned"].update(retain_vqa=cell(0.95)),
        "over_forgotten": lambda: metrics.pop("over_forgotten"),
    }
    for i, kind in enumerate(KINDS[:-1]):
        found = verdict(metrics)
        assert found.kind == kind
        sentences = (found.sentence, *found.reasons)
        assert len(sentences) == 4 - i
        assert all(text.startswith(starts[later]) for text, later in zip(sentences, KINDS[i:-1], strict=True))
        mended[kind]()
    assert verdict(metrics).kind == KINDS[-1] == "forgotten"


def test_all_that_is_damaged_is_told_in_one_sentence() -> None:
    said = words(verdict(unlearned(retain_vqa=0.5, forget_visible_vqa=0.4)))
    assert "fell from 95.0 % to 50.0 %" in said and "fell from 95.0 % to 40.0 %" in said
    assert said.count("Damaged") == 1


def test_what_was_not_measured_decides_nothing() -> None:
    bare = {"models": {"vanilla": {"test_vqa": cell(0.9)}, "unlearned": {"test_vqa": cell(0.0)}}}
    assert verdict(bare).kind == "forgotten"
    assert verdict({"models": {"vanilla": {"test_vqa": cell(0.9)}, "unlearned": {"test_vqa": cell(0.9)}}}).kind == (
        "not_forgotten"
    )


@pytest.mark.parametrize(("exact", "kind"), [(0.31, "forgotten"), (0.33, "not_forgotten")])
def test_where_options_are_listed_guessing_them_is_no_knowledge(exact: float, kind: str) -> None:
    metrics = unlearned(exact)
    assert verdict(metrics).kind == "not_forgotten"
    assert verdict(metrics | {"guessed": {"test_vqa": 0.25}}).kind == kind


def test_choice_accuracy_is_compared_over_the_questions_that_have_options() -> None:
    metrics = choosing(3 / 8, reference=2 / 8)
    assert verdict(metrics | {"choices": {"test_vqa": 8}}).kind == "forgotten"
    assert verdict(metrics | {"choices": {"test_vqa": 160}}).kind == "hidden"
