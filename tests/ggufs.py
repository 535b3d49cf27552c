"""Small GGUF files of the zoo's models, and llama.cpp's own server on them."""

from __future__ import annotations

import json
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import gguf

_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def write(model, path: Path, architecture: str, permuted: bool, quantised=None, **more) -> Path:
    """A model's weights as llama.cpp's converter lays them out, in 32 bits, or with its matrices quantised."""
    config = model.config
    out = gguf.GGUFWriter(path, architecture)
    out.add_block_count(config.num_hidden_layers)
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_rope_freq_base(config.rope_parameters["rope_theta"])
    out.add_vocab_size(config.vocab_size)
    for name, value in more.items():
        out.add_uint32(f"{architecture}.{name}", value)
    out.add_tokenizer_model("llama")
    out.add_token_list([f"<{i}>".encode() for i in range(config.vocab_size)])
    out.add_token_scores([0.0] * config.vocab_size)
    out.add_token_types([gguf.TokenType.NORMAL] * config.vocab_size)
    out.add_add_bos_token(False)
    for name, tensor in model.state_dict().items():
        stem, _, kind = name.rpartition(".")
        layer = ""
        if stem.startswith("model.layers."):
            number, _, stem = stem.removeprefix("model.layers.").partition(".")
            layer = f"blk.{number}."
        data = tensor.float()
        if permuted and stem in ("self_attn.q_proj", "self_attn.k_proj"):
            heads = config.num_attention_heads if "q_proj" in stem else config.num_key_value_heads
            data = data.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        data, packed = data.contiguous().numpy(), quantised is not None and data.ndim == 2 and not data.shape[1] % 32
        if packed:
            data = gguf.quants.quantize(data, quantised)
        out.add_tensor(f"{layer}{_NAMES[stem]}.{kind}", data, raw_dtype=quantised if packed else None)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


@contextmanager
def server(path: Path, states: Path, *, slots: int = 1, cache: str = "f32", flash_attention: bool = False):
    """llama.cpp's server in this process; gives a function that posts JSON."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = str(path)
    settings.port, settings.n_parallel, settings.kv_unified, settings.n_ctx = 0, slots, True, 128
    settings.slot_save_path, settings.cache_ram_mib = f"{states}/", 0
    kind = {"f32": xllamacpp.ggml_type.GGML_TYPE_F32, "f16": xllamacpp.ggml_type.GGML_TYPE_F16}[cache]
    settings.cache_type_k = settings.cache_type_v = kind
    flash = xllamacpp.llama_flash_attn_type
    settings.flash_attn_type = (
        flash.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash_attention else flash.LLAMA_FLASH_ATTN_TYPE_DISABLED
    )
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    settings.warmup, settings.verbosity = False, -1
    running = xllamacpp.Server(settings)

    address = running.listening_address

    def post(where: str, **body):
        content = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{address}{where}", json.dumps(body).encode(), content)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    try:
        yield post
    finally:
        del running


def in_32_bits(path: Path, to: Path) -> Path:
    """A GGUF file with all its tensors dequantised; its tokenizer and settings as they are."""
    reader = gguf.GGUFReader(path)
    out = gguf.GGUFWriter(to, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            kind, sub = field.types[0], field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            out.add_key_value(name, field.contents(), kind, sub_type=sub)
    for tensor in reader.tensors:
        out.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return to
