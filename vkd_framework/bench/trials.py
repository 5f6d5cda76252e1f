"""The attacks beside relearning as figures of a run, and how far the forgotten are marked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vkd_framework.bench.figures import Figure, Value
from vkd_framework.intervals import wilson
from vkd_framework.report.formatting import is_number
from vkd_framework.report.trials import named_figures

START = "attack."
EXCESS = "over_forgotten.excess"


def trials(metrics: Mapping[str, Any], model: str) -> list[Value]:
    """Every number that the attacks give about `model`, keyed `attack.KIND.OPTIONS.FIGURE`."""
    found = []
    for result in metrics.get("attacks") or ():
        if result.get("model") != model or "skipped" in result:
            continue
        start = START + ".".join(filter(None, (str(result["kind"]), _options(result))))
        for name, label in named_figures(result):
            if is_number(result.get(name)):
                interval = _interval(metrics, result, name)
                found.append(Value(_figure(f"{start}.{name}", label, name), result[name], interval))
    return found


def over_forgotten(metrics: Mapping[str, Any]) -> list[Value]:
    """How many nats a token the right answers cost more than with a model that never knew."""
    block = metrics.get("over_forgotten") or {}
    if not is_number(block.get("excess")):
        return []
    figure = Figure(EXCESS, "Loss above that of who never knew, nats a token", "nats", "neither")
    bounds = block.get("interval_95")
    return [Value(figure, block["excess"], (bounds[0], bounds[1]) if bounds else None)]


def _interval(metrics: Mapping[str, Any], result: Mapping[str, Any], name: str) -> tuple[float, float] | None:
    """Wilson's interval of a share of answers, where it is known how many questions were asked."""
    column = {"exact_match": "test_vqa", "retain_exact_match": "retain_vqa"}.get(name)
    cells = metrics.get("models", {}).get(result["model"]) or {}
    n = result.get("questions") or cells.get(column, {}).get("n")
    return wilson(result[name] * n, n) if column and n else None


def _options(result: Mapping[str, Any]) -> str:
    options = result.get("options") or {}
    return ",".join(
        f"{name}={'+'.join(value) if isinstance(value, list) else value}" for name, value in options.items()
    )


def _figure(key: str, label: str, name: str) -> Figure:
    """What is answered is better for nobody to know; a probe or a membership test says something by comparison only."""
    if name == "exact_match":
        return Figure(key, label, "share", "lower")
    if name == "retain_exact_match":
        return Figure(key, f"{label}, Retain VQA", "share", "higher")
    return Figure(key, label, "score" if name.endswith("_auc") or name == "ks_statistic" else "share", "neither")
