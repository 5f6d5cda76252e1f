from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from vkd_framework.bench import cells, command, export, frontier, loop, page, terminal
from vkd_framework.bench.cells import Cell
from vkd_framework.bench.estimates import Comparison, compare, estimate
from vkd_framework.bench.figures import Figure, Value, figures
from vkd_framework.bench.layout import caption, cell, sections
from vkd_framework.bench.records import MAPPINGS, Record, find, gather
from vkd_framework.bench.verdict import dominates, point, verdict
from vkd_framework.bench.verdict import frontier as frontier_of
from vkd_framework.checkpoint import write_json
from vkd_framework.cli import main
from vkd_framework.errors import RecipeError
from vkd_framework.intervals import student, student_quantile, wilson
from vkd_framework.recipe import Recipe, load_recipe
from vkd_framework.report.formatting import flatten

SHARE = Figure("retain_vqa.exact_match", "Retain VQA", "share", "higher")
STEPS = (10, 30)


def measured(share: float, n: int = 160) -> dict[str, Any]:
    low, high = wilson(share * n, n)
    figures = {"exact_match": share, "choice_accuracy": share, "rouge_l": share, "answer_probability": share}
    return {**figures, "n": n, "interval_95": [low, high]}


def columns(test: float, retain: float) -> dict[str, Any]:
    same = {"realworld_vqa": 0.65, "forget_visible_vqa": 0.9, "forget_qa": 1.0, "retain_qa": 1.0}
    shares = {"forget_vqa": test, "test_vqa": test, "retain_vqa": retain, **same}
    return {name: measured(share) for name, share in shares.items()}


def made(
    method: str,
    seed: int = 0,
    *,
    test: float = 0.05,
    retain: float = 0.9,
    attacked: Sequence[float] = (0.3, 0.6),
    never: Sequence[float] | None = (0.2, 0.4),
    recipe: str = "small",
    proofs: dict[str, Any] | None = None,
    seconds: float = 60.0,
) -> dict[str, Any]:
    """What a run would write into metrics.json."""
    scores = {"unlearned": (test, *attacked), **({"retain_only": (0.03, *never)} if never else {})}
    curves = [
        {"model": model, "scope": scope, "share": 1.0, "pairs": 8, "seed": 0, "steps": [0, *STEPS], "exact_match": y}
        for model, y in scores.items()
        for scope in ("visual", "full")
    ]
    ahead = [a - b for a, b in zip(attacked, never, strict=True)] if never else []
    return {
        "schema": 1,
        "recipe": recipe,
        "adapter": "qwen_vl",
        "method": method,
        "seed": seed,
        "models": {
            "vanilla": columns(1.0, 0.95),
            "unlearned": columns(test, retain),
            **({"retain_only": columns(0.03, 0.93)} if never else {}),
        },
        "proofs": proofs if proofs is not None else {"text_only_max_logit_difference": 0.0},
        "relearn": {
            "average_recovery": sum(attacked) / len(attacked) - test,
            "average_gap": 1.0 - sum(attacked) / len(attacked),
            "advantage_over_retain_only": sum(ahead) / len(ahead) if ahead else None,
            "curves": curves,
        },
        "cost": {
            "unlearn_seconds": seconds,
            "total_seconds": 4 * seconds,
            "peak_memory_bytes": 2**30,
            "trainable_parameters": 514_112,
            "total_parameters": 1_100_000,
        },
    }


def tried(model: str, exact: float, **figures: float) -> list[dict[str, Any]]:
    """Entries of `attacks` in metrics.json about one model."""
    return [
        {"kind": "quantize", "options": {"bits": 4}, "model": model, "exact_match": exact, "retain_exact_match": 0.9},
        {"kind": "module_restore", "options": {"parts": ["encoder", "projector"]}, "model": model, "skipped": "no"},
        {"kind": "probe", "options": {"photos": 64}, "model": model, "encoder_linear": 0.5, "chance": 0.2, **figures},
        {"kind": "membership", "options": {"lowest": 0.2}, "model": model, "loss_auc": 0.45, "min_k_auc": None},
    ]


def compared(*metrics: dict[str, Any]) -> Comparison:
    (group,) = gather([Record(Path(f"run{index}"), one) for index, one in enumerate(metrics)])
    return compare(group)


def values(*numbers: float, interval: tuple[float, float] | None = None, figure: Figure = SHARE) -> list[Value]:
    return [Value(figure, number, interval) for number in numbers]


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.7062), (2, 4.3027), (9, 2.2622), (10, 2.2281), (30, 2.0423), (120, 1.9799)]
)
def test_students_quantiles_have_their_published_values(freedom: int, quantile: float) -> None:
    assert student_quantile(freedom) == pytest.approx(quantile, abs=1e-3)


def test_an_interval_over_seeds_is_students() -> None:
    assert student([1.0, 2.0, 3.0]) == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-3)
    found = estimate(values(0.90, 0.92, 0.94))
    assert found.mean == pytest.approx(0.92)
    assert (found.low, found.high) == pytest.approx(
        (0.92 - 4.3027 * 0.02 / 3**0.5, 0.92 + 4.3027 * 0.02 / 3**0.5), abs=1e-4
    )
    assert (found.seeds, found.source) == (3, "seeds")


def test_an_interval_over_seeds_stays_among_possible_values() -> None:
    found = estimate(values(0.0, 0.1))
    assert found.low == 0.0 and found.high == pytest.approx(0.05 + 12.706 * 0.05, abs=1e-3)
    above = estimate(values(0.0, 900.0, figure=Figure("cost.x", "x", "seconds", "lower")))
    assert above.low == 0.0 and above.high is not None and above.high > 900


def test_one_seed_or_seeds_that_agree_exactly_have_the_interval_of_the_questions() -> None:
    for numbers in ((0.0,), (0.0, 0.0, 0.0)):
        found = estimate(values(*numbers, interval=(0.0, 0.02)))
        assert (found.mean, found.low, found.high, found.source) == (0.0, 0.0, 0.02, "questions")


def test_a_figure_without_any_interval_says_so() -> None:
    found = estimate(values(0.4))
    assert (found.low, found.high, found.source) == (None, None, "none")


def test_the_text_only_difference_is_the_largest_of_all_seeds() -> None:
    line = compared(made("a", 0), made("a", 1, proofs={"text_only_max_logit_difference": 0.5})).lines[0]
    assert line.estimates["proofs.text_only_max_logit_difference"].mean == 0.5


def test_the_attack_is_told_for_each_scope_step_and_pool_over_shares_and_attackers() -> None:
    metrics = made("a")
    curve = metrics["relearn"]["curves"][0]
    metrics["relearn"]["curves"] += [
        {**curve, "share": 0.05, "exact_match": [0.05, 0.1, 0.2]},
        {**curve, "pool": "new", "exact_match": [0.05, 0.8, 0.9]},
    ]
    found = figures(metrics)
    assert found["attacked.visual.known.10"].value == pytest.approx((0.3 + 0.1) / 2)
    assert found["attacked.full.known.10"].value == pytest.approx(0.3)
    assert found["attacked.visual.new.30"].value == pytest.approx(0.9)
    assert found["advantage.visual.known.30"].value == pytest.approx(0.6 - 0.4), "the share only one was attacked with"
    assert "advantage.visual.new.30" not in found
    assert figures(metrics, "retain_only")["attacked.full.known.30"].value == pytest.approx(0.4)


def test_less_is_better_only_where_the_forgotten_are_asked_who_they_are() -> None:
    better = {key: value.figure.better for key, value in figures(made("a")).items()}
    assert better["test_vqa.exact_match"] == better["forget_vqa.choice_accuracy"] == "lower"
    assert better["forget_visible_vqa.exact_match"] == better["forget_qa.exact_match"] == "higher"
    assert better["attacked.visual.known.10"] == better["cost.unlearn_seconds"] == "lower"
    assert better["relearn.average_gap"] == "higher"
    assert better["cost.total_parameters"] == "neither"


def test_of_wrong_answers_only_the_probability_is_told_and_none_is_better() -> None:
    metrics = made("a")
    metrics["models"]["unlearned"]["retain_vqa_seen_wrong_answer"] = metrics["models"]["unlearned"]["retain_vqa"]
    found = {key: value for key, value in figures(metrics).items() if key.startswith("retain_vqa_seen_wrong_answer")}
    assert {key: value.figure.better for key, value in found.items()} == {
        "retain_vqa_seen_wrong_answer.answer_probability": "neither"
    }
    metrics["models"]["unlearned"]["test_vqa_paraphrased_answer"] = metrics["models"]["unlearned"]["test_vqa"]
    reworded = [value for key, value in figures(metrics).items() if key.startswith("test_vqa_paraphrased_answer")]
    assert len(reworded) > 1 and {value.figure.better for value in reworded} == {"neither"}


def test_runs_that_differ_only_in_their_seed_are_one_row_and_others_are_told_apart(tmp_path: Path) -> None:
    for name, seed, steps in (("a", 0, 300), ("b", 1, 300), ("c", 0, 600)):
        write_json(tmp_path / name / "metrics.json", made("vkd", seed))
        recipe = {"name": name, "method": "vkd", "seed": seed, "unlearn": {"steps": steps}, "layers": ["projector"]}
        (tmp_path / name / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (group,) = gather(find([tmp_path]))
    assert [(row.label, row.seeds) for row in group.rows] == [
        ("vkd", (0, 1)),
        ("vkd (unlearn.steps=600)", (0,)),
    ]


def test_no_name_of_a_users_own_people_enters_a_comparison(tmp_path: Path) -> None:
    for name, person in (("a", "Jane Roe"), ("b", "John Doe")):
        write_json(tmp_path / name / "metrics.json", made("vkd", 0))
        data = {"kind": "jsonl", "rows": f"/home/{name}/rows.jsonl", "images": None, "forget": [person]}
        recipe = {"name": "mine", "method": "vkd", "data": data}
        (tmp_path / name / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    told = command.compare(
        [tmp_path], {form: tmp_path / f"told.{form}" for form in ("json", "csv", "markdown", "html")}
    )
    told += "".join(path.read_text() for path in tmp_path.glob("told.*"))
    assert not [word for word in ("Jane", "Roe", "John", "Doe", "rows.jsonl") if word in told]
    (group,) = gather(find([tmp_path / "a", tmp_path / "b"]))
    assert len({row.label for row in group.rows}) == 2


def test_a_setting_without_a_majority_is_told_of_every_row(tmp_path: Path) -> None:
    for name, steps in (("a", 300), ("b", 600)):
        write_json(tmp_path / name / "metrics.json", made("vkd", 0))
        recipe = {"name": name, "method": "vkd", "unlearn": {"steps": steps}}
        (tmp_path / name / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (group,) = gather(find([tmp_path]))
    assert [row.variant for row in group.rows] == ["unlearn.steps=300", "unlearn.steps=600"]


def test_a_run_of_an_older_version_is_told_apart_by_a_key_that_it_did_not_have(tmp_path: Path) -> None:
    attacks = {"old": {"weight": 1.0}, "same": {"weight": 1.0, "rank": None}, "new": {"weight": 1.0, "rank": 8}}
    for seed, (name, attack) in enumerate(attacks.items()):
        write_json(tmp_path / name / "metrics.json", made("vkd", seed))
        recipe = {"name": name, "method": "vkd", "seed": seed, "simulated_attack": attack}
        (tmp_path / name / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (group,) = gather(find([tmp_path / name for name in attacks]))
    assert [(row.variant, row.seeds) for row in group.rows] == [
        ("", (0, 1)),
        ("simulated_attack.rank=8", (2,)),
    ]


def run_with(settings: Mapping[str, Any], seed: int = 0, method: str = "vkd", **figures: Any) -> Record:
    """A run of a recipe with these sections."""
    return Record(Path(f"run{seed}"), made(method, seed, **figures), dict(flatten(settings)))


RETAINED = {"others": 0.9, "forgotten": 0.1}
TAUGHT = {"steps": 500, "shares": {"names": 0.6, "text": 0.4}}


@pytest.mark.parametrize(
    ("one", "other", "variants"),
    [
        (
            {"unlearn": {"retain_shares": None}},
            {"unlearn": {"retain_shares": RETAINED}},
            ["unlearn.retain_shares=\N{EN DASH}", "unlearn.retain_shares={forgotten: 0.1, others: 0.9}"],
        ),
        (
            {"unlearn": {"retain_shares": {"others": 0.9, "strangers": 0.1}}},
            {"unlearn": {"retain_shares": RETAINED}},
            [
                "unlearn.retain_shares={others: 0.9, strangers: 0.1}",
                "unlearn.retain_shares={forgotten: 0.1, others: 0.9}",
            ],
        ),
        (
            {"unlearn": {"steps": 9}, "teach": None},
            {"unlearn": {"steps": 9}, "teach": TAUGHT},
            ["teach=\N{EN DASH}", "teach={shares: {names: 0.6, text: 0.4}, steps: 500}"],
        ),
    ],
)
def test_a_setting_that_is_null_or_has_other_keys_tells_runs_apart(
    one: dict[str, Any], other: dict[str, Any], variants: list[str]
) -> None:
    (group,) = gather([run_with(one, 0), run_with(other, 1)])
    assert [row.variant for row in group.rows] == variants


def test_a_key_that_a_record_of_an_older_version_has_not_tells_none_apart_even_beside_null() -> None:
    with_rank = {"teach": TAUGHT | {"warmup": 0}, "unlearn": {"retain_shares": None}}
    runs = [{"teach": TAUGHT, "unlearn": {"steps": 9}}, with_rank, {"teach": None, "unlearn": {"steps": 9}}]
    (group,) = gather([run_with(settings, seed) for seed, settings in enumerate(runs)])
    assert [(row.variant, row.seeds) for row in group.rows] == [("", (0, 1)), ("teach=\N{EN DASH}", (2,))]


def test_a_setting_that_a_published_record_has_not_yet_stands_at_its_default(tmp_path: Path) -> None:
    entries = []
    for seed, forget in enumerate(({}, {"strangers": "1"}, {"strangers": "1"}, {"strangers": "2"}, {"strangers": "4"})):
        settings = {f"losses.forget_output.{key}": value for key, value in ({"form": "stranger"} | forget).items()}
        entries.append({**made("vkd", seed), "settings": settings})
    write_json(tmp_path / "published.json", entries)
    (group,) = gather(find([tmp_path / "published.json"]))
    told = "losses.forget_output.strangers"
    assert [(row.variant, row.seeds) for row in group.rows] == [
        ("", (0, 1, 2)),
        (f"{told}=2", (3,)),
        (f"{told}=4", (4,)),
    ]


def test_every_setting_with_keys_of_the_users_choice_is_compared_as_one_value() -> None:
    schema = Recipe.model_json_schema()
    sections = {name: value.get("$ref", "").rpartition("/")[2] for name, value in schema["properties"].items()}
    sections |= {"teach": "TeachConfig"}
    found = {
        f"{name}.{key}"
        for name, section in sections.items()
        for key, value in schema["$defs"].get(section, {}).get("properties", {}).items()
        if any(kind.get("type") == "object" for kind in (value, *value.get("anyOf", ())))
    }
    assert found == set(MAPPINGS)


def test_the_same_run_twice_is_refused_and_the_same_folder_twice_is_one() -> None:
    with pytest.raises(RecipeError, match=r"one and two: both are vkd with seed 0 .* give one of them"):
        gather([Record(Path("one"), made("vkd")), Record(Path("two"), made("vkd"))])


def test_the_json_file_of_a_comparison_is_compared_again_together_with_other_runs(tmp_path: Path) -> None:
    for name, seed, steps in (("a", 0, 300), ("b", 1, 300), ("c", 0, 600)):
        write_json(tmp_path / name / "metrics.json", made("vkd", seed))
        recipe = {"name": name, "method": "vkd", "seed": seed, "unlearn": {"steps": steps}}
        (tmp_path / name / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    folders = [tmp_path / name for name in "abc"]
    at_once = gather(find(folders))
    file = tmp_path / "published.json"
    for more in folders:
        file.write_text(export.json_text(find([file, more] if file.exists() else [more])))
    (group,) = gather(find([file, file]))
    assert [(row.label, row.seeds) for row in group.rows] == [(row.label, row.seeds) for row in at_once[0].rows]
    again, once = (export.markdown([compare(g)], "vkd", command="-") for g in (group, at_once[0]))
    assert again == once
    with pytest.raises(RecipeError, match=r"published.json/small-vkd-0 and .*/a: both are vkd with seed 0"):
        gather(find([file, folders[0]]))


def test_a_method_that_promises_nothing_about_text_is_not_left_out_when_it_comes_from_a_file(tmp_path: Path) -> None:
    found = {"text_only_max_logit_difference": 2.0, "frozen_parameters_identical": True, "reload_identical": True}
    metrics = made("ga_diff", proofs=found) | {"train": ["encoder", "projector", "language_model"]}
    write_json(tmp_path / "run" / "metrics.json", metrics)
    (tmp_path / "file.json").write_text(export.json_text(find([tmp_path / "run"])))
    (record,) = find([tmp_path / "file.json"])
    assert record.failed_proofs == ()


@pytest.mark.parametrize(
    "text",
    ["[1]", "{}", '[{"method": "vkd"}]', '[{"method": "vkd", "models": {}, "recipe": "r", "seed": null}]', "no JSON"],
)
def test_another_file_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(RecipeError, match=r"other\.json: (is no list of runs|cannot be read)"):
        find([tmp_path / "other.json"])


def test_recipes_keep_to_themselves_and_methods_have_the_given_order() -> None:
    records = [Record(Path("r"), made(m, recipe=r)) for r in ("x", "y") for m in ("theirs", "vkd_paper", "vkd")]
    groups = gather(records, ["vkd", "vkd_paper"])
    assert [group.recipe for group in groups] == ["x", "y"]
    assert [row.label for row in groups[0].rows] == ["vkd", "vkd_paper", "theirs"]


def test_a_reference_counts_once_however_many_runs_repeat_it() -> None:
    comparison = compared(made("vkd", 0), made("vkd", 1, test=0.1), made("npo", 0))
    vanilla, never = comparison.references
    assert (vanilla.label, never.label) == ("vanilla", "retain-only")
    found = never.estimates["test_vqa.exact_match"]
    assert (found.mean, found.source, found.seeds) == (0.03, "questions", 1)
    assert "cost.unlearn_seconds" not in vanilla.estimates


def started(people: int, guessed: float, kept: float, **more: Any) -> list[Record]:
    """Three runs with so many people, whom the model that never knew names so often; what both references keep."""
    runs = [run_with({"data": {"people": people}, "unlearn": {"steps": 9}}, seed, **more) for seed in (0, 1, 2)]
    for run in runs:
        run.metrics["models"]["vanilla"] = columns(1.0, kept)
        run.metrics["models"]["retain_only"] = columns(guessed, kept)
    return runs


def test_models_that_no_method_made_have_a_row_for_each_data_and_starting_model() -> None:
    (group,) = gather([*started(32, 0.02, 0.9), *started(64, 0.1, 0.6)[:2], *started(32, 0.02, 0.9, method="npo")])
    comparison = compare(group)
    assert [(line.label, line.mean("retain_vqa.exact_match")) for line in comparison.references] == [
        ("vanilla", 0.9),
        ("retain-only", 0.9),
        ("vanilla (data.people=64)", 0.6),
        ("retain-only (data.people=64)", 0.6),
    ]
    assert {line.estimates["test_vqa.exact_match"].seeds for line in comparison.references} == {1}
    assert [line.label for line in comparison.lines] == ["vkd", "vkd (data.people=64)", "npo"]


def test_runs_of_one_start_share_a_reference_whatever_else_differs_and_whoever_says_no_settings() -> None:
    runs = [run_with({"data": {"people": 32}, "unlearn": {"steps": steps}}, steps) for steps in (1, 2)]
    older = run_with({"data": {"people": 32, "strangers": 8}, "unlearn": {"steps": 2}}, 3)
    (group,) = gather([*runs, older, Record(Path("bare"), made("vkd", 9)), Record(Path("other"), made("npo"))])
    assert [line.label for line in compare(group).references] == ["vanilla", "retain-only"]


def test_forgetting_is_held_against_the_model_that_never_knew_of_the_same_start() -> None:
    level = {"attacked": (0.2, 0.4), "never": (0.2, 0.4)}
    few, many = started(32, 0.0, 0.9, test=0.1, **level), started(64, 0.2, 0.9, test=0.15, **level)
    (group,) = gather([*few, *many])
    comparison = compare(group)
    found = [point(line, comparison.reference("retain_only", line)) for line in comparison.lines]
    assert [place and place[0] for place in found] == pytest.approx([-0.1, 0.0])
    said = " ".join(verdict(comparison, "vkd"))
    assert "Beaten by no other: vkd (data.people=32) and vkd (data.people=64)." in said


def test_the_pictures_have_a_level_only_where_all_starts_have_the_same() -> None:
    (group,) = gather([*started(32, 0.02, 0.9), *started(64, 0.1, 0.9)])
    plot = frontier.plots(compare(group), "vkd")[0]
    assert plot.x_level is None and plot.y_level is not None


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ((1, 1, 1), (1, 1, 0), True),
        ((1, 1, 1), (1, 1, 1), False),
        ((2, 2, 0), (1, 1, 1), False),
        ((0, 0, 0), (1, 1, 1), False),
    ],
)
def test_a_point_dominates_when_it_is_nowhere_worse_and_somewhere_better(
    one: tuple[float, ...], other: tuple[float, ...], expected: bool
) -> None:
    assert dominates(one, other) is expected


def test_the_frontier_is_what_no_other_point_dominates() -> None:
    points = {"a": (2, 2, 2), "b": (3, 1, 1), "c": (1, 1, 1), "d": (2, 2, 1), "e": None}
    found = frontier_of(points)
    assert found.best == ("a", "b")
    assert found.beaten == {"c": ("a", "b", "d"), "d": ("a",)}
    assert found.unknown == ("e",)


def test_what_began_from_another_model_or_other_data_is_not_ranked_with_it() -> None:
    points = {"a": (2, 2, 2), "b": (1, 1, 1), "c": (0, 0, 0)}
    found = frontier_of(points, {"a": "32 people", "b": "64 people", "c": "64 people"})
    assert found.best == ("a", "b") and found.beaten == {"c": ("b",)}


def test_the_verdict_names_who_beats_the_baseline_on_all_three() -> None:
    text = " ".join(verdict(compared(made("vkd"), made("npo", test=0.0, attacked=(0.1, 0.1))), "vkd"))
    assert text.startswith("npo beats vkd on forget")
    assert "within the intervals" not in text
    assert "Beaten by no other: npo; beaten: vkd (by npo)." in text


def test_answering_less_than_a_model_that_never_knew_does_not_beat_one_that_answers_as_it() -> None:
    level, below = made("vkd", test=0.03, attacked=(0.2, 0.4)), made("npo", test=0.0, attacked=(0.0, 0.1))
    text = " ".join(verdict(compared(level, below), "vkd"))
    assert text.startswith("No other method beats vkd")
    assert "Beaten by no other: vkd and npo." in text
    worse = made("npo", test=0.0, attacked=(0.0, 0.1), retain=0.89)
    assert "beaten: npo (by vkd)." in " ".join(verdict(compared(level, worse), "vkd"))


def test_teaching_anew_is_told_apart_from_the_methods_that_unlearn() -> None:
    anew = made("retain_only", test=0.03, retain=0.93, attacked=(0.2, 0.4))
    text = " ".join(verdict(compared(made("vkd"), made("npo", test=0.2), anew), "vkd"))
    assert text.startswith("No other method beats vkd")
    assert "Beaten by no other: vkd; beaten: npo (by vkd)." in text
    assert "retain_only is taught anew without the forgotten and does not compete: it beats" in text
    assert "vkd (within the intervals) and npo." in text
    none = " ".join(verdict(compared(made("vkd", retain=0.95), made("npo", retain=0.94), anew), "vkd"))
    assert "does not compete: it beats none of them." in none


def test_an_interval_below_a_model_that_never_knew_is_not_what_makes_a_verdict_clear() -> None:
    level = [made("vkd", seed, attacked=(0.2 - seed / 1000, 0.4)) for seed in (0, 1)]
    below = [made("npo", seed, attacked=(0.1 - seed / 1000, 0.2), retain=0.906) for seed in (0, 1)]
    text = " ".join(verdict(compared(*level, *below), "vkd"))
    assert "npo beats vkd" in text and "all of it within the intervals" in text


def test_the_verdict_says_when_the_intervals_meet() -> None:
    text = " ".join(verdict(compared(made("vkd"), made("npo", retain=0.906)), "vkd"))
    assert "npo beats vkd" in text and "all of it within the intervals" in text


def test_the_verdict_says_when_nobody_beats_the_baseline() -> None:
    better_at_two = made("npo", test=0.0, retain=0.5, attacked=(0.1, 0.1))
    text = " ".join(verdict(compared(made("vkd"), better_at_two, made("same")), "vkd"))
    assert text.startswith("No other method beats vkd")
    assert "Beaten by no other: vkd, npo and same." in text


def test_without_a_reference_the_gap_to_vanilla_stands_for_recovery() -> None:
    a, b = made("vkd", never=None), made("npo", never=None, attacked=(0.2, 0.2))
    assert "npo beats vkd" in verdict(compared(a, b), "vkd")[0]
    assert "Advantage" not in terminal.table([compared(a, b)], "vkd")


def test_a_method_that_was_not_attacked_is_not_compared() -> None:
    bare = made("npo")
    bare["relearn"] = {}
    sentences = verdict(compared(made("vkd"), made("ga"), bare), "vkd")
    assert sentences[-1] == "Not measured on all three, and not compared: npo."


def test_one_method_alone_is_not_told_to_be_the_best() -> None:
    assert verdict(compared(made("vkd")), "vkd") == []


def test_a_figure_better_than_the_baselines_is_marked() -> None:
    comparison = compared(made("vkd"), made("npo", test=0.04, retain=0.5, attacked=(0.0, 0.0)))
    vkd, npo = comparison.lines
    assert cell(npo, "test_vqa.exact_match", vkd).endswith("\N{NO-BREAK SPACE}*")
    assert cell(npo, "attacked.visual.known.30", vkd).endswith("**")
    for line, key in ((npo, "retain_vqa.exact_match"), (npo, "forget_qa.exact_match"), (vkd, "test_vqa.exact_match")):
        assert "*" not in cell(line, key, vkd)
    assert all("*" not in cell(line, key, vkd) for line in comparison.references for key in line.estimates)


@pytest.mark.parametrize(("seeds", "words"), [((0,), "not over seeds"), ((0, 1), "Student's")])
def test_the_caption_says_what_the_intervals_are_over(seeds: tuple[int, ...], words: str) -> None:
    comparison = compared(*(made("vkd", seed, test=0.05 + seed / 100) for seed in seeds))
    assert words in caption([comparison], "vkd")


METHODS = ("vkd", "vkd_paper", "ga", "ga_diff", "kl_min", "npo", "a_method_of_a_very_long_name_xy")


def test_other_attacks_and_marks_of_the_forgotten_are_figures_like_any_other() -> None:
    runs = [
        made("vkd", seed)
        | {"attacks": [*tried("vanilla", 1.0), *tried("unlearned", exact), *tried("retain_only", 0.05)]}
        | {"over_forgotten": {"excess": -0.5, "interval_95": [-0.8, -0.2]}}
        for seed, exact in enumerate((0.1, 0.2))
    ]
    comparison = compared(*runs, made("ga"))
    (vkd, ga), (vanilla, never) = comparison.lines, comparison.references
    key = "attack.quantize.bits=4.exact_match"
    assert (vkd.mean(key), vanilla.mean(key), never.mean(key), ga.mean(key)) == (pytest.approx(0.15), 1.0, 0.05, None)
    assert vkd.estimates[key].source == "seeds" and vkd.estimates[key].figure.better == "lower"
    assert (never.estimates[key].low, never.estimates[key].high) == pytest.approx(wilson(8, 160))
    assert vkd.mean("attack.quantize.bits=4.retain_exact_match") == 0.9
    assert vkd.mean("attack.probe.photos=64.encoder_linear") == 0.5
    assert not [one for one in comparison.figures if "module_restore" in one or "min_k" in one or "chance" in one]
    excess = vkd.estimates["over_forgotten.excess"]
    assert (excess.mean, excess.low, excess.high) == (-0.5, -0.8, -0.2)
    shown = {section.title: dict(section.columns) for section in sections(comparison)}
    assert shown["Other attacks"] == {
        key: "Weights rounded to 4 bits",
        "attack.quantize.bits=4.retain_exact_match": "Weights rounded to 4 bits, Retain VQA",
    }
    assert set(shown["Traces"]) == {
        *("attack.probe.photos=64.encoder_linear", "attack.membership.lowest=0.2.loss_auc", "over_forgotten.excess"),
    }
    assert cell(vkd, "attack.membership.lowest=0.2.loss_auc", None) == "0.45"
    words = cell(vkd, "over_forgotten.excess", None).replace("\N{NO-BREAK SPACE}", " ")
    assert words == "\N{MINUS SIGN}0.50 (\N{MINUS SIGN}0.80 to \N{MINUS SIGN}0.20)"
    for text in (
        export.markdown([comparison], "vkd", command="vkd bench"),
        page.render([comparison], "vkd", command=""),
    ):
        assert "Other attacks" in text and "Traces" in text and "Weights rounded to 4 bits" in text
    assert f"small,vkd,vkd,{key},lower,0.15" in export.csv_text([comparison])


def test_the_json_of_a_comparison_has_the_attacks_where_they_were_made() -> None:
    attacks = {"attacks": tried("unlearned", 0.1), "over_forgotten": {"excess": 0.1}}
    bare, full = json.loads(export.json_text([Record(Path("a"), made("ga")), Record(Path("b"), made("vkd") | attacks)]))
    assert {name: full[name] for name in attacks} == attacks
    assert set(full) - set(bare) == set(attacks)


MANY = [
    made(name, seed, test=(2 * i + seed) / 100, retain=0.95 - i / 25 + seed / 200, attacked=(i / 10, i / 8))
    for i, name in enumerate(METHODS)
    for seed in (0, 1, 2)
]


def test_the_terminal_table_fits_120_columns_and_has_a_line_for_everybody() -> None:
    text = terminal.table([compared(*MANY)], "vkd")
    table = [
        line for line in text.splitlines() if re.match(r"(per cent|vanilla|retain-only|vkd|ga|kl_min|npo|a_meth)", line)
    ]
    assert len(table) >= 10
    assert max(map(len, table)) <= 120
    assert "5.0 2.5-7.5" in text


def on_the_terminal(*settings: Mapping[str, Any]) -> list[str]:
    """The rows of vkd with these settings."""
    (group,) = gather([run_with(one, seed) for seed, one in enumerate(settings)])
    text = terminal.table([compare(group)], "vkd")
    assert max(map(len, text.splitlines())) <= 120
    return [line for line in text.splitlines() if line.startswith("vkd") and "%" not in line and "+" in line]


def test_rows_that_differ_in_a_setting_with_a_long_name_show_its_value_on_the_terminal() -> None:
    rows = on_the_terminal(*({"simulated_attack": {"learning_rate": n / 1000}} for n in (1, 2)))
    assert [re.split(r"\s{2,}", row)[0].endswith(f"=0.00{n})") for n, row in enumerate(rows, 1)] == [True, True], rows


def test_rows_that_look_alike_once_they_are_cut_are_numbered_and_told_below() -> None:
    choices = [(1, 0.5, "everything"), (2, 0.5, "everything"), (1, 0.1, "all or nothing"), (1, 0.2, "all or nothing")]
    settings = [{"simulated_attack": dict(zip(("steps", "rate", "scope"), one, strict=True))} for one in choices]
    (group,) = gather([run_with(one, seed) for seed, one in enumerate(settings)])
    text = terminal.table([compare(group)], "vkd")
    rows = re.findall(r"^(vkd .*?)\s{2,}", text, flags=re.MULTILINE)
    assert len(set(rows)) == len(rows) == 4
    for number, line in enumerate(compare(group).lines, 1):
        assert rows[number - 1].endswith(f"[{number}]")
        assert f"[{number}] {line.label}" in " ".join(text.split())


def test_markdown_holds_the_command_and_every_method() -> None:
    text = export.markdown([compared(*MANY)], "vkd", command="vkd bench small --seeds 0,1,2", failures=["x: broke | y"])
    assert "```\nvkd bench small --seeds 0,1,2\n```" in text
    assert r"broke \| y" in text
    for title in ("Answers", "After the relearning attack", "Advantage over a model that never knew", "Text and cost"):
        assert f"### {title}" in text
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        assert len({re.sub(r"\\\|", "", line).count("|") for line in table.splitlines()}) == 1
    assert text.count("| kl\\_min | 0, 1, 2 |") == 4


def test_csv_gives_every_figure_back_exactly() -> None:
    comparison = compared(*MANY)
    rows = list(csv.DictReader(io.StringIO(export.csv_text([comparison]))))
    assert len(rows) == sum(len(line.estimates) for line in (*comparison.references, *comparison.lines))
    found = {(row["row"], row["figure"]): row for row in rows}
    for line in comparison.lines:
        for key, expected in line.estimates.items():
            row = found[line.label, key]
            assert float(row["mean"]) == expected.mean
            assert (row["low"], row["high"]) == tuple(
                "" if b is None else repr(float(b)) for b in (expected.low, expected.high)
            )
            assert int(row["seeds"]) == expected.seeds == 3
            assert row["interval"] == expected.source


def test_json_holds_the_runs_as_in_their_metrics() -> None:
    found = json.loads(export.json_text([Record(Path("a"), one) for one in MANY]))
    keys = ["recipe", "method", "seed", "models", "relearn", "cost", "proofs"]
    assert found == json.loads(json.dumps([{key: one[key] for key in keys} | {"settings": {}} for one in MANY]))


def test_the_page_asks_for_nothing_and_escapes_names() -> None:
    text = page.render([compared(*MANY, made("<b>x</b>"))], "vkd", command="vkd compare <a>")
    assert "default-src 'none'" in text
    assert "<b>x</b>" not in text and "&lt;b&gt;x&lt;/b&gt;" in text
    assert "vkd compare &lt;a&gt;" in text
    assert not re.search(r"(src|href)=\"(?!#)", text) and "url(" not in text and "@import" not in text
    assert text.count("<svg") == 2


def test_labels_of_the_frontier_cover_neither_each_other_nor_a_point() -> None:
    for plot in frontier.plots(compared(*MANY), "vkd"):
        boxes = []
        for spot in plot.spots:
            width = frontier.LETTER * len(spot.label)
            left = spot.label_x if spot.anchor == "start" else spot.label_x - width
            boxes.append((left, left + width, spot.label_y - 4 - 6, spot.label_y - 4 + 6))
            assert frontier.LEFT <= spot.x <= frontier.RIGHT and frontier.TOP <= spot.y <= frontier.BOTTOM
            assert spot.x_ends[0] <= spot.x <= spot.x_ends[1] and spot.y_ends[0] >= spot.y >= spot.y_ends[1]
        for index, (a, b, c, d) in enumerate(boxes):
            assert not any(a < f and e < b and c < h and g < d for e, f, g, h in boxes[:index])
            assert not any(a < s.x < b and c < s.y < d for s in plot.spots)


def test_methods_on_the_same_spot_are_still_readable() -> None:
    names = ("vkd", "npo", "ga", "manu", "idk", "salun")
    plot = frontier.plots(compared(*map(made, names)), "vkd")[0]
    assert len({(spot.x, spot.y) for spot in plot.spots}) == 1
    assert len({(spot.label_y, spot.anchor) for spot in plot.spots}) == len(names)
    assert sum(spot.led for spot in plot.spots) == 2, "four beside the point, the others led to"


def test_figures_that_were_not_measured_leave_no_column() -> None:
    bare = made("vkd", never=None, proofs={})
    bare["relearn"], bare["cost"] = {}, {}
    assert [section.title for section in sections(compared(bare))] == ["Answers"]


def run_folders(folder: Path, *metrics: dict[str, Any]) -> list[str]:
    for index, one in enumerate(metrics):
        write_json(folder / f"run{index}" / "metrics.json", one)
    return [str(folder / f"run{index}") for index in range(len(metrics))]


def vkd(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def test_compare_shows_the_runs_of_other_people_and_writes_what_is_asked_for(tmp_path: Path) -> None:
    runs = run_folders(tmp_path / "theirs", made("vkd"), made("their_method", 7))
    files = {form: tmp_path / "out" / f"x.{form}" for form in ("html", "markdown", "csv", "json")}
    done = vkd("compare", *runs, *(word for form, path in files.items() for word in (f"--{form}", str(path))))
    assert done.exit_code == 0, done.output
    assert "their_method" in done.stdout
    assert all(path.stat().st_size > 500 for path in files.values())
    assert f"vkd compare {runs[0]} {runs[1]}" in files["markdown"].read_text()
    assert [one["method"] for one in json.loads(files["json"].read_text())] == ["vkd", "their_method"]
    assert vkd("compare", str(tmp_path / "theirs")).stdout == done.stdout


def test_compare_leaves_out_a_run_whose_proof_failed_and_says_so(tmp_path: Path) -> None:
    runs = run_folders(tmp_path, made("vkd"), made("broken", proofs={"frozen_parameters_identical": False}))
    target = tmp_path / "x.json"
    done = vkd("compare", *runs, "--json", str(target))
    assert "left out: run1: proof failed: Frozen parameters are untouched" in done.stdout
    assert [one["method"] for one in json.loads(target.read_text())] == ["vkd"]


def assessed(folder: Path) -> Path:
    """What `vkd evaluate` and `vkd relearn` leave of a checkpoint that no run made."""
    found = made("not told", seed=3, attacked=(0.25, 0.6))
    write_json(folder / "relearn.json", {"model": "their/model", **found["relearn"]})
    evaluated = {"model": "their/model", "models": found["models"], "verdict": {"kind": "forgotten"}}
    write_json(folder / "evaluate.json", evaluated)
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"name": "small", "method": "vkd", "seed": 3}))
    return folder


def test_a_checkpoint_that_no_run_made_is_compared_under_the_name_of_its_folder(tmp_path: Path) -> None:
    theirs = assessed(tmp_path / "all" / "theirs")
    (run,) = run_folders(tmp_path / "all", made("vkd"))
    alone, run_record = find([theirs])[0], find([Path(run)])[0]
    assert (alone.recipe, alone.method, alone.seed, alone.failed_proofs) == ("small", "theirs", 3, ())
    assert alone.metrics["verdict"]["kind"] == "hidden", "of both files together: more comes back than to retain-only"
    assert figures(alone.metrics).keys() - figures(run_record.metrics).keys() == set()
    assert figures(alone.metrics)["attacked.visual.known.10"].value == 0.25
    target = tmp_path / "x.json"
    done = vkd("compare", str(theirs), run, "--json", str(target))
    assert done.exit_code == 0, done.output
    assert re.search(r"^theirs ", done.stdout, flags=re.MULTILINE)
    assert vkd("compare", str(target)).stdout == done.stdout
    assert {record.method for record in find([tmp_path / "all"])} == {"theirs", "vkd"}
    (theirs / "relearn.json").unlink()
    assert "attacked.visual.known.10" not in figures(find([theirs])[0].metrics)


def test_what_is_no_run_is_told_apart(tmp_path: Path) -> None:
    photos, alone = tmp_path / "photos", assessed(tmp_path / "alone")
    photos.mkdir()
    (alone / "evaluate.json").unlink()
    for place, fragment in (
        (photos, "holds no finished run and no folder with one; give what `vkd run`, `vkd bench` or `vkd evaluate"),
        (tmp_path / "nowhere", "there is no such file or folder"),
        (alone, f"holds relearn.json alone; add the answers: vkd evaluate MODEL --recipe RECIPE --out {alone}"),
    ):
        done = vkd("compare", str(place))
        assert (done.exit_code, done.stderr.startswith(f"error: {place}: {fragment}")) == (2, True), done.stderr
    (photos / "recipe.yaml").write_text("name: small")
    assert f"go on with it: vkd run RECIPE --resume --out {photos}" in vkd("compare", str(photos)).stderr
    (photos / "evaluate.json").write_text("[]")
    assert "no evaluate.json as `vkd evaluate --out` writes them" in vkd("compare", str(photos)).stderr


@pytest.mark.parametrize(
    ("contents", "fragment"),
    [(None, "holds no finished run"), ("{", "cannot be read"), ("[]", "is not the metrics of a run")],
)
def test_compare_refuses_what_is_no_run_in_one_line(tmp_path: Path, contents: str | None, fragment: str) -> None:
    if contents is not None:
        (tmp_path / "metrics.json").write_text(contents)
    done = vkd("compare", str(tmp_path))
    assert done.exit_code == 2, done.exception
    assert len(done.stderr.strip().splitlines()) == 1
    assert fragment in done.stderr and str(tmp_path) in done.stderr


def test_compare_needs_no_torch() -> None:
    check = (
        "import sys; from vkd_framework.bench import command; assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_verdicts_are_counted_for_each_method() -> None:
    runs = [made("vkd", seed=seed) | {"verdict": {"kind": kind}} for seed, kind in enumerate(("forgotten", "hidden"))]
    sentences = verdict(compared(*runs, made("ga") | {"verdict": {"kind": "not_forgotten"}}, made("old")), "vkd")
    assert "Verdicts, with the number of runs: vkd: forgotten 1, hidden 1; ga: not forgotten 1." in sentences


def planned(out: Path, *overrides: str, method: str = "vkd", seed: int = 0) -> Cell:
    """A cell of a bench of a shipped recipe."""
    settings = (f"method={method}", f"seed={seed}", *overrides)
    recipe = load_recipe("qwen2vl_celeb", settings)
    return Cell("qwen2vl_celeb", settings, recipe.name, method, seed, recipe.digest(), out)


def finish(cell: Cell) -> None:
    """Leave in the folder of the cell what tells a finished run."""
    write_json(cell.folder / "metrics.json", made(cell.method, cell.seed, recipe=cell.recipe))
    (cell.folder / "recipe.yaml").write_text(load_recipe(cell.reference, cell.overrides).to_yaml())
    (cell.folder / "model").mkdir()
    (cell.folder / "model" / "README.md").write_text("card")


def benched(
    monkeypatch: pytest.MonkeyPatch, found: list[Cell], *overrides: str, only_list: bool = False
) -> tuple[str, list[str]]:
    """What a bench with these cells prints, and the cells that it set out to do; none of them gets further."""
    begun: list[str] = []
    told: list[str] = []
    monkeypatch.setattr(cells, "plan", lambda *_: found)
    monkeypatch.setattr(loop, "work", lambda todo: begun.extend(cell.name for cell in todo if not cell.finished()))
    command.bench(["mine"], None, [0], overrides, found[0].out, {}, only_list=only_list, echo=told.append)
    return "\n".join(told), begun


def tables(out: Path) -> str:
    """Everything that a bench writes into its folder to be shown to others."""
    return "".join((out / name).read_text() for name in command.FILES.values())


@pytest.mark.parametrize(
    "override",
    [
        "data={kind: jsonl, rows: /home/jane/people.jsonl, forget: [Jane Roe]}",
        "data.forget=[Jane Roe]",
        " data.forget =Jane.txt",
        "data.forget.0=Jane Roe",
        "data.rows=/home/jane/people.jsonl",
        "data.images=jane",
    ],
)
def test_neither_names_nor_files_of_a_users_own_people_are_in_the_command_of_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str
) -> None:
    cell = planned(tmp_path)
    finish(cell)
    benched(monkeypatch, [cell], override, "data.seed=7")
    assert not re.search("jane|roe|people.jsonl", tables(tmp_path), flags=re.IGNORECASE)
    assert "data.seed=7" in tables(tmp_path)


def test_how_many_are_forgotten_is_in_the_command_of_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = planned(tmp_path)
    finish(cell)
    benched(monkeypatch, [cell], "data.forget=2")
    assert "--set data.forget=2" in (tmp_path / "table.md").read_text()


def test_why_a_cell_failed_is_told_on_the_terminal_and_not_in_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, failed = planned(tmp_path), planned(tmp_path, seed=1)
    finish(done)
    failed.error.parent.mkdir()
    failed.error.write_text("data.forget: no row has the subject 'Jane Row'; the nearest is 'Jane Roe'\n")
    told, _ = benched(monkeypatch, [done, failed])
    assert f"left out: {failed.name}: data.forget: no row has the subject 'Jane Row'" in told
    assert "Jane" not in tables(tmp_path)
    for name in ("table.md", "table.html"):
        text = (tmp_path / name).read_text().replace("\\", "")
        assert f"{failed.name}: failed; the reason is in .cells/{failed.name}.error" in text


def test_a_bench_over_runs_of_other_settings_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in (0, 1):
        finish(planned(tmp_path, seed=seed))
    now = [planned(tmp_path, "unlearn.steps=7", seed=seed) for seed in (0, 1, 2)]
    with pytest.raises(RecipeError) as refused:
        benched(monkeypatch, now)
    assert str(refused.value) == (
        f"{now[0].folder}: holds a run of other settings, like 1 more of the 3 cells; "
        "go on with the recipe and the --set that made it, or give another --out"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [now[0].name, now[1].name]
    told, _ = benched(monkeypatch, now, only_list=True)
    assert [re.split(r"\s{2,}", line)[1] for line in told.splitlines()] == [*["of other settings"] * 2, "to do"]


def test_a_folder_whose_recipe_cannot_be_read_is_no_run_of_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = planned(tmp_path)
    finish(cell)
    (cell.folder / "recipe.yaml").write_text("name: another\n")
    assert cell.status() == ("interrupted", "")
    assert benched(monkeypatch, [cell])[1] == [cell.name]


def test_a_bench_without_a_finished_run_leaves_the_tables_that_are_there_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = planned(tmp_path)
    benched(monkeypatch, [cell])
    assert json.loads((tmp_path / "cells.json").read_text()) == []
    for name in command.FILES.values():
        (tmp_path / name).unlink()
    finish(cell)
    benched(monkeypatch, [cell])
    before = tables(tmp_path)
    (cell.folder / "metrics.json").unlink()
    told, begun = benched(monkeypatch, [cell])
    assert begun == [cell.name] and f"left as they were: {tmp_path / 'cells.json'}" in told
    assert tables(tmp_path) == before
