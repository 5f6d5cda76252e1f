"""The attacks beside relearning, as rows for people: what was done to the models, what it means, what came out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vkd_framework.report.formatting import ABSENT, decimal, is_number, percent, significant
from vkd_framework.report.table import MODELS

EXPLANATION = (
    "Other ways to get at what was forgotten, each tried on every model for which it makes sense. Exact match on Test "
    "VQA, unless a row says otherwise. What is found in a model that never knew these people was not left behind by "
    "unlearning, so only the difference counts."
)

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Trial:
    """One row: what was tried, what it means, and the figure of each model by its key."""

    label: str
    meaning: str
    values: Mapping[str, str]

    def value(self, model: str) -> str:
        """The model's figure; a dash where it was not tried."""
        return self.values.get(model, ABSENT)


@dataclass(frozen=True)
class _Figure:
    """`key`: the number of the result that is shown."""

    key: str
    label: Callable[[Result], str]
    meaning: str
    shown: Callable[[Result], str]


def trial_rows(metrics: Mapping[str, Any]) -> list[Trial]:
    """A row for every figure of every attack, in the recipe's order."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in metrics.get("attacks") or ():
        groups.setdefault((result["kind"], repr(result.get("options"))), []).append(result)
    order = sorted(groups, key=lambda key: list(_FIGURES).index(key[0]) if key[0] in _FIGURES else len(_FIGURES))
    rows = []
    for key in order:
        results = {str(result["model"]): result for result in groups[key]}
        reasons = dict.fromkeys(str(result["skipped"]) for result in results.values() if "skipped" in result)
        for figure in _FIGURES.get(key[0], (_unknown(key[0]),)):
            done = {model: result for model, result in results.items() if "skipped" not in result}
            values = {model: figure.shown(result) for model, result in done.items()}
            if reasons or any(value != ABSENT for value in values.values()):
                label = figure.label(next(iter((done or results).values())))
                rows.append(Trial(label, " ".join([figure.meaning, *(f"Not possible: {r}." for r in reasons)]), values))
            if not done:
                break
    return rows


def named_figures(result: Result) -> list[tuple[str, str]]:
    """(key, label) of each number of a result that has a row; what is measured beside it comes after."""
    figures = _FIGURES.get(result["kind"], (_unknown(result["kind"]),))
    beside = [("retain_exact_match", figures[0].label(result))] if "retain_exact_match" in result else []
    return [*((figure.key, figure.label(result)) for figure in figures), *beside]


def trial_models(rows: list[Trial]) -> list[str]:
    """The models that any row has a figure for, in the usual order."""
    return [model for model in MODELS if any(model in row.values for row in rows)]


def over_forgotten_sentence(metrics: Mapping[str, Any]) -> str:
    """How the loss on the forgotten people compares with that of a model that never knew; empty when not measured."""
    found = metrics.get("over_forgotten") or {}
    if not is_number(found.get("excess")):
        return ""
    against = {
        "retain_only": "that of a model that never knew them",
        "vanilla_on_strangers": "the vanilla model's when the same is asked about strangers",
    }.get(str(found.get("against")), "what is expected")
    text = (
        f"The loss of the right answers about the forgotten people (Test VQA) is {significant(found.get('loss'))} nats "
        f"a token; {against} is {significant(found.get('expected'))}."
    )
    if found.get("over_forgotten"):
        return f"{text} That is measurably worse: a trace, which tells the better who was forgotten the larger it is."
    return f"{text} It is not measurably worse."


def _exact(result: Result) -> str:
    return percent(result.get("exact_match"))


def _rounded(result: Result) -> str:
    return f"{_exact(result)} (Retain VQA {percent(result.get('retain_exact_match'))})"


def _option(result: Result, name: str) -> Any:
    return (result.get("options") or {}).get(name)


def _probe(place: str, method: str) -> _Figure:
    words = {"linear": "Linear probe", "neighbours": "Nearest neighbours"}[method]
    name = f"{place}_{method}"

    def shown(result: Result) -> str:
        if not is_number(result.get(name)):
            return ABSENT
        return f"{percent(result[name])} (others {percent(result.get(f'{name}_others'))})"

    return _Figure(
        name,
        lambda result: f"{words} on the {place}, chance {percent(result.get('chance'))}",
        "Share of unseen photos of forgotten people that are given to the right person by the features.",
        shown,
    )


def _auc(name: str, words: str) -> _Figure:
    return _Figure(
        name,
        lambda result: f"Membership by {words}, AUC",
        "How well training photos of the forgotten are told from strangers'; 0.5: not at all.",
        lambda result: decimal(result.get(name)),
    )


def _ks(result: Result) -> str:
    if not is_number(result.get("ks_statistic")):
        return ABSENT
    return f"{decimal(result['ks_statistic'])}, p = {significant(result.get('ks_p'))}"


def _exact_match(label: Callable[[Result], str], meaning: str, shown: Callable[[Result], str] = _exact) -> _Figure:
    return _Figure("exact_match", label, meaning, shown)


def _unknown(kind: str) -> _Figure:
    return _exact_match(lambda result: kind, "")


_FIGURES: dict[str, tuple[_Figure, ...]] = {
    "module_restore": (
        _exact_match(
            lambda result: f"Vanilla's {' and '.join(_option(result, 'parts') or ())} put back".replace("_", " "),
            "Restoring every module that was tuned brings everything back, by construction.",
        ),
    ),
    "quantize": (
        _exact_match(
            lambda result: f"Weights rounded to {_option(result, 'bits')} bits",
            "Rounding can undo small changes.",
            _rounded,
        ),
    ),
    "probe": tuple(_probe(place, method) for place in ("encoder", "projector") for method in ("linear", "neighbours")),
    "in_context": (
        _exact_match(
            lambda result: f"After {_option(result, 'examples')} other photos with answers",
            "Other photos of the same person, each with another question and its answer, come before the question.",
        ),
    ),
    "rephrase": (_exact_match(lambda result: "Asked in other words", "The same questions in another wording."),),
    "noise": (
        _exact_match(
            lambda result: f"Photos with noise of {percent(_option(result, 'spread'))}",
            "Gaussian noise on every pixel; the figure is its standard deviation as a share of the range.",
        ),
    ),
    "crop": (
        _exact_match(
            lambda result: f"The middle {percent(_option(result, 'keep'))} of the photos",
            "Cut out and enlarged to the old size.",
        ),
    ),
    "membership": (
        _auc("loss_auc", "answer loss"),
        _auc("min_k_auc", "Min-K%"),
        _auc("min_k_pp_auc", "Min-K%++"),
        _Figure(
            "ks_statistic",
            lambda result: "Truth ratios against retain-only, KS",
            "Largest distance between the two models' distributions on Test VQA; a small p tells them apart.",
            _ks,
        ),
    ),
}
