"""Prompt tuning against real tokens, and heads that are trained with a prefix (P-Tuning v2)."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

import foreword as fw
import zoo
from test_methods import trained

# ------------------------------------------------------------------------------------------ prompts


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3", "neox"])
def test_a_text_prompt_is_the_text(name, tokenizer):
    """Virtual tokens that start from a text are the model prompted with it, and bake to a prefix from that text."""
    model, tokens = zoo.build(name), zoo.ids()
    text = zoo.SENTENCES[0]
    ids = torch.tensor([tokenizer(text)["input_ids"]]).expand(2, -1)
    want = zoo.logits(model, input_ids=torch.cat([ids, tokens], 1))[:, ids.shape[1] :]
    tuning = fw.attach(model, fw.PromptConfig(length=None, init=text), tokenizer=tokenizer)
    torch.testing.assert_close(zoo.logits(model, input_ids=tokens), want, atol=1e-4, rtol=1e-3)
    assert tuning.num_parameters == ids.shape[1] * model.get_input_embeddings().weight.shape[1]
    prefix = tuning.bake()
    tuning.detach()
    fw.attach(model, prefix)
    torch.testing.assert_close(zoo.logits(model, input_ids=tokens), want, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("name", "offset"), [("llama", 0), ("gpt2", 4)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_prompt_gradients_are_those_of_real_tokens(name, offset, checkpointing):
    model, tokens = zoo.build(name).train(), zoo.ids()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.config.resid_pdrop = model.config.embd_pdrop = model.config.attn_pdrop = 0.0
    for module in model.modules():
        if hasattr(module, "attn_dropout") and isinstance(module.attn_dropout, float):
            module.attn_dropout = 0.0
    tuning = fw.attach(model, fw.PromptConfig(length=4, init="random", position_offset=offset))
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model(input_ids=tokens, labels=tokens).loss.backward()
    (ours,) = tuning.parameters()
    start = ours.detach().clone().requires_grad_()
    tuning.detach()
    if checkpointing:
        model.gradient_checkpointing_disable()
    embedded = torch.cat([start.expand(2, -1, -1), model.get_input_embeddings()(tokens)], 1)
    labels = torch.cat([torch.full((2, 4), -100), tokens], 1)
    labels[:, 4] = -100  # the first token has nothing before it without a prompt
    model(inputs_embeds=embedded, labels=labels).loss.backward()
    torch.testing.assert_close(ours.grad, start.grad, atol=1e-5, rtol=1e-3)


def test_a_prompt_generates_what_the_text_does(tokenizer):
    model, tokens = zoo.build("llama"), zoo.ids()
    text = zoo.SENTENCES[1]
    ids = torch.tensor([tokenizer(text)["input_ids"]]).expand(2, -1)
    want = model.generate(torch.cat([ids, tokens], 1), max_new_tokens=6, do_sample=False)[:, ids.shape[1] :]
    tuning = fw.attach(model, fw.PromptConfig(length=None, init=text), tokenizer=tokenizer)
    assert torch.equal(model.generate(tokens, max_new_tokens=6, do_sample=False), want)
    tuning.detach()


# ------------------------------------------------------------------------------------------ heads


def classifier(kind):
    torch.manual_seed(0)
    config = tf.BertConfig(vocab_size=zoo.VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                           num_attention_heads=4, num_labels=2 if kind == "question" else 3)  # fmt: skip
    names = {"sequence": "SequenceClassification", "token": "TokenClassification", "question": "QuestionAnswering",
             "choice": "MultipleChoice"}  # fmt: skip
    return getattr(tf, f"BertFor{names[kind]}")(config).eval()


def labelled(kind):
    tokens = zoo.ids(2, 7)
    if kind == "choice":
        return {"input_ids": tokens[:, None].expand(-1, 3, -1).contiguous(), "labels": torch.tensor([0, 2])}
    if kind == "question":
        return {"input_ids": tokens, "start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 3])}
    return {"input_ids": tokens, "labels": torch.tensor([0, 2]) if kind == "sequence" else tokens % 3}


def scores(model, arguments):
    with torch.no_grad():
        out = model(**arguments)
    return out.logits if "logits" in out else torch.stack([out.start_logits, out.end_logits])


@pytest.mark.parametrize("kind", ["sequence", "token", "question", "choice"])
def test_a_head_is_trained_and_saved_with_the_prefix(kind, tmp_path):
    model, arguments = classifier(kind), labelled(kind)
    base = scores(model, arguments)
    config = fw.PrefixConfig(length=3, init="random", head=kind, dropout=0.1)
    tuning = trained(model, config, arguments)
    assert any(n.startswith("weights.head") for n, _ in tuning.named_parameters())
    assert [round(g["lr"], 4) for g in tuning.parameter_groups()] == [2e-2, 1e-3]
    moved = scores(model, arguments)
    tuning.bake().save(tmp_path / "p")
    tuning.detach()
    assert torch.equal(scores(model, arguments), base)
    fw.attach(model, fw.Prefix.load(tmp_path / "p"))
    torch.testing.assert_close(scores(model, arguments), moved, atol=1e-5, rtol=1e-4)


def test_a_head_has_its_own_learning_rate():
    tuning = fw.attach(
        classifier("token"), fw.PrefixConfig(length=2, init="random", head="token", head_learning_rate=1e-2)
    )
    assert [g["lr"] for g in tuning.parameter_groups()] == [2e-2, 1e-2]
    assert [g["lr"] for g in tuning.parameter_groups(5e-3)] == [5e-3, 1e-2]
    with pytest.raises(fw.ConfigError, match="say which with head="):
        fw.PrefixConfig(head_learning_rate=1e-2)
    with pytest.raises(fw.ConfigError, match="positive number"):
        fw.PrefixConfig(head="token", head_learning_rate=0.0)


def test_a_head_of_another_kind_is_refused():
    with pytest.raises(fw.ConfigError, match="AutoModelForTokenClassification"):
        fw.attach(classifier("sequence"), fw.PrefixConfig(length=2, init="random", head="token"))
    with pytest.raises(fw.ConfigError, match="has no such head"):
        fw.attach(zoo.build("llama"), fw.PrefixConfig(length=2, init="random", head="sequence"))


def without_pooler(folder, seed):
    """A classifier from a checkpoint of a masked language model: head and pooler are new at each loading."""
    if not folder.exists():
        tf.BertForMaskedLM(classifier("sequence").config).save_pretrained(folder)
    torch.manual_seed(seed)
    return tf.BertForSequenceClassification.from_pretrained(folder, num_labels=3).eval()


def test_a_head_brings_the_pooler_that_the_checkpoint_lacks(tmp_path):
    """Else a saved prefix would stand on another random pooler in the next process."""
    arguments = labelled("sequence")
    model = without_pooler(tmp_path / "base", 1)
    tuning = trained(model, fw.PrefixConfig(length=3, init="random", head="sequence"), arguments)
    assert {"bert.pooler.dense.weight", "classifier.weight"} <= set(tuning.holder.weights["head"].names)
    moved = scores(model, arguments)
    tuning.bake().save(tmp_path / "p")
    other = without_pooler(tmp_path / "base", 2)
    assert not torch.equal(model.bert.pooler.dense.weight, other.bert.pooler.dense.weight)
    fw.attach(other, fw.Prefix.load(tmp_path / "p"))
    torch.testing.assert_close(scores(other, arguments), moved, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["sequence", "token"])
def test_the_trainer_scores_a_head(kind, tokenizer, tmp_path):
    """Rows of unlike lengths through transformers' collators, and ``compute_metrics`` on logits and labels."""
    rows = []
    for i, row in enumerate(zoo.ids(8, 7).tolist()):
        ids = row[: 4 + i % 3]
        labels = i % 3 if kind == "sequence" else [-100, *(t % 3 for t in ids[1:])]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    seen = {}

    def compute(result):
        seen["logits"], seen["labels"] = result.predictions, result.label_ids
        return {"right": float((result.predictions.argmax(-1) == result.label_ids).mean())}

    pad = tf.DataCollatorWithPadding if kind == "sequence" else tf.DataCollatorForTokenClassification
    model = classifier(kind)
    before = {n: p.clone() for n, p in model.named_parameters()}
    tuning = fw.attach(model, fw.PrefixConfig(length=3, init="random", head=kind, dropout=0.1))
    start = [p.detach().clone() for p in tuning.parameters()]
    trainer = fw.PrefixTrainer(
        model,
        fw.PrefixTrainingArguments(
            str(tmp_path), max_steps=4, per_device_train_batch_size=4, per_device_eval_batch_size=4, use_cpu=True,
            report_to="none", save_strategy="no", disable_tqdm=True,
        ),
        train_dataset=rows, eval_dataset=rows, data_collator=pad(tokenizer), compute_metrics=compute,
    )  # fmt: skip
    trainer.train()
    assert 0 <= trainer.evaluate()["eval_right"] <= 1
    assert seen["logits"].shape == ((8, 3) if kind == "sequence" else (8, 6, 3))
    for logits, labels, row in zip(seen["logits"], seen["labels"], rows, strict=True):
        own = {k: torch.tensor([v]) for k, v in row.items() if k != "labels"}
        alone = scores(model, own)[0]
        count = len(row["input_ids"])
        torch.testing.assert_close(
            torch.tensor(logits if kind == "sequence" else logits[:count]), alone, atol=1e-5, rtol=1e-4
        )
        assert labels.tolist() == (
            row["labels"] if kind == "sequence" else row["labels"] + [-100] * (len(labels) - count)
        )
    assert all(not torch.equal(a, b) for a, b in zip(start, tuning.parameters(), strict=True))
    tuning.detach()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("name", ["MBart", "Marian", "Pegasus", "Blenderbot", "Bart"])
def test_a_prompt_before_a_decoder_that_stands_alone(name):
    layers = {f"{part}_{n}": v for part in ("encoder", "decoder")
              for n, v in (("layers", 1), ("attention_heads", 4), ("ffn_dim", 40))}  # fmt: skip
    config = getattr(tf, f"{name}Config")(
        vocab_size=zoo.VOCAB, d_model=32, max_position_embeddings=64, pad_token_id=0, **layers
    )
    torch.manual_seed(0)
    model, x = getattr(tf, f"{name}ForCausalLM")(config).eval(), zoo.ids()
    tuning = fw.attach(model, fw.PromptConfig(length=3, init="vocabulary"))
    ids = torch.randint(zoo.VOCAB, (3,), generator=torch.Generator().manual_seed(0))[None]
    model(input_ids=x, labels=x).loss.backward()
    assert next(tuning.parameters()).grad.abs().sum() > 0
    prefix = tuning.bake()
    tuning.detach()
    layer = model(input_ids=ids, use_cache=True).past_key_values.layers[0]
    for got, want in ((prefix.keys, layer.keys), (prefix.values, layer.values)):
        torch.testing.assert_close(next(iter(got.values())), want[0], atol=1e-5, rtol=1e-4)


def test_a_model_that_needs_the_tokens_themselves_takes_no_prompt():
    size = {"vocab_size": zoo.VOCAB, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    config = tf.Gemma4TextConfig(
        **size, num_attention_heads=4, num_key_value_heads=2, head_dim=8, global_head_dim=8,
        layer_types=["full_attention"] * 2, hidden_size_per_layer_input=8, vocab_size_per_layer_input=zoo.VOCAB,
    )  # fmt: skip
    model = zoo_like(tf.Gemma4ForCausalLM(config))
    with pytest.raises(fw.ConfigError, match="in the place of tokens"):
        fw.attach(model, fw.PromptConfig(length=3, init="vocabulary"))
    assert not hasattr(model, "foreword")


def zoo_like(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize("name", ["T5", "MT5", "UMT5"])
def test_a_head_beside_a_backbone_without_a_module_of_its_own(name):
    config = getattr(tf, f"{name}Config")(
        vocab_size=zoo.VOCAB, d_model=32, d_kv=8, d_ff=40, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    model = getattr(tf, f"{name}ForQuestionAnswering")(config).eval()
    tuning = fw.attach(model, fw.PrefixConfig(length=3, init="random", head="question"))
    assert tuning.holder.weights["head"].names == ["qa_outputs.weight", "qa_outputs.bias"]
