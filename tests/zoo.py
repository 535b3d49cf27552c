"""Tiny random models of every architecture that the tests speak of, and a tokenizer whose ids fit them."""

from __future__ import annotations

import copy
import functools

import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB = 128
SENTENCES = [
    "The film is a lovely old confection and the acting is good.",
    "There is a place in the city centre that is not for families.",
    "Write a glowing review of the film in a few plain words.",
]

_ENC = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_DEC = {**_ENC, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0}
_DEC = {**_DEC, "bos_token_id": 1, "eos_token_id": 2}
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}


def _deepseek():
    mla = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
    moe = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}
    return tf.DeepseekV3ForCausalLM(tf.DeepseekV3Config(**{**_DEC, "num_key_value_heads": 4}, **mla, **moe, **_MOE))


def _qwen3_next():
    linear = {f"linear_{n}": v for n, v in (("num_value_heads", 4), ("num_key_heads", 2), ("key_head_dim", 8))}
    config = {**_DEC, "num_hidden_layers": 4, "head_dim": 8, "num_experts": 4, "shared_expert_intermediate_size": 16}
    return tf.Qwen3NextForCausalLM(tf.Qwen3NextConfig(**config, **linear, linear_value_head_dim=8, **_MOE))


def _whisper():
    size = {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_mel_bins": 8, "max_source_positions": 16}
    layers = {f"{part}_{n}": v for part in ("encoder", "decoder") for n, v in (("layers", 2), ("attention_heads", 4))}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    return tf.WhisperForConditionalGeneration(tf.WhisperConfig(vocab_size=VOCAB, **size, **layers, **ids))


def _llava():
    vision = {k: v for k, v in _ENC.items() if k != "vocab_size"}
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**vision, image_size=16, patch_size=8, projection_dim=32),
        text_config=tf.LlamaConfig(**_DEC),
        image_token_index=100,
        image_seq_length=4,
    )
    return tf.LlavaForConditionalGeneration(config)


def _bart():
    layers = {f"{part}_{n}": v for part in ("encoder", "decoder")
              for n, v in (("layers", 4), ("attention_heads", 4), ("ffn_dim", 64))}  # fmt: skip
    return tf.BartForConditionalGeneration(
        tf.BartConfig(vocab_size=VOCAB, d_model=32, max_position_embeddings=64, **layers)
    )


_OWN = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_OPT = {"ffn_dim": 64, "max_position_embeddings": 128, "word_embed_proj_dim": 32, **_OWN}
_MODERN = {"cls_token_id": 1, "sep_token_id": 2, **_OWN}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 4, "num_heads": 4, "decoder_start_token_id": 0}
_SMALL = {k: v for k, v in _ENC.items() if k in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
_VIT = {k: v for k, v in _ENC.items() if k != "vocab_size"}

ZOO = {
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, **_OWN)),
    "opt": lambda: tf.OPTForCausalLM(tf.OPTConfig(**_SMALL, **_OPT)),
    "neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**_ENC, pad_token_id=0)),
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_DEC)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**_DEC, sliding_window=4)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**_DEC)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**_DEC, head_dim=8)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**_DEC, head_dim=8, query_pre_attn_scalar=8)),
    "gemma3": lambda: tf.Gemma3ForCausalLM(
        tf.Gemma3TextConfig(**{**_DEC, "num_hidden_layers": 3}, head_dim=8, sliding_window=4,
                            layer_types=["sliding_attention", "full_attention", "sliding_attention"])
    ),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**_DEC)),
    "gptoss": lambda: tf.GptOssForCausalLM(
        tf.GptOssConfig(
            **{**_DEC, "max_position_embeddings": 131072}, head_dim=8, num_local_experts=4, num_experts_per_tok=2
        )
    ),
    "deepseek": _deepseek,
    "qwen3next": _qwen3_next,
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**_DEC, num_local_experts=4, num_experts_per_tok=2)),
    "qwen3moe": lambda: tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**_DEC, head_dim=8, num_experts=8, **_MOE)),
    "bert": lambda: tf.BertForMaskedLM(tf.BertConfig(**_ENC)),
    "roberta": lambda: tf.RobertaForMaskedLM(tf.RobertaConfig(**_ENC)),
    "modernbert": lambda: tf.ModernBertForMaskedLM(
        tf.ModernBertConfig(**{**_ENC, "num_hidden_layers": 3, **_MODERN}, local_attention=8)
    ),
    "t5": lambda: tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=VOCAB, **_T5)),
    "bart": _bart,
    "whisper": _whisper,
    "vit": lambda: tf.ViTModel(tf.ViTConfig(**_VIT, image_size=16, patch_size=8)),
    "llava": _llava,
    "bloom": lambda: tf.BloomForCausalLM(tf.BloomConfig(hidden_size=32, n_layer=2, n_head=4, **_OWN)),
    "falcon": lambda: tf.FalconForCausalLM(tf.FalconConfig(**_SMALL, **_OWN)),
    "mpt": lambda: tf.MptForCausalLM(tf.MptConfig(d_model=32, n_layers=2, n_heads=4, vocab_size=VOCAB)),
    "deberta": lambda: tf.DebertaV2Model(tf.DebertaV2Config(**_ENC)),
    "mamba": lambda: tf.MambaForCausalLM(tf.MambaConfig(hidden_size=32, num_hidden_layers=2, **_OWN)),
}  # fmt: skip

ROTARY = ("neox", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gptoss", "deepseek", "qwen3next")
LEARNED = ("gpt2", "opt")
DECODERS = (*ROTARY, *LEARNED)
UNSUPPORTED = ("bloom", "falcon", "mpt", "deberta", "mamba")


def build(name, seed=0, **changes):
    """The model in eval mode, with weights large enough for attention to be far from uniform."""
    torch.manual_seed(seed)
    model = ZOO[name]()
    if changes:
        model.set_attn_implementation(changes["attn"])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    if getattr(model, "generation_config", None) is not None:  # random models stop at random otherwise
        model.generation_config.eos_token_id = None
        model.generation_config.forced_eos_token_id = None
        model.generation_config.pad_token_id = 0
    return model.eval()


def ids(batch=2, length=7, seed=0):
    """Token ids without the special ones."""
    return torch.randint(3, 99, (batch, length), generator=torch.Generator().manual_seed(seed))


def inputs(name, batch=2, length=7):
    """One forward pass's arguments."""
    generator = torch.Generator().manual_seed(1)
    if name == "vit":
        return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=generator)}
    if name == "whisper":
        features = torch.randn(batch, 8, 32, generator=generator)
        return {"input_features": features, "decoder_input_ids": ids(batch, 5)}
    if name == "llava":
        tokens = ids(batch, length + 4)
        tokens[:, 1:5] = 100
        return {"input_ids": tokens, "pixel_values": torch.randn(batch, 3, 16, 16, generator=generator)}
    if name in ("t5", "bart"):
        return {"input_ids": ids(batch, length), "decoder_input_ids": ids(batch, 5, seed=1)}
    return {"input_ids": ids(batch, length)}


def logits(model, **arguments):
    """What the model says, without gradients: its logits, or its hidden states."""
    with torch.no_grad():
        out = model(**arguments)
    return out.logits if "logits" in out else out[0]


def random_prefix(model, sites, length=3, seed=0, scale=0.5):
    """Keys and values by site name, normal numbers."""
    generator = torch.Generator().manual_seed(seed)

    def draw(heads, n, dim):
        return scale * torch.randn(heads, n, dim, generator=generator)

    lengths = length if isinstance(length, dict) else {s.name: length for s in sites}
    return {
        s.name: (draw(s.kv_heads, lengths[s.name], s.key_dim), draw(s.kv_heads, lengths[s.name], s.value_dim))
        for s in sites
    }


def tokenizer():
    """Byte-level BPE over the letters of SENTENCES: at most 99 ids. A new one each time: pipelines change theirs."""
    return copy.deepcopy(_tokenizer())


@functools.cache
def _tokenizer():
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=99, special_tokens=["<pad>", "<bos>", "<eos>"], show_progress=False)
    bpe.train_from_iterator(SENTENCES, trainer)
    return tf.PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
