"""Tasks: the packaged reviews, E2E from a folder, files, and what is refused."""

from __future__ import annotations

import csv
import json
import re

import comparing
import pytest

from foreword.compare.tasks import Limits, load_task, other_reviews, without_slot
from foreword.errors import ConfigError, DataError


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture
def told(tmp_path):
    rows = [{"question": f"What is {i}?", "answers": [f"It is {i}.", f"{i}"], "kind": str(i % 2)} for i in range(12)]
    for name in ("train", "valid", "test"):
        write(tmp_path / f"{name}.jsonl", rows)

    def tell(text="", drop=()):
        lines = {
            "name": "numbers", "train": "train.jsonl", "valid": "valid.jsonl", "test": "test.jsonl",
            "columns": "{input: question, references: answers}", "metrics": "[bleu, rougeL]",
        }  # fmt: skip
        path = tmp_path / "task.yaml"
        path.write_text("".join(f"{k}: {v}\n" for k, v in lines.items() if k not in drop) + text)
        return str(path)

    return tell


def test_a_file_is_a_task(told):
    text = (
        'generation: {max_new_tokens: 9, stop: "\\n"}\ninit: Numbers.\nend: "\\n"\nwhere: {kind: 1}\nmax_length: 33\n'
    )
    task = load_task(told(text), limits=Limits(train=5, valid=2, test=None))
    assert task.name == "numbers" and task.metrics == ("bleu", "rougeL") and task.decoding.max_new_tokens == 9
    assert (task.init, task.max_length) == ("Numbers.", 33) and task.decoding.stop == "\n"
    assert [len(p) for p in (task.train, task.valid, task.tests["test"])] == [5, 2, 6]
    assert all(r["input"].endswith("?\n") and int(r["input"][8:-2]) % 2 for r in task.tests["test"])
    assert all(len(r["references"]) == 2 for r in task.valid) and all("output" in r for r in task.train)


def test_options_replace_what_the_task_says(told):
    changes = {"metrics": ["CHRF"], "max_length": 50, "init": None, "decoding": {"beams": 5}}
    task = load_task(told(), changes=changes)
    assert task.metrics == ("chrf",) and task.max_length == 50 and task.decoding.beams == 5
    assert load_task(told(), changes={"metrics": []}).metrics == ()


@pytest.mark.parametrize(
    ("text", "drop", "said"),
    [
        ("metric: [bleu]\n", (), "no key is called 'metric'; did you mean metrics"),
        ("generation: {max_tokens: 3}\n", (), "no key is called 'max_tokens'; did you mean .*max_new_tokens"),
        ("generation: 3\n", (), "expected keys with values"),
        ("generation: {beams: 0}\n", (), "beams=0"),
        ("", ("valid",), "lacks 'valid'; a task needs"),
        ("max_length: long\n", (), "max_length is 'long'"),
        ("metrics: bleu\n", ("metrics",), "expected a list of names"),
        ("metrics: [blue]\n", ("metrics",), "no metric is called 'blue'; did you mean"),
        ("where: 3\n", (), "where is 3"),
        ("init: [", (), "cannot be read"),
    ],
)
def test_what_a_file_may_not_say(told, text, drop, said):
    with pytest.raises(ConfigError, match=said):
        load_task(told(text, drop))


def test_files_that_are_not_there(told, tmp_path):
    path = told()
    (tmp_path / "valid.jsonl").unlink()
    with pytest.raises(DataError, match=r"valid\.jsonl: there is no such file"):
        load_task(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_task(str(tmp_path / "none.yaml"))
    with pytest.raises(ConfigError, match="did you mean reviews"):
        load_task("review")


def test_metrics_need_an_input_to_write_from():
    with pytest.raises(DataError, match=r"example 0 has no input to write from; leave the metrics out"):
        comparing.task(tests={"test": [{"text": "All of it."}]})
    assert comparing.task(tests={"test": [{"text": "All of it."}]}, metrics=()).metrics == ()
    with pytest.raises(DataError, match="there are no valid examples"):
        comparing.task(valid=[])


def test_other_data_are_another_task():
    facts = comparing.task().facts()
    assert facts == comparing.task().facts()
    assert facts != comparing.task(train=comparing.RECORDS[::-1]).facts()
    assert facts != comparing.task(tests={"test": comparing.RECORDS[:2]}).facts()


# ---------------------------------------------------------------- E2E

TABLES = [
    ("name[The Eagle], food[French], area[riverside]", ["The Eagle serves French food.", "French food at The Eagle."]),
    ("name[The Mill], area[city centre]", ["The Mill is in the centre."]),
    ("name[Aromi], eatType[pub]", ["Aromi is a pub.", "A pub: Aromi."]),
    ("name[Zizzi], food[English]", ["Zizzi is English."]),
    ("name[Cotto], eatType[pub]", ["Cotto is a pub."]),
    ("name[Clowns], food[Indian]", ["Clowns is Indian."]),
    ("name[Strada], area[riverside]", ["Strada is at the river."]),
    ("name[Wildwood], food[Fast food]", ["Wildwood has burgers."]),
]


def e2e_folder(path, kind):
    for jsonl, table in (("train.jsonl", "trainset.csv"), ("valid.jsonl", "devset.csv")):
        if kind == "jsonl":
            write(path / jsonl, [{"input": t, "references": r} for t, r in TABLES])
        else:
            with (path / table).open("w", newline="") as file:
                rows = csv.writer(file)
                rows.writerow(("mr", "ref"))
                rows.writerows((t, ref) for t, refs in TABLES for ref in refs)
    return path


def test_e2e_in_both_its_forms_is_the_same(tmp_path):
    made = []
    for kind in ("jsonl", "csv"):
        folder = tmp_path / kind
        folder.mkdir()
        made.append(load_task("e2e", data_dir=e2e_folder(folder, kind)))
    assert made[0].facts() == made[1].facts()
    task = made[0]
    assert len(task.train) == 10 and len(task.valid) == len(task.tests["test"]) == 4
    inputs = [{r["input"] for r in part} for part in (task.valid, task.tests["test"])]
    assert not inputs[0] & inputs[1] and all(i.endswith("]\n") for part in inputs for i in part)
    assert "our own cut" in task.note and "slot-coverage" in task.metrics


def test_e2e_says_where_its_data_are(tmp_path):
    with pytest.raises(ConfigError, match=r"needs --data-dir: .*tuetschek/e2e-dataset"):
        load_task("e2e")
    with pytest.raises(DataError, match=r"has no train\.jsonl or trainset\.csv"):
        load_task("e2e", data_dir=tmp_path)


def test_a_slot_is_left_out_of_training(tmp_path):
    task = without_slot(load_task("e2e", data_dir=e2e_folder(tmp_path, "jsonl")), "food")
    assert not any("food[" in r["input"] for r in [*task.train, *task.valid, *task.tests["without food"]])
    assert all("food[" in r["input"] for r in task.tests["with food"]) and task.tests["with food"]
    assert len(without_slot(load_task("e2e", data_dir=tmp_path), "food", Limits(2, 1, 1)).train) == 2
    with pytest.raises(ConfigError, match="leaving out the slot 'colour'"):
        without_slot(load_task("e2e", data_dir=tmp_path), "colour")


# ---------------------------------------------------------------- the packaged reviews


@pytest.mark.parametrize("name", ["reviews", "sentiment"])
def test_the_packaged_reviews(name):
    few, many = (load_task(name, limits=Limits(n, 40, 50)) for n in (100, 400))
    assert few.valid == many.valid and few.tests == many.tests and few.train == many.train[:100]
    parts = [{r["input"] + r["output"] for r in part} for part in (many.train, many.valid, many.tests["test"])]
    assert [len(p) for p in parts] == [400, 40, 50] and not parts[0] & parts[1] and not parts[0] & parts[2]
    if name == "sentiment":
        assert {r["output"] for r in many.train} == {" positive", " negative"}
    else:
        assert all(r["label"] == "positive" and len(r["input"].split()) == 4 for r in many.train)


def test_another_source_of_reviews():
    task = other_reviews(Limits(50, 20, 30))
    assert list(task.tests) == ["IMDB", "Rotten Tomatoes"] and len(task.tests["Rotten Tomatoes"]) == 30
    texts = {r["input"] + r["output"] for r in task.tests["IMDB"]}
    assert not texts & {r["input"] + r["output"] for r in task.tests["Rotten Tomatoes"]}


def test_conversations_from_a_file(tmp_path):
    tools = [{"type": "function", "function": {"name": "f"}}]
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    row = {"messages": talk, "tools": tools, "label": "x"}
    split = {"prompt": talk + talk[:1], "completion": talk[1:]}
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in (row, split)))
    text = "name: t\ntrain: d.jsonl\nvalid: d.jsonl\ntest: d.jsonl\nmetrics: [bleu]\n"
    (tmp_path / "t.yaml").write_text(text + "turns: last\n")
    task = load_task(str(tmp_path / "t.yaml"))
    assert {"messages": talk, "tools": tools, "label": "x"} in task.train and split in task.train
    assert task.turns == "last" and task.facts()["turns"] == "last"
    (tmp_path / "t.yaml").write_text(text + "turns: first\n")
    with pytest.raises(ConfigError, match="turns is 'first'; expected all or last"):
        load_task(str(tmp_path / "t.yaml"))
    (tmp_path / "t.yaml").write_text(text + "group: true\n")
    with pytest.raises(DataError, match="keys end and group are for inputs and outputs"):
        load_task(str(tmp_path / "t.yaml"))
    (tmp_path / "d.jsonl").write_text(json.dumps({"question": "q", "answer": "a"}) + "\n")
    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(DataError, match=re.escape("columns: {input: question, output: answer}, or chat: true")):
        load_task(str(tmp_path / "t.yaml"))
    (tmp_path / "t.yaml").write_text(text + "chat: true\n")
    assert load_task(str(tmp_path / "t.yaml")).train == [{"messages": talk}]
