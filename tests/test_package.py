"""The package as others get it: the wheel, the names, and what importing costs."""

from __future__ import annotations

import importlib
import os
import pkgutil
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import foreword as fw

ROOT = Path(__file__).parents[1]
# The public surface that the design fixes.
NAMES = ("sites", "Site", "attach", "Tuning", "PrefixConfig", "Prefix", "Library", "PrefixTrainer", "load_model",
         "PrefixTrainingArguments", "ForewordError", "DivergedError", "DataError", "ConfigError")  # fmt: skip
NOT_ALONE = "foreword.serve.vllm.connector"  # a subclass of vLLM's: tests/on_vllm imports it
METHODS = {
    "Prefix": ("from_text", "from_tensors", "load", "save", "length", "nbytes", "shift", "slice", "join", "to"),
    "Tuning": ("parameters", "bake", "detach"),
    "Library": ("add", "use", "remove", "detach"),
}


def python(code, where, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=where, env={**os.environ, **environment},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy: nothing is left in the sources."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools builds the wheel, and is not installed")
    copy, out = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "src" / "foreword", copy / "src" / "foreword", ignore=shutil.ignore_patterns("__pycache__"))
    if importlib.util.find_spec("build") is not None:
        how = ["build", "--wheel", "--no-isolation", "--outdir", str(out), str(copy)]
    else:
        how = ["pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(copy)]
    done = subprocess.run([sys.executable, "-m", *how], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    (made,) = out.glob("*.whl")
    return made


def test_the_wheel_holds_every_file(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {n for n in archive.namelist() if n.startswith("foreword/")}
    sources = {
        str(p.relative_to(ROOT / "src"))
        for p in (ROOT / "src" / "foreword").rglob("*")
        if p.suffix in (".py", ".typed", ".html", ".css", ".js", ".svg")
    }
    assert held == sources and {"foreword/py.typed", "foreword/serve/http/page/index.html"} <= held


@pytest.mark.slow
def test_the_wheel_works_where_the_sources_are_not(wheel, tmp_path):
    target = tmp_path / "installed"
    install = ["pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run([sys.executable, "-m", *install], check=True, timeout=240)
    assert (target / "bin" / "foreword").exists()
    code = (
        "import importlib, pkgutil, foreword\n"
        f"assert foreword.__file__.startswith({str(target)!r}), foreword.__file__\n"
        "names = [m.name for m in pkgutil.walk_packages(foreword.__path__, 'foreword.') if 'main' not in m.name]\n"
        f"names.remove({NOT_ALONE!r})\n"
        "for name in names: assert importlib.import_module(name).__file__.startswith(" + repr(str(target)) + ")\n"
        "from importlib.metadata import version\n"
        "assert version('foreword') == foreword.__version__\n"
        "print(len(names))"
    )
    assert int(python(code, tmp_path, PYTHONPATH=str(target))) > 25
    run = "import runpy, sys; sys.argv = ['foreword', '--help']; runpy.run_module('foreword', run_name='__main__')"
    assert "Prefix tuning" in python(run, tmp_path, PYTHONPATH=str(target))


def test_the_names_of_the_design_are_public():
    assert not set(NAMES) - set(fw.__all__)
    for name in fw.__all__:
        assert getattr(fw, name) is not None and name in dir(fw)
    for name, methods in METHODS.items():
        assert not [m for m in methods if not hasattr(getattr(fw, name), m)]
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        fw.nonsense  # noqa: B018


def test_every_module_can_be_imported():
    for module in pkgutil.walk_packages(fw.__path__, "foreword."):
        if not module.name.endswith("__main__") and module.name != NOT_ALONE:
            importlib.import_module(module.name)
    assert callable(fw.sites)  # the function, not the file of the same name


def test_importing_foreword_does_not_import_torch(tmp_path):
    code = (
        "import sys, foreword, foreword.models, foreword.data\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert python(code, tmp_path).strip() == "[]"
