from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result
from conftest import CAST
from PIL import Image

from vkd_framework.cache import CACHE_VARIABLE
from vkd_framework.cli import main
from vkd_framework.recipe import bundled_recipes, load_recipe

RECIPE = "qwen2vl_celeb"
PRESET = "Qwen/Qwen2-VL-7B-Instruct"
UNTAUGHT = ("teach=null", "reference=none", f"model.source={PRESET}")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working folder; the cache of the test lies beside it."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    yield folder


def vkd(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def as_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from vkd_framework.cli import entry_point; entry_point()", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
    )


def sets(*settings: str) -> list[str]:
    return [part for setting in settings for part in ("--set", setting)]


def files(folder: Path) -> list[str]:
    """Everything in the working folder and the cache."""
    return sorted(str(path.relative_to(folder.parent)) for path in folder.parent.rglob("*") if path != folder)


def written(folder: Path, **changes: object) -> str:
    recipe = {"name": "mine", "adapter": "qwen_vl", "data": CAST, "teach": {"steps": 2}, "layers": ["projector"]}
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(recipe | changes))
    return str(path)


def test_help_lists_the_commands_in_the_order_in_which_a_newcomer_meets_them() -> None:
    text = vkd("--help").stdout
    names = re.findall(r"^  ([a-z-]+)  ", text.split("Commands:")[1], flags=re.MULTILINE)
    assert names == list(main.commands)  # type: ignore[attr-defined]
    assert names[:4] == ["run", "evaluate", "relearn", "inspect-layers"]
    assert len(names) >= 5


@pytest.mark.parametrize("command", list(main.commands))  # type: ignore[attr-defined]
def test_every_command_explains_itself(command: str) -> None:
    done = vkd(command, "--help")
    assert done.exit_code == 0
    assert len(done.stdout.splitlines()) >= 4


WRONG: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "no such recipe": (["run", "qwen2vl_celebs"], ("qwen2vl_celebs", "did you mean 'qwen2vl_celeb'?")),
    "misspelt key": (["run", RECIPE, "--set", "unlearn.step=3"], ("unlearn.step", "did you mean 'steps'?")),
    "override without value": (["run", RECIPE, "--set", "seed"], ("--set seed", "key=value")),
    "no such adapter": (["run", RECIPE, "--set", "adapter=qwen_v1"], ("'qwen_v1'", "did you mean 'qwen_vl'?")),
    "no such layer": (["run", RECIPE, "--set", "layers=[vision.9]"], ("layers: 'vision.9'", "vision.0 to vision.2")),
    "no such layer of a term": (
        ["run", RECIPE, "--set", "losses.repel={weight: 1, layers: [projecter]}"],
        ("losses.repel.layers: 'projecter'", "did you mean 'projector'?"),
    ),
    "too few people": (["run", RECIPE, "--set", "data.forget=40"], ("data.forget", "40")),
    "nobody of that name": (["run", RECIPE, "--set", "data.forget=[Jane Roe]"], ("data.forget", "'Jane Roe'")),
    "no such rows": (
        ["run", RECIPE, *sets("data={kind: jsonl, rows: none.jsonl, forget: [a]}", *UNTAUGHT)],
        ("data.rows", "none.jsonl"),
    ),
    "dry run without the rows": (
        ["run", RECIPE, "--dry-run", *sets("data={kind: jsonl, rows: none.jsonl, forget: [a]}", *UNTAUGHT)],
        ("data.rows", "none.jsonl"),
    ),
    "validate without the rows": (
        ["recipes", "validate", RECIPE, *sets("data={kind: jsonl, rows: none.jsonl, forget: [a]}", *UNTAUGHT)],
        ("data.rows", "none.jsonl"),
    ),
    "validate without the benchmark's folder": (
        ["recipes", "validate", RECIPE, *sets("data={kind: clear, source: ./CLEAR}", *UNTAUGHT)],
        ("data.source", "CLEAR"),
    ),
    "nothing to resume": (["run", RECIPE, "--resume"], ("--resume", "--out")),
    "dry run of a broken recipe": (["run", RECIPE, "--dry-run", "--set", "seed=x"], ("seed", "'x'")),
    "validate": (["recipes", "validate", RECIPE, "--set", "seed=x"], ("seed", "'x'")),
    "validate without the adapter": (
        ["recipes", "validate", RECIPE, "--set", "adapter=qwen"],
        ("'qwen' is not installed", "did you mean 'qwen_vl'?"),
    ),
    "a name with blanks": (["recipes", "validate", RECIPE, "--set", "name=jane roe"], ("name: should be letters",)),
    "a text for a section": (
        ["recipes", "validate", RECIPE, "--set", "model=Qwen"],
        ("model: should be a section of keys and values, such as source (given: 'Qwen')",),
    ),
    "an item of a list that is not there": (
        ["recipes", "validate", RECIPE, "--set", "attacks.0.bits=[4]"],
        ("--set attacks.0.bits=[4]: the recipe has no list 'attacks'",),
    ),
    "copy to where nothing can be": (["recipes", "copy", RECIPE, "/proc/x.yaml"], ("/proc/x.yaml: cannot be written",)),
    "copy of nothing": (["recipes", "copy", "nothing"], ("nothing: no such recipe",)),
    "a name longer than files may have": (["inspect-layers", "a" * 400], ("aaaa", "preset")),
    "no such model": (["inspect-layers", "Qwen/Qwen2-VL-7B-Instuct"], ("Instuct", f"did you mean '{PRESET}'?")),
    "no such tiny model": (["inspect-layers", "tiny:qwen"], ("'qwen'", "did you mean 'qwen_vl'?")),
    "tiny of nobody": (["inspect-layers", "tiny"], ("tiny:qwen_vl",)),
    "unknown command": (["rnu", RECIPE], ("'rnu'", "did you mean 'run'?")),
    "unknown command below": (["recipes", "lst"], ("'lst'", "did you mean 'list'?")),
    "unknown option": (["run", RECIPE, "--sett", "seed=1"], ("--sett", "--set")),
    "missing argument": (["run"], ("RECIPE",)),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_users_mistake_is_one_line_with_status_2_and_nothing_is_written(here: Path, case: str) -> None:
    arguments, fragments = WRONG[case]
    done = vkd(*arguments)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    for fragment in fragments:
        assert fragment in done.stderr
    assert files(here) == []


@pytest.mark.parametrize("group", [[], ["recipes"]])
def test_a_group_without_a_command_shows_its_help_and_no_error(group: list[str]) -> None:
    done = vkd(*group)
    assert done.exit_code == 2
    assert done.output == vkd(*group, "--help").output


def test_a_mistake_is_told_by_the_installed_command_too(here: Path) -> None:
    done = as_command("run", RECIPE, "--set", "unlearn.step=3")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert files(here) == []


def test_broken_rows_are_listed_before_any_model_is_loaded_and_nothing_is_written(here: Path) -> None:
    (here / "rows.jsonl").write_text('{"image": "a.png", "question": "Who?"}\n{"question": 3, "answer": ""}\n')
    Image.new("RGB", (8, 8)).save(here / "a.png")
    before = files(here)
    done = vkd("run", RECIPE, *sets("data={kind: jsonl, rows: rows.jsonl, forget: [a]}", *UNTAUGHT))
    assert done.exit_code == 2
    assert "rows.jsonl:1" in done.stderr and "rows.jsonl:2" in done.stderr
    assert "Traceback" not in done.stderr
    assert files(here) == before


@pytest.mark.parametrize("debug", [["--debug", "run", "nothing"], ["--debug", "recipes", "validate", "nothing"]])
def test_debug_shows_where_an_error_comes_from(debug: list[str]) -> None:
    done = vkd(*debug)
    assert done.exit_code != 0
    assert type(done.exception).__name__ == "RecipeError"


def test_a_folder_that_holds_something_is_not_run_into(here: Path) -> None:
    out = here / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    for more, fragment in (([], "exists already"), (["--resume"], "holds no run of this recipe")):
        done = vkd("run", written(here), "--out", str(out), *more)
        assert done.exit_code == 2
        assert fragment in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    assert [file.name for file in out.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("found", ["nonsense: [", "name: mine\n", "- a\n"])
def test_an_unreadable_run_is_no_run_to_resume(here: Path, found: str) -> None:
    out = here / "out"
    out.mkdir()
    (out / "recipe.yaml").write_text(found)
    done = vkd("run", written(here), "--out", str(out), "--resume")
    assert done.exit_code == 2, done.exception
    assert len(done.stderr.strip().splitlines()) == 1
    assert str(out) in done.stderr


def test_an_out_folder_below_a_file_is_refused(here: Path) -> None:
    (here / "file").write_text("mine")
    done = vkd("run", written(here), "--out", str(here / "file" / "out"))
    assert done.exit_code == 2, done.exception
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_dry_run_prints_the_resolved_recipe_and_the_plan_and_writes_nothing(here: Path) -> None:
    few = ("data.people=8", "data.forget=2", "data.strangers=4", "data.extras=4")
    done = vkd("run", RECIPE, "--dry-run", *sets("seed=5", "mask={kind: random, density: 0.25}", *few))
    assert done.exit_code == 0, done.output
    recipe, _, plan = done.stdout.partition("\n\n")
    assert yaml.safe_load(recipe)["seed"] == 5
    assert "trains" in plan and "density 0.25" in plan and "memory" in plan
    assert files(here) == []


def test_a_dry_run_of_a_7b_model_counts_without_weights(here: Path) -> None:
    done = vkd("run", RECIPE, "--dry-run", *sets("data={kind: clear}", "train=[projector]", *UNTAUGHT))
    assert done.exit_code == 0, done.output
    assert "8,291,375,616 parameters" in done.stdout
    assert "44,575,744 parameters (0.54%)" in done.stdout
    assert "pairs    assumed: the data come from the hub" in done.stdout
    assert files(here) == []


def three_people(here: Path, names: Sequence[str] = ("Ann", "Bo", "Cy"), **other: str) -> None:
    """`rows.jsonl` about three people, four photos each; `other`: what is asked instead of who it is, by name."""
    rows = []
    for at, (name, photo) in enumerate((name, photo) for name in names for photo in range(4)):
        Image.new("RGB", (8, 8), (at, 0, 0)).save(here / f"{name}{photo}.png")
        question = other.get(name, "Who is this?")
        rows.append({"image": f"{name}{photo}.png", "question": question, "answer": name, "subject": name})
    (here / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.mark.parametrize(
    "command", [["run", RECIPE, "--dry-run"], ["run", RECIPE, "--out", "out"], ["recipes", "validate", RECIPE]]
)
def test_data_that_the_losses_cannot_work_with_are_refused_before_anything_is_done(
    here: Path, command: list[str]
) -> None:
    three_people(here, Ann="What is she called?")
    settings = sets("data={kind: jsonl, rows: rows.jsonl, forget: [Ann]}", "losses.forget_output.form=relabel")
    done = vkd(*command, *settings, *sets(*UNTAUGHT))
    assert done.exit_code == 2, done.output
    assert "relabel finds no wrong answer" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not (here / "out").exists()


def test_a_dry_run_and_a_check_of_a_recipe_count_the_pairs_of_everybody_who_is_forgotten(here: Path) -> None:
    three_people(here)
    settings = sets("data={kind: jsonl, rows: rows.jsonl, forget: [Ann, Bo], test_share: 0.5}", *UNTAUGHT)
    for command in (["run", RECIPE, "--dry-run"], ["recipes", "validate", RECIPE]):
        done = vkd(*command, *settings)
        assert done.exit_code == 0, done.output
        assert (
            "pairs    4 forget and 2 retain to train on; measured: 4 forget_vqa, 4 test_vqa, 2 retain_vqa\n"
            "forgets  2 of 3 people\n"
            "         Ann: 2 pairs to train on, 2 to measure\n"
            "         Bo: 2 pairs to train on, 2 to measure\n"
        ) in done.stdout


def test_a_kept_name_that_is_nearly_a_forgotten_one_is_told(here: Path) -> None:
    three_people(here, names=("Ann Roe", "Ann Roee", "Cy"))
    settings = sets("data={kind: jsonl, rows: rows.jsonl, forget: [Ann Roe]}", *UNTAUGHT)
    done = vkd("recipes", "validate", RECIPE, *settings)
    assert "kept     'Ann Roee', nearly 'Ann Roe': if that is the same person, write both alike" in done.stdout


def test_inspect_layers_counts_a_7b_model() -> None:
    text = vkd("inspect-layers", PRESET).stdout
    assert "8,291,375,616 parameters" in text
    assert "8.15%" in text
    assert len(re.findall(r"^vision\.\d+ ", text, flags=re.MULTILINE)) == 32


def test_inspect_layers_gives_programs_the_same_figures() -> None:
    found = json.loads(vkd("inspect-layers", PRESET, "--json").stdout)
    assert found["total_parameters"] == sum(part["parameters"] for part in found["parts"]) == 8_291_375_616
    assert [layer["name"] for layer in found["layers"]] == [*(f"vision.{i}" for i in range(32)), "projector"]
    assert {layer["width"] for layer in found["layers"][:-1]} == {1280}
    assert found["layers"][-1]["width"] == 3584


def test_inspect_layers_says_the_same_the_second_time(here: Path) -> None:
    first = vkd("inspect-layers", PRESET).stdout
    assert vkd("inspect-layers", PRESET.lower().rpartition("/")[2]).stdout == first
    for kept in (here.parent / "cache").rglob("*.json"):
        kept.write_text("{ half")
    again = vkd("inspect-layers", PRESET)
    assert again.exit_code == 0, again.exception
    assert again.stdout == first


def test_inspect_layers_reads_a_local_config(here: Path) -> None:
    config = {
        "model_type": "qwen2_vl",
        "vision_config": {"depth": 3, "embed_dim": 64, "num_heads": 2, "hidden_size": 32},
    }
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    more = {"num_key_value_heads": 2, "vocab_size": 50, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    (here / "config.json").write_text(json.dumps(config | text | more))
    for source in (".", "config.json"):
        found = json.loads(vkd("inspect-layers", source, "--json").stdout)
        assert [layer["name"] for layer in found["layers"]] == ["vision.0", "vision.1", "vision.2", "projector"]


@pytest.mark.parametrize(
    ("contents", "fragment"),
    [
        ("{", "not valid JSON"),
        ("[]", "JSON object"),
        ('{"model_type": "qwen2_v"}', "did you mean 'qwen2_vl'?"),
        ("{}", "config.json: its config names no model_type"),
        ('{"model_type": "bert"}', "bert"),
        ('{"model_type": "paligemma"}', "no installed adapter serves model type 'paligemma'"),
        ('{"model_type": "internvl_chat"}', "OpenGVLab/InternVL3-8B-hf"),
        ('{"model_type": ["llava"]}', "knows no model_type ['llava']"),
        ('{"model_type": "llava", "vision_config": {"model_type": "nosuch"}}', "does not take this config"),
        ('{"model_type": "llava", "vision_config": "a text"}', "config.json: "),
        ('{"model_type": "llava", "vision_config": {"num_attention_heads": 7}}', "config.json: "),
    ],
)
def test_inspect_layers_refuses_a_broken_config_in_one_line(here: Path, contents: str, fragment: str) -> None:
    (here / "config.json").write_text(contents)
    done = vkd("inspect-layers", "config.json")
    assert done.exit_code == 2, done.exception
    assert len(done.stderr.strip().splitlines()) == 1
    assert fragment in done.stderr


def test_a_folder_without_a_config_is_told_from_a_model_that_nobody_knows(here: Path) -> None:
    (here / "photos").mkdir()
    for command in (("inspect-layers", "photos"), ("evaluate", "photos", "--recipe", RECIPE)):
        done = vkd(*command)
        assert done.exit_code == 2
        assert done.stderr.startswith("error: photos: holds no config.json; give the folder of a saved model")
        assert len(done.stderr.strip().splitlines()) == 1


def test_adapters_lists_where_each_comes_from_and_what_it_serves() -> None:
    (found,) = [row for row in json.loads(vkd("adapters", "--json").stdout) if row["name"] == "qwen_vl"]
    assert found["distribution"] == "vkd-framework"
    assert "qwen2_vl" in found["model_types"]
    assert PRESET in found["presets"]
    text = vkd("adapters").stdout
    assert "qwen_vl  (vkd-framework " in text and PRESET in text


def test_recipes_list_shows_every_recipe_with_its_description() -> None:
    lines = vkd("recipes", "list").stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(bundled_recipes())
    assert load_recipe(RECIPE).description in "\n".join(lines)


def test_a_copied_recipe_is_valid_where_it_lies_and_is_not_overwritten(here: Path) -> None:
    assert vkd("recipes", "copy", RECIPE).exit_code == 0
    assert vkd("recipes", "copy", RECIPE, "mine.yaml").exit_code == 0
    assert files(here) == ["here/mine.yaml", f"here/{RECIPE}.yaml"]
    assert load_recipe("mine.yaml").digest() == load_recipe(RECIPE).digest()
    assert vkd("recipes", "validate", "mine.yaml", "--set", "seed=3").exit_code == 0
    (here / "mine.yaml").write_text("changed")
    again = vkd("recipes", "copy", RECIPE, "mine.yaml")
    assert again.exit_code == 2
    assert "mine.yaml: exists already" in again.stderr
    assert (here / "mine.yaml").read_text() == "changed"


def test_the_schema_is_json() -> None:
    assert "unlearn" in json.loads(vkd("recipes", "schema").stdout)["properties"]


def test_doctor_finds_nothing_wrong_with_a_working_installation() -> None:
    done = vkd("doctor")
    assert done.exit_code == 0, done.stdout
    for what in ("vkd", "python", "torch", "torchvision", "transformers", "adapters", "recipes", "cache"):
        assert re.search(rf"^ok    {what} ", done.stdout, flags=re.MULTILINE)


def test_doctor_finds_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    done = vkd("doctor")
    assert done.exit_code == 1
    assert re.search(r"^FAIL  cache ", done.stdout, flags=re.MULTILINE)
    assert re.search(r"^ok    torch ", done.stdout, flags=re.MULTILINE)


def test_the_module_is_a_command_too() -> None:
    done = subprocess.run([sys.executable, "-m", "vkd_framework", "--version"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("vkd")
