"""Whole runs of methods that change the language model, prune, or teach anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import CAST

from vkd_framework.checkpoint import read_json
from vkd_framework.plugins import MLLM, load_adapter
from vkd_framework.run import run
from vkd_framework.saliency import load_mask
from vkd_framework.types import PARTS

pytestmark = pytest.mark.slow

RECIPE = {
    "name": "small",
    "adapter": "qwen_vl",
    "data": {**CAST, "train_photos": 2, "test_photos": 1, "strangers": 4, "extras": 2},
    "teach": {"steps": 5, "batch_size": 8},
    "reference": "retain_only",
    "unlearn": {"steps": 2, "warmup": 0, "forget_batch": 4, "retain_batch": 4},
    "evaluate": {"max_new_tokens": 2},
    "relearn": {"shares": [1.0], "steps": [1], "batch_size": 4, "scopes": ["full"]},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Any], Path]]:
    """Method -> its metrics and its folder."""
    base = tmp_path_factory.mktemp("methods")
    (base / "small.yaml").write_text(yaml.safe_dump(RECIPE))
    settings = {
        "npo": ("losses.forget_output.reference=retain_only",),
        "manu": ("reference=none", "prune.share=0.1"),
        "retain_only": (),
    }
    return {
        name: run(str(base / "small.yaml"), (f"method={name}", *more), out=base / name)
        for name, more in settings.items()
    }


def loaded(folder: Path) -> MLLM:
    return load_adapter("qwen_vl").load(str(folder), torch.float32, "cpu")


@pytest.mark.parametrize("name", ["npo", "manu", "retain_only"])
def test_a_method_that_changes_the_language_model_measures_text_answers_and_promises_nothing(
    runs: dict[str, tuple[dict[str, Any], Path]], name: str
) -> None:
    metrics, folder = runs[name]
    assert metrics["method"] == name
    assert "language_model" in metrics["train"]
    assert metrics["proofs"]["text_only_max_logit_difference"] > 0
    assert metrics["proofs"]["reload_identical"] is True
    report = (folder / "report.md").read_text()
    assert "measured and not promised" in report and "Failed checks" not in report
    assert name in report and "not public" not in report
    assert "original visual modules" not in (folder / "model" / "README.md").read_text()


def test_the_retain_only_method_is_the_retain_only_reference(runs: dict[str, tuple[dict[str, Any], Path]]) -> None:
    metrics, folder = runs["retain_only"]
    assert metrics["models"]["unlearned"] == metrics["models"]["retain_only"]
    assert metrics["relearn"]["advantage_over_retain_only"] == 0
    assert not (folder / "mask.safetensors").exists()
    assert (folder / "history.jsonl").read_text() == ""


def test_teaching_anew_costs_what_the_teaching_took_even_from_the_cache(
    runs: dict[str, tuple[dict[str, Any], Path]],
) -> None:
    metrics, folder = runs["retain_only"]
    cost = metrics["cost"]
    source = Path(read_json(folder / "checkpoints" / "teach-retain_only.json")["result"])
    assert cost["unlearn_seconds"] == read_json(source / "teaching.json")["seconds"] > cost["teach_seconds"]
    stages = [name for name in cost if name.endswith("_seconds") and "step" not in name and name != "total_seconds"]
    parts = [cost[name] for name in stages]
    assert cost["total_seconds"] == pytest.approx(sum(parts))
    assert cost["teach_seconds"] == read_json(folder / "checkpoints" / "teach-vanilla.json")["seconds"]


def test_pruning_sets_the_masked_weights_to_zero_and_proves_that_no_other_moved(
    runs: dict[str, tuple[dict[str, Any], Path]],
) -> None:
    metrics, folder = runs["manu"]
    vanilla = loaded(Path(read_json(folder / "checkpoints" / "teach-vanilla.json")["result"]))
    pruned = loaded(folder / "model")
    mask = load_mask(folder / "mask.safetensors", vanilla.parameters(("encoder", "language_model")))
    for name, parameter in pruned.model.named_parameters():
        before = vanilla.model.get_parameter(name)
        off = mask.get(name, torch.zeros_like(before, dtype=torch.bool))
        assert torch.equal(parameter[~off], before[~off])
        assert not parameter[off].any()
    assert metrics["proofs"]["masked_parameters_identical"] is True
    assert metrics["proofs"]["frozen_parameters_identical"] is True
    assert metrics["cost"]["active_parameters"] == sum(int(m.sum()) for m in mask.values()) > 0


def test_where_nothing_is_frozen_the_report_does_not_call_it_proved(
    runs: dict[str, tuple[dict[str, Any], Path]],
) -> None:
    for name in ("npo", "retain_only"):
        metrics, folder = runs[name]
        assert set(metrics["train"]) == set(PARTS)
        (line,) = [line for line in (folder / "report.md").read_text().splitlines() if "Frozen parameters" in line]
        assert line.endswith("not applicable |") and "nothing was frozen" in line
    manu = (runs["manu"][1] / "report.md").read_text()
    (line,) = [line for line in manu.splitlines() if "Frozen parameters" in line]
    assert line.endswith("| yes | passed |")
