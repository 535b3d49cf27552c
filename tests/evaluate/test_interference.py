"""Every task's loss under every prefix, against one example at a time with the prefix attached."""

from __future__ import annotations

import json
import statistics
from collections import Counter

import pytest
import torch

import foreword as fw
import zoo
from foreword.data import Collator
from foreword.evaluate import Interference, measure_interference

LENGTHS = {"film": 3, "food": 5}


def examples(n, seed, seq2seq=False):
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i in range(n):
        ids = torch.randint(3, 99, (4 + i % 4,), generator=generator).tolist()
        labels = ids[: 2 + i % 2] if seq2seq else [-100, -100, *ids[2:]]
        found.append({"input_ids": ids, "labels": labels, "task": "anything"})
    return found


def prefixes(model):
    made = {}
    for seed, (name, length) in enumerate(LENGTHS.items()):
        states = zoo.random_prefix(model, fw.sites(model), length=length, seed=seed, scale=1.5)
        made[name] = fw.Prefix.from_tensors(model, states)
    return made


def nll(model, prefix, row, collate):
    """Of one example, summed, and its tokens."""
    tuning = fw.attach(model, prefix) if prefix is not None else None
    batch = collate([{k: v for k, v in row.items() if k != "task"}])
    with torch.no_grad():
        loss = float(model(**batch).loss)
    if tuning is not None:
        tuning.detach()
    tokens = sum(label != -100 for label in row["labels"])
    return loss * tokens, tokens


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_the_matrix_is_that_of_single_examples(name):
    model = zoo.build(name)
    made, collate = prefixes(model), Collator(0, seq2seq=name == "t5")
    data = {
        task: examples(n, seed, name == "t5") for seed, (task, n) in enumerate({"food": 5, "film": 4, "new": 3}.items())
    }
    told = []
    found = measure_interference(model, data, made, collate, batch_size=2, done=told.append)
    assert found.tasks == ["food", "film", "new"] and found.prefixes == ["film", "food"]
    assert sum(told) == 3 * (5 + 4 + 3) and max(told) == 2
    fw.attach(model, made["film"]).detach()  # nothing is left on the model
    for t, rows in enumerate(data.values()):
        for p, prefix in enumerate([*made.values(), None]):
            each = [nll(model, prefix, row, collate) for row in rows]
            tokens = sum(n for _, n in each)
            want = sum(loss for loss, _ in each) / tokens
            got = found.base[t] if prefix is None else found.losses[t][p]
            assert got == pytest.approx(want, abs=1e-4)
            assert found.tokens[t] == tokens and found.examples[t] == len(rows)
    assert found.own("film") == found.losses[1][0] and found.own("new") is None
    assert found.harm("food") == {"film": found.losses[0][0] - found.losses[0][1]}
    assert found.harm("new") == {p: x - found.base[2] for p, x in zip(("film", "food"), found.losses[2], strict=True)}
    with pytest.raises(fw.ConfigError, match=r"no task is named 'neu'; there are: food, film, new"):
        found.own("neu")


def test_the_standard_error_is_that_of_resampled_examples():
    model = zoo.build("llama")
    data, made = {"film": examples(60, 3)}, prefixes(model)
    found = measure_interference(model, data, made, Collator(0))
    assert found.errors[0][0] == 0
    each = [[nll(model, made[p], row, Collator(0)) for row in data["film"]] for p in ("film", "food")]
    apart = [(b[0] - a[0], a[1]) for a, b in zip(*each, strict=True)]
    generator = torch.Generator().manual_seed(0)
    means = []
    for _ in range(400):
        chosen = [apart[i] for i in torch.randint(60, (60,), generator=generator).tolist()]
        means.append(sum(d for d, _ in chosen) / sum(n for _, n in chosen))
    assert found.errors[0][1] == pytest.approx(statistics.stdev(means), rel=0.25)
    single = measure_interference(model, {"film": examples(1, 3)}, made, Collator(0))
    assert single.errors == [[None, None]] and "±?" in text(single)


def text(found):
    from rich.console import Console

    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(found.table())
    return console.export_text()


MATRIX = Interference(
    ["film", "food"],
    ["film", "food"],
    [[1.0, 3.25], [2.5, 0.5]],
    [4.0, 2.0],
    [[0.0, 0.25], [0.125, 0.0]],
    [9, 8],
    [90, 80],
)


def test_json_and_table():
    assert Interference(**json.loads(json.dumps(MATRIX.to_json()))) == MATRIX
    said = text(MATRIX)
    for part in ("film", "food", "(none)", "3.250 (+2.250 ±0.250)", "2.500 (+2.000 ±0.125)", "4.000", "examples"):
        assert part in said


@pytest.mark.parametrize(("name", "magic"), [("a.png", b"\x89PNG\r\n\x1a\n"), ("deep/b.svg", b"<?xml")])
def test_the_heat_map(name, magic, tmp_path):
    """Losses in the cells, the diagonal framed, and colours that follow what is worse than the own prefix."""
    path = MATRIX.draw(tmp_path / name, title="two tasks")
    assert path.read_bytes().startswith(magic) and [p.name for p in path.parent.iterdir() if p.is_file()] == [path.name]
    if path.suffix == ".svg":
        drawn = path.read_text()
        assert all(f"<!-- {loss} -->" in drawn for loss in ("1.00", "3.25", "2.50", "0.50", "4.00", "2.00"))
        assert Counter(n in drawn for n in ("<!-- film -->", "<!-- food -->", "<!-- two tasks -->"))[True] == 3


def test_refusals():
    model = zoo.build("llama")
    made, data = prefixes(model), {"film": examples(2, 0)}
    for given, with_, message in (
        ({}, made, "give one or more"),
        (data, {}, "and a prefix"),
    ):
        with pytest.raises(fw.ConfigError, match=message):
            measure_interference(model, given, with_, Collator(0))
    with pytest.raises(fw.DataError, match="'food' has no examples to measure on"):
        measure_interference(model, {**data, "food": []}, made, Collator(0))
    unsupervised = [{"input_ids": [5, 6], "labels": [-100, -100]}]
    with pytest.raises(fw.DataError, match="no example of the task 'food' has a token with a loss"):
        measure_interference(model, {"food": unsupervised}, made, Collator(0))
    with pytest.raises(fw.ConfigError, match="batch_size=0"):
        measure_interference(model, data, made, Collator(0), batch_size=0)
    other = prefixes(zoo.build("gpt2"))
    with pytest.raises(fw.MismatchError):
        measure_interference(model, data, other, Collator(0))
    fw.attach(model, made["film"]).detach()
    tuning = fw.attach(model, made["film"])
    with pytest.raises(fw.AttachError):
        measure_interference(model, data, made, Collator(0))
    tuning.detach()
    lora = fw.attach(model, [fw.PrefixConfig(length=2, init="random"), fw.BitFitConfig(missing="add")])
    both = lora.bake()
    lora.detach()
    with pytest.raises(fw.ConfigError, match="brings bitfit"):
        measure_interference(model, data, {"film": both}, Collator(0))
    fw.attach(model, made["film"]).detach()
