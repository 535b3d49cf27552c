"""Distillation: the loss against torch's own, the teacher's answers against the prompted model, and whole runs."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from distilling import ARGUMENTS, CONFIG, QUIET, TEXT, examples, losses, run, without_dropout
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import kl_div

import foreword as fw
import zoo
from foreword.data import Collator, encode, read_examples
from foreword.train import _teacher
from foreword.train._teacher import Answers, TeacherCollator, answer_inputs, answered, top_log_probs
from foreword.train.distill import DistillTrainer, begun, divergence
from foreword.train.memory_estimate import estimate_memory
from foreword.train.run import train_prefix

# ---------------------------------------------------------------- the loss


@st.composite
def two_models(draw):
    """Logits of a teacher and a student, ``(n, V)``, float64."""
    n, vocabulary = draw(st.integers(1, 5)), draw(st.integers(2, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    scale = draw(st.sampled_from([0.1, 1.0, 8.0]))
    return tuple(scale * torch.randn(n, vocabulary, generator=generator, dtype=torch.float64) for _ in range(2))


@given(two_models())
def test_over_the_whole_vocabulary_it_is_torchs_divergence(both):
    teacher, student = both
    found = divergence(student, *top_log_probs(teacher, teacher.shape[-1]))
    expected = kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-9)


@given(two_models(), st.data())
def test_over_k_tokens_it_is_the_divergence_of_k_and_one_outcomes(both, data):
    teacher, student = both
    n, vocabulary = teacher.shape
    top = data.draw(st.integers(1, vocabulary - 1))
    ids, log_probs = top_log_probs(teacher, top)
    found = divergence(student, ids, log_probs)

    def buckets(logits):  # by hand, from probabilities
        p = logits.softmax(-1)
        kept = torch.stack([p[i, ids[i]] for i in range(n)])
        rest = torch.stack([p[i, [j for j in range(vocabulary) if j not in ids[i].tolist()]].sum() for i in range(n)])
        return torch.cat([kept, rest[:, None]], 1)

    p, q = buckets(teacher), buckets(student)
    torch.testing.assert_close(log_probs.exp(), p, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(found, (p * (p.log() - q.log())).sum(1), atol=1e-10, rtol=1e-7)
    assert (found > -1e-12).all()
    torch.testing.assert_close(
        divergence(teacher, ids, log_probs), torch.zeros(n, dtype=torch.float64), atol=1e-12, rtol=0
    )
    whole = divergence(student, *top_log_probs(teacher, vocabulary))
    finer = divergence(student, *top_log_probs(teacher, top + 1))
    assert (found <= finer + 1e-10).all() and (finer <= whole + 1e-10).all()


@pytest.mark.parametrize("top", [1, 3, 8, 9])
def test_its_gradient(top):
    teacher, student = torch.randn(2, 4, 9, dtype=torch.float64).unbind(0)
    ids, log_probs = top_log_probs(teacher, top)
    assert torch.autograd.gradcheck(lambda z: divergence(z, ids, log_probs), student.requires_grad_())


def test_tokens_that_the_teacher_rules_out_count_nothing():
    teacher = torch.tensor([[2.0, 1.0, -torch.inf, -torch.inf]])
    student = torch.zeros(1, 4, requires_grad=True)
    found = divergence(student, *top_log_probs(teacher, 3))
    found.sum().backward()
    p = teacher.softmax(-1)[0, :2]
    assert found.item() == pytest.approx(float((p * (p * 4).log()).sum()), abs=1e-6)
    assert torch.isfinite(student.grad).all()


# ---------------------------------------------------------------- the teacher's answers


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "gemma2"])
def test_a_text_as_teacher_says_what_the_prompted_model_says(name, tmp_path):
    model, tokenizer, data = zoo.build(name), zoo.tokenizer(), examples()
    run(model, tmp_path / "out", data=data, top=zoo.VOCAB, arguments={"max_steps": 1})
    told = Answers(tmp_path / "out" / "teacher" / "train", data, seq2seq=False)
    text = tokenizer(TEXT)["input_ids"]
    model.eval()
    for i in range(len(data)):
        ids, labels = data[i]["input_ids"], data[i]["labels"]
        prompted = zoo.logits(model, input_ids=torch.tensor([text + ids]))[0, len(text) :]
        places = [t for t in range(1, len(labels)) if labels[t] != -100]
        expected = prompted[[t - 1 for t in places]].log_softmax(-1)
        tokens, log_probs = told[i]
        assert tokens.dtype == torch.int32 and tokens.shape == log_probs.shape == (len(places), zoo.VOCAB)
        torch.testing.assert_close(log_probs, expected.gather(1, tokens.long()), atol=2e-4, rtol=1e-4)
        assert (log_probs.diff(dim=1) <= 1e-6).all()


def test_answers_of_many_files_stand_at_their_examples(tmp_path):
    model, data = zoo.build("llama"), examples(2 * _teacher.SHARD + 3)
    run(model, tmp_path / "out", data=data, top=5, arguments={"max_steps": 1})
    folder = tmp_path / "out" / "teacher" / "train"
    assert sorted(p.name for p in folder.iterdir()) == [f"{n:06}.safetensors" for n in range(3)]
    told = Answers(folder, data, seq2seq=False)
    fw.attach(model, fw.Prefix.from_text(model, zoo.tokenizer(), TEXT))
    for i in (0, _teacher.SHARD - 1, _teacher.SHARD, len(data) - 1):
        batch = TeacherCollator(0)([{**data[i], "teacher": told[i]}])
        inputs, predicts = answer_inputs(model, {k: batch[k] for k in ("input_ids", "labels")})
        with torch.no_grad():
            ids, log_probs = top_log_probs(model(**inputs).logits[predicts], 5)
        assert torch.equal(batch["teacher_ids"][answered(batch["labels"], False)].long(), ids)
        torch.testing.assert_close(
            batch["teacher_log_probs"][answered(batch["labels"], False)], log_probs, atol=1e-5, rtol=1e-5
        )
    with pytest.raises(IndexError):
        told[len(data)]
    (folder / "000001.safetensors").write_bytes(b"nonsense")
    with pytest.raises(fw.DataError, match=r"000001\.safetensors can't be read.*--resume"):
        told[_teacher.SHARD]


def test_only_logits_of_answers_are_made():
    model, data = zoo.build("llama"), examples()
    batch = Collator(0)([data[i] for i in range(4)])
    inputs, predicts = answer_inputs(model, batch)
    with torch.no_grad():
        kept, whole = (
            model(**inputs).logits,
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits,
        )
    assert kept.shape[1] < whole.shape[1]
    assert torch.equal(kept[predicts], whole[:, :-1][batch["labels"][:, 1:] != -100])


# ---------------------------------------------------------------- runs


def test_a_run_comes_closer_to_the_teacher_and_leaves_a_prefix(tmp_path):
    model, out = zoo.build("llama"), tmp_path / "out"
    before = tiny.base_weights(model)
    result = run(model, out, valid=examples(3), arguments={"max_steps": 40, "learning_rate": 0.1})
    tiny.assert_base_unchanged(model, before)
    assert fw.tuning.tuning_of(model) is None and all(p.requires_grad for p in model.parameters())
    found = losses(result)
    assert sum(found[-5:]) < 0.5 * sum(found[:5]) and min(found) > 0
    evaluated = [e["eval_loss"] for e in result.history if "eval_loss" in e]
    assert evaluated[-1] < evaluated[0]
    prefix = fw.Prefix.load(out)
    assert prefix == result.prefix and prefix.longest == 6
    about, tokens = prefix.metadata["distillation"], len(zoo.tokenizer()(TEXT)["input_ids"])
    assert about["text_tokens"] == tokens and about["top"] == 20
    assert about["replaced_bytes"] == fw.Prefix.from_text(model, zoo.tokenizer(), TEXT).nbytes
    start = fw.Prefix.from_text(model, zoo.tokenizer(), TEXT, length=6)
    for site in prefix.keys:  # the first token, where attention sinks, stays
        assert torch.equal(prefix.keys[site][:, :1], start.keys[site][:, :1])
        assert not torch.allclose(prefix.keys[site][:, 1:], start.keys[site][:, 1:], atol=1e-2)
    assert json.loads((out / "teacher" / "teacher.json").read_text())["top"] == 20 and begun(out)


@pytest.mark.parametrize("top", [1, 20, zoo.VOCAB])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_student_that_is_the_teacher_has_nothing_to_learn(name, top, tmp_path):
    model = zoo.build(name)
    offset = 0 if name == "llama" else len(zoo.tokenizer()(TEXT)["input_ids"])
    same = fw.Prefix.from_text(model, zoo.tokenizer(), TEXT, position_offset=offset)
    without_dropout(model)
    result = run(model, tmp_path, what=same, top=top, arguments={"max_steps": 2, "learning_rate": 1e-6})
    assert max(abs(x) for x in losses(result)) < 1e-6
    assert max(e["grad_norm"] for e in result.history if "grad_norm" in e) < 1e-4
    other = run(model, tmp_path / "other", top=top, arguments={"max_steps": 2, "learning_rate": 1e-6})
    assert min(losses(other)) > 1e-3


def test_accumulated_batches_make_the_step_of_one(tmp_path):
    model = zoo.build("llama")
    sizes = ({"per_device_train_batch_size": 6}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3})
    data = examples(6)
    one, three = (run(model, tmp_path / str(i), data=data, arguments=s) for i, s in enumerate(sizes))
    assert losses(one) == pytest.approx(losses(three), rel=1e-4)
    for site in one.prefix.keys:
        torch.testing.assert_close(one.prefix.values[site], three.prefix.values[site], atol=1e-4, rtol=1e-3)


STUDENTS = {
    "mlp": fw.PrefixConfig(length=4, init="random", reparam="mlp", hidden=16),
    "infix": fw.PrefixConfig(length=4, init="random", visible="infix:1"),
    "gate": fw.PrefixConfig(length=4, init="random", gate="head"),
    "memory": fw.MemoryConfig(rank=2),
    "prefix and memory": [fw.PrefixConfig(length=4, init="random"), fw.MemoryConfig(rank=2)],
    "adapter": fw.AdapterConfig(width=4),
}


@pytest.mark.parametrize("what", STUDENTS.values(), ids=STUDENTS)
def test_other_students(what, tmp_path):
    model = zoo.build("llama")
    before = tiny.base_weights(model)
    arguments = {"max_steps": 12, "per_device_train_batch_size": 7, "learning_rate": 0.02}
    result = run(model, tmp_path, what=what, arguments=arguments)
    tiny.assert_base_unchanged(model, before)
    assert losses(result)[-1] < 0.95 * losses(result)[0]


def test_an_infix_student_sees_where_answers_begin(tmp_path):
    """The loss of its first step is that of a plain pass with the boundary said by hand."""
    model, data = zoo.build("llama"), examples(3)
    what = STUDENTS["infix"]
    arguments = {"max_steps": 1, "per_device_train_batch_size": 3}
    result = run(model, tmp_path, what=what, data=data, top=zoo.VOCAB, arguments=arguments)
    told = Answers(tmp_path / "teacher" / "train", data, seq2seq=False)
    fw.attach(model, what, tokenizer=zoo.tokenizer())
    each = []
    for i in range(3):
        labels = torch.tensor(data[i]["labels"])
        first = int((labels != -100).long().argmax())
        with torch.no_grad(), fw.boundary(first):
            logits = model(input_ids=torch.tensor([data[i]["input_ids"]])).logits[0]
        ids, log_probs = told[i]
        each.append(divergence(logits[:-1][labels[1:] != -100], ids.long(), log_probs))
    assert losses(result)[0] == pytest.approx(float(torch.cat(each).mean()), abs=1e-5)


def test_a_prefix_as_teacher_and_a_prefix_to_go_on_from(tmp_path):
    model, tokenizer = zoo.build("llama"), zoo.tokenizer()
    data = encode(read_examples([{"text": s} for s in zoo.SENTENCES * 2]), tokenizer, max_length=40)
    trained = [
        train_prefix(model, tokenizer, what, data, tmp_path / str(i), ARGUMENTS, console=QUIET).prefix
        for i, what in enumerate([fw.PrefixConfig(length=12, init="random"), fw.MemoryConfig()])
    ]
    for i, teacher in enumerate(trained):
        first = run(model, tmp_path / f"student-{i}", teacher, arguments={"max_steps": 8})
        about = first.prefix.metadata["distillation"]
        assert about["text_tokens"] is None and about["replaced_bytes"] == teacher.nbytes
        second = run(model, tmp_path / f"further-{i}", teacher, first.prefix, arguments={"max_steps": 8, "seed": 1})
        assert sum(losses(second)) < sum(losses(first))


def test_a_lora_becomes_a_prefix(tmp_path):
    pytest.importorskip("peft")
    model, tokenizer = zoo.build("llama"), zoo.tokenizer()
    data = encode(read_examples([{"text": s} for s in zoo.SENTENCES * 2]), tokenizer, max_length=40)
    before = tiny.base_weights(model)
    teacher = train_prefix(
        model, tokenizer, fw.LoRAConfig(rank=2), data, tmp_path / "lora", ARGUMENTS, console=QUIET
    ).prefix
    result = run(model, tmp_path / "out", teacher, fw.PrefixConfig(length=4, init=TEXT), arguments={"max_steps": 12})
    tiny.assert_base_unchanged(model, before)
    assert losses(result)[-1] < losses(result)[0] and not result.prefix.parts


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_encoder_decoders_with_a_prefix_as_teacher(name, tmp_path):
    model, data = zoo.build(name), examples(seq2seq=True)
    teacher = fw.attach(model, fw.PrefixConfig(length=8, init="random"), tokenizer=zoo.tokenizer())
    bigger = teacher.bake()
    teacher.detach()
    without_dropout(model)
    result = run(model, tmp_path / "out", bigger, bigger, data, arguments={"max_steps": 1, "learning_rate": 1e-6})
    assert abs(losses(result)[0]) < 1e-6
    other = fw.PrefixConfig(length=3, init="random", seed=1)
    result = run(model, tmp_path / "other", bigger, other, data, arguments={"max_steps": 12})
    assert losses(result)[-1] < losses(result)[0]
    with pytest.raises(fw.ConfigError, match="give a Prefix as teacher"):
        run(model, tmp_path / "text", data=data)


def test_the_memory_of_a_step_is_estimated_with_its_logits(tmp_path):
    model, data = zoo.build("llama"), examples()
    run(model, tmp_path / "out", data=data, top=5, arguments={"max_steps": 1})
    told = data.with_column("teacher", Answers(tmp_path / "out" / "teacher" / "train", data, seq2seq=False))
    fw.attach(model, CONFIG, tokenizer=zoo.tokenizer())
    args = fw.PrefixTrainingArguments(str(tmp_path / "e"), use_cpu=True, report_to="none", remove_unused_columns=False)
    trainer = DistillTrainer(model, args, train_dataset=told, data_collator=TeacherCollator(0))
    found = estimate_memory(trainer)
    batch = trainer.data_collator([told[i] for i in range(len(told))])
    _, predicts = answer_inputs(model, {k: batch[k] for k in ("input_ids", "labels")})
    one = predicts.numel() * zoo.VOCAB * 4
    assert 2 * one < found.logits < 6 * one


# ---------------------------------------------------------------- going on


def test_a_run_goes_on_with_the_teacher_and_with_the_training(tmp_path, monkeypatch):
    model, data = zoo.build("llama"), examples(9)
    monkeypatch.setattr(_teacher, "SHARD", 4)
    whole = run(model, tmp_path / "whole", data=data, valid=examples(5))
    out, stop = tmp_path / "out", {"after": 2}
    shard = _teacher._shard

    def counted(*args):
        stop["after"] -= 1
        if stop["after"] < 0:
            raise KeyboardInterrupt
        return shard(*args)

    monkeypatch.setattr(_teacher, "_shard", counted)
    with pytest.raises(KeyboardInterrupt):
        run(model, out, data=data, valid=examples(5))
    assert fw.tuning.tuning_of(model) is None and begun(out)
    with pytest.raises(fw.ConfigError, match="answers of a teacher that were begun; pass --resume"):
        run(model, out, data=data, valid=examples(5))
    with pytest.raises(fw.ConfigError, match="another top"):
        run(model, out, data=data, valid=examples(5), top=7, resume=True)
    with pytest.raises(fw.ConfigError, match="another teacher"):
        run(model, out, TEXT + "!", data=data, valid=examples(5), resume=True)
    with pytest.raises(fw.ConfigError, match=r"another examples \(train\)"):
        run(model, out, data=examples(8), valid=examples(5), resume=True)
    stop["after"] = 100
    resumed = run(model, out, data=data, valid=examples(5), resume=True)
    assert stop["after"] == 100 - 3  # of five files two were there
    assert resumed.prefix == whole.prefix
    longer = run(model, out, data=data, valid=examples(5), resume=True, arguments={"max_steps": 6})
    assert longer.steps == 6 and stop["after"] == 97


def test_nothing_is_begun_in_a_folder_of_something_else(tmp_path):
    model = zoo.build("llama")
    with pytest.raises(fw.ConfigError, match="no distillation that was begun; leave --resume out"):
        run(model, tmp_path / "empty", resume=True)
    run(model, tmp_path / "out")
    with pytest.raises(fw.ConfigError, match="holds a prefix already"):
        run(model, tmp_path / "out")
    (tmp_path / "file").touch()
    with pytest.raises(fw.ConfigError, match="is a file"):
        run(model, tmp_path / "file")
