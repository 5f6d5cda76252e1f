from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

from vkd_framework.recipe import bundled_recipes

pytestmark = pytest.mark.slow

CHECKOUT = Path(__file__).parent.parent
Run = Callable[..., str]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a command of a fresh environment, outside the checkout, into which the built wheel was installed.

    The environment sees the packages of the one that runs the tests, but not the checkout.
    """
    base = tmp_path_factory.mktemp("packaging")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(base), str(CHECKOUT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = base.glob("vkd_framework-*.whl")
    home = base / "venv"
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    purelib = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    outside = base / "elsewhere"
    outside.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["VKD_CACHE"] = str(base / "cache")
    install = ["install", "--no-deps", "--no-index", "--target", purelib, str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True, capture_output=True, cwd=outside)
    # Behind its own packages; .pth files of that folder, such as the editable install of the checkout, are not read.
    (Path(purelib) / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def run(*command: str) -> str:
        done = subprocess.run([python, *command], capture_output=True, text=True, cwd=outside, env=environment)
        assert done.returncode == 0, done.stderr
        assert list(outside.iterdir()) == []
        return done.stdout

    return run


VKD = ("-c", "from vkd_framework.cli import entry_point; entry_point()")


def test_the_wheel_is_what_is_tested_and_not_the_checkout(installed: Run) -> None:
    for package in ("vkd_framework", "vkd_adapters"):
        place = installed("-c", f"import {package}; print({package}.__file__)").strip()
        assert "site-packages" in place
        assert not place.startswith(str(CHECKOUT))


def test_the_wheel_registers_the_adapter_and_the_command(installed: Run) -> None:
    found = installed(
        "-c",
        "from importlib.metadata import distribution; import json;"
        "print(json.dumps([(e.group, e.name, e.value) for e in distribution('vkd-framework').entry_points]))",
    )
    assert ["vkd_framework", "qwen_vl", "vkd_adapters.qwen_vl"] in json.loads(found)
    assert ["console_scripts", "vkd", "vkd_framework.cli:entry_point"] in json.loads(found)
    (adapter,) = [row for row in json.loads(installed(*VKD, "adapters", "--json")) if row["name"] == "qwen_vl"]
    assert adapter["model_types"]


def test_every_recipe_of_the_checkout_travels_with_the_wheel(installed: Run) -> None:
    listed = {line.split()[0] for line in installed(*VKD, "recipes", "list").splitlines()}
    assert listed == set(bundled_recipes()) == {path.stem for path in (CHECKOUT / "recipes").glob("*.yaml")}


def test_data_files_and_type_markers_are_inside(installed: Run) -> None:
    found = installed(
        "-c",
        "import importlib.resources as r; f = r.files('vkd_framework'); a = r.files('vkd_adapters');"
        "t = f / 'scaffold' / 'templates' / 'adapter.py.j2';"
        "p = (f / 'report' / 'report.html.j2', f / 'report' / 'style.css', f / 'bench' / 'bench.html.j2');"
        "print(*[p.is_file() for p in (*p, t, f / 'py.typed', a / 'py.typed')])",
    )
    assert found.split() == ["True"] * 6


def test_nothing_but_the_two_packages_is_installed(installed: Run) -> None:
    found = installed(
        "-c",
        "from importlib.metadata import distribution;"
        "print(*sorted({f.parts[0] for f in distribution('vkd-framework').files}))",
    ).split()
    assert [name for name in found if name != ".." and not name.endswith(".dist-info")] == [
        "vkd_adapters",
        "vkd_framework",
    ]


def test_a_dry_run_by_name_works_from_any_folder(installed: Run) -> None:
    assert "trains" in installed(*VKD, "run", "qwen2vl_celeb", "--dry-run")


def test_the_report_can_be_rendered_from_the_wheel(installed: Run) -> None:
    check = "from vkd_framework.report.html import render_html; from vkd_framework.report import render_model_card"
    installed("-c", check)
