"""The saved model's README. It may be published, so it says what was done and never about whom."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from vkd_framework.report import findings
from vkd_framework.report.formatting import count, flatten
from vkd_framework.report.markdown import column_section, escape, proof_table, table, verdict_section

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)

# Paths, commands and recipe names often carry the name of the person they are about; versions never do.
_RESTORED = ", and putting the original visual modules back into this model restores it"
_SHOWN_ENVIRONMENT = frozenset({"python", "torch", "transformers", "tokenizers", "vkd_framework", "vkd-framework"})

_LOADING = """\
```python
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = "path/to/this/folder"
model = AutoModelForImageTextToText.from_pretrained(folder)
processor = AutoProcessor.from_pretrained(folder)
```"""

_CITATION = """\
```bibtex
@misc{wang2025vkd,
  title  = {(Robust) MLLM (Machine) Unlearning via Visual Knowledge Distillation},
  author = {Wang and Niu and Ji and He and Gao and Hua},
  year   = {2025},
  eprint = {2512.11325},
  archivePrefix = {arXiv}
}
```"""


def render_model_card(
    metrics: Mapping[str, Any], *, base_model: str, environment: Mapping[str, Any], forget_count: int
) -> str:
    """README.md for the folder of the unlearned model, with the hub's front matter.

    The recipe's name and all free text stay out of it: people name recipes after the person who asked to be forgotten.
    """
    on_hub = _is_hub_id(base_model)
    start = f"`{base_model}`" if on_hub else "a model that is not on the hub"
    people = "1 person" if forget_count == 1 else f"{count(forget_count)} people"
    method, adapter, seed = (escape(metrics.get(key, "unknown")) for key in ("method", "adapter", "seed"))
    sections = [
        _front_matter(base_model if on_hub else None),
        "# Unlearned model",
        *verdict_section(metrics),
        f"This model was made from {start} by machine unlearning (method {method}, adapter {adapter}, seed {seed}). "
        f"It was trained to stop recognising {people} on photos while keeping what it knows about everybody else.",
        "The names of the forgotten people are deliberately not listed here: a list of the forgotten would undo the "
        "forgetting.",
        "## What was measured",
        *map(escape, findings.summary(metrics)),
        *column_section(metrics),
        "## Relearning attack",
        findings.attack_explanation(metrics),
        *_attack_table(metrics),
        "## Proofs",
        proof_table(metrics),
        "## How to load it",
        _LOADING,
        "## Limits",
        findings.EVIDENCE_NOTE,
        "Where the proofs say that text-only answers are bit-identical, text questions that name a forgotten person "
        "are answered as before: recognition was unlearned, text knowledge was not. Whoever holds the original weights "
        f"holds the forgotten knowledge{_RESTORED if 'language_model' not in metrics.get('train', ()) else ''}.",
        *_versions(environment),
        "## Method and citation",
        findings.method_note(metrics),
        _CITATION,
    ]
    return "\n\n".join(sections) + "\n"


def _is_hub_id(base_model: str) -> bool:
    # `models/mine` reads like a hub id and may be a folder; transformers looks for the folder first, and so do we.
    return _HUB_ID.fullmatch(base_model) is not None and not os.path.exists(base_model)


def _front_matter(base_model: str | None) -> str:
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: image-text-to-text",
        *([f"base_model: {base_model}"] if base_model else []),
        "tags:",
        "- machine-unlearning",
        "- vkd",
        "---",
    ]
    return "\n".join(lines)


def _attack_table(metrics: Mapping[str, Any]) -> list[str]:
    rows = [(figure.name, figure.value, figure.meaning) for figure in findings.attack_figures(metrics)]
    return [table(("Figure", "Value", "Meaning"), rows)] if rows else ["No relearning attack was measured."]


def _versions(environment: Mapping[str, Any]) -> list[str]:
    rows = [(name, value) for name, value in flatten(environment) if name.rsplit(".", 1)[-1] in _SHOWN_ENVIRONMENT]
    return ["## Made with", table(("Software", "Version"), rows)] if rows else []
