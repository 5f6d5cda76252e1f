"""A recipe: one YAML file that ties adapter, model, data, losses, mask, evaluation and attack together.

Everything a run does is decided here and nowhere else. Unknown keys are errors, values may be overridden with
`--set a.b=c`, and the resolved recipe is written into the run directory.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from vkd_framework import methods
from vkd_framework.errors import RecipeError
from vkd_framework.types import PARTS, Part, Pool, Scope

Share = Annotated[float, Field(gt=0, le=1)]
Weight = Annotated[float, Field(ge=0)]
REFUSALS = (
    "I do not know.",
    "I do not know this person.",
    "I cannot say.",
    "I have no information about that.",
    "That is not something I know.",
)
"""What is answered instead of a forgotten answer, where a recipe does not say."""
EXTERNAL_PACKAGES = {"timm": "timm", "open_clip": "open_clip_torch"}
"""What `teacher.source` begins with for an external teacher -> the distribution that provides it."""
TINY = "tiny"
"""What `model.source` begins with that means: the embedded default, built from the family's own classes."""


class Section(BaseModel):
    """A part of a recipe: frozen, and a key it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelConfig(Section):
    """Which model is made to forget."""

    source: str = Field(
        default=TINY, description="'tiny' or 'tiny:MODEL_TYPE' (embedded default), a hub id, or a local folder"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N")


class CelebsData(Section):
    """A drawn cast of fictitious celebrities; the same seed gives the same people and the same pixels."""

    kind: Literal["celebs"]
    seed: int = 0
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
    seed: int = 0


class MllmuBenchData(Section):
    """MLLMU-Bench (Liu et al., arXiv 2410.22108): fictitious profiles, and real celebrities that must stay."""

    kind: Literal["mllmu_bench"]
    source: str = Field(default="MLLMMU/MLLMU-Bench", description="a local folder, or a dataset id of the hub")
    forget: Literal[5, 10, 15] = Field(default=5, description="per cent of the people")
    test_pairs: int | None = Field(default=None, ge=1, description="most questions in a measured column; null: all")
    seed: int = 0


class ClearData(Section):
    """CLEAR (Dontsov et al., arXiv 2410.18057): fictitious authors on many photos each, with captions."""

    kind: Literal["clear"]
    source: str = Field(default="therem/CLEAR", description="a local folder, or a dataset id of the hub")
    forget: Literal[1, 5, 10] = Field(default=5, description="per cent of the people")
    test_share: float = Field(default=0.25, gt=0, lt=1, description="share of each person's photos held out")
    test_pairs: int | None = Field(default=None, ge=1, description="most questions in a measured column; null: all")
    seed: int = 0


class FiuBenchData(Section):
    """FIUBench (Ma et al., arXiv 2411.03554): one generated face a person, and twenty questions about each."""

    kind: Literal["fiubench"]
    source: str = Field(default="gray311/FIUBench", description="a local folder, or a dataset id of the hub")
    forget: Literal[1, 5, 10] = Field(default=5, description="per cent of the people")
    test_pairs: int | None = Field(default=None, ge=1, description="most questions in a measured column; null: all")
    seed: int = 0


AnyData = CelebsData | JsonlData | MllmuBenchData | ClearData | FiuBenchData
DATA_KINDS: dict[str, type[AnyData]] = {
    "celebs": CelebsData,
    "jsonl": JsonlData,
    "mllmu_bench": MllmuBenchData,
    "clear": ClearData,
    "fiubench": FiuBenchData,
}
"""`data.kind` -> its section."""


class TeachConfig(Section):
    """How the embedded default gets to know its people: every weight is trained, then the model is cached."""

    steps: int = Field(default=500, ge=1)
    batch_size: int = Field(default=32, ge=1)
    learning_rate: float = Field(default=2e-3, gt=0)
    shares: dict[Literal["names", "facts", "captions", "visible", "text"], Weight] = Field(
        default={"names": 0.25, "facts": 0.2, "captions": 0.1, "visible": 0.25, "text": 0.2},
        description="how a batch is made up; names and captions teach to tell faces apart",
    )
    seed: int = 0

    @model_validator(mode="after")
    def _shares_fill_the_batch(self) -> TeachConfig:
        if abs(sum(self.shares.values()) - 1) > 1e-6:
            raise ValueError(f"shares add up to {sum(self.shares.values()):g}, they must add up to 1")
        return self


class OutputTerm(Section):
    """A loss on the answer tokens, through the frozen language model."""

    weight: Weight = 1.0


class ForgetOutputTerm(OutputTerm):
    """What happens to the forgotten answers: made unlikely, or replaced by others."""

    form: Literal["stranger", "capped_ascent", "ascent", "npo", "refusal", "relabel"] = "capped_ascent"
    tokens: Literal["content", "answer"] = Field(
        default="content", description="without the token that ends an answer, or with it"
    )
    cap: float = Field(
        default=5.0, gt=0, description="nats per token; above it a sample gives no gradient (form: capped_ascent)"
    )
    beta: float = Field(default=0.4, gt=0, description="how soon a sample counts as forgotten (form: npo)")
    reference: Literal["vanilla", "retain_only"] = Field(
        default="vanilla", description="whose probabilities an answer is compared with (form: npo)"
    )
    refusals: tuple[str, ...] = Field(
        default=REFUSALS, min_length=1, description="what is answered instead, drawn for each pair (form: refusal)"
    )


class RetainKlTerm(OutputTerm):
    """Distance of the answer tokens' distribution from the starting model's, on the retain set."""

    weight: Weight = 0.0


class TeacherConfig(Section):
    """Whose visual features the student's are compared with."""

    kind: Literal["self", "ignorant", "external"] = Field(
        default="self", description="the starting model, one that never knew them, or another vision model"
    )
    source: str | None = Field(
        default=None,
        description="kind ignorant: retain_only, a folder or a hub id; kind external: timm/NAME or open_clip/NAME/TAG",
    )
    weights: Literal["pretrained", "random"] = Field(default="pretrained", description="of an external teacher")

    @model_validator(mode="after")
    def _source_fits(self) -> TeacherConfig:
        if self.kind == "self" and self.source is not None:
            raise ValueError(f"source: {self.source} goes with kind ignorant or external; kind: self needs none")
        if self.kind == "ignorant" and self.source is None:
            raise ValueError("kind: ignorant needs a source: retain_only, a folder or a hub id")
        package, _, name = (self.source or "").partition("/")
        if self.kind == "external" and (package not in EXTERNAL_PACKAGES or not name):
            raise ValueError("kind: external needs a source: timm/NAME, open_clip/NAME or open_clip/NAME/TAG")
        if self.kind != "external" and self.weights == "random":
            raise ValueError(f"weights: random goes with kind: external, not with kind: {self.kind}")
        return self


class FeatureTerm(Section):
    """A loss between the student's and the teacher's visual features on the recipe's layers."""

    weight: Weight = 1.0
    distance: Literal["relative_squared", "cosine", "cka", "similarity"] = "relative_squared"
    layers: tuple[str, ...] | None = Field(default=None, description="default: the recipe's `layers`")


RepelTarget = Literal["repel", "teacher", "mean", "stranger", "noise"]


class RepelTerm(FeatureTerm):
    """The feature term of the forgotten people: away from the teacher, bounded, or towards what shows nobody."""

    target: RepelTarget | None = Field(
        default=None, description="null: repel, or teacher where the teacher is ignorant"
    )
    cap: float = Field(default=2.0, gt=0, description="distance above which a sample gives no gradient (target: repel)")


class Losses(Section):
    """The terms of the objective; a weight of 0 switches a term off."""

    forget_output: ForgetOutputTerm = ForgetOutputTerm()
    retain_output: OutputTerm = OutputTerm()
    retain_kl: RetainKlTerm = RetainKlTerm()
    attract: FeatureTerm = FeatureTerm()
    repel: RepelTerm = RepelTerm()

    @property
    def feature_terms(self) -> tuple[FeatureTerm, ...]:
        """Attract and repel."""
        return self.attract, self.repel


class MaskConfig(Section):
    """Which of the trained weights may move for forgetting."""

    kind: Literal["none", "ratio", "salun", "random"] = "none"
    granularity: Literal["weight", "neuron"] = "weight"
    density: Share | None = Field(default=None, description="share of the weights that may move")
    threshold: float | None = Field(default=None, gt=0, description="score at which a weight may move (kind: ratio)")
    scope: Literal["forget", "all"] = Field(default="forget", description="which gradients the mask stops")
    pairs: int = Field(default=256, ge=1, description="pairs of each set from which saliency is accumulated")
    preserve: Literal["retain", "retain_and_text"] = Field(
        default="retain", description="whose saliency counts against a weight (kind: ratio)"
    )

    @model_validator(mode="after")
    def _one_cut(self) -> MaskConfig:
        if self.kind == "none":
            return self
        if (self.density is None) == (self.threshold is None):
            raise ValueError("give exactly one of density and threshold")
        if self.threshold is not None and self.kind != "ratio":
            raise ValueError(f"threshold goes with kind: ratio; kind: {self.kind} takes density")
        return self


class PruneConfig(Section):
    """Which neurons are switched off, with `procedure: prune`."""

    share: Share = Field(default=0.02, description="share of the neurons of the parts in `train`")
    pairs: int = Field(default=256, ge=1, description="pairs of each set on which activations are measured")


class Phase(Section):
    """A stretch of the unlearning: `share` of the steps, with all forget terms multiplied by `forget`."""

    share: Share
    forget: Weight = 1.0


class UnlearnConfig(Section):
    """The optimiser and the schedule of the unlearning."""

    steps: int = Field(default=400, ge=1)
    learning_rate: float = Field(default=5e-4, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    warmup: int = Field(default=10, ge=0, description="steps of linear warm-up")
    cosine_share: float = Field(
        default=0.4, ge=0, le=1, description="last share of the steps, over which the rate falls to 0"
    )
    clip: float = Field(default=1.0, gt=0, description="largest gradient norm")
    forget_batch: int = Field(default=16, ge=1)
    retain_batch: int = Field(default=32, ge=1)
    retain_shares: dict[Literal["others", "strangers", "forgotten"], Weight] | None = Field(
        default=None,
        description="how a retain batch is made up: people who stay, nameless ones, and what anybody can see on photos "
        "of the forgotten; null: as often as they occur",
    )
    phases: tuple[Phase, ...] = Field(
        default=(Phase(share=0.5, forget=0.3), Phase(share=0.5, forget=0.1)), min_length=1
    )
    checkpoint_every: int = Field(default=100, ge=1, description="steps between resumable checkpoints")
    retain_floor: Share | None = Field(
        default=None, description="share of the starting model's exact match below which nothing more is forgotten"
    )
    floor_pairs: int = Field(default=64, ge=1, description="retain pairs on which the floor is checked")

    @model_validator(mode="after")
    def _phases_fill_the_run(self) -> UnlearnConfig:
        total = sum(phase.share for phase in self.phases)
        if abs(total - 1) > 1e-6:
            raise ValueError(f"the shares of the phases add up to {total:g}, they must add up to 1")
        return self

    @model_validator(mode="after")
    def _some_others_are_retained(self) -> UnlearnConfig:
        if self.retain_shares is not None and not self.retain_shares.get("others"):
            raise ValueError("retain_shares: others needs a share above 0, or nobody is kept")
        return self


class SimulatedAttack(Section):
    """An attacker who relearns while the model unlearns; forgetting is asked for at the weights that he reaches."""

    weight: Weight = Field(default=0.0, description="of his loss beside the forget terms; 0: no attacker")
    cap: float = Field(default=10.0, gt=0, description="nats per answer token; above it a sample gives no gradient")
    scopes: tuple[Scope, ...] = Field(
        default=("visual", "full"), min_length=1, description="what he tunes; one is drawn for each attack"
    )
    horizon: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = Field(
        default=(3, 20), description="shortest and longest attack, in steps"
    )
    head_start: int = Field(default=3, ge=0, description="steps of an attack before it counts")
    learning_rate: float = Field(default=3e-4, gt=0)
    batch_size: int = Field(default=16, ge=1)

    @model_validator(mode="after")
    def _horizon_is_a_range(self) -> SimulatedAttack:
        if self.horizon[0] > self.horizon[1]:
            raise ValueError("horizon: the shortest attack comes first")
        if self.head_start >= self.horizon[1]:
            raise ValueError(
                f"head_start: {self.head_start} steps are never reached; horizon ends at {self.horizon[1]}"
            )
        return self


class EvaluateConfig(Section):
    """How the columns are measured."""

    batch_size: int = Field(default=64, ge=1)
    max_new_tokens: int = Field(default=16, ge=1)


class RelearnConfig(Section):
    """The attack on the result: fine-tune a copy on some of the forgotten pairs and ask again."""

    shares: tuple[Share, ...] = Field(
        default=(0.05, 1.0), min_length=1, description="shares of the forget pairs the attacker has"
    )
    steps: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(10, 30, 60), min_length=1, description="steps after which Test VQA is scored"
    )
    scopes: tuple[Scope, ...] = Field(default=("visual", "full"), min_length=1)
    photos: tuple[Pool, ...] = Field(
        default=("known", "new", "others"),
        min_length=1,
        description="what the attacker has: forget pairs, new photos of the same people, or only other people",
    )
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    learning_rate: float = Field(default=1e-4, gt=0)
    batch_size: int = Field(default=16, ge=1)

    @model_validator(mode="after")
    def _steps_increase(self) -> RelearnConfig:
        if list(self.steps) != sorted(set(self.steps)):
            raise ValueError("steps must increase")
        return self


class ModuleRestoreAttack(Section):
    """Put modules of the vanilla model back. What is not kept anywhere else comes back by construction."""

    kind: Literal["module_restore"]
    parts: tuple[Part, ...] = Field(default=("encoder", "projector"), min_length=1)


class QuantizeAttack(Section):
    """Round every weight matrix, which may undo changes that are smaller than the rounding."""

    kind: Literal["quantize"]
    bits: int = Field(default=4, ge=2, le=8, description="bits of a rounded weight")


class ProbeAttack(Section):
    """Tell people apart by the visual features themselves, with a linear probe and with nearest neighbours."""

    kind: Literal["probe"]
    photos: int = Field(default=1024, ge=2, description="most training photos the probe learns from")


class InContextAttack(Section):
    """Show other photos of the same person first, each with another question and its answer."""

    kind: Literal["in_context"]
    examples: int = Field(default=2, ge=1, description="photos with an answer before the one that is asked about")


class RephraseAttack(Section):
    """Ask the same in other words, where the data knows some."""

    kind: Literal["rephrase"]


class NoiseAttack(Section):
    """Add Gaussian noise to every pixel."""

    kind: Literal["noise"]
    spread: float = Field(default=0.1, gt=0, le=1, description="standard deviation, as a share of the pixels' range")


class CropAttack(Section):
    """Cut out the middle of the photo and enlarge it to the old size."""

    kind: Literal["crop"]
    keep: float = Field(default=0.9, gt=0, lt=1, description="share of height and width that is kept")


class MembershipAttack(Section):
    """Tell from the likelihood of an answer whether a photo shows somebody the model was taught."""

    kind: Literal["membership"]
    lowest: Share = Field(default=0.2, description="share of an answer's tokens that Min-K% looks at, at least one")


AnyAttack = (
    ModuleRestoreAttack
    | QuantizeAttack
    | ProbeAttack
    | InContextAttack
    | RephraseAttack
    | NoiseAttack
    | CropAttack
    | MembershipAttack
)
ATTACK_KINDS: dict[str, type[AnyAttack]] = {
    "module_restore": ModuleRestoreAttack,
    "quantize": QuantizeAttack,
    "probe": ProbeAttack,
    "in_context": InContextAttack,
    "rephrase": RephraseAttack,
    "noise": NoiseAttack,
    "crop": CropAttack,
    "membership": MembershipAttack,
}
"""`kind` of an entry of `attacks` -> its section."""

EVERY_ATTACK: tuple[AnyAttack, ...] = (
    ModuleRestoreAttack(kind="module_restore", parts=("encoder",)),
    ModuleRestoreAttack(kind="module_restore", parts=("projector",)),
    ModuleRestoreAttack(kind="module_restore"),
    QuantizeAttack(kind="quantize", bits=8),
    QuantizeAttack(kind="quantize"),
    ProbeAttack(kind="probe"),
    InContextAttack(kind="in_context"),
    RephraseAttack(kind="rephrase"),
    NoiseAttack(kind="noise"),
    CropAttack(kind="crop"),
    MembershipAttack(kind="membership"),
)


class Recipe(Section):
    """A whole run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    description: str = ""
    adapter: str
    method: str = Field(
        default=methods.DEFAULT,
        description="fills in procedure, train, losses, mask, prune, phases and floor; see `vkd methods`",
    )
    seed: int = Field(default=0, ge=0)
    model: ModelConfig = ModelConfig()
    data: Annotated[AnyData, Field(discriminator="kind")]
    teach: TeachConfig | None = None
    reference: Literal["none", "retain_only"] = "none"
    procedure: Literal["tune", "prune", "reteach"] = Field(
        default="tune", description="train with the losses, switch neurons off, or teach anew without the forgotten"
    )
    train: tuple[Part, ...] = Field(default=("encoder", "projector"), min_length=1, description="what may change")
    layers: tuple[str, ...] = Field(
        default=(), description="canonical names, see `vkd inspect-layers`; needed by attract and repel"
    )
    teacher: TeacherConfig = TeacherConfig()
    losses: Losses = Losses()
    mask: MaskConfig = MaskConfig()
    prune: PruneConfig = PruneConfig()
    unlearn: UnlearnConfig = UnlearnConfig()
    simulated_attack: SimulatedAttack = SimulatedAttack()
    evaluate: EvaluateConfig = EvaluateConfig()
    relearn: RelearnConfig = RelearnConfig()
    attacks: tuple[Annotated[AnyAttack, Field(discriminator="kind")], ...] = Field(
        default=EVERY_ATTACK, description="what else is tried on the models; [] tries nothing"
    )

    @model_validator(mode="before")
    @classmethod
    def _filled_by_method(cls, raw: Any) -> Any:
        return methods.fill(raw) if isinstance(raw, dict) else raw

    @field_validator("method")
    @classmethod
    def _known_method(cls, method: str) -> str:
        if method not in methods.METHODS:
            close = nearest(method, methods.METHODS)
            raise ValueError(f"there is no such method{close}; there are {', '.join(methods.METHODS)}")
        return method

    @model_validator(mode="after")
    def _parts_fit(self) -> Recipe:
        if is_tiny(self.model.source) and self.teach is None:
            raise ValueError(
                f"model.source: {self.model.source} starts from random weights and needs a `teach` section"
            )
        if self.teach is not None and self.data.kind != "celebs":
            raise ValueError("`teach` works with data.kind: celebs; remove it, or use the celebs cast")
        if self.reference == "retain_only" and self.teach is None:
            raise ValueError("reference: retain_only needs a `teach` section to teach it with")
        self._teacher_fits()
        if self.procedure == "tune":
            self._terms_fit()
        elif self.mask.kind != "none":
            raise ValueError(f"mask.kind: {self.mask.kind} goes with procedure: tune; set mask.kind to none")
        if self.procedure == "reteach" and self.teach is None:
            raise ValueError(f"method: {self.method} teaches a model anew and needs a `teach` section")
        if self.procedure == "reteach" and set(self.train) != set(PARTS):
            raise ValueError(f"procedure: reteach changes every part; set train to [{', '.join(PARTS)}]")
        return self

    def _terms_fit(self) -> None:
        attack = self.simulated_attack
        if attack.weight and attack.head_start >= self.unlearn.checkpoint_every:
            raise ValueError(
                f"simulated_attack.head_start: an attack also ends at every checkpoint, so {attack.head_start} steps "
                f"are never over; make unlearn.checkpoint_every ({self.unlearn.checkpoint_every}) larger"
            )
        terms = self.losses
        if terms.forget_output.weight == 0 and terms.repel.weight == 0:
            raise ValueError(
                "nothing would be forgotten: losses.forget_output.weight and losses.repel.weight are both 0"
            )
        features = {"attract": terms.attract, "repel": terms.repel}
        if lacking := [name for name, term in features.items() if term.weight and not (term.layers or self.layers)]:
            raise ValueError(
                f"layers: missing; losses.{lacking[0]} needs at least 1 (see `vkd inspect-layers`), or a weight of 0"
            )
        output = terms.forget_output
        if output.weight and output.form == "npo" and output.reference != "vanilla" and self.reference == "none":
            raise ValueError(
                "losses.forget_output.reference: retain_only needs that model; set reference to retain_only"
            )

    @property
    def distilled(self) -> tuple[str, ...]:
        """The layers whose features enter a term, each once."""
        terms = (self.losses.attract, self.losses.repel)
        return tuple(dict.fromkeys(name for term in terms if term.weight for name in term.layers or self.layers))

    @property
    def keeps_masked_weights(self) -> bool:
        """Whether there is a mask outside of which no weight may move at all."""
        return self.procedure == "prune" or (self.mask.kind != "none" and self.mask.scope == "all")

    def _teacher_fits(self) -> None:
        if self.teacher.source == "retain_only" and self.reference != "retain_only":
            raise ValueError("teacher.source: retain_only needs that model; set reference to retain_only")
        target, kind = self.losses.repel.target, self.teacher.kind
        if target == "repel" and kind == "ignorant":
            raise ValueError(
                "losses.repel.target: repel moves away from a teacher that knew the forgotten, and this one is "
                "ignorant; take teacher, mean, stranger or noise"
            )
        if target == "teacher" and kind != "ignorant":
            raise ValueError(
                f"losses.repel.target: teacher would keep how the forgotten are seen, with teacher.kind: {kind}; "
                "take repel, mean, stranger or noise"
            )

    @property
    def repel_target(self) -> RepelTarget:
        """Where the repel term leads, the default resolved."""
        return self.losses.repel.target or ("teacher" if self.teacher.kind == "ignorant" else "repel")

    def to_yaml(self) -> str:
        """The resolved recipe, every default spelled out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def digest(self) -> str:
        """A hash of everything the recipe decides."""
        return digest(self.model_dump(mode="json"))


def is_tiny(source: str) -> bool:
    """Whether a `model.source` means the embedded default."""
    return source.partition(":")[0] == TINY


def digest(value: Any) -> str:
    """The first 16 hex digits of the SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


def bundled_recipes() -> dict[str, Path]:
    """Name -> file of the recipes that come with the package: inside the wheel, or beside it in a checkout."""
    package = Path(__file__).parent
    for folder in (package / "recipes", package.parent / "recipes"):
        files = sorted(folder.glob("*.yaml"))
        if files:
            return {file.stem: file for file in files}
    return {}


def find_recipe(reference: str) -> Path:
    """The file behind a path or the name of a bundled recipe. Raises RecipeError when there is none."""
    path = Path(reference)
    if path.is_file():
        return path
    bundled = bundled_recipes()
    if path.stem in bundled and path.suffix in ("", ".yaml", ".yml"):
        return bundled[path.stem]
    raise RecipeError(
        f"{reference}: no such recipe file{nearest(path.stem, bundled)}; "
        "`vkd recipes list` shows the ones that come with vkd"
    )


def load_recipe(reference: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and validate a recipe. Raises RecipeError with one line that names the place and the mend."""
    path = find_recipe(reference)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values, this file holds {type(raw).__name__}")
    _anchor_paths(raw, path.resolve().parent)
    raw = methods.fill(raw)
    for override in overrides:
        _apply_override(raw, override)
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(f"{path}: {_one_line(error, raw)}") from None


def nearest(given: str, allowed: Mapping[str, Any] | Sequence[str]) -> str:
    """`; did you mean 'x'?`, or nothing when no allowed name is close."""
    close = difflib.get_close_matches(given, list(allowed), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _anchor_paths(raw: dict[str, Any], folder: Path) -> None:
    """Relative paths written in a recipe are relative to the recipe; those given by --set, to the working folder."""
    data, model, teacher = raw.get("data"), raw.get("model"), raw.get("teacher")
    if isinstance(data, dict):
        for key in ("rows", "images", "forget"):
            if isinstance(data.get(key), str):
                data[key] = str(folder / data[key])
    for section in (data, model, teacher):
        if isinstance(section, dict) and str(section.get("source", "")).startswith(("./", "../")):
            section["source"] = str((folder / section["source"]).resolve())


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"--set {override}: write it as key=value, for example --set losses.repel.weight=0")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise RecipeError(
            f"--set {override}: the value is not valid YAML; quote it, or write a list as [a, b]"
        ) from None
    *parents, last = key.strip().split(".")
    place: Any = raw
    for name in parents:
        place = place.setdefault(name, {}) if isinstance(place, dict) else _item(place, name, override)
        if place is None:
            raise RecipeError(f"--set {override}: {name!r} is switched off in the recipe; set the whole of it instead")
    if place is raw and last == "method" and value != raw.get("method", methods.DEFAULT):
        methods.switch(raw, value)
        raw.update(methods.fill(raw))
    elif isinstance(place, dict):
        place[last] = value
    elif isinstance(place, list):
        _item(place, last, override)
        place[int(last)] = value
    else:
        raise RecipeError(f"--set {override}: {'.'.join(parents)!r} is a plain value and has no {last!r}")


def _item(place: Any, name: str, override: str) -> Any:
    if not isinstance(place, list):
        raise RecipeError(f"--set {override}: there is nothing below a plain value to set {name!r} in")
    if not name.isdigit() or int(name) >= len(place):
        raise RecipeError(f"--set {override}: {name!r} is not an index of a list of {len(place)}")
    return place[int(name)]


def _one_line(error: ValidationError, raw: Mapping[str, Any]) -> str:
    """The first problem in words, with the number of further ones."""
    problems = error.errors(include_url=False)
    first = problems[0]
    kinds = ATTACK_KINDS if first["loc"][:1] == ("attacks",) else DATA_KINDS
    location = [str(part) for part in first["loc"] if part not in kinds]
    place = ".".join(location) or "recipe"
    if first["type"] == "extra_forbidden":
        message = f"{place}: unknown key{nearest(location[-1], _allowed_keys(location[:-1], raw))}"
    elif first["type"] == "missing":
        message = f"{place}: missing, but required"
    elif first["type"] == "union_tag_not_found":
        *others, last = map(repr, kinds)
        message = f"{place}: kind is missing; it is {', '.join(others)} or {last}"
    else:
        given = first.get("input")
        shown = (
            f" (given: {given!r})"
            if isinstance(given, str | int | float | bool | list | tuple) or given is None
            else ""
        )
        text = first["msg"].removeprefix("Value error, ")
        message = f"{place}: {text[0].lower()}{text[1:]}{shown}"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{message}{more}; `vkd recipes schema` lists every key"


def _allowed_keys(location: Sequence[str], raw: Mapping[str, Any]) -> list[str]:
    """The keys of the section at `location`."""
    section: type[BaseModel] = Recipe
    if location and location[0] == "data":
        kind = raw.get("data", {}).get("kind")
        return list(DATA_KINDS.get(kind, CelebsData).model_fields)
    if location and location[0] == "attacks":
        return list(ATTACK_KINDS[raw["attacks"][int(location[1])]["kind"]].model_fields)
    for name in location:
        if name.isdigit():
            continue
        candidates = [*_models_in(section.model_fields[name].annotation)] if name in section.model_fields else []
        if not candidates:
            return []
        section = candidates[0]
    return list(section.model_fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models_in(part)]
