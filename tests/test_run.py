from __future__ import annotations

import html
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from conftest import CAST, make_recipe, picture
from PIL import Image

from vkd_framework.cache import CACHE_VARIABLE
from vkd_framework.checkpoint import read_json, write_json
from vkd_framework.cli import main
from vkd_framework.errors import DataError, ModelError, RecipeError
from vkd_framework.plugins import MLLM, load_adapter
from vkd_framework.recipe import EVERY_ATTACK, load_recipe
from vkd_framework.report.formatting import NBSP
from vkd_framework.report.markdown import escape
from vkd_framework.run import dry_run, recipe_of, run
from vkd_framework.run.folder import check_models, held, make
from vkd_framework.run.metrics import unseen
from vkd_framework.run.stages import Run
from vkd_framework.types import Splits
from vkd_framework.verdict import verdict

RECIPE = {
    "name": "small",
    "adapter": "qwen_vl",
    "data": CAST,
    "teach": {"steps": 25, "batch_size": 8},
    "reference": "retain_only",
    "layers": ["vision.1", "projector"],
    "mask": {"kind": "random", "density": 0.5, "scope": "all"},
    "unlearn": {"steps": 6, "warmup": 0, "forget_batch": 4, "retain_batch": 4, "checkpoint_every": 4},
    "evaluate": {"max_new_tokens": 6},
    "relearn": {"shares": [0.05, 1.0], "steps": [1, 2], "batch_size": 4},
}
FILES = {
    *("recipe.yaml", "recipe.source.yaml", "environment.json", "metrics.json", "history.jsonl", "relearn.json"),
    *("mask.safetensors", "checkpoints", "report.html", "report.md", "model", "log.txt"),
}
COLUMNS = {"forget_vqa", "test_vqa", "retain_vqa", "forget_qa", "retain_qa", "realworld_vqa", "forget_visible_vqa"}
HELD = (("known", 0.05), ("known", 1.0), ("new", 1.0), ("others", 1.0))
"""What the attackers of the default recipe have."""
MODELS = ("vanilla", "unlearned", "retain_only")
COST = {
    *("teach_seconds", "mask_seconds", "unlearn_seconds", "evaluate_seconds", "relearn_seconds", "attacks_seconds"),
    *("total_seconds", "step_seconds", "estimated_step_seconds", "estimated_peak_memory_bytes"),
    *("peak_memory_bytes", "trainable_parameters", "active_parameters", "total_parameters", "mask_bytes"),
}


@dataclass(frozen=True)
class Finished:
    """A run that went through, with everything it wrote."""

    recipe: str
    metrics: dict[str, Any]
    folder: Path
    cache: Path

    def copy(self, target: Path) -> Path:
        shutil.copytree(self.folder, target)
        return target


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    base = tmp_path_factory.mktemp("run")
    path = base / "small.yaml"
    path.write_text(f"# my notes\n{yaml.safe_dump(RECIPE)}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(base / "cache"))
        metrics, folder = run(str(path), out=base / "out")
        yield Finished(str(path), metrics, folder, base / "cache")


def figures(metrics: dict[str, Any]) -> dict[str, Any]:
    """The metrics without what differs from run to run: times and memory."""
    varying = {name for name in COST if name.endswith(("_seconds", "memory_bytes"))}
    cost = {name: value for name, value in metrics["cost"].items() if name not in varying}
    return {**metrics, "cost": cost}


def test_the_run_directory_holds_what_the_contract_says_and_nothing_else(finished: Finished) -> None:
    assert {path.name for path in finished.folder.iterdir()} == FILES
    left_over = [path for path in finished.folder.rglob("*") if path.suffix in (".tmp", ".pt")]
    assert left_over == []
    assert (finished.folder / "model" / "README.md").read_text().startswith("---")
    assert (finished.folder / "recipe.source.yaml").read_text() == Path(finished.recipe).read_text()


@pytest.mark.parametrize("start", [run, dry_run])
def test_a_photo_that_the_processor_refuses_is_told_before_anything_is_written(
    start: Callable[..., object], tiny: MLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.model.save_pretrained("model")
    tiny.processor.save_pretrained("model")
    rows = []
    for i, size in enumerate(((48, 48), (48, 64), (48, 48), (48, 48), (3, 900))):
        picture(*size, seed=i).save(f"{i}.png")
        name = "Ann" if i < 2 else "Bo"
        rows.append({"image": f"{i}.png", "question": "Who is shown?", "answer": name, "subject": name})
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = {key: RECIPE[key] for key in ("name", "adapter", "layers", "unlearn")} | {
        "model": {"source": "model"},
        "data": {"kind": "jsonl", "rows": "rows.jsonl", "forget": ["Ann"]},
        "attacks": [],
    }
    Path("strip.yaml").write_text(yaml.safe_dump(settings))
    before = sorted(tmp_path.iterdir())

    with pytest.raises(DataError, match=r"rows\.jsonl:5: cannot be encoded with '4\.png'.*absolute aspect ratio"):
        start("strip.yaml", ())

    assert sorted(tmp_path.iterdir()) == before


def test_the_written_recipe_repeats_the_run(finished: Finished) -> None:
    again = load_recipe(str(finished.folder / "recipe.yaml"))
    assert again.digest() == load_recipe(finished.recipe).digest()


def test_metrics_have_the_keys_and_types_of_the_contract(finished: Finished) -> None:
    metrics = read_json(finished.folder / "metrics.json")
    assert metrics == json.loads(json.dumps(finished.metrics))
    assert {"schema", "recipe", "adapter", "method", "seed", "models", "proofs", "relearn", "cost"} <= set(metrics)
    assert (metrics["schema"], metrics["recipe"], metrics["adapter"]) == (1, "small", "qwen_vl")
    assert set(metrics["models"]) == {"vanilla", "unlearned", "retain_only"}
    for columns in metrics["models"].values():
        assert set(columns) == COLUMNS
        for cell in columns.values():
            for figure in ("exact_match", "choice_accuracy", "rouge_l", "answer_probability"):
                assert isinstance(cell[figure], float) and 0 <= cell[figure] <= 1
            low, high = cell["interval_95"]
            assert low <= cell["exact_match"] <= high
            assert isinstance(cell["n"], int) and cell["n"] > 0
    assert metrics["unseen"] == {column: ["photos", "phrasings"] for column in ("test_vqa", "retain_vqa")}
    assert set(metrics["cost"]) == COST
    assert all(isinstance(metrics["cost"][name], float if name.endswith("_seconds") else int) for name in COST)


def test_what_unlearning_never_saw_is_found_in_the_pairs(splits: Splits) -> None:
    both = ["photos", "phrasings"]
    assert unseen(splits) == {"test_vqa": both, "retain_vqa": both}
    asked, trained = splits.columns["test_vqa"], splits.retain[0]
    loud = replace(asked[0], question=f" {trained.question.upper()}")  # the same words about somebody else
    shown = replace(asked[0], photos=trained.photos)
    for more, new in (([loud], ["photos"]), ([shown], ["phrasings"]), ([loud, shown], [])):
        mixed = replace(splits, columns={**splits.columns, "test_vqa": (*asked, *more)})
        assert unseen(mixed) == {"test_vqa": new, "retain_vqa": both}


def test_cost_counts_what_was_trained_and_what_could_move(finished: Finished) -> None:
    cost = finished.metrics["cost"]
    assert 0 < cost["active_parameters"] == pytest.approx(cost["trainable_parameters"] / 2, abs=1)
    assert cost["trainable_parameters"] < cost["total_parameters"]
    assert cost["mask_bytes"] == (finished.folder / "mask.safetensors").stat().st_size
    assert cost["mask_bytes"] < cost["trainable_parameters"] / 8 + 20_000
    parts = [name for name in COST if name.endswith("_seconds") and "step" not in name and name != "total_seconds"]
    assert sum(cost[name] for name in parts) == pytest.approx(cost["total_seconds"])


def test_what_was_expected_stands_beside_what_was_measured(finished: Finished) -> None:
    cost = finished.metrics["cost"]
    assert cost["step_seconds"] == pytest.approx(cost["unlearn_seconds"] / RECIPE["unlearn"]["steps"])
    assert cost["estimated_step_seconds"] > 0
    assert cost["estimated_peak_memory_bytes"] == pytest.approx(cost["peak_memory_bytes"], rel=0.5)
    assert "estimated against measured: " in (finished.folder / "log.txt").read_text()


def test_a_starting_model_that_knows_little_is_told_before_anything_is_unlearned(finished: Finished) -> None:
    known = finished.metrics["models"]["vanilla"]["test_vqa"]["exact_match"]
    assert known < 0.1, "so little teaching leaves nothing to forget"
    told, _, after = (finished.folder / "log.txt").read_text().partition("there is little to forget")
    assert "unlearned: " not in told and "unlearned: " in after
    assert " (estimated " in (finished.folder / "report.md").read_text()


def test_every_proof_holds(finished: Finished) -> None:
    assert finished.metrics["proofs"] == {
        "text_only_max_logit_difference": 0.0,
        "frozen_parameters_identical": True,
        "masked_parameters_identical": True,
        "reload_identical": True,
    }


def test_text_only_columns_are_exactly_those_of_the_vanilla_model(finished: Finished) -> None:
    models = finished.metrics["models"]
    for column in ("forget_qa", "retain_qa"):
        assert models["unlearned"][column] == models["vanilla"][column]
    assert models["unlearned"]["forget_vqa"] != models["vanilla"]["forget_vqa"]


def test_the_attack_is_reported_whole(finished: Finished) -> None:
    block = finished.metrics["relearn"]
    assert read_json(finished.folder / "relearn.json") == json.loads(json.dumps(block))
    averages = {"average_recovery", "average_gap", "advantage_over_retain_only", "recovery_from_others"}
    assert all(math.isfinite(block[name]) for name in averages)
    assert set(block) == averages | {"advantage_interval_95", "advantage_by_step", "curves"}
    low, high = block["advantage_interval_95"]
    assert low <= block["advantage_over_retain_only"] <= high
    tried = [(scope, *held) for scope in ("visual", "full") for held in HELD]
    assert {(c["model"], c["scope"], c["pool"], c["share"]) for c in block["curves"]} == {
        (model, *attacker) for model in ("unlearned", "retain_only") for attacker in tried
    }
    assert [(row["scope"], row["pool"], row["share"]) for row in block["advantage_by_step"]] == tried
    assert all(len(row["advantage"]) == 2 for row in block["advantage_by_step"])
    for curve in block["curves"]:
        assert curve["steps"] == [0, 1, 2] or curve["steps"] == (0, 1, 2)
        assert curve["exact_match"][0] == finished.metrics["models"][curve["model"]]["test_vqa"]["exact_match"]


def test_the_other_attacks_are_in_the_metrics_and_in_the_report(finished: Finished) -> None:
    tried = finished.metrics["attacks"]
    kinds = {model: [result["kind"] for result in tried if result["model"] == model] for model in MODELS}
    assert kinds["unlearned"] == [config.kind for config in EVERY_ATTACK]
    assert kinds["vanilla"] == kinds["retain_only"] == [kind for kind in kinds["unlearned"] if kind != "module_restore"]
    assert not any("per_question" in result for result in tried)
    (restored,) = (one for one in tried if one["options"].get("parts") == ["encoder", "projector"])
    assert restored["exact_match"] == finished.metrics["models"]["vanilla"]["test_vqa"]["exact_match"]
    (membership,) = (one for one in tried if (one["kind"], one["model"]) == ("membership", "unlearned"))
    assert 0 <= membership["ks_statistic"] <= 1 and 0 <= membership["loss_auc"] <= 1
    assert finished.metrics["over_forgotten"]["against"] == "retain_only"
    for name in ("report.html", "report.md"):
        assert "Other attacks" in (finished.folder / name).read_text()


def test_the_verdict_comes_first_wherever_a_run_is_told(finished: Finished) -> None:
    metrics = finished.metrics
    found = metrics["verdict"]
    assert found == {**asdict(verdict(metrics)), "reasons": found["reasons"]}
    assert metrics["text_only"]["changed"] == 0.0
    assert all(0 <= metrics["degenerate"][model] <= 1 for model in ("vanilla", "unlearned"))
    assert metrics["retain_floor"] == {"floor": 0.8, "steps_below": 0, "steps": 6}
    sentence = escape(found["sentence"])
    for path in ("report.md", "model/README.md"):
        lines = [line for line in (finished.folder / path).read_text().splitlines() if line]
        assert lines[[line.startswith("# ") for line in lines].index(True) + 1] == f"**{sentence}**"
    assert f"<p>{html.escape(found['sentence'])}</p>" in (finished.folder / "report.html").read_text()
    done = CliRunner().invoke(main, ["run", finished.recipe, "--out", str(finished.folder), "--resume"])
    assert done.exit_code == 0
    assert " ".join(done.stdout.split()).endswith(" ".join((found["sentence"], *found["reasons"])).replace(NBSP, " "))


def test_history_has_a_line_a_step(finished: Finished) -> None:
    lines = [json.loads(line) for line in (finished.folder / "history.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(6))
    assert all({"forget_output", "attacked", "retain_output", "attract"} <= set(line) for line in lines)


def test_the_report_needs_no_second_file_and_names_the_forgotten(finished: Finished) -> None:
    page = (finished.folder / "report.html").read_text()
    assert "data:image/" in page
    table = (finished.folder / "report.md").read_text().partition("### Each forgotten person")[2].partition("##")[0]
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")][2:]
    assert len(rows) == CAST["forget"] and all(row[0].removeprefix("| ") in page for row in rows)
    assert sum(int(row[2]) for row in rows) == finished.metrics["models"]["unlearned"]["test_vqa"]["n"]
    assert rows[0][0].removeprefix("| ") not in (finished.folder / "model" / "README.md").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "small" in (finished.folder / "report.md").read_text()


LOAD = """
import sys
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
model, info = AutoModelForImageTextToText.from_pretrained(sys.argv[1], output_loading_info=True)
processor = AutoProcessor.from_pretrained(sys.argv[1])
content = [{"type": "image"}, {"type": "text", "text": "What is the hobby of this person?"}]
text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
inputs = processor(text=[text], images=[Image.open(sys.argv[2])], return_tensors="pt")
out = model.generate(**inputs, max_new_tokens=5, do_sample=False)
assert out.shape[1] > inputs["input_ids"].shape[1]
assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
assert not [name for name in sys.modules if name.startswith("vkd_")]
"""


@pytest.mark.slow
def test_anybody_can_load_the_model_without_vkd_and_generate(finished: Finished, tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    Image.effect_noise((48, 48), 50).convert("RGB").save(photo)
    command = [sys.executable, "-c", LOAD, str(finished.folder / "model"), str(photo)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "lost",
    [
        ["metrics.json", "report.html"],
        ["metrics.json", "relearn.json", "checkpoints/relearn-*", "checkpoints/evaluate-unlearned.json"],
        [
            "metrics.json",
            "checkpoints/unlearn.json",
            "model",
            "history.jsonl",
            "checkpoints/relearn-unlearned-full-1-0.json",
        ],
        ["checkpoints/mask.json", "mask.safetensors", "checkpoints/unlearn.json"],
    ],
    ids=["report", "evaluation", "model", "mask"],
)
@pytest.mark.slow
def test_a_resumed_run_ends_with_the_figures_of_an_uninterrupted_one(
    finished: Finished, tmp_path: Path, lost: list[str]
) -> None:
    out = finished.copy(tmp_path / "out")
    for pattern in lost:
        found = list(out.glob(pattern))
        assert found
        for path in found:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    metrics, folder = run(finished.recipe, out=out, resume=True)
    assert folder == out
    assert figures(json.loads(json.dumps(metrics))) == figures(read_json(finished.folder / "metrics.json"))
    assert {path.name for path in out.iterdir()} == FILES


def test_what_is_finished_is_not_done_again(finished: Finished, tmp_path: Path) -> None:
    out = finished.copy(tmp_path / "out")
    kept = [out / "model" / "model.safetensors", out / "mask.safetensors", *out.glob("checkpoints/*")]
    before = {path: path.stat().st_mtime_ns for path in kept}
    run(finished.recipe, out=out, resume=True)
    assert {path: path.stat().st_mtime_ns for path in kept} == before


@pytest.mark.slow
def test_another_seed_starts_from_the_same_taught_model(finished: Finished, tmp_path: Path) -> None:
    taught = sorted(finished.cache.glob("taught/*/model.safetensors"))
    assert len(taught) == 2  # vanilla and retain-only
    before = {path: path.stat().st_mtime_ns for path in taught}
    settings = (
        "seed=1",
        "relearn={shares: [0.05], steps: [1], scopes: [visual]}",
        "reference=none",
        "mask={kind: none}",
        "attacks=[]",
    )
    metrics, folder = run(finished.recipe, settings, out=tmp_path / "out")
    assert sorted(finished.cache.glob("taught/*/model.safetensors")) == taught
    assert {path: path.stat().st_mtime_ns for path in taught} == before
    assert metrics["models"]["vanilla"] == finished.metrics["models"]["vanilla"]
    assert metrics["models"]["unlearned"] != finished.metrics["models"]["unlearned"]
    assert metrics["proofs"]["masked_parameters_identical"] is None
    assert metrics["relearn"]["advantage_over_retain_only"] is None
    assert metrics["cost"]["mask_bytes"] == 0
    assert not (folder / "mask.safetensors").exists()


@pytest.mark.slow
def test_a_deleted_cache_is_filled_again_on_resume(finished: Finished, tmp_path: Path) -> None:
    out = finished.copy(tmp_path / "out")
    (out / "checkpoints" / "evaluate-vanilla.json").unlink()
    moved = tmp_path / "moved"
    shutil.move(finished.cache, moved)
    try:
        metrics, _ = run(finished.recipe, out=out, resume=True)
    finally:
        shutil.rmtree(finished.cache, ignore_errors=True)
        shutil.move(moved, finished.cache)
    assert metrics["models"] == finished.metrics["models"]


def test_a_run_does_not_go_on_with_a_model_that_was_taught_anew_and_came_out_otherwise(
    finished: Finished, tmp_path: Path
) -> None:
    out = finished.copy(tmp_path / "out")
    source = read_json(out / "checkpoints" / "teach-retain_only.json")["result"]
    about = Path(source) / "teaching.json"
    kept = about.read_text()
    about.write_text(json.dumps({**json.loads(kept), "weights": "others"}))
    try:
        with pytest.raises(ModelError, match="began with other weights of the retain_only model"):
            run(finished.recipe, out=out, resume=True)
    finally:
        about.write_text(kept)


def test_the_recipe_of_an_older_version_is_not_taken_for_todays(tmp_path: Path) -> None:
    recipe = load_recipe("qwen2vl_celeb")
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert recipe_of(tmp_path) == recipe.digest()
    older = yaml.safe_load(recipe.to_yaml())
    assert older["simulated_attack"].pop("rank") == 8  # which the method would fill in
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(older), encoding="utf-8")
    assert recipe_of(tmp_path) is None
    with pytest.raises(RecipeError, match="holds no run of this recipe"):
        run("qwen2vl_celeb", out=tmp_path, resume=True)


def test_a_run_is_not_resumed_with_other_settings(finished: Finished, tmp_path: Path) -> None:
    out = finished.copy(tmp_path / "out")
    with pytest.raises(RecipeError, match="holds no run of this recipe with these settings"):
        run(finished.recipe, ("seed=1",), out=out, resume=True)
    assert read_json(out / "metrics.json")["seed"] == 0


def test_a_run_is_not_resumed_with_other_data(finished: Finished, tmp_path: Path) -> None:
    out = finished.copy(tmp_path / "out")
    kept = out / "checkpoints" / "data.json"
    stage = read_json(kept)
    write_json(kept, {**stage, "result": "of other data"})
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.json")}
    with pytest.raises(DataError, match="the data changed since this began"):
        run(finished.recipe, out=out, resume=True)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.json")} == before
    kept.unlink()  # as a run of an older version leaves it
    run(finished.recipe, out=out, resume=True)
    assert read_json(kept)["result"] == stage["result"]


def test_a_run_is_not_resumed_with_another_model_or_teacher_in_the_same_place(tmp_path: Path, splits: Splits) -> None:
    sources = {}
    for key in ("model", "teacher"):
        (tmp_path / key).mkdir()
        (tmp_path / key / "model.safetensors").write_bytes(b"weights")
        sources[f"{key}.source"] = str(tmp_path / key)
    teacher = {"kind": "ignorant", "source": sources["teacher.source"]}
    recipe = make_recipe(model={"source": sources["model.source"]}, teach=None, teacher=teacher)
    begun = Run(recipe, load_adapter("qwen_vl"), splits, tmp_path / "run", "")
    assert begun.sources == sources
    assert not replace(begun, recipe=make_recipe()).sources
    check_models(begun.folder, begun.stages, begun.sources)
    check_models(begun.folder, begun.stages, begun.sources)
    (tmp_path / "teacher" / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(
        ModelError, match=r"began with another teacher\.source than .*; put its files back, or start anew"
    ):
        check_models(begun.folder, begun.stages, begun.sources)


def test_an_existing_run_is_not_written_over(finished: Finished) -> None:
    before = (finished.folder / "metrics.json").stat().st_mtime_ns
    for out in (finished.folder, str(finished.folder)):
        with pytest.raises(RecipeError, match="exists already; add --resume"):
            run(finished.recipe, out=out)
    assert (finished.folder / "metrics.json").stat().st_mtime_ns == before


def test_runs_that_begin_in_the_same_second_get_folders_of_their_own(tmp_path: Path) -> None:
    wanted = tmp_path / "runs" / "small-20200101-000000"
    made = [make(wanted, named=False) for _ in range(3)]
    assert [folder.name for folder in made] == [wanted.name, f"{wanted.name}-2", f"{wanted.name}-3"]
    assert make(wanted, named=True) == wanted


def test_a_run_that_is_still_going_is_not_gone_on_with(finished: Finished, tmp_path: Path) -> None:
    out = finished.copy(tmp_path / "out")
    with held(out), pytest.raises(RecipeError, match="another vkd run is writing into it; wait until it ends"):
        run(finished.recipe, out=out, resume=True)
    run(finished.recipe, out=out, resume=True)


def test_resume_without_out_finds_the_latest_run_of_the_recipe(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    finished.copy(tmp_path / "runs" / "small-20200101-000000")
    (tmp_path / "runs" / "small-20990101-000000").mkdir()
    (tmp_path / "runs" / "small-20990101-000000" / "recipe.yaml").write_text("name: small\n")
    _, folder = run(finished.recipe, resume=True)
    assert folder == Path("runs/small-20200101-000000")


@pytest.mark.parametrize(
    ("proof", "value"), [("frozen_parameters_identical", False), ("text_only_max_logit_difference", 1e-9)]
)
def test_a_failed_proof_fails_the_run_after_the_report_is_written(
    finished: Finished, tmp_path: Path, proof: str, value: object
) -> None:
    out = finished.copy(tmp_path / "out")
    marker = out / "checkpoints" / "unlearn.json"
    stage = read_json(marker)
    stage["result"]["proofs"][proof] = value
    write_json(marker, stage)
    for name in ("metrics.json", "report.html", "report.md"):
        (out / name).unlink()
    done = CliRunner().invoke(main, ["run", finished.recipe, "--out", str(out), "--resume"])
    assert done.exit_code == 1
    assert done.stdout == ""
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert proof in line and "must not be used" in line
    assert (out / "report.html").exists() and (out / "report.md").exists()
    assert read_json(out / "metrics.json")["proofs"][proof] == value
