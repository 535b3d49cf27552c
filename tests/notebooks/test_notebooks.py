"""The lab: its notebooks run, the two languages are the same code, and what is stored is small and clean."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import sys
from pathlib import Path

import matplotlib
import nbformat
import pytest

import foreword as fw
from foreword.models import packaged_reviews

ROOT = Path(__file__).parents[2]
LAB = ROOT / "notebooks"
MOST_BYTES = 200_000
SHOWN = {"text/plain", "text/markdown", "image/png"}
CJK = re.compile(r"[\u3000-\u303f\u3400-\u9fff\uff00-\uffef]")  # with their punctuation
LINK = re.compile(r"\]\(([^)\s#]+)")
# Of any machine, and of this one.
PATHS = re.compile(r"/home/|/root/|/tmp/|/Users/|/usr/|/opt/|site-packages|[A-Z]:\\\\")


def script(name):
    """A script of the lab as a module."""
    spec = importlib.util.spec_from_file_location(f"lab_{name}", LAB / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


run, keep = script("run"), script("keep")
ENGLISH = [run.ENGLISH.format(name) for name in run.PAIRS]
CHINESE = [run.CHINESE.format(name) for name in run.PAIRS]


def read(name):
    return nbformat.read(LAB / name, as_version=4)


def codes(notebook):
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook):
    """All that a notebook prints and shows as text."""
    outputs = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
    return "\n".join(o.text if o.output_type == "stream" else o.data.get("text/markdown", "") for o in outputs)


# ---------------------------------------------------------------- what is stored


def test_every_notebook_is_of_the_lab():
    assert sorted(p.name for p in LAB.glob("*.ipynb")) == sorted([*ENGLISH, *CHINESE])


@pytest.mark.parametrize("name", [*ENGLISH, *CHINESE])
def test_what_is_stored_is_whole_small_and_clean(name):
    notebook = read(name)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert (LAB / name).stat().st_size < MOST_BYTES
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [o for cell in code for o in cell.outputs]
    if outputs or name in ENGLISH:  # of two languages with the same code, one may be there without outputs
        assert outputs
        assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run it: make notebooks"
    for output in outputs:
        assert output.output_type != "error" and output.get("name") != "stderr", output
        assert set(output.get("data", {})) <= SHOWN
    said = (LAB / name).read_text(encoding="utf-8")
    found = PATHS.search(re.sub(r'"image/png": "[^"]*"', "", said))
    assert found is None, found
    assert str(ROOT) not in said and sys.prefix not in said


@pytest.mark.parametrize("name", [*ENGLISH, *CHINESE])
def test_links_lead_somewhere(name):
    text = "\n".join(cell.source for cell in read(name).cells if cell.cell_type == "markdown")
    links = [link for link in LINK.findall(text) if "://" not in link]
    assert links
    for link in links:
        assert (LAB / link).exists(), link
        if link.endswith(".ipynb"):  # a reader stays in a language
            assert link.endswith(".zh-CN.ipynb") == name.endswith(".zh-CN.ipynb"), link


@pytest.mark.parametrize(("english", "chinese"), zip(ENGLISH, CHINESE, strict=True))
def test_the_code_of_both_languages_is_the_same(english, chinese):
    pair = [read(english), read(chinese)]
    kinds = [[cell.cell_type for cell in notebook.cells] for notebook in pair]
    assert kinds[0] == kinds[1]
    for ours, theirs in zip(*map(codes, pair), strict=True):
        assert not CJK.search(ours)
        assert same_code(ours, theirs), theirs
    for ours, theirs in zip(*(n.cells for n in pair), strict=True):
        if ours.cell_type == "markdown":
            assert CJK.search(theirs.source) and not CJK.search(ours.source)
            targets = [[t.replace(".zh-CN", "") for t in LINK.findall(c.source)] for c in (ours, theirs)]
            assert sorted(targets[0]) == sorted(targets[1])


def same_code(english, chinese):
    """Whether two texts are one program but for comments, and for words that are in Chinese in the second."""
    return same(ast.parse(english), ast.parse(chinese))


def same(a, b):
    if type(a) is not type(b):
        return False
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, ast.Constant) and isinstance(a.value, str) and isinstance(b.value, str):
        return a.value == b.value or bool(CJK.search(b.value))
    if isinstance(a, ast.JoinedStr):  # words between values: there may be more of them in one language
        words, values = zip(*map(parted, (a, b)), strict=True)
        return (words[0] == words[1] or bool(CJK.search("".join(words[1])))) and same(*values)
    if isinstance(a, ast.AST):
        return all(same(getattr(a, field), getattr(b, field)) for field in a._fields)
    return a == b


def parted(joined):
    return (
        [v.value for v in joined.values if isinstance(v, ast.Constant)],
        [v for v in joined.values if not isinstance(v, ast.Constant)],
    )


def test_code_that_differs_is_seen():
    assert same_code("print('so', 2)  # a note", "print('这样', 2)")
    assert same_code("print(f'{x} steps')", "print(f'{x} 步')  # 注释")
    assert same_code("print(f'{x} steps')", "print(f'共 {x} 步')")
    assert not same_code("print(f'{x} steps')", "print(f'{y} 步')")
    assert not same_code("open(f'{x}.json')", "open(f'{x}.yaml')")
    assert not same_code("print('so', 2)", "print('这样', 3)")
    assert not same_code("f(init='good')", "f(init='bad')")
    assert not same_code("f(x)", "g(x)")
    assert not same_code("f(x)", "f(x, y)")
    assert not same_code("f(length=2)", "f(width=2)")


@pytest.mark.parametrize("preset", ["length", "reparameterisation"])
def test_the_tables_are_of_the_results_that_are_stored(preset):
    record = json.loads((LAB / "results" / f"{preset}.json").read_text(encoding="utf-8"))
    assert record["preset"] == preset and record["rows"]
    assert keep.trimmed(record) == record
    assert not PATHS.search(json.dumps(record))
    for name in (run.ENGLISH, run.CHINESE):
        shown = printed(read(name.format("04-Compare")))
        if not shown and name == run.CHINESE:
            continue
        assert f"{record['about']['parameters']:,}" in shown
        for line in record["rows"]:
            assert line["label"] in shown and f"{line['tests']['test']['loss']['mean']:.3f}" in shown, "run 04 again"


def test_without_times_a_table_is_the_same_otherwise():
    record = json.loads((LAB / "results" / "length.json").read_text(encoding="utf-8"))
    bare = keep.untimed(record)
    changed = {k for a, b in zip(record["rows"], bare["rows"], strict=True) for k in a if a[k] != b[k]}
    assert changed == {"training_seconds", "training_seconds_ratio"} and bare.keys() == record.keys()
    assert all(line[k] is None for line in bare["rows"] for k in changed)


def test_the_tables_are_made_of_what_a_comparison_leaves(monkeypatch):
    """All of 04 but its live comparison, which is the last cell."""
    matplotlib.use("Agg")
    monkeypatch.chdir(LAB)
    shared = {}
    *cells, live = codes(read("04-Compare.ipynb"))
    assert "comparison.run" in live
    for cell in cells:
        exec(compile(cell, "04-Compare", "exec"), shared)
    table = shared["show"](shared["length"]).data.split("\n")
    assert len(table) == 2 + len(shared["length"]["rows"])
    assert len({line.count("|") for line in table}) == 1


# ---------------------------------------------------------------- running them


@pytest.mark.parametrize("name", [form.format(n) for form in (run.ENGLISH, run.CHINESE) for n in run.PAIRS[2::2]])
def test_without_the_prefixes_a_notebook_says_what_to_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"02-Train(\.zh-CN)?\.ipynb"):
        exec(compile(codes(read(name))[0], name, "exec"), {})


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A copy to run in, so that nothing is written into the sources."""
    try:
        packaged_reviews()
        fw.load_model("demo")
    except fw.MissingPartError as exc:
        pytest.skip(str(exc))
    folder = tmp_path_factory.mktemp("lab") / "notebooks"
    shutil.copytree(LAB, folder, ignore=shutil.ignore_patterns("runs", "__pycache__"))
    return folder


def execute(lab, name, monkeypatch):
    """Run one; it writes below runs/lab only. Returns what it prints, without the outputs it had."""
    source = str(ROOT / "src")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")])))
    before = {p for p in lab.rglob("*") if "runs" not in p.parts}
    done = run.execute(lab / name)
    assert {p for p in lab.rglob("*") if "runs" not in p.parts} == before
    assert {p.name for p in (lab / "runs").glob("*")} <= {"lab"}
    return printed(done)


def after(text, label):
    """The number after a label."""
    return float(re.search(re.escape(label) + r"[^\d\n]*?(\d[\d.]*(?:e[-+]\d+)?)", text)[1])


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setenv("LAB_STEPS", "2")
    monkeypatch.setenv("LAB_SAMPLES", "2")
    monkeypatch.setenv("LAB_TEXTS", "2")


@pytest.mark.slow
@pytest.mark.real
def test_setup_shows_that_the_equation_holds(lab, monkeypatch):
    said = execute(lab, "01-Setup.ipynb", monkeypatch)
    assert after(said, "largest difference") < 1e-12  # float64
    assert after(said, "prompted - with the prefix") < 1e-3 < 1 < after(said, "prompted - base model")
    assert after(said, "after detach - base model") == 0


@pytest.mark.slow
@pytest.mark.real
def test_the_lab_runs_with_two_steps_of_training(lab, short, monkeypatch):
    said = execute(lab, "02-Train.ipynb", monkeypatch)
    for task in ("positive", "negative"):
        assert fw.Prefix.load(lab / "runs" / "lab" / task).longest == 18
        base, start = re.search(rf"{task}: base ([\d.]+), start ([\d.]+)", said).groups()
        assert float(start) < float(base)  # a text about the task is a good start
    said = execute(lab, "03-Inference.ipynb", monkeypatch)
    assert after(said, "right on") > 70
    assert after(said, "text from 0 - text from 18") < 1e-3
    said = execute(lab, "05-Look-inside.ipynb", monkeypatch)
    assert 0 < after(said, "least") < after(said, "mean") < after(said, "most") <= 1  # as printed
    assert after(said, "with the prefix") < after(said, "loss: base")


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.notebooks
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("names", [ENGLISH, CHINESE], ids=["english", "chinese"])
def test_the_whole_lab_runs(lab, names, monkeypatch):
    shutil.rmtree(lab / "runs", ignore_errors=True)
    said = {name: execute(lab, name, monkeypatch) for name in names}
    for before, trained in re.findall(r"([\d.]+)(?:, trained |，训练后 )([\d.]+)", said[names[1]]):
        assert float(trained) < float(before)
