from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "cost.py"
QUICK = ("--repeats", "1", "--methods", "vkd_without_attacker", "ga_diff")


def cost(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("cost") / "cost.json"
    done = cost("--size", "tiny", "--parts", "steps", "mask", "--json", str(path), *QUICK)
    assert done.returncode == 0, done.stderr
    assert "vkd_without_attacker" in done.stdout
    measured: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return measured


@pytest.mark.slow
def test_every_method_has_its_figures_and_its_ratios(found: dict[str, Any]) -> None:
    methods = found["methods"]
    assert set(methods) == {"vkd_without_attacker", "ga_diff", "floor_without_attacker"}
    for name, figures in methods.items():
        assert figures["seconds_per_step"] > 0
        assert figures["peak_memory_bytes"] > figures["model_bytes"]
        assert figures["trained_parameters"] > 0
        for against, other in (("ga_diff", "ga_diff"), ("floor", figures["floor"])):
            ratio = figures[f"ratio_to_{against}"]
            assert ratio["time"] == pytest.approx(figures["seconds_per_step"] / methods[other]["seconds_per_step"])
            assert ratio["memory"] == pytest.approx(figures["peak_memory_bytes"] / methods[other]["peak_memory_bytes"])
        assert figures["floor"] == "floor_without_attacker", name


@pytest.mark.slow
def test_adam_holds_two_numbers_for_each_trained_weight(found: dict[str, Any]) -> None:
    for figures in found["methods"].values():
        assert figures["optimizer_bytes"] == pytest.approx(2 * 4 * figures["trained_parameters"], rel=0.01)
    trained = {name: figures["trained_parameters"] for name, figures in found["methods"].items()}
    assert trained["ga_diff"] == sum(found["parameters"].values())
    assert trained["vkd_without_attacker"] == found["parameters"]["encoder"] + found["parameters"]["projector"]


@pytest.mark.slow
def test_the_mask_stands_beside_the_procedure_it_is_compared_with(found: dict[str, Any]) -> None:
    mask = found["mask"]
    for figures in (mask, mask["reference"]):
        assert figures["seconds"] > 0 and figures["peak_memory_above_model_bytes"] > 0
    assert mask["ratio_to_reference"]["bytes"] == mask["file_bytes"] / mask["reference"]["file_bytes"] < 1 / 30


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="ends when the machine has no GPU")
def test_the_largest_size_says_in_one_line_that_it_needs_a_gpu() -> None:
    done = cost("--size", "8b")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.splitlines() == ["cost.py: --size 8b needs a GPU, and torch sees none; take --size 120m"]
