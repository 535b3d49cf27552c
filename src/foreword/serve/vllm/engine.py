"""What is read of vLLM's configuration, and which of its settings a prefix can't be served with."""

from __future__ import annotations

from typing import Any

from foreword.errors import ConfigError, UnsupportedModelError
from foreword.serve.vllm.options import Options
from foreword.serve.vllm.rows import Shape


def options_of(config: Any) -> Options:
    """The connector's options.

    Raises:
        ConfigError: no connector is set, or its options are wrong.
    """
    if config.kv_transfer_config is None:
        raise ConfigError("vLLM was started without foreword's connector; start it with `foreword serve --engine vllm`")
    return Options.from_json(config.kv_transfer_config.kv_connector_extra_config)


def shape_of(config: Any) -> Shape:
    """Of the whole model, over all workers."""
    model = config.model_config
    return Shape(model.hf_text_config.num_hidden_layers, model.get_total_num_kv_heads(), model.get_head_size())


def check_config(config: Any) -> None:
    """Make sure that vLLM is set up so that prefixes are right.

    Raises:
        UnsupportedModelError: the model caches in a form that a prefix has no place in.
        ConfigError: a setting that would have a request answered without its prefix.
    """
    model = config.model_config
    if model.use_mla:
        raise UnsupportedModelError("the model has latent attention (MLA): vLLM caches no keys and values of its heads")
    if model.is_encoder_decoder:
        raise UnsupportedModelError("encoder-decoder models have no prefixes on vLLM; `foreword serve` has none either")
    if getattr(model, "uses_mrope", False):
        raise UnsupportedModelError(
            "the model has positions in several dimensions (M-RoPE), which a prefix can't be moved in"
        )
    if config.kv_transfer_config.kv_load_failure_policy != "fail":
        raise ConfigError('kv_load_failure_policy must be "fail": else a prefix that is gone is computed as text')
    if config.speculative_config is not None and config.speculative_config.method not in (
        "ngram",
        "ngram_gpu",
        "suffix",
    ):
        raise ConfigError("a draft model has no prefix of its own; speculate with method ngram, or not at all")


def check_layers(groups: int, windows: dict[str, int | None], most: int) -> None:
    """Make sure that all layers keep all keys.

    Args:
        groups: of the cache.
        windows: each layer's sliding window.
        most: tokens of a request.

    Raises:
        UnsupportedModelError: some don't, and would forget the prefix.
    """
    if groups > 1:
        raise UnsupportedModelError(
            f"vLLM has {groups} groups of caches for this model (sliding windows, recurrent or latent layers among the "
            "others); prefixes need one that holds all layers alike"
        )
    for name, window in windows.items():
        if window is not None and 0 < window < most:
            raise UnsupportedModelError(
                f"{name} has a sliding window of {window} tokens, which would slide past the prefix; with "
                f"--max-model-len {window} it never does"
            )
