"""An estimate as text, with the arithmetic behind every figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vkd_framework.estimate import Estimate, devices, work
from vkd_framework.estimate.advice import Change
from vkd_framework.report.formatting import size


def text(found: Estimate, *, limit: float | None = None, changes: Sequence[Change] = ()) -> str:
    """What a run is expected to cost. With `limit` bytes, whether that is enough and otherwise what to change."""
    lines = [f"a pair   {found.tokens}"]
    if found.passes:
        lines.append(
            f"a step   {count(found.step_flops, 'FLOP')}, about {seconds(found.step_seconds)} ({found.rate.how})"
        )
        for each in found.passes:
            parts = work.flops(found.size, found.tokens, each).values()
            there, back, weights = (
                sum(getattr(part, name) for part in parts) for name in ("forward", "activations", "weights")
            )
            lines.append(
                f"         {each.what:<20}{each.pairs:>4} pairs: {count(there, 'FLOP')} forward + "
                f"{count(back, 'FLOP')} back + {count(weights, 'FLOP')} for weights"
                f"{f', {each.times:.0%} of the steps' if each.times < 1 else ''}"
            )
        if found.fetched:
            lines.append(
                f"         the language model fetched, {size(found.fetched)}: "
                f"about {seconds(found.fetched / devices.FETCHED)} of it"
            )
        steps = found.recipe.unlearn.steps
        lines.append(f"         {steps:,} steps: about {seconds(steps * found.step_seconds)}")
    peak = found.peak
    lines.append(f"memory   about {size(peak.bytes)} at most, in the stage `{peak.name}`")
    lines += [
        f"         {line.what:<22}{size(line.bytes):>10}  {line.how}"
        for line in sorted(peak.lines, key=lambda line: -line.bytes)
        if line.bytes
    ]
    others = [f"{stage.name} {size(stage.bytes)}" for stage in found.stages if stage is not peak]
    lines.append(f"         other stages: {'; '.join(others)}")
    if found.offloaded:
        lines.append(
            f"         the language model in the computer's memory: {size(found.offloaded)}, up to twice that as it is "
            "pinned, for each process"
        )
    lines.append(f"disk     about {size(sum(line.bytes for line in found.disk))}")
    lines += [
        f"         {line.what:<22}{size(line.bytes) if line.bytes else '?':>10}  {line.how}"
        for line in sorted(found.disk, key=lambda line: -line.bytes)
    ]
    if limit is not None:
        lines += ["", *fitting(found, limit, changes)]
    return "\n".join(lines)


def fitting(found: Estimate, limit: float, changes: Sequence[Change]) -> list[str]:
    """Whether a run fits, and else each change with what comes out when it is added to those before it."""
    if found.peak.bytes <= limit:
        return [f"fits     into {size(limit)}, with {size(limit - found.peak.bytes)} to spare"]
    lines = [f"fits not {size(limit)} is too little; one after the other:"]
    for change in changes:
        then = change.then
        speed = f", {seconds(then.step_seconds)} a step" if then.passes else ""
        lines.append(f"         {change.flags}: {size(then.peak.bytes)} (`{then.peak.name}`){speed}; {change.price}")
    if not changes or changes[-1].then.peak.bytes > limit:
        lines.append("         that is not enough; take a smaller model")
    return lines


def against(cost: Mapping[str, Any]) -> str:
    """One line at the end of a run: what its `cost` block says was expected, and what came out."""
    step, took = cost["estimated_step_seconds"], cost["step_seconds"]
    speed = f"{seconds(step)} a step against {seconds(took)}, " if step and took else ""
    peak, held = cost["estimated_peak_memory_bytes"], cost["peak_memory_bytes"]
    return f"estimated against measured: {speed}{size(peak)} of memory against {size(held)}"


def seconds(number: float) -> str:
    """Seconds, minutes or hours."""
    if number < 120:
        return f"{number:.2g} s" if number < 10 else f"{number:.0f} s"
    return f"{number / 60:.0f} min" if number < 7200 else f"{number / 3600:.1f} h"


def count(number: float, unit: str) -> str:
    """A large number with a metric prefix."""
    for power, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G")):
        if number >= power:
            return f"{number / power:.3g} {prefix}{unit}"
    return f"{number / 1e6:.3g} M{unit}"
