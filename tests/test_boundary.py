"""Where the output begins, for infixes: who says it, and that nobody else's word is taken."""

from __future__ import annotations

import contextvars
import copy
import threading
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from transformers import DataCollatorWithFlattening, DynamicCache, Trainer, TrainingArguments

import foreword as fw
import zoo
from foreword.data import Collator
from foreword.losses import example_losses
from foreword.visibility import parse

STARTS = (2, 5, 4, 1)


def examples(starts=STARTS, lengths=(6, 9, 8, 5)):
    """Examples whose output begins at different places."""
    found = []
    for seed, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        ids = zoo.ids(1, length, seed=seed)[0].tolist()
        found.append({"input_ids": ids, "labels": [-100] * start + ids[start:]})
    return found


def prefix_for(model, visible, seed=0):
    tensors = zoo.random_prefix(model, fw.sites(model), 3, seed)
    return replace(fw.Prefix.from_tensors(model, tensors), visible=parse(visible))


def close(a, b, atol=2e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-4)


def alone(model, rows):
    """Each row's logits by itself, its labels saying where its output begins."""
    return [
        zoo.logits(model, input_ids=torch.tensor([r["input_ids"]]), labels=torch.tensor([r["labels"]]))[0] for r in rows
    ]


def padded_left(rows):
    longest = max(len(r["input_ids"]) for r in rows)
    pads = [longest - len(r["input_ids"]) for r in rows]
    ids = torch.tensor([[0] * n + r["input_ids"] for n, r in zip(pads, rows, strict=True)])
    mask = torch.tensor([[0] * n + [1] * (longest - n) for n in pads])
    labels = torch.tensor([[-100] * n + r["labels"] for n, r in zip(pads, rows, strict=True)])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}, labels, pads


# ---------------------------------------------------------------- a batch


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mistral"])
@pytest.mark.parametrize("visible", ["infix", "infix:1"])
def test_the_column_of_a_batch_says_it_without_labels(name, visible):
    model, rows = zoo.build(name), examples()
    fw.attach(model, prefix_for(model, visible))
    batch = Collator(0)(rows)
    del batch["labels"]
    got = zoo.logits(model, **batch)
    for row, want in zip(got, alone(model, rows), strict=True):
        close(row[: len(want)], want)


@pytest.mark.parametrize("visible", ["infix", "infix:2"])
def test_padding_on_the_left_counts_in_indices_and_not_in_the_column(visible):
    model, rows = zoo.build("llama"), examples()
    fw.attach(model, prefix_for(model, visible))
    batch, labels, pads = padded_left(rows)
    wanted = alone(model, rows)
    found = [zoo.logits(model, **batch, labels=labels), zoo.logits(model, **batch, boundary=torch.tensor(STARTS))]
    with fw.boundary([s + n for s, n in zip(STARTS, pads, strict=True)]):
        found.append(zoo.logits(model, **batch))
    for got in found:
        for row, n, want in zip(got, pads, wanted, strict=True):
            close(row[n:], want)


def test_an_examples_own_boundary_comes_before_its_labels():
    model, row = zoo.build("llama"), examples()[1]
    fw.attach(model, prefix_for(model, "infix"))
    own = zoo.logits(model, **Collator(0)([{**row, "boundary": 3}]))
    with fw.boundary(3):
        close(zoo.logits(model, input_ids=torch.tensor([row["input_ids"]])), own)
    assert not torch.allclose(own, alone(model, [row])[0][None], atol=1e-3)
    losses = [example_losses(model, [{**row, **more}], Collator(0))[0] for more in ({}, {"boundary": 3})]
    assert abs(losses[0] - losses[1]) > 1e-3


def test_of_several_turns_the_first_answer_begins_the_output():
    model = zoo.build("llama")
    fw.attach(model, prefix_for(model, "infix"))
    ids = zoo.ids(1, 9)
    labels = ids.clone()
    labels[:, :3], labels[:, 5:7] = -100, -100
    with fw.boundary(3):
        want = zoo.logits(model, input_ids=ids)
    assert torch.equal(zoo.logits(model, input_ids=ids, labels=labels), want)


def test_a_column_is_nothing_to_prefixes_that_all_see_and_to_libraries():
    model, batch = zoo.build("llama"), Collator(0)(examples())
    plain = {k: v for k, v in batch.items() if k != "boundary"}
    assert example_losses(model, examples(), Collator(0))  # the base model's own call isn't given it
    seen = []
    model.model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(set(kwargs)), with_kwargs=True)
    prefix = prefix_for(model, "all")
    for visible in ("all", "first:3"):
        tuning = fw.attach(model, replace(prefix, visible=parse(visible)))
        assert torch.equal(zoo.logits(model, **batch), zoo.logits(model, **plain))
        tuning.detach()
    tuning = fw.attach(model, fw.PrefixConfig(length=2, init="random"))
    assert torch.equal(zoo.logits(model, **batch), zoo.logits(model, **plain))
    tuning.detach()
    library = fw.Library(model)
    library.add("a", prefix)
    with library.use("a"):
        assert torch.equal(zoo.logits(model, **batch), zoo.logits(model, **plain))
    library.detach()
    assert seen and all("boundary" not in names for names in seen)


# ---------------------------------------------------------------- packed rows


def packed(rows):
    return DataCollatorWithFlattening(return_flash_attn_kwargs=False)(copy.deepcopy(rows))


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma2"])
@pytest.mark.parametrize("visible", ["all", "first:3", "window:2:5", "infix", "infix:1"])
@pytest.mark.parametrize("said", ["labels", "column"])
def test_packed_rows_are_the_examples_apart(name, visible, said):
    model, rows = zoo.build(name), examples((2, 5, 4), (6, 9, 8))
    fw.attach(model, prefix_for(model, visible))
    batch = packed(rows)
    if said == "column":
        del batch["labels"]
        batch["boundary"] = torch.tensor([2, 5, 4])
    close(zoo.logits(model, **batch, use_cache=False)[0], torch.cat(alone(model, rows)))


def test_packed_rows_have_the_gradients_of_the_examples_apart():
    model, rows = zoo.build("llama"), examples((2, 5, 4), (6, 9, 8))
    tuning = fw.attach(model, fw.PrefixConfig(length=3, init="random", visible="infix"))
    found = []
    for batches in ([packed(rows)], [{k: torch.tensor([v]) for k, v in r.items()} for r in rows]):
        for parameter in tuning.parameters():
            parameter.grad = None
        for batch in batches:
            model(**batch, use_cache=False, num_items_in_batch=torch.tensor(12)).loss.backward()
        found.append([p.grad.clone() for p in tuning.parameters()])
    for a, b in zip(*found, strict=True):
        close(a, b, 1e-6)
        assert a.abs().max() > 1e-5


def test_several_packed_rows_with_padding_between_the_examples():
    model, rows = zoo.build("llama"), examples((2, 3, 2, 3), (5, 5, 4, 6))
    fw.attach(model, prefix_for(model, "infix"))
    ids, labels, positions = (torch.zeros(2, 11, dtype=torch.long) for _ in range(3))
    labels += -100
    places = [(0, 0), (0, 5), (1, 0), (1, 4)]
    for (row, start), example in zip(places, rows, strict=True):
        stop = start + len(example["input_ids"])
        ids[row, start:stop] = torch.tensor(example["input_ids"])
        labels[row, start:stop] = torch.tensor(example["labels"])
        positions[row, start:stop] = torch.arange(stop - start)
    positions[0, 10], positions[1, 10] = 5, 6
    want = alone(model, rows)
    by_labels = zoo.logits(model, input_ids=ids, position_ids=positions, labels=labels, use_cache=False)
    column = torch.tensor([2, 3, 2, 3])
    by_column = zoo.logits(model, input_ids=ids, position_ids=positions, boundary=column, use_cache=False)
    for got in (by_labels, by_column):
        for (row, start), logits in zip(places, want, strict=True):
            close(got[row, start : start + len(logits)], logits)


def test_packed_rows_that_do_not_say_where_outputs_begin_are_refused():
    model, rows = zoo.build("llama"), examples((2, 0, 4), (6, 9, 8))  # packing takes the first label off
    fw.attach(model, prefix_for(model, "infix"))
    batch = packed(rows)
    with pytest.raises(fw.AttachError, match="an example without input"):
        model(**batch)
    with pytest.raises(fw.AttachError, match="2 numbers, and the rows hold 3 examples"):
        model(**batch, boundary=torch.tensor([2, 0]))
    with pytest.raises(fw.AttachError, match=r"fw\.boundary says one index a row"), fw.boundary(2):
        model(**batch)
    got = zoo.logits(model, **batch, boundary=torch.tensor([2, 0, 4]), use_cache=False)
    want = torch.cat(alone(model, rows))
    close(got[0], want)


# ---------------------------------------------------------------- nobody says it


def test_a_pass_that_nobody_told_is_refused():
    """Log-probabilities that the caller computes, the backbone, scoring: today's input may be all of it, or not."""
    model, ids = zoo.build("llama"), zoo.ids(2, 9)
    tuning = fw.attach(model, fw.PrefixConfig(length=3, init="random", visible="infix"))
    for training in (True, False):
        model.train(training)
        for call in (model, model.model):
            with pytest.raises(fw.AttachError, match=r"nobody said where the output begins.*fw\.boundary"):
                call(input_ids=ids)
            with torch.no_grad(), pytest.raises(fw.AttachError, match="nobody said"):
                call(input_ids=ids, use_cache=False)
    model.train()
    with pytest.raises(fw.AttachError, match="nobody said"):
        model(input_ids=ids, use_cache=True)
    model.eval()
    with fw.boundary(4):
        want = zoo.logits(model, input_ids=ids)
        hidden = model.model(input_ids=ids).last_hidden_state
    assert torch.equal(zoo.logits(model, input_ids=ids, boundary=torch.tensor([4, 4])), want)
    assert torch.equal(zoo.logits(model, input_ids=ids, boundary=4), want)
    told = model.model(input_ids=ids, boundary=torch.tensor([4, 4])).last_hidden_state
    assert torch.equal(told, hidden)
    logits = model(input_ids=ids, boundary=torch.tensor([4, 4])).logits[:, 3:-1].log_softmax(-1)
    logits.gather(-1, ids[:, 4:, None]).sum().backward()  # as GRPO and DPO do
    assert all(p.grad.abs().sum() > 0 for p in tuning.parameters())


def test_an_earlier_pass_says_nothing():
    model, ids = zoo.build("llama"), zoo.ids(1, 9)
    fw.attach(model, prefix_for(model, "infix"))
    labels = ids.clone()
    labels[:, :4] = -100
    zoo.logits(model, input_ids=ids, labels=labels)
    zoo.logits(model, input_ids=ids, boundary=torch.tensor([4]))
    for call in (model, model.model):
        with pytest.raises(fw.AttachError, match="nobody said"):
            call(input_ids=ids)
    with pytest.raises(fw.ForewordError, match="names 2 rows"):
        model(input_ids=zoo.ids(3, 9), boundary=torch.tensor([1, 2]))
    with pytest.raises(fw.AttachError, match="nobody said"):  # the one that failed is over
        model(input_ids=ids)
    for bad in (torch.tensor([-1]), torch.tensor([0.5]), torch.tensor([[1]])):
        with pytest.raises(fw.ConfigError, match="number of input tokens"):
            model(input_ids=ids, boundary=bad)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_pass_that_was_broken_off_leaves_nothing(error):
    """Ctrl-C is no Exception: torch runs no hook for it."""
    model, ids = zoo.build("llama"), zoo.ids(1, 9)
    tuning = fw.attach(model, fw.PrefixConfig(length=3, init="random", visible="infix"))
    with fw.boundary(3):
        want = zoo.logits(model, input_ids=ids)

    def broken(*args):
        raise error

    handle = model.model.layers[1].register_forward_pre_hook(broken)
    with pytest.raises(error):
        model(input_ids=ids, boundary=torch.tensor([6]))
    handle.remove()
    with pytest.raises(fw.AttachError, match="nobody said"):
        model(input_ids=ids)
    with torch.no_grad():
        for parameter in tuning.parameters():
            parameter.add_(0.5)
    moved = zoo.logits(model, input_ids=ids, boundary=3)
    assert not torch.allclose(moved, want, atol=1e-3)  # the prefix was made anew
    with torch.no_grad():
        for parameter in tuning.parameters():
            parameter.sub_(0.5)
    close(zoo.logits(model, input_ids=ids, boundary=3), want)


# ---------------------------------------------------------------- writing


@pytest.mark.parametrize("visible", ["infix", "infix:1"])
def test_a_loop_of_ones_own_is_generate(visible):
    """A call that asks for a cache reads the input; who goes on from that cache goes on from its boundary."""
    model, prompt = zoo.build("llama"), zoo.ids(2, 5)
    fw.attach(model, prefix_for(model, visible))
    want = model.generate(prompt, max_new_tokens=5, do_sample=False)
    other = zoo.ids(1, 8, seed=3)
    for start in ({"use_cache": True}, {"past_key_values": DynamicCache()}):
        ids, now = prompt, prompt
        cache = None
        for _ in range(5):
            with torch.no_grad():
                out = model(input_ids=now, **(start if cache is None else {"past_key_values": cache}))
                model(input_ids=other, use_cache=True)  # another batch between has its own
            cache, now = out.past_key_values, out.logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, now], 1)
        assert torch.equal(ids, want)


def test_a_prompt_read_in_chunks_has_to_be_said():
    model, ids = zoo.build("llama"), zoo.ids(1, 9)
    fw.attach(model, prefix_for(model, "infix"))
    with torch.no_grad():
        cache = model(input_ids=ids[:, :3], use_cache=True).past_key_values
        with pytest.raises(fw.AttachError, match="nobody said"):
            model(input_ids=ids[:, 3:6], past_key_values=cache)
        foreign = DynamicCache()
        for layer, (keys, values) in enumerate((layer.keys, layer.values) for layer in cache.layers):
            foreign.update(keys, values, layer)
        with pytest.raises(fw.AttachError, match="nobody said"):
            model(input_ids=ids[:, 3:4], past_key_values=foreign)
        with fw.boundary(6):
            whole = model(input_ids=ids).logits
            cache = model(input_ids=ids[:, :3], use_cache=True).past_key_values
            model(input_ids=ids[:, 3:6], past_key_values=cache)
        rest = model(input_ids=ids[:, 6:], past_key_values=cache).logits  # the cache knows
    close(rest, whole[:, 6:])
    assert torch.equal(  # generate reads in chunks itself
        model.generate(ids, max_new_tokens=4, do_sample=False, prefill_chunk_size=4),
        model.generate(ids, max_new_tokens=4, do_sample=False),
    )


def test_generate_inside_generate_has_its_own_prompt():
    """Another model that is asked while this one writes; an assistant goes on from this one's prompt instead."""
    model, judge = zoo.build("llama"), zoo.build("llama", seed=1)
    fw.attach(model, prefix_for(model, "infix"))
    fw.attach(judge, prefix_for(judge, "infix"))
    prompt, question = zoo.ids(1, 5), zoo.ids(1, 9, seed=4)
    options = {"max_new_tokens": 4, "do_sample": False}
    want, told = model.generate(prompt, **options), judge.generate(question, **options)
    found = []

    def ask(ids, scores):
        found.append(judge.generate(question, **options))
        return scores

    assert torch.equal(model.generate(prompt, logits_processor=[ask], **options), want)
    assert len(found) == 4 and all(torch.equal(f, told) for f in found)
    assert torch.equal(model.generate(prompt, assistant_model=judge, **options), want)


def test_a_thread_does_not_take_a_block_over():
    model, ids = zoo.build("llama"), zoo.ids(1, 6)
    fw.attach(model, prefix_for(model, "infix"))
    options = {"max_new_tokens": 2, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}

    def work(block=None):
        try:
            with block if block is not None else nullcontext():
                found.append(model.generate(ids, **options).logits[0])
        except fw.AttachError as exc:
            found.append(str(exc))

    found, want = [], {}
    for n in (3, None):
        work(fw.boundary(n))
        want[n] = found.pop()
    assert not torch.allclose(want[3], want[None], atol=1e-3)

    def started(function, *args):
        thread = threading.Thread(target=function, args=args)
        thread.start()
        thread.join()
        return found.pop()

    with fw.boundary(3):
        assert "copy_context().run" in started(work)
        assert torch.equal(started(contextvars.copy_context().run, work), want[3])
        assert torch.equal(started(work, fw.boundary(None)), want[None])
    assert torch.equal(started(work), want[None])


# ---------------------------------------------------------------- gradient checkpointing


@pytest.mark.parametrize("reentrant", [None, False])
def test_layers_that_are_run_again_have_the_boundary_of_their_own_pass(reentrant):
    """Two passes before their backward, and one of another batch between: chosen and rejected, with a reference."""
    model, ids = zoo.build("llama").train(), zoo.ids(2, 8)
    tuning = fw.attach(model, fw.PrefixConfig(length=3, init="random", visible="infix:1"))
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    losses = [
        model(input_ids=ids, boundary=torch.tensor(n)).logits.log_softmax(-1)[..., 7].sum() for n in ([2, 5], [6, 3])
    ]
    with torch.no_grad():
        model(input_ids=ids, boundary=torch.tensor([1, 1]))
    (losses[0] - 2 * losses[1]).backward()
    got = [p.grad.clone() for p in tuning.parameters()]
    tuning.detach()
    assert type(model.model.layers[0].__dict__.get("_gradient_checkpointing_func")).__name__ in ("NoneType", "partial")
    model = zoo.build("llama").train()
    tuning = fw.attach(model, fw.PrefixConfig(length=3, init="random", visible="infix:1"))
    for n, weight in (([2, 5], 1), ([6, 3], -2)):
        (weight * model(input_ids=ids, boundary=torch.tensor(n)).logits.log_softmax(-1)[..., 7].sum()).backward()
    for a, parameter in zip(got, tuning.parameters(), strict=True):
        close(a, parameter.grad, 1e-5)
        assert a.abs().sum() > 0


def test_a_checkpoint_function_of_the_callers_is_right_or_refused():
    model, ids = zoo.build("llama").train(), zoo.ids(2, 8)
    fw.attach(model, fw.PrefixConfig(length=3, init="random", visible="infix:1"))
    for layer in model.model.layers:
        own = layer.forward
        layer.forward = lambda *args, own=own, **kwargs: torch.utils.checkpoint.checkpoint(
            own, *args, use_reentrant=False, **kwargs
        )
    model(input_ids=ids, boundary=3).logits.sum().backward()
    first = model(input_ids=ids, boundary=3).logits.sum()
    model(input_ids=ids, boundary=5)
    with pytest.raises(fw.AttachError, match="a checkpoint function that doesn't tell which"):
        first.backward()


@pytest.mark.parametrize("visible", ["infix", "first:4"])
def test_compiled_code_has_the_boundary_of_each_call(visible):
    torch._dynamo.reset()
    model, ids = zoo.build("llama"), zoo.ids(2, 8)
    fw.attach(model, prefix_for(model, visible), trainable=True)
    compiled = torch.compile(model, backend="eager")
    labels = ids.clone()
    labels[:, :3] = -100
    for more in ({"labels": labels}, {"boundary": torch.tensor([5, 2])}, {"labels": ids}):
        with torch.set_grad_enabled("boundary" not in more):
            close(compiled(input_ids=ids, **more).logits, model(input_ids=ids, **more).logits)
    if visible == "infix":
        with pytest.raises(fw.AttachError, match="nobody said"):
            compiled(input_ids=ids)


# ---------------------------------------------------------------- trainers


def summed(outputs, labels, num_items_in_batch=None):
    """A loss that is computed beside the model, as a user's ``compute_loss_func``."""
    logits = outputs["logits"][:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100)


@pytest.mark.filterwarnings("ignore:learning_rate")
@pytest.mark.parametrize("trainer", [fw.PrefixTrainer, Trainer])
@pytest.mark.parametrize("options", [{}, {"label_smoothing_factor": 0.1}, {"compute_loss_func": summed}])
@pytest.mark.parametrize("unused", [True, False])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainers_say_it_whoever_computes_the_loss(trainer, options, unused, checkpointing, tmp_path):
    model, rows = zoo.build("llama"), examples()
    tuning = fw.attach(model, fw.PrefixConfig(length=3, init="random", visible="infix:1"))
    own = dict(options)
    function = own.pop("compute_loss_func", None)
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=4, per_device_eval_batch_size=2,
        learning_rate=1e-9, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=1,
        remove_unused_columns=unused, gradient_checkpointing=checkpointing, max_grad_norm=1e9,
        gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None, **own,
    )  # fmt: skip
    made = trainer(
        model, args, train_dataset=rows, eval_dataset=rows, data_collator=Collator(0), compute_loss_func=function
    )
    made.train()
    norm = next(entry["grad_norm"] for entry in made.state.log_history if "grad_norm" in entry)
    for parameter in tuning.parameters():
        parameter.grad = None
    batch = Collator(0)(rows)
    with fw.boundary(list(STARTS)):  # one after another of the random order: the sum is the same
        out = model(**{k: v for k, v in batch.items() if k != "boundary"})
    if "label_smoothing_factor" in options:
        loss = made.label_smoother(out, batch["labels"], shift_labels=True)
    else:
        loss = out.loss if function is None else function(out, batch["labels"])
    loss.backward()
    want = torch.stack([p.grad.norm() for p in tuning.parameters()]).norm()
    assert norm > 1e-3 and abs(norm - float(want)) < 2e-3 * float(want)
    assert made.evaluate()["eval_loss"] > 0
    assert made.predict(rows).predictions[0].shape[-1] > 3


def test_a_trainer_whose_batches_say_nothing_stops_at_its_first_step(tmp_path):
    model = zoo.build("llama")
    fw.attach(model, fw.PrefixConfig(length=3, init="random", visible="infix"))
    args = fw.PrefixTrainingArguments(
        output_dir=str(tmp_path), max_steps=2, use_cpu=True, report_to="none", disable_tqdm=True
    )

    class Own(fw.PrefixTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            logits = model(input_ids=inputs["input_ids"]).logits
            return logits.log_softmax(-1)[..., 3].mean()

    with pytest.raises(fw.AttachError, match="nobody said where the output begins"):
        Own(model, args, train_dataset=examples(), data_collator=Collator(0)).train()
