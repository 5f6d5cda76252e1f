"""`vkd new-adapter`: a package of its own for an architecture that no installed adapter serves."""

from __future__ import annotations

import importlib.metadata
import keyword
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from vkd_framework.checkpoint import atomic_folder
from vkd_framework.errors import AdapterError
from vkd_framework.plugins import GENERIC, Adapter, installed_adapters, load_adapter
from vkd_framework.recipe import nearest


@dataclass(frozen=True)
class Written:
    """A package that was written. `missing` says what its author has to fill in, None when its adapter works."""

    folder: Path
    files: tuple[str, ...]
    module: Path
    adapter: Adapter | None
    missing: str | None


def new_adapter(name: str, model_type: str, folder: Path | None = None) -> Written:
    """Write the package. Raises AdapterError, before anything is built, for a name or a type that cannot be had."""
    check_name(name)
    check_model_type(model_type)
    target = folder or Path(f"vkd-adapter-{name.replace('_', '-')}")
    module = f"vkd_adapter_{name}"
    if (target / f"{module}.py").exists():
        raise AdapterError(
            f"{target}: exists already, and what you changed in it is kept; install it and let "
            f"`vkd check-adapter {name}` say what is left, or give another folder with --out"
        )
    if target.exists():
        raise AdapterError(f"{target}: exists already; give another folder with --out")
    try:  # before the long work
        target.mkdir(parents=True)
        target.rmdir()
    except OSError as error:
        raise AdapterError(f"{target}: cannot be made ({error.strerror}); give another folder with --out") from error

    from vkd_framework.scaffold.render import Findings, render_adapter, render_package
    from vkd_framework.scaffold.shrink import UNKNOWN, draft
    from vkd_framework.scaffold.trial import execute, work_out

    proposal = draft(model_type)
    if proposal is None:
        raise AdapterError(
            f"the config class of {model_type!r} has no defaults to work a tiny model out from; "
            "start from examples/third_party_adapter"
        )
    if proposal.processor_class == UNKNOWN:
        found = Findings()
        missing: str | None = (
            f"transformers pairs no processor with {model_type!r}; write its checkpoints' own into tiny_processor"
        )
    else:
        proposal, found, missing = work_out(proposal)
    source = render_adapter(proposal, found, missing)
    files = render_package(name, module, proposal, found, missing) | {f"{module}.py": source}
    with atomic_folder(target) as temporary:
        for path, text in files.items():
            (temporary / path).parent.mkdir(exist_ok=True)
            (temporary / path).write_text(text, encoding="utf-8")
    adapter = None if missing else execute(source, name)
    return Written(target, tuple(sorted(files)), target / f"{module}.py", adapter, missing)


def check_name(name: str) -> None:
    """Raise AdapterError unless an adapter and a module can be called `name`, and none is yet."""
    if keyword.iskeyword(name) or name == GENERIC:
        what = "a word of Python" if keyword.iskeyword(name) else "what every adapter falls back on"
        raise AdapterError(f"{name!r} cannot be an adapter's name: it is {what}; choose another")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        plain = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
        raise AdapterError(
            f"{name!r} cannot be an adapter's name: lower-case letters, digits and underscores, a letter first"
            + (f"; did you mean {plain!r}?" if re.fullmatch(r"[a-z][a-z0-9_]*", plain) else "")
        )
    for installed in installed_adapters():
        if installed.name == name:
            raise AdapterError(
                f"adapter {name!r} is installed already ({installed.distribution} {installed.version}); "
                "choose another name (see `vkd adapters`)"
            )


def check_model_type(model_type: str) -> None:
    """Raise AdapterError unless transformers has an image-text-to-text model of this type and no adapter serves it."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as MODELS

    version = importlib.metadata.version("transformers")
    if model_type not in MODELS:
        what = (
            f"is no image-text-to-text model in transformers {version}"
            if model_type in CONFIG_MAPPING
            else f"is no model type that transformers {version} knows"
        )
        raise AdapterError(
            f"{model_type!r} {what}{nearest(model_type, list(MODELS))}; it is the `model_type` of a config.json"
        )
    for installed in installed_adapters():
        with suppress(AdapterError):  # a broken adapter serves nothing
            if model_type in load_adapter(installed.name).model_types:
                serving = installed.name
                break
    else:
        return
    raise AdapterError(
        f"model type {model_type!r} is served by the installed adapter {serving!r}; a recipe takes it with "
        f"`adapter: {serving}`"
    )
