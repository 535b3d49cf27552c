"""Any method on any architecture: it trains, generates, is saved, comes back from the file, and leaves nothing."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import foreword as fw
import zoo
from test_methods import with_labels

DECODERS = ("llama", "gpt2", "gemma2", "gemma3", "qwen3", "mistral", "neox", "opt", "phi3")
BOTH = ("t5", "bart")
ENCODERS = ("bert", "roberta", "modernbert")
SIZE, TASKS = 5, ("one", "two")


@st.composite
def prefixes(draw, causal: bool):
    """A prefix of any kind that the model can have."""
    config = {
        "length": draw(st.integers(1, 4)),
        "init": draw(st.sampled_from(["random", zoo.SENTENCES[0], "words:film good lovely acting"])),
        "repeat": True,
        "reparam": draw(st.sampled_from(["direct", "mlp", "low-rank"])),
        "depth": draw(st.integers(1, 3)),
        "hidden": 8,
        "rank": 2,
        "per_kind": draw(st.booleans()),
        "sites": draw(st.sampled_from([None, "first:1", "last:1", "every:2"])),
        "gate": draw(st.sampled_from([None, "head", "zero", "input"])),
        "strength": draw(st.sampled_from([1.0, 0.5, 2.0])),
        "dropout": draw(st.sampled_from([0.0, 0.2])),
        "position_offset": draw(st.sampled_from([0, 4])) if causal else 0,
        "visible": draw(st.sampled_from(["all", "infix", "infix:1", "first:3", "window:1:6"])) if causal else "all",
    }
    config["freeze_first"] = config["length"] > 1 and draw(st.booleans())
    given = draw(st.sampled_from([None, "tasks", "condition"]))
    if given == "tasks":
        config["tasks"] = TASKS
    if given == "condition":
        config |= {"reparam": "mlp", "depth": max(2, config["depth"]), "condition": SIZE}
    if config["reparam"] == "mlp" and draw(st.booleans()):
        config["share"] = "layers"
    if config["reparam"] == "direct" and given == "tasks" and draw(st.booleans()):
        config["share"] = "keys"
    return fw.PrefixConfig(**config)


def memories(rotary: bool):
    return st.builds(
        fw.MemoryConfig,
        rank=st.sampled_from([None, 1, 3]),
        activation=st.sampled_from(["elu", "gelu"]),
        queries=st.sampled_from(["rotated", "plain"] if rotary else ["rotated"]),
    )


WEIGHTS = st.sampled_from([
    fw.LoRAConfig(rank=2, targets="all-linear"), fw.AdapterConfig(width=4), fw.AdapterConfig(width=4, style="pfeiffer"),
    fw.BitFitConfig(missing="add"), fw.FullConfig(),
])  # fmt: skip


@st.composite
def cases(draw):
    name = draw(st.sampled_from([*DECODERS, *BOTH, *ENCODERS]))
    causal, rotary = name in DECODERS, name in zoo.ROTARY
    at_sites = draw(st.sampled_from(["prefix", "memory", "prompt", "prefix and memory", "nothing"]))
    items = []
    if "prefix" in at_sites:
        items.append(draw(prefixes(causal)))
    if "memory" in at_sites:
        items.append(draw(memories(rotary)))
    if at_sites == "prompt":
        assume(name not in ENCODERS)
        items.append(fw.PromptConfig(length=draw(st.integers(1, 4)), init="random"))
    if at_sites == "nothing" or draw(st.booleans()):
        items.append(draw(WEIGHTS))
    return name, items, draw(st.booleans())


def asked(items):
    """What each row is given, and what to bake: for two rows."""
    config = next((i for i in items if isinstance(i, fw.PrefixConfig)), None)
    if config is not None and config.tasks:
        return {"task": ["two", "two"]}, {"task": "two"}
    if config is not None and config.condition:
        vector = torch.linspace(-1, 1, SIZE)
        return {"condition": vector.expand(2, -1)}, {"condition": vector}
    return {}, {}


def trained(tuning, model, arguments, rows):
    for _ in range(2):
        model(**arguments, **rows).loss.backward()
        for parameter in tuning.parameters():
            if parameter.grad is not None:
                assert parameter.grad.isfinite().all()
                parameter.data -= 0.2 * parameter.grad
                parameter.grad = None


@pytest.mark.slow
@settings(max_examples=120)
@given(case=cases())
def test_any_method_on_any_architecture(case):
    name, items, checkpointing = case
    model, arguments = zoo.build(name), with_labels(name)
    base, before = zoo.logits(model, **arguments), {n: p.clone() for n, p in model.named_parameters()}
    rows, one = asked(items)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    tuning = fw.attach(model, items, tokenizer=zoo.tokenizer())
    trained(tuning, model, arguments, rows)
    if checkpointing:
        model.gradient_checkpointing_disable()
    model.eval()
    moved = zoo.logits(model, **arguments, **rows)
    assert moved.isfinite().all() and not torch.equal(moved, base)
    written = None
    if model.can_generate():
        ids, options = {"input_ids": arguments["input_ids"]}, {"max_new_tokens": 3, "do_sample": False}
        with tuning.given(**rows) if rows else torch.no_grad():
            written = model.generate(**ids, **options)
            assert torch.equal(model.generate(**ids, **options, use_cache=False), written)
    prefix = tuning.bake(**one)
    tuning.detach()
    assert torch.equal(zoo.logits(model, **arguments), base)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    with tempfile.TemporaryDirectory() as folder:
        loaded = fw.Prefix.load(prefix.save(Path(folder) / "p"))
    assert loaded == prefix
    again = fw.attach(model, loaded)
    torch.testing.assert_close(zoo.logits(model, **arguments), moved, atol=1e-4, rtol=1e-3)
    if written is not None:
        assert torch.equal(model.generate(**ids, **options), written)
    again.detach()
    assert torch.equal(zoo.logits(model, **arguments), base)
