"""What the suites share: a small cast, a tiny real model that knows its words, and a cache folder of their own."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import reported
from PIL import Image

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as `vkd` itself does, and before torch is imported

from vkd_framework import data
from vkd_framework.cache import CACHE_VARIABLE
from vkd_framework.plugins import MLLM, load_adapter
from vkd_framework.recipe import CelebsData, Recipe, TeachConfig
from vkd_framework.types import AttackCurve, ImageQuestionPair, Photo, Sample, Splits

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when a test module first imports transformers

CAST = {
    "kind": "celebs",
    "people": 6,
    "forget": 2,
    "train_photos": 3,
    "test_photos": 2,
    "strangers": 4,
    "extras": 4,
    "test_pairs": 20,
}


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or fills the user's cache, subprocesses included."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def splits() -> Splits:
    return data.load(CelebsData.model_validate(CAST))


@pytest.fixture(scope="session")
def tiny(splits: Splits) -> MLLM:
    """A tiny real model with random weights. Tests look at it; those that train take `student`."""
    mllm = load_adapter("qwen_vl").tiny_model(texts_of(splits), 48, 0)
    mllm.model.requires_grad_(False)
    return mllm


@pytest.fixture
def student(tiny: MLLM) -> MLLM:
    """A copy of `tiny` that a test may change."""
    return tiny.copy()


@pytest.fixture(scope="session")
def taught(tiny: MLLM, splits: Splits, tmp_path_factory: pytest.TempPathFactory) -> MLLM:
    """`tiny` after a few steps of teaching: it has learnt the form of the answers, and little about anybody."""
    from vkd_framework.teach import teach

    mllm = tiny.copy()
    resume = tmp_path_factory.mktemp("taught") / "state.pt"
    teach(mllm, splits.teach, TeachConfig(steps=40, batch_size=8), what="teach", resume=resume)
    return mllm


@pytest.fixture(scope="session")
def few(splits: Splits) -> Splits:
    """Two people, two photos each: so few that a model learns them by heart in seconds."""
    forgotten = splits.forget_subjects[0]
    other = next(pair.subject for pair in splits.retain if pair.subject and pair.subject not in splits.forget_subjects)
    retain = tuple(pair for pair in splits.retain if pair.subject == other and pair.kind == "identity")[:10]
    forget = tuple(pair for pair in splits.forget if pair.subject == forgotten)[:10]
    return Splits(forget, retain, splits.columns, (forgotten,), (forgotten, other))


@pytest.fixture(scope="session")
def knowing(tiny: MLLM, few: Splits, tmp_path_factory: pytest.TempPathFactory) -> MLLM:
    """`tiny` after it learnt `few` by heart."""
    from vkd_framework.teach import teach

    mllm = tiny.copy()
    config = TeachConfig.model_validate({"steps": 40, "batch_size": 10, "shares": {"facts": 1}})
    resume = tmp_path_factory.mktemp("knowing") / "state.pt"
    teach(mllm, {"facts": (*few.forget, *few.retain)}, config, what="teach", resume=resume)
    return mllm


@pytest.fixture
def recipe() -> Recipe:
    return make_recipe()


@pytest.fixture
def metrics() -> dict[str, Any]:
    return reported.metrics()


@pytest.fixture
def curves() -> list[AttackCurve]:
    return reported.curves()


@pytest.fixture
def samples() -> list[Sample]:
    return reported.samples()


def make_recipe(**changes: Any) -> Recipe:
    """A small recipe on the cast; `changes` replace whole sections, of the losses only what they name.

    Unless a method is named, all four terms of the objective and nothing else: no mask, no attacker, no floor.
    """
    unlearn = {"steps": 4, "warmup": 0, "forget_batch": 4, "retain_batch": 4, "cosine_share": 0.0}
    settings: dict[str, object] = {
        "name": "small",
        "adapter": "qwen_vl",
        "data": CAST,
        "teach": {"steps": 1},
        "layers": ["vision.1", "projector"],
        "unlearn": unlearn,
    }
    if "method" not in changes:
        given = changes.pop("losses", {})
        terms: dict[str, Any] = {
            "forget_output": {"form": "capped_ascent"},
            "retain_output": {"share": 1},
            "repel": {"weight": 0.3},
        }
        losses = given | {name: term | given.get(name, {}) for name, term in terms.items()}
        changes = {"losses": losses, "simulated_attack": {"weight": 0}, **changes}
        changes["unlearn"] = {"retain_floor": None} | changes.get("unlearn", unlearn)
    return Recipe.model_validate(settings | changes)


def mean_loss(mllm: MLLM, pairs: Sequence[ImageQuestionPair]) -> float:
    """Mean cross-entropy of the pairs' answers."""
    import torch

    from vkd_framework.output import answer_losses

    with torch.no_grad():
        return answer_losses(mllm, pairs).mean().item()


def texts_of(splits: Splits) -> list[str]:
    groups = (*splits.teach.values(), *splits.columns.values())
    return sorted({text for pairs in groups for pair in pairs for text in (pair.question, pair.answer, *pair.options)})


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Noise, so that no two patches of it look alike."""
    size = (width, height)
    channels = [Image.effect_noise(size, 60 + 20 * channel + seed) for channel in range(3)]
    return Image.merge("RGB", channels).convert(mode)


def asked_about(
    photo: Image.Image | Path | None, question: str = "What is shown?", answer: str = "chess"
) -> ImageQuestionPair:
    """One pair; photos are told apart by the object they come from."""
    key = f"{id(photo)}"
    return ImageQuestionPair(key, question, answer, (Photo(key, photo),) if photo is not None else ())


def weights(mllm: MLLM) -> dict[str, bytes]:
    """Every parameter, bit for bit."""
    return {name: parameter.detach().numpy().tobytes() for name, parameter in mllm.model.named_parameters()}


def changed(before: Mapping[str, bytes], after: Mapping[str, bytes]) -> set[str]:
    return {name for name in before if before[name] != after[name]}


def flat(groups: Mapping[str, Iterable[ImageQuestionPair]]) -> list[ImageQuestionPair]:
    return [pair for pairs in groups.values() for pair in pairs]
