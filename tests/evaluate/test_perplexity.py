"""text_nll against the model's own loss, one text at a time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from foreword.errors import ConfigError, DataError
from foreword.evaluate import perplexity, text_nll

WORDS = [
    "<unk>",
    "<s>",
    "</s>",
    "a",
    "film",
    "that",
    "was",
    "good",
    "and",
    "bad",
    "but",
    "never",
    "dull",
    "nor",
    "long",
]
TEXTS = [
    "a film that was good",
    "bad",
    "never dull nor long but good and bad and dull",
    "a film",
    "was long but dull",
]
PROMPTS = ["the film", "a", "that film was", "good and", "a film that"]


def make_tokenizer(special: str | None = None) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    if special:
        words.post_processor = processors.TemplateProcessing(single=special, special_tokens=[("<s>", 1), ("</s>", 2)])
    # No padding token: scoring does not need one.
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.5,  # peaked predictions, so that a wrong position shows
        attention_dropout=0.5,  # a result that depends on train mode shows
    )
    return LlamaForCausalLM(config).eval()


def own_loss(model: LlamaForCausalLM, before: list[int], after: list[int]) -> float:
    ids = torch.tensor([before + after])
    labels = torch.tensor([[-100] * len(before) + after])
    with torch.no_grad():
        return float(model(ids, labels=labels).loss)


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_with_prompts_it_is_the_models_own_loss(model, tokenizer) -> None:
    expected = [
        own_loss(model, ids_of(tokenizer, prompt), ids_of(tokenizer, text))
        for prompt, text in zip(PROMPTS, TEXTS, strict=True)
    ]
    assert text_nll(model, tokenizer, TEXTS, prompts=PROMPTS, batch_size=3) == pytest.approx(expected, rel=1e-5)


def test_without_prompts_it_is_the_models_own_loss(model, tokenizer) -> None:
    texts = [text for text in TEXTS if text != "bad"]
    expected = [own_loss(model, [], ids_of(tokenizer, text)) for text in texts]
    assert text_nll(model, tokenizer, texts) == pytest.approx(expected, rel=1e-5)
    assert text_nll(model, tokenizer, texts, prompts=[""] * 4) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("special", ["<s> $A", "<s> $A </s>"])
@pytest.mark.parametrize("prompt", ["", "that film"])
def test_special_tokens_stand_at_the_beginning_only(model, special: str, prompt: str) -> None:
    tokenizer = make_tokenizer(special)
    expected = [own_loss(model, [1, *ids_of(tokenizer, prompt)], ids_of(tokenizer, text)) for text in TEXTS]
    found = text_nll(model, tokenizer, TEXTS, prompts=[prompt] * len(TEXTS))
    assert found == pytest.approx(expected, rel=1e-5)


@given(
    texts=st.lists(st.lists(st.sampled_from(WORDS[3:]), min_size=2, max_size=12).map(" ".join), min_size=1, max_size=9),
    batch_size=st.integers(1, 9),
)
@settings(max_examples=25, deadline=None)
def test_batching_does_not_matter(model, tokenizer, texts: list[str], batch_size: int) -> None:
    alone = [text_nll(model, tokenizer, [text])[0] for text in texts]
    assert text_nll(model, tokenizer, texts, batch_size=batch_size) == pytest.approx(alone, rel=1e-4)


def test_long_texts_are_cut_at_the_end(model, tokenizer) -> None:
    cut = text_nll(model, tokenizer, [TEXTS[2]], prompts=["a film"], max_length=5)
    assert cut == pytest.approx([own_loss(model, ids_of(tokenizer, "a film"), ids_of(tokenizer, TEXTS[2])[:3])])


@pytest.mark.parametrize(("prompt", "kept"), [("good and bad but never dull", 3), ("a film", 2)])
def test_long_prompts_lose_their_start_on_request(model, tokenizer, prompt: str, kept: int) -> None:
    text, before = TEXTS[2], ids_of(tokenizer, prompt)
    found = text_nll(model, tokenizer, [text], prompts=[prompt], max_length=6, cut_prompts=True)
    expected = own_loss(model, before[-kept:], ids_of(tokenizer, text)[: 6 - kept])
    assert found == pytest.approx([expected], rel=1e-5)
    short = text_nll(model, tokenizer, ["bad"], prompts=[prompt], max_length=6, cut_prompts=True)
    assert short == pytest.approx([own_loss(model, before[-5:], ids_of(tokenizer, "bad"))], rel=1e-5)


def test_half_precision_logits_are_scored_in_32_bits(model, tokenizer) -> None:
    half = LlamaForCausalLM(model.config).eval()
    half.load_state_dict(model.state_dict())
    half.to(torch.bfloat16)
    with torch.no_grad():
        ids = torch.tensor([ids_of(tokenizer, TEXTS[0])])
        logs = half(ids).logits[0, :-1].float().log_softmax(-1)
    expected = -logs.gather(1, ids[0, 1:, None]).mean()
    assert text_nll(half, tokenizer, [TEXTS[0]]) == pytest.approx([float(expected)], rel=1e-6)


def test_modes_are_restored_and_dropout_is_off(model, tokenizer) -> None:
    expected = text_nll(model, tokenizer, TEXTS, prompts=PROMPTS)
    model.train()
    model.lm_head.eval()
    try:
        assert text_nll(model, tokenizer, TEXTS, prompts=PROMPTS) == expected
        assert model.training
        assert model.model.layers[0].self_attn.training
        assert not model.lm_head.training
        with pytest.raises(DataError):
            text_nll(model, tokenizer, ["a film", ""])
        assert model.training
    finally:
        model.eval()
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("empty", ["", "  \n"])
def test_an_empty_text_is_named(model, tokenizer, empty: str) -> None:
    with pytest.raises(DataError, match="Text 1 is empty"):
        text_nll(model, tokenizer, ["a film", empty])


def test_nothing_to_score_is_named(model, tokenizer) -> None:
    with pytest.raises(DataError, match=r"Text 2 .*single token"):
        text_nll(model, tokenizer, ["a film", "a film", "bad"])
    with pytest.raises(DataError, match=r"Text 0 .*max_length"):
        text_nll(model, tokenizer, ["a film"], prompts=["good and bad"], max_length=3)
    with pytest.raises(DataError, match="2 texts but 1 prompts"):
        text_nll(model, tokenizer, ["a film", "a film"], prompts=["a"])


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"max_length": 1}])
def test_sizes_are_checked(model, tokenizer, wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        text_nll(model, tokenizer, ["a film"], **wrong)


def test_no_texts(model, tokenizer) -> None:
    assert text_nll(model, tokenizer, []) == []


def test_perplexity() -> None:
    assert perplexity([math.log(2), math.log(8)]) == pytest.approx(4)
    assert perplexity(nll for nll in [0.0]) == 1
    assert perplexity([1e6]) == math.inf
    assert math.isnan(perplexity([math.nan]))
    with pytest.raises(DataError):
        perplexity([])


@pytest.mark.real
def test_the_real_model_prefers_english() -> None:
    from foreword.models import load_model

    model, tokenizer = load_model("demo")
    english, shuffled = text_nll(
        model,
        tokenizer,
        [
            " a film that never quite decides what it wants to be.",
            " decides film to never be that quite wants it what a.",
        ],
        prompts=["It is", "It is"],
    )
    assert english < shuffled - 1
