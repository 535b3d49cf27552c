"""What happens to the cache's blocks: sharing, preemption, chunks, prefixes that are replaced or taken away."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
import small_models as small
import torch
from vllm_engines import PLACE, engine, greedy, lines

import foreword as fw
import zoo
from foreword.serve.vllm.tasks import Tasks

TOKENS, SIZE = 12, 32


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model, its folder, two tasks, and texts as ids."""
    folder = tmp_path_factory.mktemp("vllm")
    model = small.build("llama")
    prefixes = {"a": small.prefix(model, 75, 1), "b": small.prefix(model, 40, 2)}
    for name, made in prefixes.items():
        made.save(folder / "shelf" / name)
    tokenizer = zoo.tokenizer()
    ids = [tokenizer.encode(t, add_special_tokens=False) for t in small.TEXTS]
    small.save(model, folder / "model")
    return SimpleNamespace(model=model, prefixes=prefixes, folder=folder / "model", shelf=folder / "shelf", ids=ids)


@pytest.fixture(scope="module")
def running(home, tmp_path_factory):
    """One engine for what doesn't disturb the others: chunks of 16 tokens, 12 blocks."""
    events = tmp_path_factory.mktemp("events") / "events.jsonl"
    more = {"max_num_batched_tokens": 16, "enable_chunked_prefill": True, "blocks": 14, "max_num_seqs": 8}
    with engine(home.folder, home.shelf, events=events, extra={"prompt_logprobs": True}, **more) as llm:
        yield SimpleNamespace(llm=llm, events=events, tasks=Tasks(home.shelf, PLACE))


def expected(home, task, ids, tokens=TOKENS):
    return small.expected(home.model, home.prefixes.get(task), ids, tokens)


def test_the_second_request_of_a_task_shares_the_first_ones_blocks(home, running):
    first, second = (running.tasks.get("a").prompt(ids) for ids in home.ids[:2])
    assert greedy(running.llm, [first], TOKENS) == [expected(home, "a", home.ids[0])]
    assert greedy(running.llm, [second], TOKENS) == [expected(home, "a", home.ids[1])]
    one, two = (e for e in lines(running.events) if e["event"] == "loaded")
    assert (one["start"], one["stop"], two["start"], two["stop"]) == (0, 75, 64, 75)
    allocated = [e["blocks"] for e in lines(running.events) if e["event"] == "allocated"]
    assert allocated[0][:2] == allocated[1][:2] and allocated[0][2] != allocated[1][2]


def test_another_salt_of_the_client_shares_nothing(home, running):
    before = len(lines(running.events))
    prompt = running.tasks.get("a").prompt(home.ids[0], salt="mine")
    assert greedy(running.llm, [prompt], TOKENS) == [expected(home, "a", home.ids[0])]
    (loaded,) = (e for e in lines(running.events)[before:] if e["event"] == "loaded")
    assert loaded["start"] == 0


def test_requests_that_are_preempted_go_on_with_their_prefix(home, running):
    before, asked = len(lines(running.events)), [(t, ids) for t in ("a", "b", None) for ids in home.ids]
    prompts = [running.tasks.get(t).prompt(ids, salt=str(i)) if t else {"prompt_token_ids": ids}
               for i, (t, ids) in enumerate(asked)]  # fmt: skip
    assert greedy(running.llm, prompts, 60) == [expected(home, t, ids, 60) for t, ids in asked]
    assert any(e.get("preempted") for e in lines(running.events)[before:])


@pytest.mark.parametrize("task", ["a", "b"])
def test_scores_of_the_prompt_are_forewords(home, running, task):
    from vllm import SamplingParams

    ids, prompt = home.ids[0], running.tasks.get(task).prompt(home.ids[0], salt="scores")
    length = home.prefixes[task].longest
    wanted = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, prompt_logprobs=0, detokenize=False)
    (out,) = running.llm.generate([prompt], wanted, use_tqdm=False)
    assert list(out.outputs[0].token_ids) == expected(home, task, ids)
    tuning = fw.attach(home.model, home.prefixes[task])
    scores = zoo.logits(home.model, input_ids=torch.tensor([ids]))[0].log_softmax(-1)
    tuning.detach()
    theirs = [out.prompt_logprobs[length + i][ids[i]].logprob for i in range(1, len(ids))]
    ours = [float(scores[i - 1, ids[i]]) for i in range(1, len(ids))]
    assert max(abs(a - b) for a, b in zip(theirs, ours, strict=True)) < 1e-3
    # What it left in the cache is the prefix, not what the placeholders were as text.
    assert greedy(running.llm, [prompt], TOKENS) == [expected(home, task, ids)]


def test_bad_requests_end_alone(home, running):
    from vllm import SamplingParams

    good = running.tasks.get("b")
    text = home.ids[0]
    bad = [
        {"prompt_token_ids": text, "cache_salt": str(good.salt)},  # no placeholders
        {"prompt_token_ids": good.before([]), "cache_salt": str(good.salt)},  # no text
        {"prompt_token_ids": good.before(text), "cache_salt": "foreword:b"},
        {
            "prompt_token_ids": good.before(text),
            "cache_salt": str(good.salt).replace(":b", ":c").replace(good.salt.digest, "1" * 32),
        },  # no such prefix
        {"prompt_token_ids": good.before(text), "cache_salt": str(good.salt).replace(good.salt.digest, "0" * 32)},
    ]
    wanted = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
    for prompt in bad:
        outs = running.llm.generate([prompt, good.prompt(text)], wanted, use_tqdm=False)
        assert outs[0].outputs[0].finish_reason == "error", prompt
        assert list(outs[1].outputs[0].token_ids) == expected(home, "b", text)


def test_a_replaced_prefix_is_another_task_and_one_that_is_gone_fails(home, running):
    fresh, text = small.prefix(home.model, 40, 9), home.ids[0]
    small.prefix(home.model, 40, 8).save(home.shelf / "c")
    old = running.tasks.get("c")
    fresh.save(home.shelf / "c")
    new = running.tasks.get("c")
    assert old.salt.digest != new.salt.digest
    # The old one was never loaded, so it is gone; the new one answers.
    from vllm import SamplingParams

    wanted = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
    outs = running.llm.generate([old.prompt(text), new.prompt(text)], wanted, use_tqdm=False)
    assert outs[0].outputs[0].finish_reason == "error"
    assert list(outs[1].outputs[0].token_ids) == small.expected(home.model, fresh, text, TOKENS)
    shutil.rmtree(home.shelf / "c")  # what a worker holds goes on
    assert greedy(running.llm, [new.prompt(text, "x")], TOKENS) == [small.expected(home.model, fresh, text, TOKENS)]
    with pytest.raises(fw.PrefixFileError, match="no prefix 'c'"):
        running.tasks.get("c")
