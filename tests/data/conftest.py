"""Small tokenizers, trained in a moment: byte-level BPE, so every string has tokens and decodes back."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "There is a place in the city centre, Alimentum, that is not family-friendly.",
    "name[Alimentum], area[city centre], familyFriendly[no]",
    "The film is a lovably old-school confection, and the acting is good.",
    "Once upon a time there was a house by the sea. The sea was calm, and the house was old.",
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _trained(template: str | None = None) -> PreTrainedTokenizerFast:
    special = ["<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    if template:
        ids = [(name, tokenizer.token_to_id(name)) for name in ("<bos>", "<eos>")]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
    )


@pytest.fixture(scope="session")
def plain() -> PreTrainedTokenizerFast:
    """Adds no special tokens."""
    return _trained()


@pytest.fixture(scope="session")
def with_bos() -> PreTrainedTokenizerFast:
    """Opens every text with BOS."""
    return _trained("<bos> $A")


@pytest.fixture(scope="session")
def bos_eos() -> PreTrainedTokenizerFast:
    """Opens with BOS and closes with EOS, as encoders' tokenizers do."""
    return _trained("<bos> $A <eos>")


@pytest.fixture(scope="session")
def chat() -> PreTrainedTokenizerFast:
    """Adds no special tokens, and has a ChatML template."""
    tokenizer = _trained()
    tokenizer.chat_template = CHATML
    return tokenizer
