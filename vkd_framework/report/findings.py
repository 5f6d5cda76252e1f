"""What the numbers say, in sentences and rows. Every claim is computed from `metrics.json`; none is written ahead."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from vkd_framework.methods import METHODS
from vkd_framework.report.formatting import (
    ABSENT,
    NBSP,
    count,
    duration,
    is_number,
    percent,
    percent_range,
    points,
    share_of,
    significant,
    size,
)
from vkd_framework.report.table import cell_of, never_seen
from vkd_framework.types import PARTS

PAPER = "arXiv 2512.11325"

VKD_NOTE = (
    "The exact losses, layers, weights and learning rates of VKD (Visual Knowledge Distillation, "
    f"{PAPER}) are not public. What ran here is a reconstruction from the paper's description; "
    "its numbers are this reconstruction's and not the paper's."
)

EVIDENCE_NOTE = (
    "The numbers describe the questions, photos and attacks that were tried, with the sampling error that the "
    "intervals show. They do not prove that no other question or stronger attack finds a trace."
)

PROOF_STATEMENTS = {
    "text_only_max_logit_difference": (
        "Text-only answers are bit-identical",
        "Largest difference of any logit between the vanilla and the unlearned model on prompts without a photo; it "
        "must be exactly 0, unless the method also changes the language model.",
    ),
    "frozen_parameters_identical": (
        "Frozen parameters are untouched",
        "Every parameter outside the tuned modules is bit-identical to the vanilla model's.",
    ),
    "masked_parameters_identical": (
        "Masked parameters are untouched",
        "Every weight that the saliency mask excludes is bit-identical to the vanilla model's.",
    ),
    "reload_identical": (
        "The saved model is the measured model",
        "Loaded again from disk, the saved model gives the same outputs as the one that was measured.",
    ),
}

_NOT_PROMISED = "The method changes the language model too, so text-only answers are measured and not promised to stay."
_NOTHING_FROZEN = "The method may change every weight: nothing was frozen."

_NOT_APPLICABLE = {
    "masked_parameters_identical": "Without a mask, or with mask scope “forget”, every tuned weight may move.",
}

_STAGES = {
    "teach_seconds": "Teaching the vanilla and reference models",
    "mask_seconds": "Saliency mask",
    "unlearn_seconds": "Unlearning",
    "evaluate_seconds": "Evaluation",
    "relearn_seconds": "Relearning attack",
    "attacks_seconds": "Other attacks",
    "total_seconds": "Total",
}


@dataclass(frozen=True)
class Proof:
    """A checked statement. `reason` says why a proof does not apply."""

    title: str
    statement: str
    value: str
    status: Literal["passed", "FAILED", "not applicable"]
    reason: str = ""


@dataclass(frozen=True)
class Definition:
    """A figure with what it means."""

    name: str
    value: str
    meaning: str


def summary(metrics: Mapping[str, Any]) -> list[str]:
    """The run in a few plain sentences, one per subject matter."""
    sentences = [
        _forgotten_sentence(metrics),
        _others_sentence(metrics),
        _text_sentence(metrics),
        attack_sentence(metrics),
        _floor_sentence(metrics),
        _failed_sentence(metrics),
    ]
    return [sentence for sentence in sentences if sentence]


def verdict_sentences(metrics: Mapping[str, Any]) -> list[str]:
    """What became of the run, the deciding sentence first; empty for a run of a version that gave no verdict."""
    verdict = metrics.get("verdict") or {}
    return [verdict["sentence"], *verdict.get("reasons", ())] if verdict.get("sentence") else []


def headline(metrics: Mapping[str, Any]) -> list[Definition]:
    """The figures a reader looks for first: value and what it is."""
    relearn = metrics.get("relearn") or {}
    tiles = [
        Definition("Forgotten people", _change(metrics, "test_vqa"), "Test VQA, exact match before → after"),
        Definition("Everybody else", _change(metrics, "retain_vqa"), "Retain VQA, exact match before → after"),
        Definition("Text-only answers", _text_verdict(metrics), "before and after unlearning"),
    ]
    advantage = relearn.get("advantage_over_retain_only")
    if is_number(advantage):
        tiles.append(
            Definition("Relearning attack", points(advantage), "after it, compared with a model that never knew")
        )
    else:
        recovery = points(relearn.get("average_recovery"))
        tiles.append(Definition("Relearning attack", recovery, "average recovery; no reference to compare with"))
    return tiles


def attack_explanation(metrics: Mapping[str, Any]) -> str:
    """What the relearning attack is, and what its figures say."""
    return (
        "An attacker fine-tunes a copy of the unlearned model on a share of the forgotten people's questions, on new "
        f"photos of them, or on other people only, and is then scored on {never_seen(metrics, 'test_vqa')} that the "
        "attack did not use. The same attack on a model that never knew these people shows what can be learned from "
        "scratch; only what comes back beyond that was hidden instead of erased."
    )


def attack_figures(metrics: Mapping[str, Any]) -> list[Definition]:
    """The attack's averages with their definitions; empty when no attack was run."""
    relearn = metrics.get("relearn") or {}
    if not relearn:
        return []
    advantage, interval = relearn.get("advantage_over_retain_only"), relearn.get("advantage_interval_95")
    ranging = f" ({points(interval[0])} to {points(interval[1])})" if interval else ""
    from_others = relearn.get("recovery_from_others")
    return [
        Definition(
            "Average recovery",
            points(relearn.get("average_recovery")),
            "Mean of exact match after the attack minus exact match before it. Smaller: less came back.",
        ),
        Definition(
            "Average gap",
            points(relearn.get("average_gap")),
            "Mean of the vanilla model's exact match minus exact match after the attack. Larger: further from vanilla.",
        ),
        Definition(
            "Advantage over retain-only",
            f"{points(advantage)}{ranging}" if is_number(advantage) else "no reference",
            "Mean of exact match after the attack minus that of the retain-only model after the same attack, with the "
            "95 % interval over the questions. Above 0: knowledge was hidden. At or below 0: relearning is no easier "
            "than learning from scratch.",
        ),
        *(
            [
                Definition(
                    "Recovery from others",
                    points(from_others),
                    "The average recovery for attackers who only have other people. Their attacks are not in the other "
                    "figures.",
                )
            ]
            if is_number(from_others)
            else []
        ),
    ]


def attack_sentence(metrics: Mapping[str, Any]) -> str:
    """What came back under attack, and what a model that never knew would have learned."""
    relearn = metrics.get("relearn") or {}
    recovery, uninformed = relearn.get("average_recovery"), relearn.get("recovery_from_others")
    if not is_number(recovery) and is_number(uninformed):
        return (
            f"Under attackers who only had other people, exact match on Test VQA changed by {points(uninformed)} on "
            "average. Nobody who has pairs of the forgotten tried."
        )
    if not is_number(recovery):
        return "No relearning attack was measured."
    text = f"Under the relearning attack, exact match on Test VQA changed by {points(recovery)} on average."
    advantage = relearn.get("advantage_over_retain_only")
    if not is_number(advantage):
        return f"{text} Without a retain-only reference it is not known how much of that was learned from scratch."
    amount = points(abs(advantage)).removeprefix("+")
    if round(100 * advantage, 1) == 0:
        return f"{text} After the same attack, a model that never knew these people answers equally well."
    side = "more" if advantage > 0 else "less"
    return f"{text} It then scores {amount} {side} than a model that never knew these people, attacked alike."


def method_note(metrics: Mapping[str, Any]) -> str:
    """Where the method comes from, and how far what ran here is the authors' own."""
    name = metrics.get("method")
    method = METHODS.get(name) if isinstance(name, str) else None
    if method is None or name == "vkd_paper":
        return VKD_NOTE
    return f"{name}: {method.summary}. Source: {method.source}. {method.differs}"


def proof_rows(metrics: Mapping[str, Any]) -> list[Proof]:
    """Every proof with its verdict: the known ones always, others as they are named."""
    proofs = metrics.get("proofs") or {}
    names = [*PROOF_STATEMENTS, *(name for name in proofs if name not in PROOF_STATEMENTS)]
    return [_proof(name, proofs, _waived(name, metrics)) for name in names]


def cost_rows(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the run took, as rows of name and text."""
    cost = metrics.get("cost") or {}
    rows = [(label, duration(cost.get(key))) for key, label in _STAGES.items()]
    total = cost.get("total_parameters")
    return [
        *rows,
        *([("One step of unlearning", _beside(cost, "step_seconds", duration))] if cost.get("step_seconds") else []),
        ("Peak memory", _beside(cost, "peak_memory_bytes", size)),
        ("Parameters", count(total)),
        ("Trainable parameters", share_of(cost.get("trainable_parameters"), total)),
        ("Active parameters (inside the mask)", share_of(cost.get("active_parameters"), total)),
        ("Saliency mask on disk", size(cost.get("mask_bytes"))),
    ]


def _beside(cost: Mapping[str, Any], key: str, written: Callable[[object], str]) -> str:
    """A measured figure, with what was expected where that is known."""
    expected = cost.get(f"estimated_{key}")
    return written(cost.get(key)) + (f" (estimated {written(expected)})" if expected is not None else "")


def identity(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Recipe, method, adapter and seed, as rows of name and text."""
    return [(key.capitalize(), str(metrics.get(key, ABSENT))) for key in ("recipe", "method", "adapter", "seed")]


def _forgotten_sentence(metrics: Mapping[str, Any]) -> str:
    before, after = cell_of(metrics, "vanilla", "test_vqa"), cell_of(metrics, "unlearned", "test_vqa")
    if not (before and after):
        return "Questions about the forgotten people that unlearning never saw were not measured before and after."
    text = (
        f"Asked about the forgotten people on {never_seen(metrics, 'test_vqa')} that unlearning never saw (Test VQA, "
        f"{count(after.get('n'))} questions), the model gave {percent(before.get('exact_match'))} exact answers before "
        f"unlearning and {percent(after.get('exact_match'))} after it "
        f"(95{NBSP}% interval {percent_range(after.get('interval_95'))})"
    )
    reference = cell_of(metrics, "retain_only", "test_vqa")
    text += f"; a model that never knew them gives {percent(reference.get('exact_match'))}." if reference else "."
    trained = _change_in_words(metrics, "forget_vqa")
    return f"{text} On the photos that unlearning used, exact match {trained}." if trained else text


def _others_sentence(metrics: Mapping[str, Any]) -> str:
    names = {
        "retain_vqa": "questions about everybody else",
        "realworld_vqa": "other questions (Real-world VQA)",
        "forget_visible_vqa": "questions about what anybody can see on photos of the forgotten people",
    }
    changes = [(name, _change_in_words(metrics, column)) for column, name in names.items()]
    parts = [f"{name} {change}" for name, change in changes if change]
    return _sentence(parts, "With a photo, exact match on ")


def _text_sentence(metrics: Mapping[str, Any]) -> str:
    names = {"forget_qa": "the forgotten people", "retain_qa": "everybody else"}
    changes = [(name, _change_in_words(metrics, column)) for column, name in names.items()]
    parts = [f"questions about {name} {change}" for name, change in changes if change]
    text = _sentence(parts, "Without a photo, exact match on ")
    difference = (metrics.get("proofs") or {}).get("text_only_max_logit_difference")
    if not isinstance(difference, int | float):
        return f"{text} Whether text-only answers are bit-identical was not checked.".strip()
    verdict = "are bit-identical" if difference == 0 else "are NOT bit-identical"
    return f"{text} Text-only answers {verdict} (largest logit difference {significant(difference)}).".strip()


def _floor_sentence(metrics: Mapping[str, Any]) -> str:
    floor = metrics.get("retain_floor") or {}
    if not floor.get("steps_below"):
        return ""
    return (
        f"For {count(floor['steps_below'])} of {count(floor['steps'])} steps the model was only repaired and nothing "
        f"was forgotten, because it gave less than {percent(floor['floor'])} of the right answers about retained "
        "photos that it had started with."
    )


def _failed_sentence(metrics: Mapping[str, Any]) -> str:
    failed = [proof.title for proof in proof_rows(metrics) if proof.status == "FAILED"]
    return f"Failed checks: {'; '.join(failed)}." if failed else ""


def _sentence(parts: list[str], start: str) -> str:
    if not parts:
        return ""
    listed = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    return f"{start}{listed}."


def _change_in_words(metrics: Mapping[str, Any], column: str) -> str:
    before, after = (cell_of(metrics, model, column).get("exact_match") for model in ("vanilla", "unlearned"))
    if not (is_number(before) and is_number(after)):
        return ""
    if percent(before) == percent(after):
        return f"stayed at {percent(after)}"
    return f"went from {percent(before)} to {percent(after)}"


def _change(metrics: Mapping[str, Any], column: str) -> str:
    before, after = (cell_of(metrics, model, column).get("exact_match") for model in ("vanilla", "unlearned"))
    return f"{percent(before)} → {percent(after)}"


def _text_verdict(metrics: Mapping[str, Any]) -> str:
    difference = (metrics.get("proofs") or {}).get("text_only_max_logit_difference")
    if not isinstance(difference, int | float):
        return "not checked"
    return "bit-identical" if difference == 0 else "not identical"


def _waived(name: str, metrics: Mapping[str, Any]) -> str:
    """Why the method of the run does not promise what a proof says; nothing when it does."""
    train = metrics.get("train") or ()
    if name == "text_only_max_logit_difference" and "language_model" in train:
        return _NOT_PROMISED
    if name == "frozen_parameters_identical" and set(train) == set(PARTS):
        return _NOTHING_FROZEN
    return ""


def _proof(name: str, proofs: Mapping[str, Any], waived: str) -> Proof:
    title, statement = PROOF_STATEMENTS.get(name, (name, ""))
    value = proofs.get(name)
    if value is not None and waived:
        measured = ABSENT if isinstance(value, bool) else significant(value) if is_number(value) else str(value)
        return Proof(title, statement, measured, "not applicable", waived)
    if value is None:
        reason = (_NOT_APPLICABLE.get(name) if name in proofs else None) or "Not measured in this run."
        return Proof(title, statement, ABSENT, "not applicable", reason)
    if isinstance(value, bool):
        return Proof(title, statement, "yes" if value else "no", "passed" if value else "FAILED")
    # NaN is no proof: it differs from 0 and fails.
    shown = significant(value) if is_number(value) else str(value)
    return Proof(title, statement, shown, "passed" if value == 0 else "FAILED")
