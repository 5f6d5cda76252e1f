"""Where a model's visual features tell who somebody is, and where forgetting pulls: how to choose distillation points.

Both figures of a layer come from real forward passes of the starting model on the recipe's training photos. The photos
that a run is measured on are never looked at: a choice made on them would flatter its own measurement.

Shapes: `N` photos, `D` channels, `Q` pairs.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vkd_framework.batches import in_parts
from vkd_framework.errors import DataError
from vkd_framework.features import FeatureTap, photo_features, vision_forward
from vkd_framework.intervals import wilson
from vkd_framework.output import answer_losses
from vkd_framework.plugins import MLLM, trainable
from vkd_framework.progress import Progress
from vkd_framework.types import DistillationLayer, ImageQuestionPair, Splits

PHOTOS = 1024
"""Most photos looked at, equally many of each person."""
FOLDS = 5
NEIGHBOURS = 5
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2)
"""Ridge penalties tried, as multiples of the mean squared singular value of the training photos' features."""
RESAMPLES = 1000
REACHED = 0.9
"""A layer tells people apart when it reaches this share of the best layer's accuracy."""
RULE = (
    f"the earliest layer where nearest neighbours reach {REACHED:.0%} of the best layer, and the last layer, "
    "of those that reach the language model"
)


@dataclass(frozen=True)
class Score:
    """`accuracy`: the share of the forgotten people's photos that are given to the right person; `interval_95` is its
    Wilson interval. `everybody`: the same share over the photos of all people."""

    accuracy: float
    interval_95: tuple[float, float]
    everybody: float


@dataclass(frozen=True)
class Identity:
    """How well photos show who is on them, at one layer, told from photos of other folds alone.

    `linear`: by a linear probe, which finds whatever is there. `neighbours`: by the most similar photos, which find it
    only where it decides how far photos are apart, and distances are what the feature terms compare. `chance`: 1 /
    `people`. `photos`: how many photos of forgotten people are scored.
    """

    linear: Score
    neighbours: Score
    chance: float
    people: int
    photos: int


@dataclass(frozen=True)
class Gradient:
    """How hard forget pairs pull at one layer's weights, compared with retain pairs.

    `forget` and `retain`: the squared norm of the gradient of one pair's answer cross-entropy with respect to the
    layer's weights, divided by their number, mean over pairs. `ratio`: the first over the second, `interval_95` from
    resampled pairs; both None where no gradient arrives.
    """

    forget: float
    retain: float
    ratio: float | None
    interval_95: tuple[float, float] | None


@dataclass(frozen=True)
class Probed:
    """What was found at each layer, by name, and the layers that follow from it.

    Without two people with two photos each, `identity` and `suggested` are empty and `people` says how many there are.
    """

    identity: Mapping[str, Identity]
    gradient: Mapping[str, Gradient]
    suggested: tuple[str, ...]
    forget_pairs: int
    retain_pairs: int
    people: int


def probe(mllm: MLLM, splits: Splits, *, pairs: int, seed: int, batch_size: int = 16) -> Probed:
    """Look at every layer of `mllm`. Freezes the language model and changes no weight.

    `pairs`: most forget pairs, and most retain pairs, whose gradients are taken. Raises DataError when one of the two
    sets shows no photo at all.
    """
    forget_pairs, retain_pairs = (draw_seen(source, pairs, seed) for source in (splits.forget, splits.retain))
    if not forget_pairs or not retain_pairs:
        raise DataError("data: no layer can be judged without photos among the forget pairs and among the retain pairs")
    photos = choose_photos(splits, PHOTOS, seed)
    names = list(dict.fromkeys(name for _, name in photos))
    scored = torch.tensor([name in splits.forget_subjects for _, name in photos])
    identity: dict[str, Identity] = {}
    if len(names) > 1 and bool(scored.any()):
        person = torch.tensor([names.index(name) for _, name in photos])
        fold = deal_folds(person, FOLDS, seed)
        pooled = pooled_features(mllm, [pair for pair, _ in photos], batch_size)
        identity = {
            layer.name: identify(pooled[layer.name], person, fold, scored) for layer in Progress(mllm.layers, "probes")
        }
    forget = squared_gradients(mllm, forget_pairs, "gradients of the forget pairs")
    retain = squared_gradients(mllm, retain_pairs, "gradients of the retain pairs")
    gradient = {
        layer.name: compare(forget[layer.name], retain[layer.name], layer.parameters, seed) for layer in mllm.layers
    }
    suggested = suggest(mllm.layers, {name: found.neighbours.accuracy for name, found in identity.items()})
    return Probed(identity, gradient, suggested, len(forget_pairs), len(retain_pairs), len(names))


def choose_photos(splits: Splits, most: int, seed: int) -> list[tuple[ImageQuestionPair, str]]:
    """Training photos of named people, each alone in a pair, with the name of whoever is on it.

    Left out are photos that occur under several names or only beside others, and people with a single photo. Files with
    the same pixels are one photo. At most `most` photos, at most equally many of each person; the forgotten come first.
    """
    albums: dict[str, list[ImageQuestionPair]] = {name: [] for name in (*splits.forget_subjects, *splits.subjects)}
    for pair, name in portraits((*splits.forget, *splits.retain)):
        albums.setdefault(name, []).append(pair)
    albums = {name: album for name, album in albums.items() if len(album) > 1}
    invited = list(albums)[: most // 2]
    seen: set[str] = set()
    chosen = []
    for name in invited:
        random.Random(f"{seed}/{name}").shuffle(albums[name])
        own = [pair for pair in albums[name][: most // len(invited)] if _first_time(pair, seen)]
        chosen += [(pair, name) for pair in own if len(own) > 1]
    return chosen


def portraits(pairs: Iterable[ImageQuestionPair]) -> list[tuple[ImageQuestionPair, str]]:
    """The photos that show one named person as far as `pairs` say, each alone in its pair, with the name.

    Of photos that are asked about together nobody says who is on which.
    """
    alone: dict[str, ImageQuestionPair] = {}
    names: dict[str, set[str]] = defaultdict(set)
    for pair in pairs:
        for key in pair.photo_keys if pair.subject is not None else ():
            names[key].add(str(pair.subject))
            if len(pair.photos) == 1:
                alone.setdefault(key, pair)
    return [(pair, str(pair.subject)) for key, pair in alone.items() if len(names[key]) == 1]


def deal_folds(person: Tensor, count: int, seed: int) -> Tensor:
    """`[N]`: the fold of each photo; everybody's photos are dealt out in turn, so that nobody is in one fold only."""
    generator = torch.Generator().manual_seed(seed)
    fold = torch.empty_like(person)
    for label in sorted(set(person.tolist())):
        own = (person == label).nonzero().squeeze(1)
        start = int(torch.randint(count, (), generator=generator))
        fold[own[torch.randperm(len(own), generator=generator)]] = (torch.arange(len(own)) + start) % count
    return fold


def pooled_features(mllm: MLLM, pairs: Sequence[ImageQuestionPair], batch_size: int) -> dict[str, Tensor]:
    """Layer -> `[N, D]`: the mean over the rows that show part of the photo, in float32."""
    found: dict[str, list[Tensor]] = {layer.name: [] for layer in mllm.layers}
    for chunk in Progress(in_parts(pairs, batch_size), "features"):
        inputs = mllm.tokenize(chunk, with_answer=False).inputs
        with torch.no_grad(), FeatureTap(mllm.model, mllm.layers) as tap:
            vision_forward(mllm, inputs)
            features = photo_features(mllm, inputs, tap)
        for name, layer in features.items():
            rows = layer.rows.float()
            total = rows.new_zeros(len(chunk), rows.shape[1]).index_add(0, layer.sample, rows)
            number = torch.bincount(layer.sample, minlength=len(chunk)).clamp(min=1)
            found[name].append((total / number[:, None]).cpu())
    return {name: torch.cat(parts) for name, parts in found.items()}


def identify(features: Tensor, person: Tensor, fold: Tensor, scored: Tensor) -> Identity:
    """Cross-validated: who is on each photo, told from `features` `[N, D]` of the other folds' photos alone.

    `person` `[N]` int64, `fold` `[N]` int64, `scored` `[N]` bool: the photos whose hits are counted.
    """
    linear, neighbours = torch.empty_like(person), torch.empty_like(person)
    for held_out in sorted(set(fold.tolist())):
        test = fold == held_out
        train, unseen = standardise(features[~test], features[test])
        linear[test] = ridge_probe(train, person[~test], unseen)
        neighbours[test] = nearest_neighbours(train, person[~test], unseen)
    people = len(set(person.tolist()))
    return Identity(
        linear=_score(linear == person, scored),
        neighbours=_score(neighbours == person, scored),
        chance=1 / people,
        people=people,
        photos=int(scored.sum()),
    )


def standardise(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Both with the mean 0 and the variance 1 that `train` `[N, D]` has in each channel, in float64."""
    mean, spread = train.double().mean(dim=0), train.double().std(dim=0, correction=0)
    spread = torch.where(spread > 1e-6 * spread.max().clamp(min=1e-12), spread, torch.ones_like(spread))
    return (train.double() - mean) / spread, (test.double() - mean) / spread


def ridge_probe(train: Tensor, label: Tensor, test: Tensor) -> Tensor:
    """`[M]`: the class of each row of `test` `[M, D]`, by ridge regression on one target a class.

    The penalty is the one with the smallest leave-one-out error on `train` `[N, D]`, which must be centred.
    """
    classes, target = _classes(label)
    wanted = torch.nn.functional.one_hot(target, len(classes)).double()
    offset = wanted.mean(dim=0)
    u, s, vh = torch.linalg.svd(train, full_matrices=False)
    seen = u.T @ (wanted - offset)
    power = s.square()
    errors, answers = [], []
    for penalty in PENALTIES:
        kept = power / (power + penalty * power.mean().clamp(min=1e-12))
        leverage = (u.square() * kept).sum(dim=1, keepdim=True) + 1 / len(train)
        missed = (wanted - offset - u @ (kept[:, None] * seen)) / (1 - leverage).clamp(min=1e-9)
        errors.append(float(missed.square().mean()))
        weights = vh.T @ ((kept / s.clamp(min=1e-12))[:, None] * seen)
        answers.append(test @ weights + offset)
    best = min(range(len(PENALTIES)), key=errors.__getitem__)
    chosen: Tensor = classes[answers[best].argmax(dim=1)]
    return chosen


def nearest_neighbours(train: Tensor, label: Tensor, test: Tensor, count: int = NEIGHBOURS) -> Tensor:
    """`[M]`: the class that the `count` most similar rows of `train` vote for, weighted by cosine similarity."""
    classes, target = _classes(label)
    similar = torch.nn.functional.normalize(test, dim=1) @ torch.nn.functional.normalize(train, dim=1).T
    nearest = similar.topk(min(count, len(train)), dim=1)
    votes = similar.new_zeros(len(test), len(classes)).scatter_add(1, target[nearest.indices], 1 + nearest.values)
    chosen: Tensor = classes[votes.argmax(dim=1)]
    return chosen


def squared_gradients(mllm: MLLM, pairs: Sequence[ImageQuestionPair], what: str) -> dict[str, Tensor]:
    """Layer -> `[Q]`: for each pair, the squared norm of its answer's cross-entropy gradient over the layer's weights.

    Pair by pair, because the gradient of a batch's mean is the smaller the more its pairs disagree. Only visual weights
    get gradients; a weight that none reaches counts as 0.
    """
    parameters = trainable(mllm, ("encoder", "projector"))
    owners = [
        next((layer.name for layer in mllm.layers if name.startswith(f"{layer.path}.")), None) for name in parameters
    ]
    found = {layer.name: torch.zeros(len(pairs), dtype=torch.float64) for layer in mllm.layers}
    for q, pair in enumerate(Progress(pairs, what)):
        gradients = torch.autograd.grad(answer_losses(mllm, [pair]).sum(), list(parameters.values()), allow_unused=True)
        for owner, gradient in zip(owners, gradients, strict=True):
            if owner is not None and gradient is not None:
                found[owner][q] += float(gradient.float().square().sum())
    mllm.model.requires_grad_(False)
    return found


def compare(forget: Tensor, retain: Tensor, parameters: int, seed: int) -> Gradient:
    """The pull at one layer of `parameters` weights, from the squared norms `[Q]` of either set's pairs."""
    size = max(1, parameters)
    means = float(forget.mean()) / size, float(retain.mean()) / size
    if means[1] == 0:
        return Gradient(*means, ratio=None, interval_95=None)
    generator = torch.Generator().manual_seed(seed)
    tops, bottoms = (
        norms[torch.randint(len(norms), (RESAMPLES, len(norms)), generator=generator)].mean(dim=1)
        for norms in (forget, retain)
    )
    ends = (tops / bottoms.clamp(min=torch.finfo(torch.float64).tiny)).quantile(torch.tensor([0.025, 0.975]).double())
    return Gradient(*means, ratio=means[0] / means[1], interval_95=(float(ends[0]), float(ends[1])))


def suggest(layers: Sequence[DistillationLayer], accuracy: Mapping[str, float]) -> tuple[str, ...]:
    """The layers to distil, by `RULE`; none without accuracies, and none when no layer reaches the language model."""
    reaching = [layer.name for layer in layers if layer.reaches_language_model]
    if not reaching or not accuracy:
        return ()
    best = max(accuracy[name] for name in reaching)
    earliest = next(name for name in reaching if accuracy[name] >= REACHED * best)
    return tuple(dict.fromkeys([earliest, reaching[-1]]))


def draw_seen(pairs: Sequence[ImageQuestionPair], most: int, seed: int) -> list[ImageQuestionPair]:
    """At most `most` of the pairs that show a photo, drawn by `seed`."""
    shown = [pair for pair in pairs if pair.photos]
    return random.Random(seed).sample(shown, min(most, len(shown)))


def _classes(label: Tensor) -> tuple[Tensor, Tensor]:
    """The labels that occur, in order, and which of them each entry is."""
    classes = torch.tensor(sorted(set(label.tolist())))
    return classes, torch.searchsorted(classes, label)


def _score(right: Tensor, scored: Tensor) -> Score:
    hits, photos = int(right[scored].sum()), int(scored.sum())
    return Score(hits / photos, wilson(hits, photos), float(right.float().mean()))


def _first_time(pair: ImageQuestionPair, seen: set[str]) -> bool:
    """Whether no photo with the same pixels was met before; remembers it."""
    pixels = pair.photos[0].pixels
    fresh = pixels not in seen
    seen.add(pixels)
    return fresh
