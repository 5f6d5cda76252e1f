"""Where the time of a `vkd run` goes: forward, backward and generation, and what is spent outside of them.

    python benchmarks/profile_run.py [RECIPE] [--set KEY=VALUE]... [--json FILE]

Without --set the run is the embedded default, shortened. Times are processor time on a CPU, wall time on a GPU. The
model's arithmetic is timed at its borders: the outermost call of a module and the functions of `losses` (forward),
`torch.autograd` (backward), `generate` (generation). What lies outside is sampled, and booked on the innermost function
of this package that was running. The cache is an empty one, so that teaching is part of the run.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

SHORT = (
    "teach.steps=60",
    "unlearn.steps=60",
    "relearn.steps=[30]",
    "relearn.shares=[1.0]",
    "attacks=[]",
)
OURS = ("vkd_framework", "vkd_adapters")
BUCKETS = ("forward", "backward", "generation")
SAMPLE_SECONDS = 0.003


class Clock:
    """Time by stage and bucket; what is in no bucket is sampled."""

    def __init__(self) -> None:
        self.stage, self.bucket = "start", ""
        self.seconds: dict[str, Counter[str]] = defaultdict(Counter)
        self.samples: Counter[tuple[str, str]] = Counter()
        self.now: Callable[[], float] = time.process_time
        self._since = 0.0
        self._main = threading.get_ident()
        self._done = threading.Event()

    def _book(self) -> None:
        now = self.now()
        self.seconds[self.stage][self.bucket or "outside"] += now - self._since
        self._since = now

    @contextmanager
    def within(self, *, stage: str | None = None, bucket: str | None = None) -> Iterator[None]:
        """Book what happens in the block on a stage or a bucket; a bucket inside a bucket changes nothing."""
        before = self.stage, self.bucket
        self._book()
        self.stage, self.bucket = stage or self.stage, self.bucket or bucket or ""
        try:
            yield
        finally:
            self._book()
            self.stage, self.bucket = before

    def timed(self, function: Callable[..., Any], bucket: str) -> Callable[..., Any]:
        """`function`, booked on `bucket`."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if self.bucket:
                return function(*args, **kwargs)
            with self.within(bucket=bucket):
                return function(*args, **kwargs)

        return wrapped

    @contextmanager
    def running(self) -> Iterator[None]:
        """Time and sample the block."""
        sampler = threading.Thread(target=self._sample, daemon=True)
        sampler.start()
        try:
            yield
        finally:
            self._book()
            self._done.set()
            sampler.join()

    def _sample(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            if not self.bucket:
                self.samples[self.stage, _where(sys._current_frames().get(self._main))] += 1


def _where(frame: FrameType | None) -> str:
    """The innermost function of ours in a stack."""
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if package := next((name for name in OURS if name in path.parts), None):
            return f"{'/'.join(path.parts[path.parts.index(package) + 1 :])}:{frame.f_code.co_qualname}"
        frame = frame.f_back
    return "imports and the like"


def instrument(clock: Clock) -> None:
    """Wrap what the model's arithmetic goes through, and the stages of a run."""
    import torch
    from transformers import GenerationMixin

    from vkd_framework import losses
    from vkd_framework.checkpoint import Stages

    if torch.cuda.is_available():

        def now() -> float:
            torch.cuda.synchronize()
            return time.perf_counter()

        clock.now = now
    torch.nn.Module.__call__ = clock.timed(torch.nn.Module.__call__, "forward")  # type: ignore[method-assign, assignment]
    GenerationMixin.generate = clock.timed(GenerationMixin.generate, "generation")
    for name in ("backward", "grad"):
        setattr(torch.autograd, name, clock.timed(getattr(torch.autograd, name), "backward"))
    _time_losses(clock, losses)
    run = Stages.run

    def staged(self: Stages, stage: str, *args: Any, **kwargs: Any) -> Any:
        with clock.within(stage=stage.partition("-")[0]):
            return run(self, stage, *args, **kwargs)

    Stages.run = staged  # type: ignore[method-assign]


def _time_losses(clock: Clock, losses: ModuleType) -> None:
    """Also where other modules have imported a function by name."""
    for name, function in list(vars(losses).items()):
        if callable(function) and getattr(function, "__module__", "") == losses.__name__ and name.islower():
            timed = clock.timed(function, "forward")
            for module in list(sys.modules.values()):
                if getattr(module, "__name__", "").startswith(OURS) and getattr(module, name, None) is function:
                    setattr(module, name, timed)


def profile(recipe: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    """Run it, and say what took how long."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder, clock.running():
        os.environ["VKD_CACHE"] = f"{folder}/cache"
        import vkd_framework.run

        instrument(clock)
        vkd_framework.run.run(recipe, overrides, out=Path(folder) / "run")
    return summary(clock)


def summary(clock: Clock) -> dict[str, Any]:
    """Seconds by stage and bucket, the share outside, and the largest costs outside with their share of everything."""
    total = sum(value for buckets in clock.seconds.values() for value in buckets.values())
    outside = sum(buckets["outside"] for buckets in clock.seconds.values())
    sampled = sum(clock.samples.values())
    costs = [
        {
            "stage": stage,
            "function": function,
            "seconds": count / sampled * outside,
            "share": count / sampled * outside / total,
        }
        for (stage, function), count in clock.samples.most_common(20)
    ]
    stages = {
        stage: {
            **{name: buckets[name] for name in (*BUCKETS, "outside")},
            "outside_share": buckets["outside"] / sum(buckets.values()),
        }
        for stage, buckets in clock.seconds.items()
        if sum(buckets.values()) > 0
    }
    return {"total_seconds": total, "outside_share": outside / total, "stages": stages, "largest_costs": costs}


def table(found: dict[str, Any]) -> str:
    """The same as text."""
    names = (*BUCKETS, "outside")
    lines = [f"{'stage':<10}" + "".join(f"{name:>12}" for name in names) + f"{'outside':>12}"]
    for stage, row in found["stages"].items():
        lines.append(
            f"{stage:<10}" + "".join(f"{row[name]:>10.2f} s" for name in names) + f"{row['outside_share']:>12.1%}"
        )
    lines += [f"of {found['total_seconds']:.1f} s, {found['outside_share']:.1%} outside", "", "largest costs outside:"]
    lines += [
        f"{c['share']:>7.1%} {c['seconds']:>8.2f} s  {c['stage']:<9} {c['function']}" for c in found["largest_costs"]
    ]
    return "\n".join(lines)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="qwen2vl_celeb")
    parser.add_argument(
        "--set", action="append", dest="overrides", metavar="KEY=VALUE", help="replaces the short settings"
    )
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    options = parser.parse_args()
    found = profile(options.recipe, SHORT if options.overrides is None else tuple(options.overrides))
    print(table(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
