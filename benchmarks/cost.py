"""What a step, a mask, a measurement and a start cost, side by side in one run; ratios first.

    python benchmarks/cost.py --size {tiny,120m,8b} [--family F] --json FILE

All methods make their steps in turn, on one model, with as many forget and retain pairs each. See `README.md` beside
this file for what is compared with what.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from costs import lines, masks, memory, pieces
from costs.models import FAMILIES, SIZES, Size, build, recipe_of, splits_of, warm_up
from costs.steps import FLOOR_OF, FLOORS, VARIANTS, Prepared, prepared

from vkd_framework.checkpoint import write_json
from vkd_framework.estimate import devices, estimate
from vkd_framework.estimate.known import tokens_of
from vkd_framework.estimate.work import sizes
from vkd_framework.machine import environment
from vkd_framework.plugins import MLLM
from vkd_framework.types import PARTS, Splits

PARTS_OF_RUN = ("steps", "mask", "pieces", "throughput", "lines", "start_up")
REPEATS = {"tiny": 7, "120m": 3, "8b": 7}
PIECES_OF = ("vkd_attacker_full", "vkd_attacker_visual")
Figures = dict[str, Any]


def main(arguments: list[str] | None = None) -> None:
    """Measure what was asked for, print the tables and write the JSON file."""
    options = _options(arguments)
    size = SIZES[options.size]
    size = replace(size, micro_batch=options.micro_batch)
    if forget := options.forget_batch:
        size = replace(size, forget_batch=forget, retain_batch=3 * forget)
    if size.device == "cuda" and not torch.cuda.is_available():
        sys.exit(f"cost.py: --size {options.size} needs a GPU, and torch sees none; take --size 120m")
    if options.fresh:
        print(json.dumps(_fresh(options, size)))
        return
    found: Figures = {
        "schema": 1,
        "size": options.size,
        "family": options.family,
        "preset": FAMILIES[options.family].preset,
        "batch": {"forget": size.forget_batch, "retain": size.retain_batch, "at_once": size.micro_batch},
        "clock": "wall" if size.device == "cuda" else "processor",
        "repeats": options.repeats,
        "environment": environment(size.device),
    }
    for name, figures in _parts(options, size):
        found[name] = figures
        if options.json:
            write_json(options.json, found)
    print(table(found))


def _parts(options: argparse.Namespace, size: Size) -> Iterator[tuple[str, Any]]:
    """Name and figures of each part that was asked for, as soon as they are known."""
    held = _in_fresh_processes(options, size)
    if set(options.parts) - {"start_up"}:
        splits = splits_of(size)
        mllm = build(options.family, size, splits)
        yield "parameters", {part: mllm.count([part]) for part in PARTS}
        yield "tokens", int(mllm.tokenize(splits.forget[:1]).inputs["input_ids"].shape[1])
        if "steps" in options.parts:
            yield "methods", _methods(options, size, mllm, splits, held)
        if "mask" in options.parts:
            yield "mask", _masks(options, size, mllm, splits, held)
        if "pieces" in options.parts:
            yield "pieces", {name: pieces.seconds(name, mllm, options.family, size, splits) for name in PIECES_OF}
        if "throughput" in options.parts:
            yield "throughput", lines.throughput(mllm, options.family, size, splits)
        if "lines" in options.parts:
            yield (
                "lines",
                {
                    "steps": lines.in_steps(mllm, options.family, size, splits),
                    "pairs": lines.in_pairs(mllm, options.family, size, splits),
                    "people": held["people"],
                },
            )
    if "start_up" in options.parts:
        yield "start_up_seconds", lines.start_up()


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="cost.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", choices=list(SIZES), required=True, help="8b needs a GPU")
    parser.add_argument("--family", choices=list(FAMILIES), default="qwen_vl", help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the figures are written")
    parser.add_argument("--repeats", type=int, help="rounds in which two steps of each method are timed")
    parser.add_argument(
        "--forget-batch", type=int, metavar="N", help="forget pairs of a step; the retain pairs are three times as many"
    )
    parser.add_argument("--micro-batch", type=int, metavar="N", help="the most pairs of a step in the model at once")
    parser.add_argument("--parts", nargs="+", choices=PARTS_OF_RUN, default=list(PARTS_OF_RUN), help="default: all")
    parser.add_argument("--methods", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), help="default: all")
    parser.add_argument("--fresh", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.repeats = options.repeats or REPEATS[options.size]
    return options


def _in_fresh_processes(options: argparse.Namespace, size: Size) -> Figures:
    """What fresh processes measured, each one figure; a GPU's allocator tells, so there only what differs in data."""
    base = ["--size", options.size, "--family", options.family, "--forget-batch", str(size.forget_batch)]
    base += ["--micro-batch", str(size.micro_batch)] if size.micro_batch else []

    def fresh(kind: str, name: str) -> Any:
        print(f"memory of {name}", file=sys.stderr)
        return memory.in_fresh_process([*base, "--fresh", kind, name])

    found: Figures = {"step": {}, "mask": {}}
    if size.device != "cuda" and "steps" in options.parts:
        found["step"] = {name: fresh("step", name) for name in _asked(options)}
    if size.device != "cuda" and "mask" in options.parts:
        found["mask"] = {name: fresh("mask", name) for name in masks.PROCEDURES}
    if "lines" in options.parts:
        found["people"] = [fresh("people", str(factor)) for factor in lines.CASTS]
    return found


def _asked(options: argparse.Namespace) -> list[str]:
    floors = {FLOOR_OF[name] for name in options.methods if name in FLOOR_OF}
    return [*dict.fromkeys(["ga_diff", *options.methods]), *(name for name in FLOORS if name in floors)]


def _fresh(options: argparse.Namespace, size: Size) -> Figures:
    """One figure of this process, which does nothing else."""
    kind, name = options.fresh
    splits = splits_of(size)
    warm_up(options.family, size, splits)
    peak = memory.Peak(size.device)
    if kind == "people":
        return {**lines.with_people(options.family, size, int(name)), "peak_memory_bytes": peak.bytes()}
    mllm = build(options.family, size, splits)
    if kind == "mask":
        return _held_by_mask(masks.file_bytes(name, mllm, options.family, size, splits), peak, mllm)
    one = prepared(name, mllm, options.family, size, splits)
    for step in range(2):
        one.step(step)
    return _held_by_step(one, peak, mllm)


def _held_by_step(one: Prepared, peak: memory.Peak, mllm: MLLM) -> Figures:
    """What steps that were made hold."""
    return {
        "peak_memory_bytes": peak.bytes(),
        "model_bytes": _weights(mllm),
        "trained_parameters": one.trained,
        "optimizer_bytes": one.optimizer_bytes(),
        "attacker_bytes": one.attacker_bytes(),
        "bytes_written": one.written(),
    }


def _held_by_mask(file_bytes: int, peak: memory.Peak, mllm: MLLM) -> Figures:
    return {"file_bytes": file_bytes, "peak_memory_bytes": peak.bytes(), "model_bytes": _weights(mllm)}


def _weights(mllm: MLLM) -> int:
    return sum(p.numel() * p.element_size() for p in mllm.model.parameters())


def _methods(options: argparse.Namespace, size: Size, mllm: MLLM, splits: Splits, held: Figures) -> Figures:
    """Name -> figures; every round times two steps of each, which differ where forget terms and attacker take turns."""
    counted: dict[str, list[float]] = {name: [] for name in _asked(options)}
    wall: dict[str, list[float]] = {name: [] for name in counted}
    warming = int(size.device == "cuda")  # the first round on a GPU chooses kernels and fills the allocator
    for turn in range(options.repeats + warming):
        print(f"steps: round {turn + 1} of {options.repeats + warming}", file=sys.stderr)
        for name in counted:
            peak = None if name in held["step"] else memory.Peak(size.device, already=_weights(mllm))
            one = prepared(name, mllm, options.family, size, splits)
            cpu, waited = lines.two_steps(one, size)
            if turn >= warming:
                counted[name].append(cpu)
                wall[name].append(waited)
            if peak is not None:
                held["step"][name] = _held_by_step(one, peak, mllm)
            del one
            mllm.model.zero_grad()
    found: Figures = {}
    for name, seconds in counted.items():
        middle = statistics.median(seconds)
        found[name] = {
            "seconds_per_step": middle,
            "seconds_of_each_round": seconds,
            "wall_seconds_per_step": statistics.median(wall[name]),
            **held["step"][name],
            "estimated": _estimated(name, mllm, options.family, size, splits),
        }
    scopes = recipe_of(options.family, size, "vkd").simulated_attack.scopes
    if all(f"vkd_attacker_{scope}" in found for scope in scopes):
        found["vkd"] = _mixed([found[f"vkd_attacker_{scope}"] for scope in scopes])
    epoch = -(-len(splits.retain) // size.retain_batch)
    for name, figures in found.items():
        floor = "floor" if "floor" in found else next((n for n in FLOORS if n in found), None)
        figures["seconds_per_epoch"] = epoch * figures["seconds_per_step"]
        figures["ratio_to_ga_diff"] = _ratio(figures, found["ga_diff"])
        figures["floor"] = FLOOR_OF.get(name, floor)
        figures["ratio_to_floor"] = _ratio(figures, found[figures["floor"]]) if figures["floor"] else None
    return dict(sorted(found.items(), key=lambda item: (not item[0].startswith("vkd"), item[0])))


def _estimated(name: str, mllm: MLLM, family: str, size: Size, splits: Splits) -> Figures | None:
    """What `vkd run --dry-run` says of the step, before anything is measured; None for a floor."""
    if name not in VARIANTS:
        return None
    method, overrides = VARIANTS[name]
    rate = devices.measured(size.device, size.dtype, sizes(mllm).hidden)
    tokens = tokens_of(splits, mllm, mllm.processor)
    found = estimate(recipe_of(family, size, method, *overrides), mllm, tokens, rate)
    stage = next(stage for stage in found.stages if stage.name == "unlearn")
    return {"seconds_per_step": found.step_seconds, "peak_memory_bytes": stage.bytes}


def _mixed(drawn: list[Figures]) -> Figures:
    """The mean step where one of several kinds is drawn with equal chances, and the most memory of them."""
    largest = max(drawn, key=lambda figures: int(figures["peak_memory_bytes"]))
    means = {
        name: statistics.fmean(figures[name] for figures in drawn)
        for name in ("seconds_per_step", "wall_seconds_per_step")
    }
    return {**{name: value for name, value in largest.items() if name != "seconds_of_each_round"}, **means}


def _ratio(figures: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, float]:
    return {
        "time": figures["seconds_per_step"] / other["seconds_per_step"],
        "memory": figures["peak_memory_bytes"] / other["peak_memory_bytes"],
    }


def _masks(options: argparse.Namespace, size: Size, mllm: MLLM, splits: Splits, held: Figures) -> Figures:
    """Our mask's figures, and the reference procedure's."""
    seconds: dict[str, list[float]] = {name: [] for name in masks.PROCEDURES}
    for turn in range(options.repeats):
        print(f"masks: round {turn + 1} of {options.repeats}", file=sys.stderr)
        for name in masks.PROCEDURES:
            peak = None if name in held["mask"] else memory.Peak(size.device, already=_weights(mllm))
            watch = memory.Stopwatch(size.device)
            file_bytes = masks.file_bytes(name, mllm, options.family, size, splits)
            seconds[name].append(watch.seconds()[0])
            mllm.model.zero_grad()
            if peak is not None:
                held["mask"][name] = _held_by_mask(file_bytes, peak, mllm)
    both = {
        name: {
            "seconds": statistics.median(seconds[name]),
            **figures,
            "peak_memory_above_model_bytes": figures["peak_memory_bytes"] - figures["model_bytes"],
        }
        for name, figures in held["mask"].items()
    }
    ours, reference = both["ours"], both["reference"]
    return {
        "pairs_of_each_set": size.pairs,
        **ours,
        "reference": reference,
        "ratio_to_reference": {
            "time": ours["seconds"] / reference["seconds"],
            "memory_above_model": ours["peak_memory_above_model_bytes"] / reference["peak_memory_above_model_bytes"],
            "bytes": ours["file_bytes"] / reference["file_bytes"],
        },
    }


def table(found: Mapping[str, Any]) -> str:
    """The figures as text."""
    out = [f"{found['size']}, {found['family']} ({found['preset']}), {found['environment']['device']}"]
    if "parameters" in found:
        parts = ", ".join(f"{count / 1e6:,.1f} M {part}" for part, count in found["parameters"].items())
        out.append(f"{parts}; {found['tokens']} tokens a pair; {found['batch']}; {found['clock']} seconds")
    if methods := found.get("methods"):
        head = ("", "time", "memory", "time", "memory", "s/step", "peak MB", "optim MB", "attack MB", "trained M")
        out += ["", f"{'':<24}{'of ga_diff':>16}{'of its floor':>18}", _row(head)]
        for name, m in methods.items():
            ratios = [m["ratio_to_ga_diff"], m["ratio_to_floor"] or {"time": float("nan"), "memory": float("nan")}]
            shown = [f"{ratio[key]:.2f}" for ratio in ratios for key in ("time", "memory")]
            megabytes = (f"{m[key] / 1e6:.0f}" for key in ("peak_memory_bytes", "optimizer_bytes", "attacker_bytes"))
            row = (name, *shown, f"{m['seconds_per_step']:.3f}", *megabytes, f"{m['trained_parameters'] / 1e6:.1f}")
            out.append(_row(row))
        out += ["", f"{'measured of estimated':<24}{'time':>9}{'memory':>9}"]
        for name, m in methods.items():
            if told := m["estimated"]:
                shown = [f"{m[key] / told[key]:.2f}" for key in ("seconds_per_step", "peak_memory_bytes")]
                out.append(_row((name, *shown)))
    if mask := found.get("mask"):
        ratio = mask["ratio_to_reference"]
        out += ["", "mask, of the reference's: " + ", ".join(f"{key} {value:.3f}" for key, value in ratio.items())]
        for name, m in (("ours", mask), ("reference", mask["reference"])):
            above = m["peak_memory_above_model_bytes"] / 1e6
            out.append(f"  {name:<10} {m['seconds']:.2f} s, {above:.0f} MB above the model, {m['file_bytes']:,} bytes")
    for name, spent in found.get("pieces", {}).items():
        whole = sum(spent.values())
        out.append(f"\n{name}, {whole:.3f} s a step:")
        out += [f"  {piece:<38} {value:.3f} {value / whole:>6.0%}" for piece, value in spent.items()]
    for what, rows in found.get("lines", {}).items():
        out.append(f"\n{what}: " + "; ".join(", ".join(f"{k} {_shown(v)}" for k, v in row.items()) for row in rows))
    for title in ("throughput", "start_up_seconds"):
        out += [f"\n{title}:"] if title in found else []
        out += [f"  {name:<34} {value:.3f}" for name, value in found.get(title, {}).items()]
    return "\n".join(out)


def _row(cells: tuple[str, ...]) -> str:
    return f"{cells[0]:<24}" + "".join(f"{cell:>{9 if i < 4 else 10}}" for i, cell in enumerate(cells[1:]))


def _shown(value: float) -> str:
    return f"{value:.3f}" if isinstance(value, float) else f"{value:,}"


if __name__ == "__main__":
    main()
