"""Folders of evaluations: killed, torn, full, changed, compared."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import foreword as fw
import zoo
from foreword.errors import ConfigError, DataError
from foreword.evaluate.examples import Task
from foreword.evaluate.predict import Batch, Decoding, predict
from foreword.evaluate.run import Folder, against, finite, record_of, write_all

HERE = Path(__file__).parent
SCRIPTS = HERE / "scripts"
ENVIRONMENT = {
    **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore",
    "PYTHONPATH": os.pathsep.join(map(str, [HERE.parent, SCRIPTS, Path(fw.__file__).parents[1]])),
}  # fmt: skip
TASKS = [
    Task(s[:9], (s[9:],), f"line {i}") for i, s in enumerate([*zoo.SENTENCES, "Separators \u2028 and \x85 of lines."])
]
HOW = Decoding(max_new_tokens=6)


@pytest.fixture(scope="module")
def base():
    return zoo.build("llama").eval(), zoo.tokenizer()


@pytest.mark.slow
def test_a_killed_run_goes_on_and_writes_no_batch_twice(tmp_path):
    seed = time.time_ns()
    done = subprocess.run(
        [sys.executable, SCRIPTS / "write_tiny.py", tmp_path / "killed", str(seed)],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    told = f"seed {seed}\n{done.stdout}\n{done.stderr[-3000:]}"
    lines = [line.split() for line in done.stdout.splitlines()]
    assert done.returncode == 0 and [w[0] for w in lines] == ["killed"] * 4 + ["ended"], told
    assert [int(w[1]) for w in lines[:4]].count(signal.SIGKILL) >= 3 and lines[4][1] == "0", told
    written = [int(n) for w in lines for n in w[2:]]
    assert len(written) == len(set(written)) and len(written) >= 11, told
    sys.path.insert(0, str(SCRIPTS))
    try:
        import write_tiny
    finally:
        sys.path.remove(str(SCRIPTS))
    whole = predict(zoo.build("llama").eval(), zoo.tokenizer(), [t.prompt for t in write_tiny.TASKS],
                    settings=write_tiny.HOW, batch_size=2)  # fmt: skip
    assert Folder(tmp_path / "killed").written(write_tiny.TASKS) == whole, told
    assert sorted(p.name for p in (tmp_path / "killed").iterdir()) == ["predictions.jsonl", "run.json"], told


def test_a_full_disk_loses_only_the_batch_that_was_being_written(tmp_path):
    """A process whose files may not grow beyond a size gets the error that a full disk gives; the next one goes on."""
    code = (
        "import os, resource, sys, write_tiny; from pathlib import Path\n"
        "os.environ['PIPE'] = str(os.open(os.devnull, os.O_WRONLY))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (700, resource.RLIM_INFINITY))\n"
        "try: write_tiny.write(Path(sys.argv[1]))\n"
        "except OSError as exc: print('OSError', exc.errno)\n"
    )
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "full")], env=ENVIRONMENT, capture_output=True,
                          text=True, timeout=120, check=True)  # fmt: skip
    assert done.stdout.startswith("OSError"), done.stdout + done.stderr[-2000:]
    folder = Folder(tmp_path / "full")
    before = folder.done()
    content = (tmp_path / "full" / "writing.jsonl").read_text()
    assert before and not content.endswith("\n")  # the last line is torn
    sys.path.insert(0, str(SCRIPTS))
    try:
        import write_tiny
    finally:
        sys.path.remove(str(SCRIPTS))
    new = []
    texts = write_all(zoo.build("llama").eval(), zoo.tokenizer(), write_tiny.TASKS, write_tiny.HOW, batch_size=2,
                      folder=folder, progress=lambda n, of: new.append(n))  # fmt: skip
    assert texts == predict(zoo.build("llama").eval(), zoo.tokenizer(), [t.prompt for t in write_tiny.TASKS],
                            settings=write_tiny.HOW, batch_size=2)  # fmt: skip
    assert new[: len(before)] == [2 * (i + 1) for i in range(len(before))]


def test_what_is_kept_is_what_was_written(base, tmp_path):
    folder = Folder(tmp_path / "out")
    folder.begin({"a": 1}, resume=False)
    texts = write_all(*base, TASKS, HOW, batch_size=3, folder=folder)
    assert texts == predict(*base, [t.prompt for t in TASKS], settings=HOW, batch_size=3)
    assert folder.written(TASKS) == texts == against(folder.path, TASKS)
    records = [json.loads(x) for x in (folder.path / "predictions.jsonl").read_text().split("\n") if x]
    assert [r["input"] for r in records] == [t.input for t in TASKS] and records[3]["key"] == TASKS[3].key


def test_texts_with_any_line_separator_come_back(tmp_path):
    folder = Folder(tmp_path / "out")
    folder.begin({}, resume=False)
    texts = ["a\u2028b", "c\nd", "\x85", ""]
    folder.finish(TASKS, texts)
    assert folder.written(TASKS) == texts


def test_a_line_may_be_torn_anywhere(tmp_path):
    folder, batches = Folder(tmp_path), [Batch(0, (1, 2), ("é\u2028", "b")), Batch(1, (0,), ("Größe 鷹",))]
    add = folder.keep([])
    for batch in batches:
        add(batch)
    path = tmp_path / "writing.jsonl"
    content = path.read_bytes()
    first = content.index(b"\n")
    for end in range(len(content) + 1):
        path.write_bytes(content[:end])
        whole = (end >= first) + (end >= len(content) - 1)
        assert list(folder.done().values()) == batches[:whole], end


def test_folders_that_are_taken(tmp_path):
    folder = Folder(tmp_path / "out")
    with pytest.raises(ConfigError, match="holds no evaluation; leave --resume out"):
        folder.begin({}, resume=True)
    folder.begin({"decoding": {"beams": 5, "stop": None}, "x": 1}, resume=False)
    with pytest.raises(ConfigError, match="holds an evaluation already; pass --resume"):
        folder.begin({}, resume=False)
    folder.begin({"decoding": {"beams": 5, "stop": None}, "x": 1}, resume=True)
    with pytest.raises(ConfigError, match=r"another evaluation: decoding\.beams is 5 there and 1 here"):
        folder.begin({"decoding": {"beams": 1, "stop": None}, "x": 1}, resume=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="which is not of an evaluation"):
        Folder(tmp_path / "other").begin({}, resume=False)
    with pytest.raises(ConfigError, match="is a file"):
        Folder(tmp_path / "other" / "thesis.tex").begin({}, resume=False)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (TASKS[:2], "one run has 4 examples and the other 2; the first 2 are the same"),
        (TASKS[::-1], "the same 4 examples in another order"),
        ([*TASKS[:1], Task("new", ("x",), ""), *TASKS[2:]], "4 and 4 examples, of which 3 are in both.*example 1"),
        ([*TASKS[:3], Task(TASKS[3].input, ("other",), "")], "of which 3 are in both.*example 3"),
    ],
)
def test_runs_on_other_data_are_not_compared(tmp_path, other, said):
    folder = Folder(tmp_path / "other")
    folder.begin({}, resume=False)
    folder.finish(other, [""] * len(other))
    with pytest.raises(ConfigError, match=rf"saw different data: .*{said}"):
        against(folder.path, TASKS)
    with pytest.raises(DataError, match="was changed"):
        folder.written(TASKS)


def test_a_folder_without_predictions_is_nothing_to_compare_with(tmp_path):
    with pytest.raises(ConfigError, match=r"has no predictions\.jsonl"):
        against(tmp_path, TASKS)
    (tmp_path / "predictions.jsonl").write_text('{"prediction": "x"}\n')
    with pytest.raises(ConfigError, match="does not say which examples"):
        against(tmp_path, TASKS)


def test_json_has_no_infinity():
    assert finite({"a": [math.inf, 1.5, (math.nan,)], "b": "x"}) == {"a": [None, 1.5, [None]], "b": "x"}
    from foreword.evaluate.metrics import score

    record = record_of(score(["a b"], [["a b"]], metrics=["bleu", "cider"]))
    assert json.loads(json.dumps(record))["cider"] == {
        "value": 0.0, "low": None, "high": None, "unit": "", "higher_is_better": True, "note": record["cider"]["note"]
    }  # fmt: skip
