"""The layers a loss can hook: their names and figures, when they run, where their gradients go."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vkd_framework.testing.compare import TOLERANCE, difference, few, relative_gap
from vkd_framework.testing.outcomes import Check, Wrong
from vkd_framework.testing.subject import Pass, Subject, answer_losses
from vkd_framework.types import Part

LAYERS = "vkd_list_distillation_layers (docs/hooks.md); vkd_framework.generic.list_distillation_layers"


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
            gap = relative_gap(made.tap.features[layer.name], evaluated.tap.features[layer.name])
            if gap > TOLERANCE:
                raise Wrong(f"the features of evaluation, training {what}", f"{layer.name} is {gap:.2g} apart")
        apart = [name for name in due if name not in gradients or relative_gap(gradients[name], due[name]) > 0.01]
        if apart:
            raise Wrong(f"the gradients of evaluation, training {what}", f"others for {few(apart)}")


def vision_alone_gives_the_same_features(subject: Subject) -> None:
    """A vision-only forward pass gives the features of a full one."""
    for name, rows in subject.vision.tap.features.items():
        other = subject.whole.tap.features.get(name)
        if other is None or relative_gap(rows, other) > TOLERANCE:
            raise Wrong("the same features", f"{name} differs: {difference(rows, other)}")


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
    loss = answer_losses(made.logits, batch).sum()
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
        energy = answer_losses(made.logits, batch).sum()
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


CHECKS = (
    Check(layers_have_canonical_names, LAYERS),
    Check(layers_run_in_their_order, LAYERS),
    Check(every_layer_runs_once, LAYERS),
    Check(layers_run_once_in_training, LAYERS),
    Check(vision_alone_gives_the_same_features, LAYERS),
    Check(widths_are_true, LAYERS),
    Check(parameter_counts_are_true, LAYERS),
    Check(layers_share_no_parameter, LAYERS),
    Check(layers_reach_what_they_say, LAYERS),
)
