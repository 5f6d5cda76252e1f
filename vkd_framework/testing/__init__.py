"""The adapter author's kit: does an adapter tell the truth about its models?

    from vkd_framework.testing import assert_conforms

    def test_the_adapter_conforms():
        assert_conforms("my_family")

Every check asks the adapter something and compares the answer with what the model itself does: pixels are exchanged,
weights disturbed, gradients followed. docs/conformance.md lists the checks and the mistakes they find.

Shape letters: `B` samples, `L` text tokens, `R` feature rows, `D` channels, `V` vocabulary.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from transformers.utils import logging

from vkd_framework.errors import AdapterError
from vkd_framework.plugins import Adapter, installed_adapters, load_adapter
from vkd_framework.recipe import is_tiny, nearest
from vkd_framework.testing.checks import ADAPTER_CHECKS, MODEL_CHECKS
from vkd_framework.testing.checks.model import LOAD, TINY
from vkd_framework.testing.outcomes import CheckResult, count, look_at, one_line, place, run_checks, table
from vkd_framework.testing.subject import Subject

__all__ = ["CheckResult", "assert_conforms", "check_adapter", "count", "find_adapter", "table"]


def check_adapter(adapter: str | Adapter, source: str | None = None) -> list[CheckResult]:
    """Run every check and return one result each, in order.

    `adapter`: a registered name, the dotted path of an importable module, or a loaded adapter. `source`: the model to
    check with, a hub id, a local folder or `tiny:MODEL_TYPE`; None takes the tiny model of every model type served, and
    with several of them puts the type before each name. A check that raises counts as failed and the others still run;
    those that stop at the very same error are told in one. Raises AdapterError when the adapter cannot be loaded.
    """
    adapter = find_adapter(adapter) if isinstance(adapter, str) else adapter
    results = run_checks(ADAPTER_CHECKS, adapter, adapter.name)
    if source is None and "vkd_tiny_model" not in adapter.hooks:
        missing = "write vkd_tiny_model (docs/hooks.md), or name a model: `--model` or `source`"
        found = f"adapter {adapter.name!r} has no hook vkd_tiny_model and no model was named"
        return [*results, CheckResult("there-is-a-model-to-check", False, "a model to check with", found, missing)]
    sources = [f"tiny:{model_type}" for model_type in adapter.model_types] if source is None else [source]
    for one in sources:
        prefix = f"{one.partition(':')[2]}: " if len(sources) > 1 else ""
        with _quiet_transformers(), tempfile.TemporaryDirectory(prefix="vkd-check-") as folder:
            found_here = _check_model(adapter, one, Path(folder))
        results += [
            replace(result, name=prefix + result.name, also=tuple(prefix + name for name in result.also))
            for result in found_here
        ]
    return results


def assert_conforms(adapter: str | Adapter, source: str | None = None) -> None:
    """Raise AssertionError with a table of the checks that fail. Arguments as in `check_adapter`."""
    __tracebackhide__ = True
    results = check_adapter(adapter, source)
    if any(not result.ok for result in results):
        raise AssertionError("\n" + table([result for result in results if not result.ok], count(results)))


def find_adapter(name: str) -> Adapter:
    """A registered adapter, or the module at a dotted path, so that an author can check before installing."""
    installed = [adapter.name for adapter in installed_adapters()]
    if name in installed or "." not in name:
        return load_adapter(name)
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not name.startswith(error.name):
            raise AdapterError(f"adapter {name!r} does not import: {one_line(error)}") from error
        raise AdapterError(
            f"adapter {name!r} is neither installed nor a module that can be imported{nearest(name, installed)}; "
            f"installed: {', '.join(installed) or 'none'} (see `vkd adapters`)"
        ) from error
    except Exception as error:
        raise AdapterError(f"adapter {name!r} does not import: {one_line(error)}") from error
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
        hook = look_at(error, LOAD if not is_tiny(source) else TINY, MODEL_CHECKS)
        look = f"{hook}; the other checks need a model and were left out"
        found = f"{one_line(error)}{place(error)}"
        return [CheckResult("the-model-loads", False, f"{source} is built, saved and loaded", found, look)]
    return run_checks(MODEL_CHECKS, subject, source)
