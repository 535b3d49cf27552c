"""Collating: padding can be taken off again, and never counts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from foreword.data import Collator, EncodedDataset, EncodeStats, Example, encode
from foreword.errors import DataError

PAD = 3
token = st.integers(0, 50)
sequence = st.lists(token, min_size=1, max_size=12)
multiple = st.one_of(st.none(), st.integers(1, 8))


def causal(ids: list[int], start: int) -> dict[str, list[int]]:
    return {"input_ids": ids, "labels": [-100] * start + ids[start:]}


@settings(deadline=None)
@given(st.lists(st.tuples(sequence, st.integers(0, 12)), min_size=1, max_size=6), multiple)
def test_round_trip(rows: list[tuple[list[int], int]], to: int | None) -> None:
    examples = [causal(ids, min(start, len(ids))) for ids, start in rows]
    batch = Collator(PAD, pad_to_multiple_of=to)(examples)
    assert list(batch) == ["input_ids", "attention_mask", "labels", "boundary"]
    longest = max(len(ids) for ids, _ in rows)
    length = batch["input_ids"].shape[1]
    assert longest <= length < longest + (to or 1)
    assert length % (to or 1) == 0
    boundary = batch.pop("boundary")
    for tensor in batch.values():
        assert tensor.dtype == torch.long
        assert tensor.shape == (len(rows), length)
    assert boundary.dtype == torch.long and boundary.tolist() == [min(start, len(ids)) for ids, start in rows]
    for index, example in enumerate(examples):
        count = len(example["input_ids"])
        assert batch["attention_mask"][index].tolist() == [1] * count + [0] * (length - count)
        assert batch["input_ids"][index].tolist() == example["input_ids"] + [PAD] * (length - count)
        assert batch["labels"][index].tolist() == example["labels"] + [-100] * (length - count)


@settings(deadline=None)
@given(st.lists(st.tuples(sequence, sequence), min_size=1, max_size=6), multiple)
def test_seq2seq_pads_both_sides_apart(rows: list[tuple[list[int], list[int]]], to: int | None) -> None:
    batch = Collator(PAD, seq2seq=True, pad_to_multiple_of=to)(
        [{"input_ids": ids, "labels": labels} for ids, labels in rows]
    )
    for side, name, filler in ((0, "input_ids", PAD), (1, "labels", -100)):
        longest = max(len(row[side]) for row in rows)
        assert longest <= batch[name].shape[1] < longest + (to or 1)
        for index, row in enumerate(rows):
            padding = batch[name].shape[1] - len(row[side])
            assert batch[name][index].tolist() == row[side] + [filler] * padding
    assert batch["attention_mask"].sum(dim=1).tolist() == [len(ids) for ids, _ in rows]


def test_an_end_token_used_as_padding_stays_supervised_where_it_is_real() -> None:
    batch = Collator(9)([causal([1, 2, 9], 1), causal([1, 2, 3, 4, 9], 1)])
    assert batch["labels"][0].tolist() == [-100, 2, 9, -100, -100]
    assert batch["attention_mask"][0].tolist() == [1, 1, 1, 0, 0]


def test_refusals() -> None:
    with pytest.raises(DataError, match="at least one example"):
        Collator(PAD)([])
    with pytest.raises(DataError, match="Example 1 of the batch has 2 ids and 1 labels"):
        Collator(PAD)([causal([1], 0), {"input_ids": [1, 2], "labels": [1]}])
    with pytest.raises(DataError, match="pad_to_multiple_of"):
        Collator(PAD, pad_to_multiple_of=0)
    for wrong in (-1, None, True):
        with pytest.raises(DataError, match="pad_token_id"):
            Collator(wrong)  # type: ignore[arg-type]


def test_for_tokenizer(plain: PreTrainedTokenizerFast) -> None:
    assert Collator.for_tokenizer(plain, seq2seq=True, pad_to_multiple_of=4) == Collator(
        plain.pad_token_id, seq2seq=True, pad_to_multiple_of=4
    )
    backend = plain.backend_tokenizer
    ended = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    assert Collator.for_tokenizer(ended).pad_token_id == plain.eos_token_id
    with pytest.raises(DataError, match="neither a padding nor an end token"):
        Collator.for_tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))


def test_in_a_data_loader(plain: PreTrainedTokenizerFast) -> None:
    examples = [Example("a" * n, "b", f"list[{n}]") for n in range(1, 6)]
    data = encode(examples, plain, max_length=20)
    loader = DataLoader(data, batch_size=2, collate_fn=Collator.for_tokenizer(plain))
    batches = list(loader)
    assert [len(batch["input_ids"]) for batch in batches] == [2, 2, 1]
    assert sum(int(batch["attention_mask"].sum()) for batch in batches) == data.stats.tokens
    assert sum(int((batch["labels"] != -100).sum()) for batch in batches) == data.stats.supervised_tokens


def test_conditions_and_tasks_are_kept():
    stats = EncodeStats(2, 0, 0, 4, 4, 2)
    plain = EncodedDataset([[1, 2], [3]], [[1, 2], [3]], stats)
    vectors = torch.tensor([[0.5, 1.0], [2.0, 3.0]], dtype=torch.float64)
    dataset = plain.with_column("condition", vectors).with_column("task", ["a", "b"])
    batch = Collator(0)([dataset[0], dataset[1]])
    assert torch.equal(batch["condition"], vectors.float()) and batch["task"] == ["a", "b"]
    assert batch["input_ids"].tolist() == [[1, 2], [3, 0]]
    assert set(Collator(0)([plain[0], plain[1]])) == {"input_ids", "attention_mask", "labels", "boundary"}
    with pytest.raises(DataError, match="3 values for 'task' and 2 examples"):
        plain.with_column("task", ["a", "b", "c"])
    with pytest.raises(DataError, match="can't be named 'labels'"):
        plain.with_column("labels", ["a", "b"])


def test_an_example_says_where_its_output_begins() -> None:
    """For infixes: its own word, or the first token with a label (of several turns, the first answer's)."""
    turns = {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, 6, -100, -100, 9]}
    none = {"input_ids": [5, 6], "labels": [-100, -100]}
    assert Collator(PAD)([turns, {**turns, "boundary": 3}, {**turns, "boundary": 0}, none])["boundary"].tolist() == [
        1, 3, 0, 2,
    ]  # fmt: skip
    assert "boundary" not in Collator(PAD, seq2seq=True)([turns])
    for own in (6, -1, 1.5, True):
        with pytest.raises(DataError, match=r"boundary of example 1 .* of its 5 tokens"):
            Collator(PAD)([turns, {**turns, "boundary": own}])
