"""The `vkd` command. Nothing heavy is imported before a command needs it: `vkd --help` answers at once."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from vkd_framework import __version__
from vkd_framework.errors import RecipeError, VKDError

GOING_ON = {
    "run": "; go on with --resume",
    "bench": "; the same command goes on",
    "evaluate": "; with --out, the same command goes on",
    "relearn": "; with --out, the same command goes on",
}
"""Command -> what to do after it was stopped."""


class Commands(click.Group):
    """Commands in the order in which a newcomer meets them; a user's mistake is one line, an own bug a traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """As defined below, not sorted."""
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """With the nearest command when the given one does not exist."""
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            from vkd_framework.recipe import nearest

            ctx.fail(f"no command {args[0]!r}{nearest(args[0], self.commands)}")
        return super().resolve_command(ctx, args)

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Usage errors too are one line, with where to read on; click would print the usage above it."""
        try:
            result = super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message())
            sys.exit(error.exit_code)
        except click.ClickException as error:
            where = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "vkd"
            click.echo(f"error: {error.format_message().rstrip('.')}; see `{where} --help`", err=True)
            sys.exit(error.exit_code)
        except click.Abort:
            click.echo("error: stopped", err=True)
            sys.exit(1)
        if standalone_mode:
            sys.exit(result if isinstance(result, int) else 0)
        return result

    def invoke(self, ctx: click.Context) -> Any:
        """Turn errors that are meant for the user into one line and an exit status."""
        try:
            return super().invoke(ctx)
        except VKDError as error:
            if ctx.find_root().params.get("debug"):
                raise
            click.echo(f"error: {error}", err=True)
            sys.exit(error.exit_status)
        except KeyboardInterrupt:
            click.echo(f"error: stopped{GOING_ON.get(ctx.invoked_subcommand or '', '')}", err=True)
            sys.exit(1)


RECIPE = click.argument("recipe")
SET = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a setting, for example --set unlearn.steps=100. Repeatable.",
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")


def names(ctx: click.Context, parameter: click.Parameter, value: str | None) -> list[str] | None:
    """The parts of a list with commas."""
    if value is None:
        return None
    if not (parts := [part.strip() for part in value.split(",") if part.strip()]):
        raise click.BadParameter(f"{value!r} names nothing; write it as a,b", ctx, parameter)
    return parts


def seeds_of(ctx: click.Context, parameter: click.Parameter, value: str) -> list[int]:
    """The whole numbers of a list with commas."""
    parts = names(ctx, parameter, value) or []
    if not all(part.isdecimal() for part in parts):
        raise click.BadParameter(f"{value!r} is no list of whole numbers; write it as 0,1,2", ctx, parameter)
    return [int(part) for part in parts]


def compared(command: Callable[..., None]) -> Callable[..., None]:
    """The files into which a comparison can be written."""
    for form, words in (
        ("html", "the comparison, its frontier drawn, as a page"),
        ("markdown", "the comparison as Markdown, with the command above it,"),
        ("csv", "every figure with its interval as CSV"),
        ("json", "the runs as a list of {recipe, method, seed, models, relearn, cost}"),
    ):
        option = click.option(
            f"--{form}", form, type=click.Path(path_type=Path, dir_okay=False), help=f"Write {words} to this file."
        )
        command = option(command)
    return command


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="vkd")
@click.option("--debug", is_flag=True, help="Show tracebacks of errors that are otherwise one line.")
def main(debug: bool) -> None:
    """Make a multimodal language model forget who somebody is, prove what changed, and attack the result."""


@main.command()
@RECIPE
@SET
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), help="Run directory. Default: runs/<recipe name>-<time>."
)
@click.option("--resume", is_flag=True, help="Go on with a run that was stopped; finished stages are kept.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Print the resolved recipe, what would be trained and what that would cost; load no weights.",
)
@click.option("--gpu", metavar="NAME", help="With --dry-run: a GPU to estimate for, such as A100-80GB, H100 or L4.")
@click.option("--gpu-memory", metavar="SIZE", help="With --dry-run: say what to change so that it fits, such as 24GB.")
def run(
    recipe: str,
    overrides: tuple[str, ...],
    out: Path | None,
    resume: bool,
    dry_run: bool,
    gpu: str | None,
    gpu_memory: str | None,
) -> None:
    """Unlearn what RECIPE says: a file, or the name of a recipe that comes with vkd."""
    if not dry_run and (gpu or gpu_memory):
        raise click.UsageError(f"{'--gpu' if gpu else '--gpu-memory'} goes with --dry-run; add it, or leave this out")
    with quick_imports():
        from vkd_framework import ranks
        from vkd_framework import run as runs
        from vkd_framework.report import terminal_table, verdict_text

    if dry_run:
        click.echo(runs.dry_run(recipe, overrides, gpu=gpu, gpu_memory=gpu_memory))
        return

    with ranks.together():
        metrics, folder = runs.run(recipe, overrides, out=out, resume=resume)
        if ranks.is_main():
            click.echo(terminal_table(metrics))
            click.echo(f"\nreport: {folder / 'report.html'}\nmodel:  {folder / 'model'}")
            click.echo(f"\n{verdict_text(metrics)}")


MODEL = click.argument("model")
WITH_RECIPE = click.option(
    "--recipe",
    required=True,
    metavar="RECIPE",
    help="The data, the columns and the attacks: a file, or a recipe that comes with vkd.",
)
INTO = click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Folder to keep the results in.")
ALONE = click.option("--alone", is_flag=True, help="Load no other model; figures that compare with one are left out.")


@main.command()
@MODEL
@WITH_RECIPE
@SET
@INTO
@ALONE
@JSON
def evaluate(model: str, recipe: str, overrides: tuple[str, ...], out: Path | None, alone: bool, as_json: bool) -> None:
    """Measure the columns of MODEL and try the attacks of a recipe on it, as a run does.

    MODEL is a hub id, a local folder or the folder of a run; vkd need not have made it. It stands in the place of the
    unlearned model, beside the recipe's starting model and, where the recipe has one, the retain-only reference.
    """
    with quick_imports():
        from vkd_framework import assess, ranks
        from vkd_framework.report import terminal_table, trials_table, verdict_text

    with ranks.together():
        found = assess.evaluate(model, recipe, overrides, out=out, alone=alone)
        parts = (terminal_table(found), trials_table(found), verdict_text(found))
        if ranks.is_main():
            click.echo(json.dumps(found, indent=2) if as_json else "\n\n".join(filter(None, parts)))


@main.command()
@MODEL
@WITH_RECIPE
@SET
@INTO
@ALONE
@JSON
def relearn(model: str, recipe: str, overrides: tuple[str, ...], out: Path | None, alone: bool, as_json: bool) -> None:
    """Attack MODEL as a recipe says: fine-tune copies, and see how fast the forgotten people come back.

    MODEL is a hub id, a local folder or the folder of a run; vkd need not have made it. Where the recipe has a
    retain-only reference, it is attacked alike, because only what comes back beyond it was hidden instead of erased.
    """
    with quick_imports():
        from vkd_framework import assess, ranks
        from vkd_framework.report import paragraph, relearn_table
        from vkd_framework.verdict import hiding

    with ranks.together():
        found = assess.attack(model, recipe, overrides, out=out, alone=alone)
        if ranks.is_main():
            told = f"{relearn_table(found)}\n\n{paragraph(hiding(found))}"
            click.echo(json.dumps(found, indent=2) if as_json else told)


@main.command("inspect-layers")
@click.argument("model", required=False)
@click.option(
    "--recipe", metavar="RECIPE", help="Measure the starting model of a recipe on its data, and suggest layers."
)
@SET
@click.option("--adapter", metavar="NAME", help="The adapter to ask, when several serve the model.")
@JSON
def inspect_layers(
    model: str | None, recipe: str | None, overrides: tuple[str, ...], adapter: str | None, as_json: bool
) -> None:
    """Show the parts and distillation layers of MODEL, without its weights.

    MODEL is a preset such as Qwen/Qwen2-VL-7B-Instruct, a local folder or config.json, a hub id, or tiny:NAME for the
    tiny model of an adapter or a model type.

    With --recipe, MODEL is the recipe's and may be left out. Its weights are loaded, and each layer is shown with how
    well people can be told apart there, how hard forgetting pulls there, and whether to distil there.
    """
    if recipe is None and model is None:
        raise click.UsageError("give a MODEL, or --recipe")
    if recipe is None and overrides:
        raise click.UsageError("--set goes with --recipe")
    if recipe is not None and adapter is not None:
        raise click.UsageError(f"the recipe names the adapter; write --set adapter={adapter}")
    from vkd_framework.layers_table import inspect, inspect_recipe, table

    if recipe is not None:
        with quick_imports():
            import vkd_framework.probe  # noqa: F401 (what follows takes minutes and needs garbage collection)
        found = inspect_recipe(recipe, overrides, model)
    else:
        with quick_imports():
            found = inspect(str(model), adapter)
    click.echo(json.dumps(found, indent=2) if as_json else table(found))


@main.command()
@JSON
def adapters(as_json: bool) -> None:
    """List the installed adapters, where they come from and what they serve."""
    from vkd_framework.plugins import installed_adapters, load_adapter

    found: list[dict[str, Any]] = []
    for installed in installed_adapters():
        row: dict[str, Any] = {
            "name": installed.name,
            "distribution": installed.distribution,
            "version": installed.version,
        }
        try:
            adapter = load_adapter(installed.name)
            row |= {
                "model_types": list(adapter.model_types),
                "hooks": list(adapter.hooks),
                "presets": list(adapter.presets),
            }
        except VKDError as error:
            row["error"] = str(error)
        found.append(row)
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    for row in found:
        click.echo(f"{row['name']}  ({row['distribution']} {row['version']})")
        if "error" in row:
            click.echo(f"  broken: {row['error']}")
            continue
        click.echo(f"  model types: {', '.join(row['model_types'])}")
        click.echo(f"  presets:     {', '.join(row['presets']) or 'none'}")
        click.echo(f"  hooks:       {', '.join(row['hooks'])}")


@main.command()
@JSON
def methods(as_json: bool) -> None:
    """List the methods that a recipe may name, with their sources and where public code differs."""
    from vkd_framework.methods import DEFAULT, METHODS

    if as_json:
        rows = [
            {"name": name, "summary": m.summary, "source": m.source, "differs": m.differs, "values": dict(m.values)}
            for name, m in METHODS.items()
        ]
        click.echo(json.dumps(rows, indent=2))
        return
    for name, method in METHODS.items():
        click.echo(f"{name}{'  (default)' if name == DEFAULT else ''}\n  {method.summary}\n  {method.source}")


@main.command("new-adapter")
@click.argument("name")
@click.option(
    "--model-type",
    required=True,
    metavar="TYPE",
    help="What the config.json of its checkpoints calls the architecture (model_type).",
)
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), help="Folder to write. Default: vkd-adapter-NAME."
)
def new_adapter(name: str, model_type: str, out: Path | None) -> None:
    """Write a package with an adapter NAME for a transformers architecture that no installed adapter serves.

    Its tiny model is worked out from the architecture's own classes, tried, and checked as `vkd check-adapter` does.
    Exit status 1 when something is left to be mended by hand.
    """
    with quick_imports():
        from vkd_framework import scaffold, testing

        written = scaffold.new_adapter(name, model_type, out)
    click.echo(f"{written.folder} written: {', '.join(written.files)}")
    if written.adapter is None:
        click.echo(f"to do in {written.module}: {written.missing}")
        sys.exit(1)
    results = testing.check_adapter(written.adapter)
    failed = [result for result in results if not result.ok]
    click.echo(testing.table(failed, testing.count(results)))
    click.echo(f"next: pip install -e '{written.folder}[test]' && vkd check-adapter {name}")
    if failed:
        sys.exit(1)


@main.command("check-adapter")
@click.argument("name")
@click.option(
    "--model",
    metavar="REF",
    help="Hub id, local folder or tiny:MODEL_TYPE to check with. Default: the tiny model of each model type.",
)
@JSON
def check_adapter(name: str, model: str | None, as_json: bool) -> None:
    """Check that adapter NAME tells the truth about its models; exit status 1 when it does not.

    NAME is an installed adapter, or the dotted path of a module that can be imported from here. What `vkd new-adapter`
    writes has no dot in its name: install it first. The checks are listed in docs/conformance.md.
    """
    sys.path.insert(0, os.getcwd())  # an author checks before installing
    with quick_imports():
        from vkd_framework import testing

    results = testing.check_adapter(name, model)
    click.echo(json.dumps([asdict(result) for result in results], indent=2) if as_json else testing.table(results))
    if not all(result.ok for result in results):
        sys.exit(1)


@main.command()
@click.argument("recipes", nargs=-1, required=True, metavar="RECIPE...")
@click.option("--methods", callback=names, help="Methods, with commas. Default: all that the recipe can be run with.")
@click.option("--seeds", callback=seeds_of, default="0,1,2", show_default=True, help="Seeds, with commas.")
@SET
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of all runs; give it again to go on. Default: runs/bench-<time>.",
)
@compared
@click.option("--list", "only_list", is_flag=True, help="Show the cells and how far each is; run nothing.")
def bench(
    recipes: tuple[str, ...],
    methods: list[str] | None,
    seeds: list[int],
    overrides: tuple[str, ...],
    out: Path | None,
    only_list: bool,
    **targets: Path | None,
) -> None:
    """Run every RECIPE with every method and seed, and show all of them in one table.

    Each cell is an ordinary run in OUT/<recipe>-<method>-<seed>. The same command with the same --out goes on where it
    was stopped, and several may work on one --out together. A cell that fails does not stop the others; exit status 1
    when one did.
    """
    from vkd_framework import ranks

    ranks.alone("vkd bench", "start it several times with one --out, and each takes cells of its own")
    with quick_imports():
        from vkd_framework.bench import command

    unfinished = command.bench(recipes, methods, seeds, overrides, out, targets, only_list=only_list, echo=click.echo)
    if unfinished:
        sys.exit(1)


@main.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=click.Path(path_type=Path))
@compared
def compare(runs: tuple[Path, ...], **targets: Path | None) -> None:
    """Show finished runs side by side: one row for each recipe and method, over its seeds.

    RUN is a run folder, a folder of them such as the --out of a bench, a file that --json wrote, or the folder of one
    checkpoint's `vkd evaluate` and `vkd relearn`. Runs of one method whose recipes differ in more than the seed get
    rows of their own.
    """
    from vkd_framework.bench import command

    click.echo(command.compare(runs, targets))


@main.group(cls=Commands)
def recipes() -> None:
    """List, copy and check recipes."""


@recipes.command("list")
def recipes_list() -> None:
    """The recipes that come with vkd; `vkd run NAME` runs one from any folder."""
    from vkd_framework.recipe import bundled_recipes, load_recipe

    found = bundled_recipes()
    width = max(map(len, found), default=0) + 2
    for name in found:
        click.echo(f"{name:<{width}}{load_recipe(name).description}")


@recipes.command("copy")
@click.argument("name")
@click.argument("target", type=click.Path(path_type=Path), required=False)
def recipes_copy(name: str, target: Path | None) -> None:
    """Copy a recipe to TARGET (default: NAME.yaml here) to change it."""
    from vkd_framework.checkpoint import write_text
    from vkd_framework.recipe import find_recipe

    source = find_recipe(name)
    goal = target or Path(source.name)
    goal = goal / source.name if goal.is_dir() else goal
    if goal.exists():
        raise RecipeError(f"{goal}: exists already; give another target")
    try:
        write_text(goal, source.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{goal}: cannot be written ({error.strerror}); give another target") from error
    click.echo(f"{goal} written; run it with: vkd run {goal}")


@recipes.command("schema")
def recipes_schema() -> None:
    """The JSON schema of a recipe: every key, its type, default and meaning."""
    from vkd_framework.recipe import Recipe

    click.echo(json.dumps(Recipe.model_json_schema(), indent=2))


@recipes.command("validate")
@RECIPE
@SET
def recipes_validate(recipe: str, overrides: tuple[str, ...]) -> None:
    """Check RECIPE, and the data that it reads from this machine, without running it."""
    from vkd_framework.plugins import check_installed
    from vkd_framework.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    check_installed(loaded.adapter)
    told = ""
    if loaded.data.kind != "celebs":  # these are drawn: there is nothing to read
        from vkd_framework import data

        if data.is_here(loaded.data):
            from vkd_framework.run.checks import check_pairs

            splits = data.load(loaded.data)
            check_pairs(loaded, splits)
            told = f"\n{data.told(splits)}"
    facts = f"adapter {loaded.adapter}, method {loaded.method}, data {loaded.data.kind}"
    click.echo(f"{loaded.name}: valid ({facts}){told}")


@main.command()
def doctor() -> None:
    """Check this machine and installation; exit status 1 when a run would fail."""
    from vkd_framework.doctor import checks

    with quick_imports():
        results = checks()
    for check in results:
        click.echo(f"{'ok  ' if check.ok else 'FAIL'}  {check.what:<14}{check.found}")
    if not all(check.ok for check in results):
        sys.exit(1)


def entry_point() -> None:
    """`vkd`: run the command, then leave at once; tearing torch down at exit takes a second and saves nothing."""
    status: object = 0
    try:
        main(prog_name="vkd")
    except SystemExit as stop:
        status = stop.code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else int(status is not None))


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import without garbage collection, a quarter of the time, and keep the bars and the advice of others away."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads triple the time beside another busy process
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # the last process to fail finds the first gone
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
    if "transformers" in sys.modules:
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
