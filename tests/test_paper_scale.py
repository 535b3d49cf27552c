"""The arithmetic of benchmarks/paper_scale.py on numbers worked out by hand."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import transformers as tf

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def paper():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("paper_scale", BENCHMARKS / "paper_scale.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["paper_scale"] = module
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_llama_2_70b_has_its_known_size(paper):
    base = paper.Base()
    assert base.parameters == 68_976_648_192  # as its model card's 69 billion, to the last one
    assert base.prefix(20) == 80 * 2 * 8 * 128 * 20 == 3_276_800
    # 16 x (q and o 16384 each, k and v 9216 each, three of the MLP 36864 each) x 80
    assert base.lora(16) == 80 * 16 * (2 * 16384 + 2 * 9216 + 3 * 36864) == 207_093_760


def test_the_parameters_are_those_of_transformers(paper):
    base = paper.Base(hidden=16, intermediate=24, layers=3, heads=4, kv_heads=2, head_dim=4, vocabulary=50)
    config = tf.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=50, tie_word_embeddings=False,
    )  # fmt: skip
    assert base.parameters == sum(p.numel() for p in tf.LlamaForCausalLM(config).parameters())


def test_costs_worked_out_by_hand(paper):
    base = paper.Base(hidden=8, intermediate=16, layers=2, heads=2, kv_heads=1, head_dim=4, vocabulary=10)
    # products of a layer: q 64, k 32, v 32, o 64, three of 128: 576; norms 2 x 8; embeddings 2 x 80; last norm 8
    assert (base.linear, base.parameters) == (576, 2 * (576 + 16) + 160 + 8) == (576, 1352)
    assert base.stored(2.0) == 2704 and base.stored(0.5) == 1152 * 0.5 + 200 * 2 == 976
    assert base.prefix(5) == 2 * 2 * 4 * 5 == 80
    # inputs 2 x 8 x 2; inside (32 + 16 + 8 + 64) x 2; logits 3 x 10 x 4
    assert base.activations(3, 7) == 21 * (32 + 240 + 120)
    ddp = paper.cost(base, "prefix", "bf16", False, 4, 3, 7, 5, 1)
    assert ddp == paper.Cost(2704, 80 * 16, 3 * 5 * 2 * 4 * 2, 21 * 392, round(2 * 0.75 * 320), 0)
    assert ddp.traffic == 480 and ddp.memory == 2704 + 1280 + 240 + 8232
    sharded = paper.cost(base, "prefix", "int4", True, 4, 3, 7, 5, 1)
    assert (sharded.base, sharded.gathered, sharded.reduced) == (244 + 2 * 488, 1464, 480)
    full = paper.cost(base, "full", "bf16", True, 4, 3, 7, 5, 1)
    assert (full.trained, full.reduced, full.gathered) == (1352 * 16 // 4, 4056, 4056)
    # q 16, k 12, v 12, o 16 and three of 24, at rank 2, two layers
    assert base.lora(2) == 2 * 2 * (16 + 12 + 12 + 16 + 72) == 512
