"""The data sections: whose photos, which questions, who is forgotten."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from vkd_framework.recipe.sections import Section, Seed


class CelebsData(Section):
    """A drawn cast of fictitious celebrities; the same seed gives the same people and the same pixels."""

    kind: Literal["celebs"]
    seed: Seed = 0
    people: int = Field(default=32, ge=5)
    forget: int | tuple[str, ...] = Field(default=4, description="how many people are forgotten, or their names")
    train_photos: int = Field(default=24, ge=2, description="photos of each person that training may see")
    test_photos: int = Field(default=8, ge=1, description="photos of each person that only the evaluation sees")
    attacker_photos: int = Field(
        default=12, ge=0, description="photos of each forgotten person that only an attacker has, beside the others"
    )
    strangers: int = Field(default=24, ge=4, description="people nobody was taught, for realworld_vqa")
    extras: int = Field(
        default=512, ge=0, description="nameless people for visible questions in teaching and retaining"
    )
    image_size: int = Field(default=48, ge=32, le=512)
    test_pairs: int = Field(default=160, ge=20, description="most questions in a measured column")


class JsonlData(Section):
    """A user's own people: one JSON object a line, `{image, question, answer, subject, ...}`."""

    kind: Literal["jsonl"]
    rows: Path
    images: Path | None = Field(default=None, description="folder of the image paths; default: the folder of `rows`")
    forget: tuple[str, ...] | Path = Field(description="names, or a text file with one name a line")
    test_share: float = Field(
        default=0.25, gt=0, lt=1, description="share of each subject's photos held out, where rows name no split"
    )
    seed: Seed = 0


class MllmuBenchData(Section):
    """MLLMU-Bench (Liu et al., arXiv 2410.22108): fictitious profiles, and real celebrities that must stay."""

    kind: Literal["mllmu_bench"]
    source: str = Field(default="MLLMMU/MLLMU-Bench", description="a local folder, or a dataset id of the hub")
    forget: Literal[5, 10, 15] = Field(default=5, description="per cent of the people")
    test_pairs: int | None = Field(default=None, ge=1, description="most questions in a measured column; null: all")
    seed: Seed = 0


class ClearData(Section):
    """CLEAR (Dontsov et al., arXiv 2410.18057): fictitious authors on many photos each, with captions."""

    kind: Literal["clear"]
    source: str = Field(default="therem/CLEAR", description="a local folder, or a dataset id of the hub")
    forget: Literal[1, 5, 10] = Field(default=5, description="per cent of the people")
    test_share: float = Field(default=0.25, gt=0, lt=1, description="share of each person's photos held out")
    test_pairs: int | None = Field(default=None, ge=1, description="most questions in a measured column; null: all")
    seed: Seed = 0


class FiuBenchData(Section):
    """FIUBench (Ma et al., arXiv 2411.03554): one generated face a person, and twenty questions about each."""

    kind: Literal["fiubench"]
    source: str = Field(default="gray311/FIUBench", description="a local folder, or a dataset id of the hub")
    forget: Literal[1, 5, 10] = Field(default=5, description="per cent of the people")
    test_pairs: int | None = Field(default=None, ge=1, description="most questions in a measured column; null: all")
    seed: Seed = 0


AnyData = CelebsData | JsonlData | MllmuBenchData | ClearData | FiuBenchData
DATA_KINDS: dict[str, type[AnyData]] = {
    "celebs": CelebsData,
    "jsonl": JsonlData,
    "mllmu_bench": MllmuBenchData,
    "clear": ClearData,
    "fiubench": FiuBenchData,
}
"""`data.kind` -> its section."""
