"""The methods of unlearning, each a set of recipe values: what is trained, which losses, which mask, which schedule.

A method fills in what a recipe leaves out of the sections in `OWNED`; everything else (data, batches, optimiser,
evaluation, attack, report) is the same for all methods. So they run in one loop and are compared fairly.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

OWNED = ("train", "losses", "mask", "unlearn.phases", "simulated_attack")
"""Recipe keys that belong to the method: switching the method puts them back to the new method's values."""

DEFAULT = "vkd"


@dataclass(frozen=True)
class Method:
    """A named set of recipe values. `source` is a citation; `differs` says where public code and paper part."""

    summary: str
    source: str
    values: Mapping[str, Any]
    differs: str = ""


METHODS: dict[str, Method] = {
    "vkd": Method(
        summary="visual knowledge distillation, our default",
        source="Wang et al., arXiv 2512.11325, with our schedule",
        values={
            "train": ["encoder", "projector"],
            "losses": {
                "forget_output": {"weight": 1.0, "cap": 5.0},
                "retain_output": {"weight": 1.0},
                "attract": {"weight": 1.0, "distance": "relative_squared"},
                "repel": {"weight": 0.3, "distance": "relative_squared", "cap": 2.0},
            },
            "mask": {"kind": "ratio", "granularity": "weight", "density": 0.8, "scope": "all"},
            "unlearn": {"phases": [{"share": 0.5, "forget": 0.3}, {"share": 0.5, "forget": 0.1}]},
        },
    ),
    "vkd_paper": Method(
        summary="visual knowledge distillation as the paper describes it",
        source="Wang et al., arXiv 2512.11325",
        differs="no authors' code is public; the losses, weights and rates are a reconstruction from the text",
        values={
            "train": ["encoder", "projector"],
            "losses": {
                "forget_output": {"weight": 1.0, "cap": 6.0},
                "retain_output": {"weight": 1.0},
                "attract": {"weight": 1.0, "distance": "relative_squared"},
                "repel": {"weight": 1.0, "distance": "relative_squared", "cap": 2.0},
            },
            "mask": {"kind": "ratio", "granularity": "weight", "threshold": 1.0, "scope": "forget"},
            "unlearn": {"phases": [{"share": 1.0, "forget": 1.0}]},
        },
    ),
}
"""Name in a recipe's `method:` -> what it means."""


def fill(raw: Mapping[str, Any]) -> dict[str, Any]:
    """`raw` over the values of its method; unchanged when there is no such method.

    A section is filled key by key, except that one which names its `kind` is kept whole, as lists and plain values are.
    """
    method = raw.get("method", DEFAULT)
    return _merge(METHODS[method].values, raw) if isinstance(method, str) and method in METHODS else dict(raw)


def switch(raw: dict[str, Any], method: str) -> None:
    """Make `raw` a recipe of another method: what the old one owned is taken out."""
    for key in OWNED:
        *parents, last = key.split(".")
        place: Any = raw
        for name in parents:
            place = place.get(name) if isinstance(place, dict) else None
        if isinstance(place, dict):
            place.pop(last, None)
    raw["method"] = method


def _merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged: dict[str, Any] = deepcopy(dict(under))
    for key, value in over.items():
        filled = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping) and "kind" not in value
        merged[key] = _merge(merged[key], value) if filled else value
    return merged
