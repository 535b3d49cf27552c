"""Greedy tokens of the real vLLM are foreword's own: several architectures; tasks and lengths mixed in a batch."""

from __future__ import annotations

import pytest
import small_models as small
from vllm_engines import PLACE, engine, greedy, lines

import zoo
from foreword.serve.vllm.tasks import Tasks

TOKENS = 16


@pytest.mark.parametrize("name", small.MODELS)
def test_tokens_are_forewords(tmp_path, name):
    model, learned = small.build(name), name in small.LEARNED
    folder, shelf, events = small.save(model, tmp_path / "model"), tmp_path / "shelf", tmp_path / "events.jsonl"
    lengths = {"short": 5, "block": 32, "long": 75}
    prefixes = {n: small.prefix(model, length, seed, learned) for seed, (n, length) in enumerate(lengths.items())}
    for task, made in prefixes.items():
        made.save(shelf / task)
    tasks, tokenizer = Tasks(shelf, PLACE), zoo.tokenizer()
    texts = [tokenizer.encode(t, add_special_tokens=False) for t in small.TEXTS]
    asked = [(task, ids) for ids in texts for task in (*lengths, None)]
    # Before vLLM starts: it serves some architectures with transformers' own classes, which it changes for that.
    wanted = [small.expected(model, prefixes.get(t), ids, TOKENS) for t, ids in asked]
    with engine(folder, shelf, by_module=name == "qwen2", events=events) as llm:
        prompts = [tasks.get(t).prompt(ids) if t else {"prompt_token_ids": ids} for t, ids in asked]
        found = greedy(llm, prompts, TOKENS)
    assert found == wanted
    assert len({tuple(w) for w in wanted}) > len(texts)  # the prefixes do something
    assert {e["event"] for e in lines(events)} == {"ready", "allocated", "loaded"}
