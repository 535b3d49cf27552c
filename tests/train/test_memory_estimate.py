"""The estimate against the peak that torch's profiler counts in a real run, and that it leaves the run alone."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch.profiler import ProfilerActivity, profile

import foreword as fw
import zoo
from foreword.train._live import LiveBytes, bytes_of, size_of, smaller, step_peak
from foreword.train.memory_estimate import estimate_memory

EVERY_SECOND = {"use_reentrant": False, "every_n_layers": 2}


def allocated_at_the_peak(run):
    """Bytes that torch's allocator gave out during a run, at its highest moment (not by the way that we count)."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events, found = list(profiler.profiler.kineto_results.experimental_event_tree()), []
    while events:
        event = events.pop()
        events += event.children
        if type(event.extra_fields).__name__ == "_ExtraFields_Allocation":
            found.append((event.start_time_ns, event.extra_fields.alloc_size))
    now = peak = 0
    for _, size in sorted(found, key=lambda e: e[0]):
        now += size
        peak = max(peak, now)
    return peak


def training(model, out, **arguments):
    settings = {"save_strategy": "no", "max_steps": 2, "per_device_train_batch_size": 8, **arguments}
    return tiny.trainer(model, out, tiny.rows(16, 100), **settings)


@pytest.fixture(scope="module", autouse=True)
def _profiler_at_work(tmp_path_factory):
    """The profiler's first session around a run may see no allocation: that one is thrown away."""
    for _ in range(3):
        model, _ = tiny.tuned("llama")
        if allocated_at_the_peak(training(model, tmp_path_factory.mktemp("first")).train):
            return
    pytest.fail("torch's profiler sees no allocations here")


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("llama", {}),
        ("llama", {"gradient_checkpointing": True}),
        ("llama", {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": EVERY_SECOND}),
        ("llama", {"bf16": True}),
        ("llama", {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}),
        ("gpt2", {}),
        ("t5", {"gradient_checkpointing": True}),
        ("bert", {}),
    ],
)
def test_the_estimate_is_the_measured_peak(name, arguments, tmp_path):
    model, _ = tiny.tuned(name)
    trainer = training(model, tmp_path, **arguments)
    estimate = estimate_memory(trainer)
    # What stood before the profiler began: the weights, and the parameters.
    predicted = estimate.total - estimate.base - estimate.trained
    assert 0.9 < predicted / allocated_at_the_peak(trainer.train) < 1.1
    assert estimate.step > 10 * estimate.trained and min(estimate.parts.values()) >= 0


@pytest.mark.parametrize("arguments", [{}, {"gradient_checkpointing": True}])
@pytest.mark.parametrize("name", ["mixtral", "qwen3moe", "gptoss", "deepseek"])
def test_experts_are_estimated_within_a_fifth(name, arguments, tmp_path):
    """Which of them a token goes to depends on the numbers, so steps of two sizes are not the same ops."""
    model, _ = tiny.tuned(name)
    trainer = training(model, tmp_path, **arguments)
    estimate = estimate_memory(trainer)
    predicted = estimate.total - estimate.base - estimate.trained
    assert 0.8 < predicted / allocated_at_the_peak(trainer.train) < 1.2


@pytest.mark.parametrize("length", [100, 200])
def test_linear_attention_is_counted_in_its_chunks(length, tmp_path):
    model, _ = tiny.tuned("qwen3next")
    settings = {"save_strategy": "no", "max_steps": 2, "per_device_train_batch_size": 8}
    trainer = tiny.trainer(model, tmp_path, tiny.rows(16, length), **settings)
    estimate = estimate_memory(trainer)
    predicted = estimate.total - estimate.base - estimate.trained
    assert 0.85 < predicted / allocated_at_the_peak(trainer.train) < 1.15


def test_full_fine_tuning_counts_gradients_and_optimizer(tmp_path):
    model = zoo.build("llama")
    fw.attach(model, fw.FullConfig())
    trainer = training(model, tmp_path, per_device_train_batch_size=1)
    estimate = estimate_memory(trainer)
    weights = bytes_of(model.parameters())
    assert estimate.trained == weights and estimate.optimizer == 2 * weights and estimate.base < weights / 20
    predicted = estimate.total - estimate.base - estimate.trained
    assert 0.85 < predicted / allocated_at_the_peak(trainer.train) < 1.15


def test_checkpointing_and_fewer_rows_need_less(tmp_path):
    model, _ = tiny.tuned("llama")
    plain = estimate_memory(training(model, tmp_path))
    less = estimate_memory(training(model, tmp_path, gradient_checkpointing=True))
    half = estimate_memory(training(model, tmp_path, per_device_train_batch_size=4))
    assert less.step < 0.8 * plain.step and less.checkpointing and not plain.checkpointing
    # The four longest need no padding mask, and the masks that a pass makes for itself end with it.
    assert half.step == pytest.approx(plain.step / 2, rel=0.04)


def test_eager_attention_grows_with_the_square_of_the_tokens(tmp_path):
    def step_of(name, tokens):
        model = zoo.build("llama")
        model.set_attn_implementation(name)
        fw.attach(model, fw.PrefixConfig(length=4, init="random"))
        ids = torch.full((8, tokens), 5)
        return estimate_memory(training(model, tmp_path), {"input_ids": ids, "labels": ids}).step

    assert step_of("sdpa", 640) / step_of("sdpa", 320) == pytest.approx(2, rel=0.15)
    assert step_of("eager", 640) / step_of("eager", 320) > 3


def test_the_run_is_what_it_would_have_been(tmp_path):
    found = []
    for estimating in (False, True):
        torch.manual_seed(3)
        model, tuning = tiny.tuned("llama", dropout=0.2)
        trainer = training(model, tmp_path, gradient_checkpointing=True)
        model.eval()
        if estimating:
            before = tiny.base_weights(model)
            estimate_memory(trainer)
            tiny.assert_base_unchanged(model, before)
            assert not model.training and not model.is_gradient_checkpointing and "forward" not in model.__dict__
        trainer.train()
        found.append((list(tiny.losses(trainer).values()), tuning.bake()))
    assert found[0][0] == found[1][0] and found[0][1] == found[1][1]


def test_live_bytes_are_those_of_living_tensors_each_storage_once():
    given = torch.ones(10)
    with LiveBytes(7) as live:
        kept = given * 2
        view = kept.view(2, 5)
        view += 1
        passing = torch.ones(100)
        wide = torch.ones(3, 7)
        del passing
        last = given + 1
    totals, logits = zip(*live.moments, strict=True)
    assert max(totals) == 40 + 400 + 84 and totals[-1] == 40 + 84 + 40 and max(logits) == logits[-1] == 84
    del kept, view, wide, last
    assert live.now == [0, 0]


def test_a_step_that_is_known_is_carried_over_exactly():
    held = []

    def step(batch):
        held.clear()
        rows, tokens = batch["input_ids"].shape
        held.append(torch.ones(1000))
        held.append(torch.ones(rows, 50))
        held.append(torch.ones(rows, tokens, 3))
        held.append(torch.ones(rows, tokens, 11))
        held.append(torch.ones(tokens, tokens))
        held.clear()

    peak = step_peak(step, {"input_ids": torch.ones(16, 500, dtype=torch.long)}, 11)
    assert (peak.once, peak.rows, peak.logits) == (4000, 16 * 50 * 4, 16 * 500 * 11 * 4)
    assert peak.tokens == 16 * 500 * 3 * 4 + 500 * 500 * 4


def test_smaller_batches_keep_what_matters():
    mask = torch.ones(4, 100, dtype=torch.long)
    mask[0, 60:] = 0
    batch = {
        "input_ids": torch.ones(4, 100, dtype=torch.long), "attention_mask": mask, "task": ["a", "b", "c", "d"],
        "labels": torch.ones(4, 50, dtype=torch.long), "pixel_values": torch.ones(4, 3, 8, 8),
    }  # fmt: skip
    assert size_of(batch) == (4, 100)
    small = smaller(batch, 2, 40)
    assert small["input_ids"].shape == (2, 40) and small["labels"].shape == (2, 20) and small["task"] == ["a", "b"]
    assert small["pixel_values"].shape == (2, 3, 8, 8)
    assert not small["attention_mask"].all() and small["attention_mask"].sum() == 79
    batch["attention_mask"] = torch.ones_like(mask)
    assert smaller(batch, 2, 40)["attention_mask"].all()


def test_a_streamed_training_set_is_refused(tmp_path):
    model, _ = tiny.tuned("llama")
    trainer = tiny.trainer(model, tmp_path)
    trainer.train_dataset = iter(tiny.rows())
    with pytest.raises(fw.ConfigError, match="give estimate_memory a batch"):
        estimate_memory(trainer)
