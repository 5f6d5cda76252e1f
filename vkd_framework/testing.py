"""The adapter author's kit: does an adapter tell the truth about its models?

    from vkd_framework.testing import assert_conforms

    def test_the_adapter_conforms():
        assert_conforms("my_family")

Every check asks the adapter something and compares the answer with what the model itself does: pixels are exchanged,
weights disturbed, gradients followed. docs/conformance.md lists the checks and the mistakes they find.

Shape letters: `B` samples, `L` text tokens, `R` feature rows, `D` channels, `V` vocabulary.
"""

from __future__ import annotations

import copy
import importlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging

from vkd_framework.errors import AdapterError, ModelError, VKDError
from vkd_framework.features import FeatureTap, PhotoFeatures, photo_features, vision_forward
from vkd_framework.generic import image_token_id, render
from vkd_framework.layers_table import describe
from vkd_framework.losses import answer_cross_entropy
from vkd_framework.plugins import MLLM, Adapter, Anatomy, installed_adapters, load_adapter
from vkd_framework.progress import Progress
from vkd_framework.recipe import is_tiny, nearest
from vkd_framework.types import EncodedBatch, ImageQuestionPair, Part, Photo

IGNORED = -100
SIDE = 48
"""Height and width in pixels of the square photos, and the image size asked of `vkd_tiny_model`."""

TOLERANCE = 1e-4
"""How far two computations of the same figure may lie apart, relative to the figures' root mean square."""

QUESTIONS = ("What is shown?", "Which city is the capital of Norway?", "What is the hobby of the person in this photo?")
ANSWERS = ("chess", "The capital of Norway is Oslo.", "a baker from Oslo who plays chess", "red")
SCRIPTS = ("Zoë Ærø", "山田 太郎", "🙂", "a", "two\nlines", "What is shown?")
TEXTS = (*QUESTIONS, *ANSWERS, *SCRIPTS)


@dataclass(frozen=True)
class CheckResult:
    """One check's outcome. `look`: which hook to mend, where it is described, which generic function may help."""

    name: str
    ok: bool
    expected: str
    found: str
    look: str


class Wrong(Exception):
    """Raised by a check that does not hold."""

    def __init__(self, expected: str, found: str) -> None:
        super().__init__(f"expected {expected}, found {found}")
        self.expected, self.found = expected, found


def check_adapter(adapter: str | Adapter, source: str | None = None) -> list[CheckResult]:
    """Run every check and return one result each, in order.

    `adapter`: a registered name, the dotted path of an importable module, or a loaded adapter. `source`: the model to
    check with, a hub id, a local folder or `tiny:MODEL_TYPE`; None takes the tiny model of every model type served, and
    with several of them puts the type before each name. A check that raises counts as failed and the others still run;
    those that stop at the very same error are told in one. Raises AdapterError when the adapter cannot be loaded.
    """
    adapter = find_adapter(adapter) if isinstance(adapter, str) else adapter
    results = _outcomes(ADAPTER_CHECKS, adapter, adapter.name)
    if source is None and "vkd_tiny_model" not in adapter.hooks:
        missing = "write vkd_tiny_model (docs/hooks.md), or name a model: `--model` or `source`"
        found = f"adapter {adapter.name!r} has no hook vkd_tiny_model and no model was named"
        return [*results, CheckResult("there-is-a-model-to-check", False, "a model to check with", found, missing)]
    sources = [f"tiny:{model_type}" for model_type in adapter.model_types] if source is None else [source]
    for one in sources:
        prefix = f"{one.partition(':')[2]}: " if len(sources) > 1 else ""
        with _quiet_transformers(), tempfile.TemporaryDirectory(prefix="vkd-check-") as folder:
            found_here = _check_model(adapter, one, Path(folder))
        results += [replace(result, name=prefix + result.name) for result in found_here]
    return results


def assert_conforms(adapter: str | Adapter, source: str | None = None) -> None:
    """Raise AssertionError with a table of the checks that fail. Arguments as in `check_adapter`."""
    __tracebackhide__ = True
    results = check_adapter(adapter, source)
    if any(not result.ok for result in results):
        raise AssertionError("\n" + table([result for result in results if not result.ok], len(results)))


def table(results: Sequence[CheckResult], total: int | None = None) -> str:
    """A line a check, three more below each one that failed, and a count; `total` where only failures are given."""
    lines = []
    for result in results:
        lines.append(f"{'ok  ' if result.ok else 'FAIL'}  {result.name}")
        if not result.ok:
            lines += [f"      {what:<9} {getattr(result, what)}" for what in ("expected", "found", "look")]
    failed = sum(not result.ok for result in results)
    count = len(results) if total is None else total
    return "\n".join([*lines, f"{count} checks, {f'{failed} failed' if failed else 'all hold'}"])


def find_adapter(name: str) -> Adapter:
    """A registered adapter, or the module at a dotted path, so that an author can check before installing."""
    installed = [adapter.name for adapter in installed_adapters()]
    if name in installed or "." not in name:
        return load_adapter(name)
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not name.startswith(error.name):
            raise AdapterError(f"adapter {name!r} does not import: {_one_line(error)}") from error
        raise AdapterError(
            f"adapter {name!r} is neither installed nor a module that can be imported{nearest(name, installed)}; "
            f"installed: {', '.join(installed) or 'none'} (see `vkd adapters`)"
        ) from error
    except Exception as error:
        raise AdapterError(f"adapter {name!r} does not import: {_one_line(error)}") from error
    return Adapter(name, module)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without bars and load reports: incomplete weights are loaded on purpose."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _check_model(adapter: Adapter, source: str, folder: Path) -> list[CheckResult]:
    try:
        subject = Subject.load(adapter, source, folder)
    except Exception as error:
        look = f"{LOAD if not is_tiny(source) else TINY}; the other checks need a model and were left out"
        return [CheckResult("the-model-loads", False, f"{source} is built, saved and loaded", _one_line(error), look)]
    return _outcomes(MODEL_CHECKS, subject, source)


def _outcomes(checks: Sequence[Check], subject: Any, what: str) -> list[CheckResult]:
    results: list[CheckResult] = []
    raised: dict[str, list[str]] = {}
    for check in Progress(checks, f"check {what}"):
        statement = _statement(check)
        try:
            check.run(subject)
        except Wrong as wrong:
            results.append(CheckResult(check.name, False, wrong.expected, wrong.found, check.look))
        except Exception as error:
            found = f"raised {_one_line(error)}"
            if found not in raised:
                results.append(CheckResult(check.name, False, statement, found, check.look))
            raised.setdefault(found, []).append(check.name)
        else:
            results.append(CheckResult(check.name, True, statement, "", check.look))
    return [_with_followers(result, raised.get(result.found, [])[1:]) for result in results]


def _with_followers(result: CheckResult, followers: Sequence[str]) -> CheckResult:
    if not followers:
        return result
    return replace(result, look=f"{result.look}; {len(followers)} further checks stopped at the same error")


def _statement(check: Check) -> str:
    return (check.run.__doc__ or "").strip().splitlines()[0].rstrip(".")


@dataclass(frozen=True)
class Check:
    """A statement about an adapter, its test, and where to look when it does not hold."""

    run: Callable[[Any], None]
    look: str

    @property
    def name(self) -> str:
        """The function's name as a slug."""
        return self.run.__name__.replace("_", "-")


@dataclass(frozen=True, eq=False)
class Pass:
    """One forward pass: which layers ran, what each put out (as it is, and flattened to `[R, D]`), the logits."""

    ran: tuple[str, ...]
    outputs: Mapping[str, Tensor]
    tap: FeatureTap
    logits: Tensor | None


@dataclass(frozen=True, eq=False)
class Subject:
    """What all checks of one model share; each piece is made when the first check asks for it."""

    adapter: Adapter
    source: str
    folder: Path
    mllm: MLLM
    built: MLLM | None
    """The tiny model in memory, before it was saved and loaded."""

    @classmethod
    def load(cls, adapter: Adapter, source: str, folder: Path) -> Subject:
        """Load by `vkd_load_model`, as a run does; a tiny model is saved first."""
        built = tiny(adapter, source) if is_tiny(source) else None
        where = source
        if built is not None:
            where = str(folder / "model")
            save(built, Path(where))
        return cls(adapter, source, folder, adapter.load(where, torch.float32, "cpu"), built)

    @property
    def saved(self) -> Path:
        """The folder with the saved model; a model that came from elsewhere is saved on demand."""
        where = self.folder / "model"
        if not where.exists():
            save(self.mllm, where)
        return where

    @cached_property
    def pictures(self) -> Mapping[str, Photo]:
        """Photos of many shapes and colour modes, drawn as noise, so that no two patches look alike."""
        drawn = {
            "square": Photo("square", noise(SIDE, SIDE, 1)),
            "portrait": self._file("portrait", SIDE * 2 // 3, SIDE, "L"),
            "first": self._file("first", SIDE, SIDE, "RGB"),
            "second": Photo("second", noise(SIDE, SIDE // 2, 2)),
            "panorama": self._file("panorama", SIDE * 2, SIDE // 2, "P"),
            "tiny": self._file("tiny", SIDE // 6, SIDE // 6, "RGBA"),
        }
        return drawn

    def _file(self, name: str, width: int, height: int, mode: str) -> Photo:
        path = self.folder / f"{name}.png"
        noise(width, height, len(name)).convert(mode).save(path)
        return Photo(name, path)

    @cached_property
    def plain(self) -> tuple[ImageQuestionPair, ...]:
        """Two questions about square photos."""
        square = self.pictures["square"]
        return (
            ImageQuestionPair("square", QUESTIONS[0], ANSWERS[0], (square,)),
            ImageQuestionPair("square again", QUESTIONS[2], ANSWERS[2], (self.pictures["first"],)),
        )

    @cached_property
    def text_only(self) -> ImageQuestionPair:
        """A question without a photo."""
        return ImageQuestionPair("text only", QUESTIONS[1], ANSWERS[1])

    @cached_property
    def two_photos(self) -> ImageQuestionPair:
        """A question about two photos."""
        photos = (self.pictures["first"], resized(self.pictures["second"], SIDE, SIDE))
        return ImageQuestionPair("two photos", QUESTIONS[2], ANSWERS[2], photos)

    @cached_property
    def differently_sized(self) -> tuple[ImageQuestionPair, ...]:
        """A portrait from a greyscale file, a panorama from a palette file, a tiny picture with transparency."""
        return tuple(
            ImageQuestionPair(name, question, answer, (self.pictures[name],))
            for name, question, answer in (
                ("portrait", QUESTIONS[2], ANSWERS[3]),
                ("panorama", QUESTIONS[0], ANSWERS[2]),
                ("tiny", QUESTIONS[2], ANSWERS[0]),
            )
        )

    @cached_property
    def pairs(self) -> tuple[ImageQuestionPair, ...]:
        """The mixed batch of the checks: photo, text, photos of other sizes, two photos in one question.

        What the model cannot take in one batch is left out or made the same size; a check of its own says so.
        """
        first, *_ = self.plain
        others = self.differently_sized
        if not self.runs((first, *others)):
            others = tuple(replace(p, photos=(resized(p.photos[0], SIDE, SIDE),)) for p in others)
        two = [self.two_photos] if self.runs((first, self.two_photos)) else []
        text = [self.text_only] if self.runs((first, self.text_only)) else []
        return (first, *text, others[0], *two, *others[1:])

    def runs(self, pairs: Sequence[ImageQuestionPair]) -> bool:
        """Whether the pairs can be encoded and answered in one batch."""
        try:
            self.forward(self.mllm.tokenize(pairs).inputs)
        except Exception:
            return False
        return True

    @cached_property
    def batch(self) -> EncodedBatch:
        """`pairs`, encoded with their answers."""
        return self.mllm.tokenize(self.pairs)

    @cached_property
    def vision(self) -> Pass:
        """A vision-only forward pass of the batch, without gradients."""
        return self.look(self.batch.inputs)

    @cached_property
    def whole(self) -> Pass:
        """A full forward pass of the batch, without gradients."""
        return self.forward(self.batch.inputs)

    @cached_property
    def features(self) -> dict[str, PhotoFeatures]:
        """The batch's feature rows as losses see them."""
        return self.rows(self.batch.inputs, self.vision)

    def rows(self, inputs: Mapping[str, Tensor], made: Pass) -> dict[str, PhotoFeatures]:
        """The real rows of a pass by layer."""
        return photo_features(self.mllm, inputs, made.tap)

    @torch.no_grad()
    def look(self, inputs: Mapping[str, Tensor]) -> Pass:
        """Run encoder and projector alone."""
        return self.record(lambda: vision_forward(self.mllm, inputs))

    @torch.no_grad()
    def forward(self, inputs: Mapping[str, Tensor]) -> Pass:
        """Run the whole model."""
        return self.record(lambda: self.mllm.model(**inputs, use_cache=False))

    def record(self, run: Callable[[], Any]) -> Pass:
        """Note the layers that run meanwhile and what they put out."""
        ran: list[str] = []
        outputs: dict[str, Tensor] = {}

        def note(name: str) -> Callable[..., None]:
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
                ran.append(name)
                outputs[name] = output if isinstance(output, Tensor) else output[0]

            return hook

        with ExitStack() as stack, FeatureTap(self.mllm.model, self.mllm.layers) as tap:
            for layer in self.mllm.layers:
                handle = self.mllm.model.get_submodule(layer.path).register_forward_hook(note(layer.name))
                stack.callback(handle.remove)
            answer = run()
        return Pass(tuple(ran), outputs, tap, getattr(answer, "logits", None))

    @cached_property
    def exchanged(self) -> dict[tuple[int, int], dict[str, Tensor]]:
        """(sample, photo) -> the batch's inputs with that photo replaced by another of its size."""
        found = {}
        for b, pair in enumerate(self.pairs):
            for i, photo in enumerate(pair.photos):
                photos = (*pair.photos[:i], redrawn(photo), *pair.photos[i + 1 :])
                pairs = [replace(pair, photos=photos) if n == b else other for n, other in enumerate(self.pairs)]
                found[b, i] = dict(self.mllm.tokenize(pairs).inputs)
        return found

    @cached_property
    def moved(self) -> dict[tuple[int, int], dict[str, Tensor]]:
        """(sample, photo) -> layer -> `[R]` bool, the rows that differ once that photo is another one."""
        return {
            key: {
                name: _differs(rows, self.vision.tap.features[name])
                for name, rows in self.look(inputs).tap.features.items()
            }
            for key, inputs in self.exchanged.items()
        }

    def entering(self, path: str, inputs: Mapping[str, Tensor]) -> Tensor | None:
        """`[R, D]`: the hidden states that a vision-only pass hands to a module, flattened; None when it takes none."""
        entered: list[Tensor] = []

        def note(_module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
            first = positional[0] if positional else named.get("hidden_states")
            if isinstance(first, Tensor) and first.ndim > 1:
                entered.append(first.flatten(0, -2))

        handle = self.mllm.model.get_submodule(path).register_forward_pre_hook(note, with_kwargs=True)
        try:
            self.look(inputs)
        finally:
            handle.remove()
        return entered[0] if entered else None

    def token(self, ids: int | Sequence[int] | Tensor) -> str:
        """Token ids as text, special tokens spelt out."""
        listed = [ids] if isinstance(ids, int) else list(ids)
        return str(self.mllm.processor.tokenizer.decode(listed, clean_up_tokenization_spaces=False))

    def attended(self, batch: EncodedBatch, row: int) -> list[int]:
        """A row's token ids without padding."""
        ids: list[int] = batch.inputs["input_ids"][row][batch.inputs["attention_mask"][row].bool()].tolist()
        return ids

    def single_losses(self) -> Tensor:
        """`[B]`: the answer loss of each pair, asked alone."""
        return torch.cat([self.losses(self.mllm.tokenize([pair])) for pair in self.pairs])

    @torch.no_grad()
    def losses(self, batch: EncodedBatch) -> Tensor:
        """`[B]`: the answer losses of a batch."""
        logits = self.mllm.model(**batch.inputs).logits
        return answer_cross_entropy(logits, batch.inputs["input_ids"], batch.labels != IGNORED)


def tiny(adapter: Adapter, source: str) -> MLLM:
    """The tiny model that `tiny`, `tiny:ADAPTER` or `tiny:MODEL_TYPE` means."""
    name = source.partition(":")[2]
    wanted = None if name in ("", adapter.name) and name not in adapter.model_types else name
    return adapter.tiny_model(TEXTS, SIDE, 0, wanted)


def save(mllm: MLLM, folder: Path) -> None:
    """Model and processor as `from_pretrained` reads them."""
    mllm.model.save_pretrained(folder)
    mllm.processor.save_pretrained(folder)


def noise(width: int, height: int, seed: int) -> Image.Image:
    """A picture in which no two patches look alike."""
    return Image.fromarray(numpy.random.default_rng(seed).integers(1, 255, (height, width, 3), dtype=numpy.uint8))


def redrawn(photo: Photo) -> Photo:
    """Another picture of the same size."""
    return Photo(f"{photo.key} redrawn", noise(*photo.open().size, seed=99))


def resized(photo: Photo, width: int, height: int) -> Photo:
    """The same picture in another size."""
    return Photo(f"{photo.key} {width}x{height}", photo.open().resize((width, height)))


def transformers_knows_the_model_types(adapter: Adapter) -> None:
    """Every model type served is one that transformers builds an image-text-to-text model for."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as NAMES

    for model_type in adapter.model_types:
        if model_type not in NAMES and model_type not in CONFIG_MAPPING:
            raise Wrong("model types of transformers", f"{model_type!r}{nearest(model_type, list(NAMES))}")


def presets_can_be_described(adapter: Adapter) -> None:
    """Every preset builds without weights, is of a served type, and has its head in the language model."""
    for name, config in adapter.presets.items():
        if config.get("model_type") not in adapter.model_types:
            raise Wrong(f"a model type of {', '.join(adapter.model_types)}", f"{name}: {config.get('model_type')!r}")
        try:
            anatomy = describe(name, adapter)
        except VKDError as error:
            raise Wrong(f"{name} can be described", _one_line(error)) from error
        _head_is_language(anatomy, f"{name}: ")


def refused_types_are_not_served(adapter: Adapter) -> None:
    """No model type is both served and refused, and every refusal says what to use instead."""
    for model_type, sentence in adapter.refused_model_types.items():
        if model_type in adapter.model_types:
            raise Wrong("refused types other than the served ones", f"{model_type!r} is served and refused")
        if not sentence.strip():
            raise Wrong(f"{model_type!r}: what to use instead", "an empty sentence")


def a_question_about_a_photo_is_answered(subject: Subject) -> None:
    """Two questions about photos of one size can be encoded and answered in one batch."""
    subject.forward(subject.mllm.tokenize(subject.plain).inputs)


def text_and_photos_share_a_batch(subject: Subject) -> None:
    """A question without a photo can share a batch with one about a photo."""
    subject.forward(subject.mllm.tokenize([subject.plain[0], subject.text_only]).inputs)


def a_question_may_show_two_photos(subject: Subject) -> None:
    """A question about two photos can share a batch with one about a single photo."""
    subject.forward(subject.mllm.tokenize([subject.plain[0], subject.two_photos]).inputs)


def differently_sized_photos_share_a_batch(subject: Subject) -> None:
    """Square, portrait, panorama and tiny photos can share a batch."""
    subject.forward(subject.mllm.tokenize([subject.plain[0], *subject.differently_sized]).inputs)


def the_same_seed_gives_the_same_tiny_model(subject: Subject) -> None:
    """vkd_tiny_model gives the same weights for the same arguments."""
    if subject.built is not None:
        _same_weights(subject.built, tiny(subject.adapter, subject.source), "a second vkd_tiny_model")


def a_saved_model_loads_unchanged(subject: Subject) -> None:
    """Weights and logits are identical after saving and loading, by the adapter and by the Auto classes."""
    folder = str(subject.saved)
    again = subject.adapter.load(folder, torch.float32, "cpu")
    auto = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    others = {
        "vkd_load_model": again,
        "the Auto classes": subject.adapter.bind(auto, AutoProcessor.from_pretrained(folder)),
    }
    if subject.built is not None:
        others["the tiny model before it was saved"] = subject.built
    logits = subject.forward(subject.mllm.tokenize(subject.plain).inputs).logits
    for what, other in others.items():
        _same_weights(subject.mllm, other, what)
        with torch.no_grad():
            theirs = other.model.eval()(**other.tokenize(subject.plain).inputs, use_cache=False).logits
        if logits is None or not torch.equal(logits, theirs):
            raise Wrong("identical logits", f"{what} gives others, apart by {_gap(logits, theirs)}")


def incomplete_weights_are_refused(subject: Subject) -> None:
    """A checkpoint that lacks a weight of the encoder, or has one too many, raises ModelError."""
    from safetensors.torch import load_file, save_file

    kept = subject.saved / "model.safetensors"
    if not kept.is_file():
        return
    weights = load_file(kept)
    encoder = next(p for p in subject.mllm.parameters(["encoder"]).values() if p.ndim > 1)
    gone = next(n for n, w in weights.items() if w.shape == encoder.shape and torch.equal(w, encoder.detach()))
    lacking = {name: weight for name, weight in weights.items() if name != gone}
    for what, tensors in (
        (f"{gone} is missing", lacking),
        ("an unknown weight is left over", {**weights, "model.left_over.weight": torch.ones(2)}),
    ):
        try:
            save_file(tensors, kept, metadata={"format": "pt"})
            subject.adapter.load(str(subject.saved), torch.float32, "cpu")
        except ModelError:
            continue
        finally:
            save_file(weights, kept, metadata={"format": "pt"})
        raise Wrong("ModelError", f"loads although {what}")


def embeddings_and_head_are_language_model(subject: Subject) -> None:
    """The input embeddings and the output head belong to the language model."""
    _head_is_language(subject.mllm)


def text_does_not_pass_the_vision_modules(subject: Subject) -> None:
    """Text-only logits stay the same, bit for bit, whatever the encoder's and the projector's weights are."""
    inputs = subject.mllm.tokenize([subject.text_only]).inputs
    before = subject.forward(inputs).logits
    for part in VISION_PARTS:
        with _disturbed(subject.mllm, part) as names:
            after = subject.forward(inputs).logits
        if before is None or after is None or not torch.equal(before, after):
            raise Wrong(
                f"text-only logits that do not know the {part}",
                f"they move by {_gap(before, after)} when its weights are disturbed ({_few(names)})",
            )


def photos_pass_encoder_and_projector(subject: Subject) -> None:
    """Logits of a photo question change with the encoder's weights, and with the projector's."""
    inputs = subject.mllm.tokenize(subject.plain[:1]).inputs
    before = subject.forward(inputs).logits
    for part in VISION_PARTS:
        with _disturbed(subject.mllm, part) as names:
            after = subject.forward(inputs).logits
        if before is None or after is None or torch.equal(before, after):
            raise Wrong(
                f"photo logits that depend on the {part}", f"they stay as they are when {_few(names)} are disturbed"
            )


def gradients_reach_the_parts_in_use(subject: Subject) -> None:
    """A photo question gives encoder and projector gradients, a text-only one gives them none."""
    for pair, due in ((subject.plain[0], True), (subject.text_only, False)):
        batch = subject.mllm.tokenize([pair])
        for part in VISION_PARTS:
            named = subject.mllm.parameters([part])
            loss = _loss(subject, batch)
            gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
            reached = [name for name, g in zip(named, gradients, strict=True) if g is not None and bool(g.any())]
            if bool(reached) != due:
                amount = "no parameter" if due else f"{len(reached)} parameters ({_few(reached)})"
                raise Wrong(
                    f"{'some' if due else 'no'} {part} parameter with a gradient from a "
                    f"{'photo' if due else 'text-only'} question",
                    f"{amount} of {len(named)} with one",
                )


def layers_have_canonical_names(subject: Subject) -> None:
    """Layers are named vision.0, vision.1 and so on, then projector."""
    names = [layer.name for layer in subject.mllm.layers]
    blocks = [name for name in names if name != "projector"]
    due = [f"vision.{i}" for i in range(len(blocks))] + ["projector"] * (len(names) - len(blocks))
    if names != due:
        wrong = next(i for i, (a, b) in enumerate(zip(names, due, strict=True)) if a != b)
        raise Wrong(f"{due[wrong]!r} in place {wrong}", f"{names[wrong]!r}")


def layers_run_in_their_order(subject: Subject) -> None:
    """In a vision-only forward pass the layers run in the order in which they are listed."""
    order = tuple(dict.fromkeys(subject.vision.ran))
    listed = tuple(layer.name for layer in subject.mllm.layers if layer.name in order)
    if order != listed:
        raise Wrong(f"the order {', '.join(listed)}", f"they run as {', '.join(order)}")


def every_layer_runs_once(subject: Subject) -> None:
    """Each layer runs exactly once in a vision-only and in a full forward pass."""
    for what, made in (("vision-only", subject.vision), ("full", subject.whole)):
        _each_once(subject, what, made)


def layers_run_once_in_training(subject: Subject) -> None:
    """Training, with checkpointing or without, runs layers once and gives evaluation's features and gradients."""
    evaluated, due = _trained(subject, None)
    for what, checkpointing in (("as loaded", False), ("with gradient checkpointing", True)):
        made, gradients = _trained(subject, checkpointing)
        _each_once(subject, f"training {what}", made)
        for layer in subject.mllm.layers:
            if not made.outputs[layer.name].requires_grad:
                raise Wrong(f"features that carry a gradient, training {what}", f"those of {layer.name} carry none")
            gap = _relative(made.tap.features[layer.name], evaluated.tap.features[layer.name])
            if gap > TOLERANCE:
                raise Wrong(f"the features of evaluation, training {what}", f"{layer.name} is {gap:.2g} apart")
        apart = [name for name in due if name not in gradients or _relative(gradients[name], due[name]) > 0.01]
        if apart:
            raise Wrong(f"the gradients of evaluation, training {what}", f"others for {_few(apart)}")


def vision_alone_gives_the_same_features(subject: Subject) -> None:
    """A vision-only forward pass gives the features of a full one."""
    for name, rows in subject.vision.tap.features.items():
        other = subject.whole.tap.features.get(name)
        if other is None or other.shape != rows.shape or _relative(rows, other) > TOLERANCE:
            raise Wrong("the same features", f"{name} differs: {_gap(rows, other)}")


def widths_are_true(subject: Subject) -> None:
    """A layer's width is the number of channels that it puts out."""
    for layer in subject.mllm.layers:
        channels = subject.vision.tap.features[layer.name].shape[1]
        if layer.width is not None and layer.width != channels:
            raise Wrong(f"{layer.name}: width {channels}", f"{layer.width}")


def parameter_counts_are_true(subject: Subject) -> None:
    """A layer's parameter count is that of the module at its path."""
    for layer in subject.mllm.layers:
        count = sum(p.numel() for p in subject.mllm.model.get_submodule(layer.path).parameters())
        if layer.parameters != count:
            raise Wrong(f"{layer.name}: {count:,} parameters in {layer.path}", f"{layer.parameters:,}")


def layers_share_no_parameter(subject: Subject) -> None:
    """No parameter is counted in two layers, and each layer lies in the part that its name says."""
    model, parts = subject.mllm.model, {n: part for part, names in subject.mllm.parts.items() for n in names}
    owned = {
        layer.name: list(model.get_submodule(layer.path).named_parameters(layer.path)) for layer in subject.mllm.layers
    }
    owner: dict[int, str] = {}
    for layer, parameters in owned.items():
        for name, parameter in parameters:
            if id(parameter) in owner:
                raise Wrong("every parameter in one layer", f"{name} is in {owner[id(parameter)]} and in {layer}")
        owner |= {id(parameter): layer for _, parameter in parameters}
    for layer, parameters in owned.items():
        due: Part = "projector" if layer == "projector" else "encoder"
        for name, _ in parameters:
            if parts.get(name, due) != due:
                raise Wrong(f"{layer} inside the {due}", f"{name} is in the {parts[name].replace('_', ' ')}")


def layers_reach_what_they_say(subject: Subject) -> None:
    """The answer's loss has a gradient at exactly the layers that are said to reach the language model."""
    batch = subject.batch
    made = subject.record(lambda: subject.mllm.model(**batch.inputs, use_cache=False))
    if made.logits is None:
        raise Wrong("logits", "none in the model's output")
    loss = answer_cross_entropy(made.logits, batch.inputs["input_ids"], batch.labels != IGNORED).sum()
    for layer in subject.mllm.layers:
        output = made.outputs[layer.name]
        gradient = None
        if output.requires_grad:
            (gradient,) = torch.autograd.grad(loss, [output], retain_graph=True, allow_unused=True)
        reaches = gradient is not None and bool(gradient.any())
        if reaches != layer.reaches_language_model:
            raise Wrong(
                f"{layer.name}: reaches_language_model={reaches}",
                f"{layer.reaches_language_model}, but the answer's loss has {'a' if reaches else 'no'} gradient there",
            )


def rows_belong_to_their_sample(subject: Subject) -> None:
    """With another photo in one sample, exactly the rows assigned to that sample change."""
    for layer in subject.mllm.layers:
        rows = len(subject.vision.tap.features[layer.name])
        assigned = subject.adapter.feature_rows(subject.mllm.model, subject.batch.inputs, layer, rows)
        for b, pair in enumerate(subject.pairs):
            moved = [subject.moved[b, i][layer.name] for i in range(len(pair.photos))]
            changed = torch.stack(moved).any(dim=0) if moved else torch.zeros(rows, dtype=torch.bool)
            own = (assigned.sample == b) & assigned.real
            strays, still = changed & assigned.real & ~own, own & ~changed
            if bool(strays.any() | still.any()):
                what = f"{layer.name}: another photo in sample {b} ({pair.id}) changes its {int(own.sum())} rows only"
                raise Wrong(what, f"{_rows(strays)} of other samples change, {_rows(still)} of its own do not")


def gradients_stay_in_their_sample(subject: Subject) -> None:
    """A sample's rows have a gradient at its own photo's pixels and at no other's."""
    inputs = dict(subject.batch.inputs)
    name = next(n for n, t in inputs.items() if t.is_floating_point())
    pixels = inputs[name] = inputs[name].detach().clone().requires_grad_(True)
    made = subject.record(lambda: vision_forward(subject.mllm, inputs))
    found = subject.rows(inputs, made)
    differ = {key: (changed[name] != subject.batch.inputs[name]) for key, changed in subject.exchanged.items()}
    for layer, features in found.items():
        for b, pair in enumerate(subject.pairs):
            if not pair.photos:
                continue
            energy = features.rows[features.sample == b].square().sum()
            (gradient,) = torch.autograd.grad(energy, pixels, retain_graph=True, allow_unused=True)
            touched = torch.zeros_like(pixels, dtype=torch.bool) if gradient is None else gradient != 0
            for (other, i), where in differ.items():
                if bool((touched & where).any()) != (other == b):
                    raise Wrong(
                        f"{layer}: sample {b} ({pair.id}) depends on its own pixels only",
                        f"{'it depends on' if other != b else 'it does not depend on'} photo {i} of sample {other}",
                    )


def text_only_samples_have_no_rows(subject: Subject) -> None:
    """No feature row is assigned to a sample without photos, nor beyond the batch."""
    due = {b for b, pair in enumerate(subject.pairs) if pair.photos}
    for layer, features in subject.features.items():
        got = set(features.sample.tolist())
        if got != due:
            raise Wrong(f"{layer}: rows of samples {sorted(due)}", f"rows of samples {sorted(got)}")


def photos_of_a_sample_come_in_order(subject: Subject) -> None:
    """In a sample of two photos, the rows of the first come before the rows of the second."""
    for b, pair in enumerate(subject.pairs):
        if len(pair.photos) < 2:
            continue
        for layer in subject.mllm.layers:
            first, second = (subject.moved[b, i][layer.name] for i in range(2))
            order = [*first.nonzero().flatten().tolist(), *second.nonzero().flatten().tolist()]
            if not bool(first.any()) or not bool(second.any()) or order != sorted(set(order)):
                raise Wrong(
                    f"{layer.name}: rows of the first photo, then rows of the second",
                    f"first photo: {_rows(first)}; second: {_rows(second)}",
                )


def neighbours_do_not_change_a_samples_rows(subject: Subject) -> None:
    """A sample has the same real rows, in number and value, in a mixed batch and alone."""
    for b, pair in enumerate(subject.pairs):
        if not pair.photos:
            continue
        inputs = subject.mllm.tokenize([pair]).inputs
        alone = subject.rows(inputs, subject.look(inputs))
        for layer, features in subject.features.items():
            rows = features.rows[features.sample == b]
            if rows.shape != alone[layer].rows.shape:
                raise Wrong(
                    f"{layer}: {len(alone[layer].rows)} real rows for sample {b} ({pair.id}), as alone",
                    f"{len(rows)} in a mixed batch; padding counts as real",
                )
            gap = _relative(rows, alone[layer].rows)
            if gap > 10 * TOLERANCE:
                raise Wrong(f"{layer}: the rows of sample {b} ({pair.id}) as alone", f"{gap:.2g} apart")


def only_rows_that_show_a_photo_are_real(subject: Subject) -> None:
    """Before the first block, real rows depend on a photo, and of an unpadded one all that depend on it are real."""
    square = subject.mllm.tokenize(subject.plain[:1]).inputs
    other = subject.mllm.tokenize([replace(subject.plain[0], photos=(redrawn(subject.pictures["square"]),))]).inputs
    for inputs, exchanged, padded in (
        (square, [other], False),
        (subject.batch.inputs, list(subject.exchanged.values()), True),
    ):
        first = subject.mllm.layers[0].path
        before, *after = (subject.entering(first, one) for one in (inputs, *exchanged))
        if before is None:
            return
        shows = torch.stack([_differs(one, before) for one in after if one is not None]).any(dim=0)
        rows = len(shows)
        for layer in subject.mllm.layers:
            if layer.name == "projector":
                continue
            real = subject.adapter.feature_rows(subject.mllm.model, inputs, layer, rows).real
            strays, lost = real & ~shows, shows & ~real
            if bool(strays.any()) or (bool(lost.any()) and not padded):
                raise Wrong(
                    f"{layer.name}: {int(shows.sum())} of {rows} rows show a photo",
                    f"{_rows(strays)} real without showing one, {_rows(lost)} showing one but not real",
                )


def real_rows_are_finite(subject: Subject) -> None:
    """Every real row holds finite numbers."""
    for layer, features in subject.features.items():
        bad = ~features.rows.isfinite().all(dim=1)
        if bool(bad.any()):
            raise Wrong(f"{layer}: finite features", f"{_rows(bad)} are not")


def labels_cover_the_answer_and_one_stop_token(subject: Subject) -> None:
    """Labels decode to exactly the answer and its stop token, in every script and on either padding side."""
    scripts = [replace(subject.text_only, id=answer, answer=answer) for answer in SCRIPTS]
    for side in ("right", "left"):
        for pairs in (subject.pairs, scripts):
            batch = subject.mllm.tokenize(pairs, padding_side=side)
            for row, pair in enumerate(pairs):
                labels = batch.labels[row][batch.labels[row] != IGNORED].tolist()
                due = pair.answer + subject.token(subject.mllm.stop_ids[0])
                # a template that writes a blank before the answer may leave it to the answer's first token
                if subject.token(labels).lstrip() != due or subject.mllm.stop_ids[0] in labels[:-1]:
                    raise Wrong(f"labels of {pair.id!r} that decode to {due!r}", f"{subject.token(labels)!r}")


def labels_begin_right_after_the_prompt(subject: Subject) -> None:
    """The first label lies on the token after the prompt's last one, and labels have no gaps."""
    for pair in subject.pairs:
        prompt = subject.attended(subject.mllm.tokenize([pair], with_answer=False), 0)
        batch = subject.mllm.tokenize([pair])
        covered = (batch.labels[0] != IGNORED).nonzero().flatten().tolist()
        if not covered or covered != list(range(len(prompt), len(prompt) + len(covered))):
            raise Wrong(
                f"{pair.id!r}: the first label on token {len(prompt)}, right after the prompt, and no gaps",
                f"labels on tokens {_few(covered)}",
            )


def labels_cover_no_prompt_image_or_padding(subject: Subject) -> None:
    """Labels equal the input ids where they count, and lie on no image token and no padding; prompts have none."""
    for side in ("right", "left"):
        batch = subject.mllm.tokenize(subject.pairs, padding_side=side)
        ids, covered = batch.inputs["input_ids"], batch.labels != IGNORED
        wrong = {
            "padding tokens": covered & (batch.inputs["attention_mask"] == 0),
            "image tokens": covered & (ids == image_token_id(subject.mllm.model)),
            "tokens whose id they do not hold": covered & (batch.labels != ids),
            "tokens that are no content, the stop token apart": covered
            & ~batch.content
            & (ids != ids.where(covered, -1)),
        }
        for what, where in wrong.items():
            if bool(where.any()):
                raise Wrong("labels on answer tokens only", f"{int(where.sum())} labels on {what}")
    prompt = subject.mllm.tokenize(subject.pairs, with_answer=False)
    if bool((prompt.labels != IGNORED).any()) or bool(prompt.content.any()):
        raise Wrong("no labels without an answer", f"{int((prompt.labels != IGNORED).sum())} labels")


def content_is_the_answer_alone(subject: Subject) -> None:
    """Content covers the labelled tokens without the stop token."""
    batch = subject.batch
    stop = torch.isin(batch.labels, torch.tensor(subject.mllm.stop_ids))
    due = (batch.labels != IGNORED) & ~stop
    if not torch.equal(due, batch.content):
        row = int((due != batch.content).any(dim=1).nonzero()[0])
        found = subject.token(batch.inputs["input_ids"][row][batch.content[row]])
        raise Wrong(f"content {subject.token(batch.inputs['input_ids'][row][due[row]])!r}", f"{found!r}")


def texts_have_one_bos(subject: Subject) -> None:
    """A text begins with one BOS token where the tokenizer writes one, never with two."""
    bos = subject.mllm.processor.tokenizer.bos_token_id
    written = list(subject.mllm.processor.tokenizer("a").input_ids)[:1] == [bos]
    if bos is None:
        return
    for row, pair in enumerate(subject.pairs):
        ids = subject.attended(subject.batch, row)
        leading = next((i for i, token in enumerate(ids) if token != bos), len(ids))
        if leading > 1 or leading < written:
            raise Wrong(f"{pair.id!r}: one {subject.token(bos)!r} at its beginning", f"{leading} of them")


def prompts_are_prefixes(subject: Subject) -> None:
    """A prompt's tokens are the first tokens of its full text."""
    for pair in subject.pairs:
        prompt = subject.attended(subject.mllm.tokenize([pair], with_answer=False), 0)
        full = subject.attended(subject.mllm.tokenize([pair]), 0)
        if full[: len(prompt)] != prompt:
            at = next((i for i, (a, b) in enumerate(zip(prompt, full, strict=False)) if a != b), len(full))
            raise Wrong(
                f"{pair.id!r}: {subject.token(prompt[at : at + 3])!r} at token {at}, as in the prompt",
                f"{subject.token(full[at : at + 3])!r} (does the template's prompt end in a blank?)",
            )


def answers_end_with_the_first_stop_token(subject: Subject) -> None:
    """The first stop token is what follows an answer in the chat template, or else in the encoded text."""
    processor, pair = subject.mllm.processor, subject.plain[0]
    first = subject.mllm.stop_ids[0]
    text = render(processor, pair.question, len(pair.photos), pair.answer) if _has_template(processor) else ""
    tail = text.rpartition(pair.answer)[2].strip()
    if tail:
        after = list(processor.tokenizer(tail, add_special_tokens=False).input_ids)
    else:  # nothing is written there, so the hook has to
        ids, content = subject.batch.inputs["input_ids"][0], subject.batch.content[0]
        after = ids[int(content.nonzero().max()) + 1 :].tolist()
    if after[:1] != [first]:
        raise Wrong(
            f"{subject.token(after[:1])!r} as first stop token, because it follows an answer",
            f"{subject.token(first)!r} (all: {_few([subject.token(i) for i in subject.mllm.stop_ids])})",
        )


def every_key_of_the_processor_is_kept(subject: Subject) -> None:
    """The model is given every key that the processor returned."""
    given: set[str] = set()
    spy = _spy(subject.mllm.processor, given)
    stop_ids = subject.mllm.stop_ids
    kept = set(subject.adapter.tokenize_pairs(spy, subject.plain, stop_ids, True, "right").inputs)
    lost = sorted(given - kept - {"offset_mapping"})
    if lost:
        raise Wrong(f"the keys {_few(sorted(given - {'offset_mapping'}), 9)}", f"without {', '.join(lost)}")


def padding_goes_where_it_is_asked(subject: Subject) -> None:
    """Padding stands on the side that was asked for."""
    for side, edge in (("left", 0), ("right", -1)):
        mask = subject.mllm.tokenize(subject.pairs, padding_side=side).inputs["attention_mask"].bool()
        if bool(mask[:, edge].all()) or not bool(mask[:, -1 - edge].all()):
            raise Wrong(f"padding on the {side}", f"none there, or padding on the other side ({side} was asked for)")


def losses_do_not_depend_on_the_batch(subject: Subject) -> None:
    """Answer losses of a mixed batch, padded left or right, are those of its pairs one by one."""
    alone = subject.single_losses()
    for side in ("right", "left"):
        together = subject.losses(subject.mllm.tokenize(subject.pairs, padding_side=side))
        gap, b = (together - alone).abs().max(dim=0)
        if not gap <= TOLERANCE:
            raise Wrong(
                f"loss {float(alone[b]):.4f} for {subject.pairs[int(b)].id!r}, as alone",
                f"{float(together[b]):.4f} in a batch padded {side}",
            )


def losses_are_those_of_transformers(subject: Subject) -> None:
    """The answer loss equals the loss that the model itself reports for the labels."""
    for pair in subject.pairs:
        batch = subject.mllm.tokenize([pair])
        own = float(subject.losses(batch))
        with torch.no_grad():
            reported = float(subject.mllm.model(**batch.inputs, labels=batch.labels).loss)
        if not abs(own - reported) <= TOLERANCE * max(1.0, abs(reported)):
            raise Wrong(f"{pair.id!r}: loss {reported:.4f}, as the model reports", f"{own:.4f}")


def image_tokens_match_the_features(subject: Subject) -> None:
    """There is one image token for each feature that the projector hands to the language model."""
    handed = _handed_over(subject.mllm, subject.batch.inputs)
    tokens = int((subject.batch.inputs["input_ids"] == image_token_id(subject.mllm.model)).sum())
    if handed != tokens:
        raise Wrong(f"{handed} image tokens, as many as visual features", f"{tokens}")


def generation_does_not_depend_on_the_batch(subject: Subject) -> None:
    """Next-token logits of a left-padded mixed batch are those of its pairs one by one, while the tokens agree."""
    together = _generated(subject, subject.pairs)
    for b, pair in enumerate(subject.pairs):
        alone = _generated(subject, [pair])
        for step, (ours, theirs) in enumerate(zip(together, alone, strict=False)):
            gap = _relative(ours[b], theirs[0])
            if gap > 10 * TOLERANCE:
                raise Wrong(f"{pair.id!r}: the logits of step {step} as alone", f"{gap:.2g} apart in a batch")
            if int(ours[b].argmax()) != int(theirs[0].argmax()):
                break


def the_meta_device_shows_the_same_model(subject: Subject) -> None:
    """Parts and layers found without weights are those of the loaded model."""
    bare = describe(str(subject.saved), subject.adapter)
    for what, ours, theirs in (
        ("parts", subject.mllm.modules, bare.modules),
        ("layers", subject.mllm.layers, bare.layers),
    ):
        if ours != theirs:
            raise Wrong(f"the {what} of the loaded model", f"without weights: {theirs}")


VISION_PARTS: tuple[Part, ...] = ("encoder", "projector")

TYPES = "vkd_model_types (docs/hooks.md)"
REFUSED = "vkd_refused_model_types (docs/hooks.md)"
PRESETS = "vkd_model_presets (docs/hooks.md); `vkd inspect-layers` shows a preset"
LOAD = "vkd_load_model (docs/hooks.md); vkd_framework.generic.load_model"
TINY = "vkd_tiny_model (docs/hooks.md); vkd_framework.tiny"
PARTS = "vkd_locate_vision_modules (docs/hooks.md); vkd_framework.generic.locate_vision_modules(nested_projector=...)"
LAYERS = "vkd_list_distillation_layers (docs/hooks.md); vkd_framework.generic.list_distillation_layers"
TOKENS = "vkd_tokenize_pairs (docs/hooks.md); vkd_framework.generic.tokenize_pairs"
ROWS = "vkd_feature_rows (docs/hooks.md); vkd_framework.generic.feature_rows"
STOP = "vkd_stop_token_ids (docs/hooks.md); vkd_framework.generic.stop_token_ids"

ADAPTER_CHECKS = (
    Check(transformers_knows_the_model_types, TYPES),
    Check(refused_types_are_not_served, REFUSED),
    Check(presets_can_be_described, PRESETS),
)
MODEL_CHECKS = (
    Check(a_question_about_a_photo_is_answered, TOKENS),
    Check(text_and_photos_share_a_batch, TOKENS),
    Check(a_question_may_show_two_photos, TOKENS),
    Check(differently_sized_photos_share_a_batch, TOKENS),
    Check(the_same_seed_gives_the_same_tiny_model, TINY),
    Check(a_saved_model_loads_unchanged, LOAD),
    Check(incomplete_weights_are_refused, LOAD),
    Check(the_meta_device_shows_the_same_model, LAYERS),
    Check(embeddings_and_head_are_language_model, PARTS),
    Check(text_does_not_pass_the_vision_modules, PARTS),
    Check(photos_pass_encoder_and_projector, PARTS),
    Check(gradients_reach_the_parts_in_use, PARTS),
    Check(layers_have_canonical_names, LAYERS),
    Check(layers_run_in_their_order, LAYERS),
    Check(every_layer_runs_once, LAYERS),
    Check(layers_run_once_in_training, LAYERS),
    Check(vision_alone_gives_the_same_features, LAYERS),
    Check(widths_are_true, LAYERS),
    Check(parameter_counts_are_true, LAYERS),
    Check(layers_share_no_parameter, LAYERS),
    Check(layers_reach_what_they_say, LAYERS),
    Check(rows_belong_to_their_sample, ROWS),
    Check(gradients_stay_in_their_sample, ROWS),
    Check(text_only_samples_have_no_rows, ROWS),
    Check(photos_of_a_sample_come_in_order, ROWS),
    Check(neighbours_do_not_change_a_samples_rows, ROWS),
    Check(only_rows_that_show_a_photo_are_real, ROWS),
    Check(real_rows_are_finite, ROWS),
    Check(labels_cover_the_answer_and_one_stop_token, TOKENS),
    Check(labels_begin_right_after_the_prompt, TOKENS),
    Check(labels_cover_no_prompt_image_or_padding, TOKENS),
    Check(content_is_the_answer_alone, TOKENS),
    Check(texts_have_one_bos, TOKENS),
    Check(prompts_are_prefixes, TOKENS),
    Check(answers_end_with_the_first_stop_token, STOP),
    Check(every_key_of_the_processor_is_kept, TOKENS),
    Check(padding_goes_where_it_is_asked, TOKENS),
    Check(image_tokens_match_the_features, TOKENS),
    Check(losses_do_not_depend_on_the_batch, TOKENS),
    Check(losses_are_those_of_transformers, TOKENS),
    Check(generation_does_not_depend_on_the_batch, TOKENS),
)


def _one_line(error: BaseException) -> str:
    """The error's kind and message; those of vkd speak for themselves."""
    message = " ".join(str(error).split())
    return message if isinstance(error, VKDError) else f"{type(error).__name__}: {message}"


def _few(items: Iterable[Any], count: int = 3) -> str:
    listed = [str(item) for item in items]
    more = f" and {len(listed) - count} more" if len(listed) > count else ""
    return ", ".join(listed[:count]) + more


def _rows(where: Tensor) -> str:
    """`no row`, or how many rows and the first few of them."""
    found = where.nonzero().flatten().tolist()
    return f"{len(found)} rows ({_few(found)})" if found else "no row"


def _shape(tensor: Tensor | None) -> str:
    return "nothing" if tensor is None else str(list(tensor.shape))


def _gap(a: Tensor | None, b: Tensor | None) -> str:
    if a is None or b is None or a.shape != b.shape:
        return f"{_shape(a)} against {_shape(b)}"
    return f"up to {float((a - b).abs().max()):.2g}"


def _relative(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the root mean square of the second; infinite for other shapes or NaN."""
    if a.shape != b.shape:
        return float("inf")
    gap = float((a - b).abs().max() / b.square().mean().sqrt().clamp(min=1e-12))
    return gap if gap == gap else float("inf")


def _differs(a: Tensor, b: Tensor) -> Tensor:
    """`[R]` bool: rows that differ by more than rounding."""
    if a.shape != b.shape:
        raise Wrong(f"{_shape(b)} features for a photo of the same size", _shape(a))
    return (a - b).abs().amax(dim=1) > 1e-5 * b.square().mean().sqrt()


def _same_weights(ours: MLLM, theirs: MLLM, what: str) -> None:
    other = dict(theirs.model.named_parameters())
    mine = dict(ours.model.named_parameters())
    wrong = [name for name in mine if name not in other or not torch.equal(mine[name], other[name])]
    if wrong or len(mine) != len(other):
        raise Wrong("identical weights", f"{what} gives others in {len(wrong)} parameters ({_few(wrong)})")


def _head_is_language(anatomy: Anatomy, where: str = "") -> None:
    language = {id(parameter) for parameter in anatomy.parameters(["language_model"]).values()}
    names = {id(parameter): name for name, parameter in anatomy.model.named_parameters()}
    ends = {
        "input embeddings": anatomy.model.get_input_embeddings(),
        "output head": anatomy.model.get_output_embeddings(),
    }
    for what, module in ends.items():
        for parameter in module.parameters() if module is not None else ():
            if id(parameter) not in language:
                raise Wrong(f"{where}the {what} in the language model", f"{names[id(parameter)]} is in another part")


@contextmanager
def _disturbed(mllm: MLLM, part: Part) -> Iterator[list[str]]:
    """Noise on every weight of a part; the weights come back bit for bit."""
    named = mllm.parameters([part])
    kept = {name: parameter.detach().clone() for name, parameter in named.items()}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in named.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        try:
            yield list(named)
        finally:
            for name, parameter in named.items():
                parameter.copy_(kept[name])


def _loss(subject: Subject, batch: EncodedBatch) -> Tensor:
    logits = subject.mllm.model(**batch.inputs, use_cache=False).logits
    return answer_cross_entropy(logits, batch.inputs["input_ids"], batch.labels != IGNORED).sum()


def _each_once(subject: Subject, what: str, made: Pass) -> None:
    for layer in subject.mllm.layers:
        times = made.ran.count(layer.name)
        if times != 1:
            raise Wrong(f"{layer.name} ({layer.path}) runs once in a {what} forward pass", f"it runs {times} times")


def _trained(subject: Subject, checkpointing: bool | None) -> tuple[Pass, dict[str, Tensor]]:
    """A full forward and backward pass in training mode (None: evaluation), and the gradients of the encoder."""
    model, batch = subject.mllm.model, subject.batch
    with _mode(model, checkpointing):
        made = subject.record(lambda: model(**batch.inputs, use_cache=False))
        features = {name: rows.detach() for name, rows in made.tap.features.items()}
        if made.logits is None:
            raise Wrong("logits", "none in the model's output")
        energy = answer_cross_entropy(made.logits, batch.inputs["input_ids"], batch.labels != IGNORED).sum()
        for rows in made.tap.features.values():
            energy = energy + rows.square().mean()
        model.zero_grad(set_to_none=True)
        torch.autograd.backward(energy)
    named = subject.mllm.parameters(["encoder"])
    gradients = {name: p.grad for name, p in named.items() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    made.tap.features.update(features)
    return made, gradients


@contextmanager
def _mode(model: Any, checkpointing: bool | None) -> Iterator[None]:
    """Training mode, with gradient checkpointing if asked for; all switches are put back."""
    switches = ("training", "gradient_checkpointing", "_gradient_checkpointing_func")
    kept = [(m, {s: m.__dict__[s] for s in switches if s in m.__dict__}) for m in model.modules()]
    model.train(checkpointing is not None)
    try:
        if checkpointing and model.supports_gradient_checkpointing:
            if hasattr(model, "activation_checkpointing_enable"):
                model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
            else:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        yield
    finally:
        for module, values in kept:
            for switch in switches:
                module.__dict__.pop(switch, None)
            module.__dict__.update(values)


def _has_template(processor: Any) -> bool:
    return bool(getattr(processor, "chat_template", None))


def _spy(processor: Any, given: set[str]) -> Any:
    """The processor, noting the keys of whatever it returns."""
    kind = type(processor)

    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        answer = kind.__call__(self, *arguments, **named)
        given.update(answer)
        return answer

    spy = copy.copy(processor)
    spy.__class__ = type(kind.__name__, (kind,), {"__call__": call})
    return spy


@torch.no_grad()
def _handed_over(mllm: MLLM, inputs: Mapping[str, Tensor]) -> int:
    """How many visual features the language model is handed, whichever form a transformers version gives them."""
    answer = vision_forward(mllm, inputs)
    answer = getattr(answer, "pooler_output", answer)
    while isinstance(answer, tuple) and len(answer) == 2 and not isinstance(answer[0], Tensor):
        answer = answer[0]
    tensors = [answer] if isinstance(answer, Tensor) else list(answer)
    return sum(tensor.numel() // tensor.shape[-1] for tensor in tensors)


def _generated(subject: Subject, pairs: Sequence[ImageQuestionPair]) -> list[Tensor]:
    """Step -> `[B, V]`: the logits of a greedy answer of a few tokens, padded on the left."""
    mllm = subject.mllm
    with torch.no_grad():
        made = mllm.model.generate(
            **mllm.tokenize(pairs, with_answer=False, padding_side="left").inputs,
            do_sample=False,
            max_new_tokens=3,
            eos_token_id=list(mllm.stop_ids),
            pad_token_id=mllm.stop_ids[0],
            output_logits=True,
            return_dict_in_generate=True,
        )
    return list(made.logits)
