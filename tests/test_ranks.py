from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from conftest import CAST
from rank_worker import RECIPES, everything
from safetensors.torch import load_file

from vkd_framework import ranks
from vkd_framework.checkpoint import read_json
from vkd_framework.cli import main
from vkd_framework.divided import Division

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Ended:
    """How one of several processes ended."""

    status: int
    out: str
    err: str


def begun(count: int, command: Sequence[str], **environment: str) -> list[subprocess.Popen[str]]:
    """Start several processes as a launcher would, but without one: it takes seconds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, *command],
            cwd=HERE,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def ended(processes: Sequence[subprocess.Popen[str]]) -> list[Ended]:
    found = []
    for process in processes:
        out, err = process.communicate(timeout=300)
        found.append(Ended(process.returncode, out, err))
    return found


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict[str, Any]], Path]:
    """What one process found, what each of two found, and the folder of the two."""
    folder = tmp_path_factory.mktemp("two")
    two = begun(2, ["rank_worker.py", str(folder)])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as those have: where a gradient is nothing but rounding, Adam makes whole steps of it
    one = everything(tmp_path_factory.mktemp("one"))
    torch.set_num_threads(threads)
    assert [(end.status, end.err) for end in ended(two) if end.status] == []
    return one, [torch.load(folder / f"found-{rank}.pt", weights_only=True) for rank in range(2)], folder


def apart(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    return max(float((first[name].double() - second[name].double()).abs().max()) for name in first)


def apart_of_way(
    start: dict[str, torch.Tensor], first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]
) -> float:
    """How far two models are apart, as a share of the way that the first has gone.

    Over all weights together: where a single gradient is nothing but rounding, Adam makes a whole step of it.
    """

    def length(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
        return math.hypot(*(float(torch.dist(one[name].double(), other[name].double())) for name in one))

    return length(first, second) / length(first, start)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_two_processes_and_one_unlearn_the_same_however_batches_divide(both: Any, name: str) -> None:
    one, two, _ = both
    assert apart_of_way(one["start"], one[name]["weights"], two[0][name]["weights"]) < 3e-4
    for alone, shared in zip(one[name]["history"], two[0][name]["history"], strict=True):
        assert set(alone) == set(shared)
        for key in alone:
            assert shared[key] == pytest.approx(alone[key], rel=1e-4, abs=2e-6), key


@pytest.mark.slow
def test_all_processes_hold_the_same_weights_bit_for_bit(both: Any) -> None:
    _, two, _ = both
    for name in RECIPES:
        assert apart(two[0][name]["weights"], two[1][name]["weights"]) == 0
        assert two[0][name]["history"] == two[1][name]["history"]
    assert apart(two[0]["taught"], two[1]["taught"]) == 0


@pytest.mark.slow
def test_two_processes_teach_what_one_teaches(both: Any) -> None:
    one, two, _ = both
    assert apart(one["taught"], two[0]["taught"]) < 1e-3


@pytest.mark.slow
def test_saliency_is_the_sum_over_all_batches_and_the_mask_the_same(both: Any) -> None:
    one, two, _ = both
    for name, score in one["saliency"]["scores"].items():
        torch.testing.assert_close(two[0]["saliency"]["scores"][name], score, rtol=1e-4, atol=1e-9)
    for kind in ("mask", "threshold"):
        mask = one["saliency"][kind]
        flipped = sum(int((two[0]["saliency"][kind][name] != m).sum()) for name, m in mask.items())
        assert flipped <= 1e-3 * sum(m.numel() for m in mask.values())
        assert apart(two[0]["saliency"][kind], two[1]["saliency"][kind]) == 0


@pytest.mark.slow
def test_answers_and_figures_are_gathered_in_order_and_identical(both: Any) -> None:
    one, two, _ = both
    assert two[0]["answers"].keys() == one["answers"].keys()
    for column, (cell, answers, cut) in one["answers"].items():
        shared = two[0]["answers"][column]
        assert {**shared[0], "interval_95": None} == pytest.approx({**cell, "interval_95": None})
        assert shared[1:] == [answers, cut]
    assert two[0]["answers"] == two[1]["answers"]
    assert two[0]["curve"] == two[1]["curve"] == one["curve"]


@pytest.mark.slow
def test_processes_that_were_stopped_and_went_on_end_like_others(both: Any) -> None:
    for found in both[1]:
        assert found["resumed"] == {"history": True, "weights": True}


@pytest.mark.slow
def test_a_stage_is_done_by_all_written_once_and_counts_the_largest_memory(both: Any) -> None:
    one, two, folder = both
    assert one["stage"] == [0, 10]
    assert two[0]["stage"] == two[1]["stage"] == [0, 1, 11]
    assert [path.name for path in (folder / "stages").iterdir()] == ["first.json"]


FAILS_ON_ONE = """
import sys
from vkd_framework import data, ranks
from vkd_framework.cli import entry_point
from vkd_framework.errors import DataError
load = data.load
def broken(config):
    if ranks.rank() == 1:
        raise DataError("row 7: no such photo; mend the row")
    ranks.once(lambda: None)
    return load(config)
data.load = broken
sys.argv = ["vkd", "run", *sys.argv[1:]]
entry_point()
"""


def lines_of(ends: Sequence[Ended]) -> list[str]:
    return [line for end in ends for line in (end.out + end.err).splitlines()]


@pytest.mark.slow
def test_an_error_in_one_process_ends_all_with_its_line_alone(tmp_path: Path) -> None:
    ends = ended(begun(2, ["-c", FAILS_ON_ONE, "qwen2vl_celeb", "--out", str(tmp_path / "run")]))
    assert lines_of(ends) == ["error: row 7: no such photo; mend the row"]
    assert [end.status for end in ends] == [1, 2]
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())


@pytest.mark.slow
def test_an_error_that_all_processes_make_is_told_once() -> None:
    ends = ended(begun(2, ["-m", "vkd_framework", "run", "qwen2vl_celeb", "--set", "unlearn.steps=-1"]))
    assert len(lines_of(ends)) == 1
    assert "unlearn.steps" in lines_of(ends)[0]
    assert [end.status for end in ends] == [2, 2]


FAILS_LATER_ON_ONE = """
import sys, time
from vkd_framework.cli import entry_point, quick_imports
with quick_imports():
    from vkd_framework import data, ranks
    from vkd_framework.errors import DataError
def broken(config):
    time.sleep(3 * ranks.rank())
    raise DataError("row 7: no such photo; mend the row")
data.load = broken
sys.argv = ["vkd", "run", *sys.argv[1:]]
entry_point()
"""


@pytest.mark.slow
def test_who_makes_the_same_error_when_the_first_process_is_gone_says_nothing(tmp_path: Path) -> None:
    ends = ended(begun(2, ["-c", FAILS_LATER_ON_ONE, "qwen2vl_celeb", "--out", str(tmp_path / "run")]))
    assert lines_of(ends) == ["error: row 7: no such photo; mend the row"]
    assert [end.status for end in ends] == [2, 2]


SMALL = {
    "name": "small",
    "adapter": "qwen_vl",
    "data": CAST,
    "teach": {"steps": 10, "batch_size": 7},
    "layers": ["vision.1", "projector"],
    "mask": {"kind": "ratio", "density": 0.5, "pairs": 20},
    "unlearn": {"steps": 30, "warmup": 0, "forget_batch": 3, "retain_batch": 5, "checkpoint_every": 5},
    "evaluate": {"batch_size": 16, "max_new_tokens": 4},
    "relearn": {
        **{"shares": [1.0], "steps": [1, 2], "photos": ["known"], "scopes": ["full", "low_rank"]},
        **{"batch_size": 3, "micro_batch": 1},
    },
    "attacks": [{"kind": "membership"}, {"kind": "quantize"}],
}


def launched(recipe: Path, out: Path, *options: str, how: str = "--multi_gpu") -> subprocess.Popen[str]:
    """A run by two processes, as a user starts it."""
    command = ["accelerate.commands.launch", how, "--num_processes=2", "--main_process_port=0", "-m"]
    return subprocess.Popen(
        [sys.executable, "-m", *command, "vkd_framework", "run", str(recipe), f"--out={out}", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def workers(launcher: subprocess.Popen[str]) -> list[int]:
    """The processes that a launcher started."""
    return [int(pid) for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes of a launcher in /proc")
def test_a_launched_run_that_lost_a_process_goes_on_to_the_result_of_one_that_did_not(tmp_path: Path) -> None:
    recipe, straight, killed = tmp_path / "small.yaml", tmp_path / "straight", tmp_path / "killed"
    recipe.write_text(yaml.safe_dump(SMALL))
    [whole] = ended([launched(recipe, straight)])
    assert whole.status == 0, whole.err
    assert whole.err.count("results in") == 1
    assert whole.out.count("report:") == 1
    assert read_json(straight / "environment.json")["processes"] == 2

    launcher = launched(recipe, killed)
    while not (killed / "checkpoints" / "unlearn.pt").exists():
        assert launcher.poll() is None
        time.sleep(0.01)
    os.kill(workers(launcher)[1], signal.SIGKILL)
    [broken] = ended([launcher])
    assert broken.status != 0
    assert not (killed / "checkpoints" / "unlearn.json").exists()

    [resumed] = ended([launched(recipe, killed, "--resume")])
    assert resumed.status == 0, resumed.err
    assert (killed / "history.jsonl").read_text() == (straight / "history.jsonl").read_text()
    first, second = (load_file(folder / "model" / "model.safetensors") for folder in (straight, killed))
    assert apart(first, second) == 0
    first, second = (read_json(folder / "metrics.json") for folder in (straight, killed))
    for block in ("models", "attacks", "relearn", "proofs"):
        assert first[block] == second[block]
    left_over = [path for path in killed.rglob("*") if path.suffix in (".tmp", ".pt")]
    assert left_over == []


@pytest.mark.slow
def test_processes_that_divide_a_language_model_hold_each_layer_once_and_answer_in_their_own_time(
    tmp_path: Path,
) -> None:
    divided = ended(begun(2, ["divided_worker.py", str(tmp_path)], ACCELERATE_USE_FSDP="true"))
    assert [(end.status, end.err) for end in divided if end.status] == []
    first, second = (torch.load(tmp_path / f"found-{rank}.pt", weights_only=True) for rank in range(2))
    assert first["same"] and second["same"]
    assert len(first["seen"]) > 10
    assert first["seen"] == second["seen"] == [[turn % 2] for turn in range(len(first["seen"]))]
    for found in (first, second):
        assert found["estimated"] == found["whole"] - found["layers"] / 2


@pytest.mark.slow
def test_a_run_that_divides_the_language_model_ends_as_one_that_does_not(tmp_path: Path) -> None:
    recipe = tmp_path / "small.yaml"
    relearn = {**SMALL["relearn"], "scopes": ["visual", "low_rank"]}
    recipe.write_text(yaml.safe_dump({**SMALL, "relearn": relearn, "attacks": [{"kind": "membership"}]}))
    for how in ("--multi_gpu", "--use_fsdp"):
        [end] = ended([launched(recipe, tmp_path / how, how=how)])
        assert end.status == 0, end.err
    whole, divided = (read_json(tmp_path / how / "metrics.json") for how in ("--multi_gpu", "--use_fsdp"))
    for block in ("models", "attacks", "relearn", "proofs"):
        assert whole[block] == divided[block]
    models = [load_file(tmp_path / how / "model" / "model.safetensors") for how in ("--multi_gpu", "--use_fsdp")]
    assert apart(*models) == 0


@pytest.mark.parametrize(("processes", "blocks"), [(2, 3), (4, 28), (7, 28)])
def test_processes_that_divide_layers_of_different_sizes_hold_about_the_same(processes: int, blocks: int) -> None:
    sizes = [3584 * width for width in (3584, 512, 512, 3584, 18944, 18944, 18944)] * blocks
    division = Division(range(processes))
    for size in sizes:
        division.holder(size)
    assert sum(division.held.values()) == sum(sizes)
    assert max(division.held.values()) - min(division.held.values()) <= max(sizes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "environment", "words"),
    [
        ([], {}, "take full out of relearn.scopes, quantize out of attacks"),
        (["--set", "model.offload=true", "--set", "relearn.scopes=[visual]"], {}, "leave one of the two out"),
        ([], {"FSDP_OFFLOAD_PARAMS": "true"}, "model.offload"),
    ],
)
def test_what_would_change_a_divided_language_model_is_refused_once(
    options: list[str], environment: dict[str, str], words: str
) -> None:
    command = ["-m", "vkd_framework", "run", "qwen2vl_celeb", *options]
    lines = lines_of(ended(begun(2, command, ACCELERATE_USE_FSDP="true", **environment)))
    assert len(lines) == 1 and words in lines[0]


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "true"}, "model.offload"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "model.gradient_checkpointing"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "model.dtype"),
        ({"ACCELERATE_USE_CPU": "True", "MASTER_PORT": "1"}, "--multi_gpu"),
    ],
)
def test_what_a_launcher_was_asked_for_and_a_run_does_not_do_is_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], words: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(main, ["run", "qwen2vl_celeb"])
    assert result.exit_code == 2
    assert words in result.output
    assert result.output.count("\n") == 1


def test_a_bench_is_not_launched_as_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    result = CliRunner().invoke(main, ["bench", "qwen2vl_celeb"])
    assert (result.exit_code, result.output.count("\n")) == (2, 1)
    assert "--out" in result.output


def test_alone_everything_passes_through_as_it_is() -> None:
    assert (ranks.rank(), ranks.size(), ranks.is_main()) == (0, 1, True)
    assert ranks.part([1, 2, 3]) == ranks.share([1, 2, 3]) == ranks.in_order([1, 2, 3]) == [1, 2, 3]
    assert ranks.weight([True, False]) == ranks.weight_of(7, [1]) == 1.0
    assert ranks.weight([False]) == 0.0
    gradient = torch.ones(2)
    assert ranks.add({"a": gradient}, {"a": gradient, "b": gradient})["a"] is gradient
