"""The real model: SmolLM2-135M with prefixes, against prompting, PEFT, and itself."""

from __future__ import annotations

import csv
from itertools import islice

import peft
import pytest
import torch
from transformers import GenerationConfig

import foreword as fw
from foreword.data import Collator, encode, read_examples
from foreword.demo.job import plain
from foreword.errors import MissingPartError
from foreword.generation import write
from foreword.models import packaged_reviews

pytestmark = [pytest.mark.real]
TEXT = "Here is what a delighted viewer wrote about the film:"
PROMPTS = ("The film", "After ten minutes my wife and I")
P, NEW = 6, 24
TASKS = ("film", "food", "news")


@pytest.fixture(scope="module")
def real():
    try:
        model, tokenizer = fw.load_model("demo", dtype="float32")
    except MissingPartError as exc:
        pytest.skip(str(exc))
    model.generation_config = GenerationConfig(pad_token_id=tokenizer.eos_token_id)  # no stopping: equal lengths
    return model, tokenizer


@pytest.fixture(autouse=True)
def _clean(real):
    """A test that fails must not leave its prefix on the shared model."""
    yield
    if (tuning := fw.tuning.tuning_of(real[0])) is not None:
        tuning.detach()


def logits(model, ids, **more):
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


def left_padded(tokenizer, texts=PROMPTS):
    rows = [tokenizer(t)["input_ids"] for t in texts]
    longest = max(map(len, rows))
    ids = torch.tensor([[tokenizer.eos_token_id] * (longest - len(r)) + r for r in rows])
    return {"input_ids": ids, "attention_mask": torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows])}


def test_a_text_prefix_is_the_prompt(real):
    model, tokenizer = real
    prompt, ids = (torch.tensor([tokenizer(t)["input_ids"]]) for t in (TEXT, "The film was"))
    want = logits(model, torch.cat([prompt, ids], 1))[:, prompt.shape[1] :]
    before = logits(model, ids)
    tuning = fw.attach(model, fw.Prefix.from_text(model, tokenizer, TEXT))
    torch.testing.assert_close(logits(model, ids), want, atol=1e-3, rtol=1e-3)
    assert (want - before).abs().max() > 1
    tuning.detach()
    assert torch.equal(logits(model, ids), before)


@pytest.fixture(scope="module")
def prefix(real):
    """A prefix near what the model itself makes, and not what any text gives."""
    model, tokenizer = real
    made = fw.Prefix.from_text(model, tokenizer, TEXT, length=P)
    generator = torch.Generator().manual_seed(0)

    def stirred(t):
        return t + 0.1 * t.std() * torch.randn(t.shape, generator=generator)

    return fw.Prefix.from_tensors(model, {s: (stirred(made.keys[s]), stirred(made.values[s])) for s in made.keys})


@pytest.fixture(scope="module")
def of_peft(real, prefix):
    """What PEFT says: logits, greedy and beam tokens for the same prefix. PEFT starts its text at P."""
    model, tokenizer = real
    moved = prefix.shift(P)
    settings = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
    peer = peft.get_peft_model(model, settings)
    states = torch.stack([torch.stack([moved.keys[s.name], moved.values[s.name]]) for s in moved.sites])
    with torch.no_grad():  # (site, 2, head, token, dim) -> (token, all)
        peer.prompt_encoder["default"].embedding.weight.copy_(states.permute(3, 0, 1, 2, 4).reshape(P, -1))
    batch = left_padded(tokenizer)
    single = torch.tensor([tokenizer(PROMPTS[1])["input_ids"]])
    arguments = {"do_sample": False, "pad_token_id": tokenizer.eos_token_id}
    try:
        peer.eval()
        return {
            "logits": logits(peer, single),
            "greedy": peer.generate(**batch, max_new_tokens=NEW, **arguments),
            "beams": peer.generate(**batch, max_new_tokens=8, num_beams=3, **arguments),
        }
    finally:
        for parameter in model.parameters():
            parameter.requires_grad_(True)


@pytest.mark.slow
@pytest.mark.parametrize(("offset", "tolerance"), [(P, 1e-4), (0, 2e-3)])
def test_it_is_what_peft_gives(real, prefix, of_peft, offset, tolerance):
    model, tokenizer = real
    tuning = fw.attach(model, prefix.shift(offset) if offset else prefix)
    assert tuning.position_offset == offset
    single = torch.tensor([tokenizer(PROMPTS[1])["input_ids"]])
    torch.testing.assert_close(logits(model, single), of_peft["logits"], atol=tolerance, rtol=0)
    batch, arguments = left_padded(tokenizer), {"do_sample": False, "pad_token_id": tokenizer.eos_token_id}
    greedy = model.generate(**batch, max_new_tokens=NEW, **arguments)
    assert torch.equal(greedy, of_peft["greedy"]) and greedy.shape[1] == batch["input_ids"].shape[1] + NEW
    assert torch.equal(model.generate(**batch, max_new_tokens=8, num_beams=3, **arguments), of_peft["beams"])
    tuning.detach()
    assert not torch.equal(model.generate(**batch, max_new_tokens=NEW, **arguments), of_peft["greedy"])


def test_a_mixed_batch_writes_what_each_wrote_alone(real, prefix):
    model, tokenizer = real
    complaint = fw.Prefix.from_text(model, tokenizer, "Complaint of an angry guest: everything was awful, I")
    library = fw.Library(model)
    library.add("stirred", prefix)
    library.add("text", complaint)
    tasks, prompts = ["stirred", None, "text"], ["The film", "The film", "The food was"]
    alone = []
    for task, prompt in zip(tasks, prompts, strict=True):
        with library.use(task):
            alone += write(model, tokenizer, [prompt], do_sample=False, max_new_tokens=16)
    with library.use(tasks):
        mixed = write(model, tokenizer, prompts, do_sample=False, max_new_tokens=16)
    library.detach()
    assert mixed == alone and len(set(mixed)) == 3


def test_save_load_attach_to_the_bit(real, prefix, tmp_path):
    model, tokenizer = real
    ids = torch.tensor([tokenizer(PROMPTS[1])["input_ids"]])
    tuning = fw.attach(model, prefix)
    want = logits(model, ids)
    tuning.detach()
    prefix.save(tmp_path / "p")
    loaded = fw.Prefix.load(tmp_path / "p")
    assert loaded == prefix and prefix.nbytes == 30 * 3 * P * 64 * 2 * 4
    tuning = fw.attach(model, loaded)
    assert torch.equal(logits(model, ids), want)


@pytest.mark.slow
def test_three_steps_on_real_reviews(real, tmp_path):
    model, tokenizer = real
    with packaged_reviews().open(newline="", encoding="utf-8") as file:
        texts = [plain(r["text"]) for r in islice(csv.DictReader(file), 8)]
    data = encode(read_examples([{"text": t} for t in texts]), tokenizer, max_length=32)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    fw.attach(model, fw.PrefixConfig(length=P, init=TEXT), tokenizer=tokenizer)
    args = fw.PrefixTrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=8, warmup_steps=0, report_to="none", use_cpu=True,
        logging_steps=1, save_strategy="no", remove_unused_columns=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = fw.PrefixTrainer(
        model, args, train_dataset=data, eval_dataset=data, data_collator=Collator.for_tokenizer(tokenizer)
    )
    start = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < start - 0.05
    tuning = fw.tuning.tuning_of(model)
    tuning.detach()
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())


@pytest.mark.parametrize(
    ("what", "count"),
    [
        (fw.PrefixConfig(length=20, init="random"), 230_400),
        (fw.PrefixConfig(length=20, init="random", gate="head"), 230_400 + 270),
        (fw.PrefixConfig(length=20, init="random", gate="input"), 230_400 + 17_550),
        (fw.PrefixConfig(length=20, init="random", reparam="mlp", share="layers"), 485_248),
        (fw.PrefixConfig(length=20, init="random", reparam="mlp", condition=128), 6_248_192),
        (fw.PrefixConfig(length=20, init="random", tasks=TASKS), 691_200),
        (fw.PrefixConfig(length=20, init="random", tasks=TASKS, share="keys"), 460_800),
        (fw.PrefixConfig(length=20, init="random", tasks=TASKS, reparam="low-rank"), 92_640),
        (fw.PrefixConfig(length=20, init="random", tasks=TASKS, reparam="mlp"), 6_203_136),
        (fw.PrefixConfig(length=20, init="random", tasks=TASKS, reparam="mlp", share="layers"), 505_728),
        (fw.MemoryConfig(), 1_105_920),
        (fw.MemoryConfig(rank=4), 138_240),
        (fw.PromptConfig(length=20, init="vocabulary"), 11_520),
        (fw.LoRAConfig(rank=8), 460_800),
        (fw.AdapterConfig(width=32), 2_248_320),
        (fw.AdapterConfig(width=32, style="pfeiffer"), 1_124_160),
        (fw.BitFitConfig(missing="add"), 155_520),
        (fw.FullConfig(), 134_515_008),
    ],
)
def test_parameter_counts_of_the_docs(real, what, count):
    tuning = fw.attach(real[0], what)
    assert tuning.num_parameters == count
    tuning.detach()


def test_an_infix_writes_from_its_boundary(real):
    """The prompt is read as the base model reads it; what is written sees the infix."""
    model, tokenizer = real
    base = write(model, tokenizer, PROMPTS, do_sample=False, max_new_tokens=12)
    tuning = fw.attach(model, fw.PrefixConfig(length=None, init=TEXT, visible="infix"), tokenizer=tokenizer)
    late = write(model, tokenizer, PROMPTS, do_sample=False, max_new_tokens=12)
    tuning.detach()
    first = [tokenizer(t, add_special_tokens=False)["input_ids"][0] for t in base]
    assert [tokenizer(t, add_special_tokens=False)["input_ids"][0] for t in late] == first and late != base


def test_a_join_is_near_the_model_that_read_both_texts(real):
    """Nearer than either alone; and without the second's first token (a second attention sink) nearer still."""
    model, tokenizer = real
    a, b = "You are a film critic who writes short, warm sentences.", " Always mention the weather, and be polite."
    first, second, whole = (fw.Prefix.from_text(model, tokenizer, t) for t in (a, b, a + b))
    ids = torch.tensor([tokenizer("When we came out of the house in the evening, it was")["input_ids"]])

    def distance(prefix):
        found = []
        for each in (whole, prefix):
            tuning = fw.attach(model, each)
            found.append(logits(model, ids).double().log_softmax(-1))
            tuning.detach()
        return float((found[0].exp() * (found[0] - found[1])).sum(-1).mean())

    alone = min(distance(first), distance(second))
    both, one_sink = distance(first.join(second)), distance(first.join(second.slice(1)))
    assert one_sink < both < alone
