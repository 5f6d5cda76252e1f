"""What every section is made of, and the sections about the model itself: which, how taught, how asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

Share = Annotated[float, Field(gt=0, le=1)]
Weight = Annotated[float, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
TINY = "tiny"
"""What `model.source` begins with that means: the embedded default, built from the family's own classes."""


_NO_NUMBER = PydanticCustomError("number_expected", "Should be a number, which true and false are not")


class Section(BaseModel):
    """A part of a recipe: frozen, and a key it does not know is an error.

    In a section with a `weight`, nothing else is read while that is 0.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_truth_value_is_a_number(cls, raw: Any) -> Any:
        given = {name: raw[name] for name in cls.model_fields if name in raw} if isinstance(raw, dict) else {}
        if faults := [
            InitErrorDetails(type=_NO_NUMBER, loc=(name, *place), input=value)
            for name, whole in given.items()
            for place, value in _numbers_due(whole, cls.model_fields[name].annotation)
            if isinstance(value, bool)
        ]:
            raise ValidationError.from_exception_data(cls.__name__, faults)
        return raw


def _numbers_due(value: Any, annotation: Any) -> list[tuple[tuple[str, ...], Any]]:
    """Of what is given for a setting of that type, what has to be a number, each with where it stands below it."""
    types = _types(annotation)
    if bool in types or not (int in types or float in types):
        return []
    if str in types or not isinstance(value, list | tuple | dict):
        return [((), value)]
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return [((str(place),), item) for place, item in items]


def _types(annotation: Any) -> list[Any]:
    """The plain types that a value, or an item of it, may have."""
    parts = get_args(annotation)
    if get_origin(annotation) is Literal:
        return [type(part) for part in parts]
    if get_origin(annotation) is Annotated:
        parts = parts[:1]
    if get_origin(annotation) is dict:
        parts = parts[1:]
    return [found for part in parts for found in _types(part)] or [annotation]


@dataclass(frozen=True)
class ReadWith:
    """In the type of a setting or section: read only while `key` has one of `values`; without values, while it is set.

    Of a key that lists several, one is enough.

    `key` stands beside the setting, or else at the top of the recipe.
    """

    key: str
    values: tuple[str, ...] = ()


TUNING = ReadWith("procedure", ("tune",))


class ModelConfig(Section):
    """Which model is made to forget."""

    source: str = Field(
        default=TINY, description="'tiny' or 'tiny:MODEL_TYPE' (embedded default), a hub id, or a local folder"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N")
    attention: Literal["eager", "sdpa", "flash_attention_2"] | None = Field(
        default=None, description="how attention is computed; null: what transformers chooses"
    )
    quantize: Literal["int8"] | None = Field(
        default=None, description="hold the frozen language model in 8 bits: half the memory of bfloat16"
    )
    offload: bool = Field(
        default=False,
        description="keep the frozen language model in the computer's memory, and fetch each layer whenever it is used",
    )
    gradient_checkpointing: Annotated[bool, TUNING] = Field(
        default=False, description="keep only the inputs of blocks while unlearning: less memory, more time"
    )

    @property
    def frozen_language_model(self) -> bool:
        """Whether the language model is held in a way in which nothing can tune it."""
        return self.quantize is not None or self.offload


class TeachConfig(Section):
    """How the embedded default gets to know its people: every weight is trained, then the model is cached."""

    steps: int = Field(default=500, ge=1)
    batch_size: int = Field(default=32, ge=1)
    learning_rate: float = Field(default=2e-3, gt=0)
    shares: dict[Literal["names", "facts", "captions", "visible", "text"], Weight] = Field(
        default={"names": 0.25, "facts": 0.2, "captions": 0.1, "visible": 0.25, "text": 0.2},
        description="how a batch is made up; names and captions teach to tell faces apart",
    )
    seed: Seed = 0

    @model_validator(mode="after")
    def _shares_fill_the_batch(self) -> TeachConfig:
        if abs(sum(self.shares.values()) - 1) > 1e-6:
            raise ValueError(f"shares add up to {sum(self.shares.values()):g}, they must add up to 1")
        return self


class EvaluateConfig(Section):
    """How the columns are measured."""

    batch_size: int = Field(default=64, ge=1)
    max_new_tokens: int = Field(default=16, ge=1)


def is_tiny(source: str) -> bool:
    """Whether a `model.source` means the embedded default."""
    return source.partition(":")[0] == TINY
