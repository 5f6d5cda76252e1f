"""The methods of unlearning, each a set of recipe values: what is trained, which losses, which mask, which schedule.

A method fills in what a recipe leaves out of the sections in `OWNED`; everything else (data, batches, optimiser,
evaluation, attack, report) is the same for all methods. So they run in one loop and are compared fairly.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

OWNED = (
    *("procedure", "train", "losses", "mask", "prune", "unlearn.phases", "unlearn.retain_floor"),
    "simulated_attack",
)
"""Recipe keys that belong to the method: switching the method puts them back to the new method's values."""

DEFAULT = "vkd"


@dataclass(frozen=True)
class Method:
    """A named set of recipe values. `source` is a citation; `differs` says where public code and paper part."""

    summary: str
    source: str
    values: Mapping[str, Any]
    differs: str = ""


EVERYTHING = ["encoder", "projector", "language_model"]
ONE_PHASE = {"phases": [{"share": 1.0, "forget": 1.0}]}
OURS = (
    "Public code supervises every token that is not padding, image placeholders and the question among them, and takes "
    "the forget and the retain set in turns of whole epochs or steps. Here the answer alone is supervised, and each "
    "step adds both gradients."
)
"""What holds for every baseline that trains."""


def _without_features(forget: Mapping[str, Any], **others: Mapping[str, Any]) -> dict[str, Any]:
    """Loss terms at the output alone: `forget` for the forget set, the others as given and off where not."""
    off: dict[str, Any] = {name: {"weight": 0.0} for name in ("retain_output", "retain_kl", "attract", "repel")}
    return {"forget_output": {"weight": 1.0, "tokens": "answer", **forget}, **off, **others}


def _tuned(forget: Mapping[str, Any], **others: Mapping[str, Any]) -> dict[str, Any]:
    return {"train": EVERYTHING, "losses": _without_features(forget, **others), "unlearn": ONE_PHASE}


METHODS: dict[str, Method] = {
    "vkd": Method(
        summary="visual knowledge distillation against a simulated attacker, our default",
        source="Wang et al., arXiv 2512.11325, with our forget term, schedule and attacker",
        differs="the paper's exact losses are not public: what is tuned and the terms on visual features are a "
        "reconstruction, and the forget term, the schedule and the simulated attacker are ours",
        values={
            "train": ["encoder", "projector"],
            "losses": {
                "forget_output": {"form": "stranger", "weight": 1.0, "strangers": 8},
                "retain_output": {"weight": 1.0, "share": 0.25},
                "attract": {"weight": 1.0, "distance": "relative_squared"},
                "repel": {"weight": 0.0},
            },
            "mask": {"kind": "none"},
            "unlearn": {
                "phases": [{"share": 0.4, "forget": 0.3}, {"share": 0.6, "forget": 0.1}],
                "retain_floor": 0.8,
            },
            "simulated_attack": {
                "weight": 1.5,
                "cap": 12.0,
                "scopes": ["visual", "full", "full"],
                "rank": 8,
                "horizon": [10, 30],
                "head_start": 3,
                "learning_rate": 3e-4,
            },
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
    "ga": Method(
        summary="gradient ascent on the forgotten answers, and nothing else",
        source="Jang et al., arXiv 2210.01504, L_UL; as a baseline in MLLMU-Bench, Liu et al., arXiv 2410.22108",
        differs=f"{OURS} The benchmark tunes adapters of low rank, here every weight is tuned. Without a bound it may "
        "diverge: the run then ends with an error.",
        values=_tuned({"form": "ascent"}),
    ),
    "ga_diff": Method(
        summary="gradient ascent on the forgotten answers, descent on the others",
        source="Liu et al., arXiv 2203.12817; Maini et al., arXiv 2401.06121, L_diff",
        differs=f"{OURS} Every weight is tuned, as there; the multimodal benchmarks tune adapters of low rank.",
        values=_tuned({"form": "ascent"}, retain_output={"weight": 1.0}),
    ),
    "kl_min": Method(
        summary="GA_Diff, and the starting model's distribution kept on the retained answers",
        source="Maini et al., arXiv 2401.06121, L_KL; MLLMU-Bench, Liu et al., arXiv 2410.22108",
        differs=f"{OURS} The paper has no cross-entropy on the retain set, the benchmark's code adds it, and so do we. "
        "That code sums the divergence over all positions of a text, padding too; here, as in the paper, it is a mean, "
        "and over answer tokens only.",
        values=_tuned({"form": "ascent"}, retain_output={"weight": 1.0}, retain_kl={"weight": 1.0}),
    ),
    "npo": Method(
        summary="negative preference optimisation: a bounded ascent, on the forget set alone",
        source="Zhang et al., arXiv 2404.05868, L_NPO; beta as in MLLMU-Bench",
        differs=f"{OURS} The benchmark's code compares with a model taught the retain set only, its paper and NPO's "
        "with the starting model: so do we (losses.forget_output.reference changes it). That code puts the mean over "
        "tokens and over the batch into the sigmoid; here, as in NPO's paper, it is each answer's sum over tokens.",
        values=_tuned({"form": "npo", "beta": 0.4}),
    ),
    "npo_rt": Method(
        summary="NPO, and descent on the others",
        source="Zhang et al., arXiv 2404.05868, NPO-RT",
        differs=f"{OURS} The multimodal benchmarks compare with NPO alone. Reference and sums are as in npo.",
        values=_tuned({"form": "npo", "beta": 0.4}, retain_output={"weight": 1.0}),
    ),
    "idk_po": Method(
        summary="refusals taught in place of the forgotten answers, descent on the others",
        source="Maini et al., arXiv 2401.06121, L_idk",
        differs=f"{OURS} The paper draws from a hundred refusals, anew each time; here from five, once for each pair.",
        values=_tuned({"form": "refusal"}, retain_output={"weight": 1.0}),
    ),
    "mmunlearner": Method(
        summary="GA_Diff with the forget gradient masked by saliency, in every part",
        source="Huo et al., arXiv 2502.11051 (geometry-constrained gradient ascent)",
        differs=f"{OURS} The public code leaves parameters outside its mask file to the full forget gradient, "
        "clips before it masks, and computes the mask in the model's dtype; here every trained weight is masked, "
        "clipping comes after, and the mask is made in float32. Text questions count as preserved where the data has "
        "some that no column measures.",
        values={
            **_tuned({"form": "ascent"}, retain_output={"weight": 1.0}),
            "mask": {
                "kind": "ratio",
                "granularity": "weight",
                "threshold": 1.0,
                "scope": "forget",
                "preserve": "retain_and_text",
            },
        },
    ),
    "salun": Method(
        summary="wrong answers taught in place of the forgotten ones, descent on the others, salient weights only",
        source="Fan et al., arXiv 2310.12508 (saliency mask with random labelling)",
        differs=f"{OURS} The paper labels images for a classifier; a wrong answer, drawn from the pair's options once, "
        "is the nearest thing here. Half of all weights may move, as there. Its first code let momentum and decay move "
        "the others; here they are put back.",
        values={
            **_tuned({"form": "relabel"}, retain_output={"weight": 1.0}),
            "mask": {"kind": "salun", "granularity": "weight", "density": 0.5, "scope": "all"},
        },
    ),
    "manu": Method(
        summary="the neurons that answer most to the forgotten, compared with the others, set to 0; no training",
        source="Liu et al., arXiv 2502.15910 (four importance functions, forget over retain, top share pruned)",
        differs="The public code names the last blocks of two families, keeps its frequency term at weight 0, counts "
        "padding, and zeroes outputs of every linear layer; here a neuron is a hidden unit of any MLP block of encoder "
        "or language model, all four functions count alike, and the unit is cut on both sides. The paper also scores "
        "text questions about the forgotten; here these are to stay, so photos alone decide.",
        values={
            "procedure": "prune",
            "train": ["encoder", "language_model"],
            "prune": {"share": 0.02},
        },
    ),
    "retain_only": Method(
        summary="a model taught from the start without the forgotten people: the measure of all others",
        source="retraining, the definition of exact unlearning (Bourtoule et al., arXiv 1912.03817)",
        differs="Only for models that vkd teaches itself. Its cost is that of the teaching, even from the cache.",
        values={"procedure": "reteach", "train": EVERYTHING},
    ),
}
"""Name in a recipe's `method:` -> what it means."""


def fill(raw: Mapping[str, Any]) -> dict[str, Any]:
    """`raw` over the values of its method, and over both what its `for_methods` says for that method.

    A section is filled key by key, except that one which names its `kind` is kept whole, as lists and plain values are.
    What `for_methods` says for other methods is left out. Without such a method, `raw` comes back unchanged.
    """
    method = raw.get("method", DEFAULT)
    if not isinstance(method, str) or method not in METHODS:
        return dict(raw)
    written = {key: value for key, value in raw.items() if key != "for_methods"}
    own = (raw.get("for_methods") or {}).get(method, {})
    return _merge(_merge(METHODS[method].values, written), own)


def switch(raw: dict[str, Any], method: str) -> None:
    """Make `raw` a recipe of another method: what the old one owned is taken out."""
    take_out(raw)
    raw["method"] = method


def take_out(raw: Mapping[str, Any]) -> None:
    """Remove from `raw` what belongs to a method."""
    for key in OWNED:
        *parents, last = key.split(".")
        place: Any = raw
        for name in parents:
            place = place.get(name) if isinstance(place, dict) else None
        if isinstance(place, dict):
            place.pop(last, None)


def _merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged: dict[str, Any] = deepcopy(dict(under))
    for key, value in over.items():
        filled = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping) and "kind" not in value
        merged[key] = _merge(merged[key], value) if filled else value
    return merged
