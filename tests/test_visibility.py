"""Who sees a prefix: against explicit masks, caches joined by hand, and step-by-step generation."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

import foreword as fw
import zoo
from foreword._views import SitePrefix
from foreword.attention import attend, attention_path
from foreword.visibility import Visibility, parse
from test_attention import EXACT, SDPA, draw_tensors

DECODERS = ("llama", "gpt2", "mistral", "gemma2", "gptoss", "deepseek")


def visible_prefix(model, visible, length=3, seed=0):
    tensors = zoo.random_prefix(model, fw.sites(model), length, seed)
    prefix = fw.Prefix.from_tensors(model, tensors)
    return fw.Prefix(prefix.keys, prefix.values, prefix.sites, rotations=prefix.rotations,
                     fingerprint=prefix.fingerprint, visible=parse(visible))  # fmt: skip


@settings(max_examples=120)
@given(st.integers(0, 10**6), st.sampled_from(["merged", "concat", "step"]), st.booleans(), st.integers(1, 6))
def test_unseen_prefixes_are_masked_columns(seed, path, masked, length):
    """Attention where some queries don't see the prefix is softmax with -inf in those columns; gradients too."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v, pk, pv, bias = draw_tensors(generator, 2, 4, 2, length, length, 1, 3, 4, 4)
    seen = torch.rand(2, length, generator=generator) < 0.5
    text = torch.ones(length, length, dtype=torch.bool).tril()
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 2, True
    with attention_path(path):
        got, _ = attend(SitePrefix(pk, pv, bias=bias), SDPA, "sdpa", module, q, k, v,
                        text[None, None].expand(2, 1, -1, -1) if masked else None, seen, scaling=0.4)  # fmt: skip
    keys = torch.cat([pk.expand(2, -1, -1, -1), k], 2).repeat_interleave(2, 1)
    values = torch.cat([pv.expand(2, -1, -1, -1), v], 2).repeat_interleave(2, 1)
    scores = q @ keys.mT * 0.4
    before = bias[None, :, None, None].expand(2, 4, length, 3).masked_fill(~seen[:, None, :, None], -torch.inf)
    after = torch.zeros(2, 4, length, length).to(q).masked_fill(~text, -torch.inf)
    want = ((scores + torch.cat([before, after], -1)).softmax(-1) @ values).transpose(1, 2)
    torch.testing.assert_close(got, want, **EXACT)
    weight = torch.randn(got.shape, generator=generator, dtype=torch.float64)
    leaves = (q, k, v, pk, pv, bias)
    if not seen.any():  # the base model's attention: the prefix takes no part
        leaves = (q, k, v)
    for a, b in zip(torch.autograd.grad(got, leaves, weight), torch.autograd.grad(want, leaves, weight), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox"])
@pytest.mark.parametrize("early", [0, 2])
def test_infix_is_caches_joined_segment_by_segment(name, early):
    """[x; INFIX; y] = x alone, then y over the cache of x with the infix's keys and values behind it; float64."""
    model = zoo.build(name).double()
    tokens, boundary = zoo.ids(2, 9), 5
    prefix = visible_prefix(model, f"infix:{early}")
    cut = boundary - early
    cache = DynamicCache()
    first = model(input_ids=tokens[:, :cut], past_key_values=cache).logits
    for layer, site in zip(cache.layers, prefix.sites, strict=True):
        layer.keys = torch.cat([layer.keys, prefix.keys[site.name].double().expand(2, -1, -1, -1)], 2)
        layer.values = torch.cat([layer.values, prefix.values[site.name].double().expand(2, -1, -1, -1)], 2)
    positions = torch.arange(cut, 9)[None].expand(2, -1)
    rest = model(input_ids=tokens[:, cut:], past_key_values=cache, position_ids=positions).logits
    labels = tokens.clone()
    labels[:, :boundary] = -100
    tuning = fw.attach(model, prefix)
    with torch.no_grad():
        got = model(input_ids=tokens, labels=labels).logits
        with fw.boundary(boundary):
            told = model(input_ids=tokens).logits
    tuning.detach()
    torch.testing.assert_close(got, torch.cat([first, rest], 1), atol=1e-10, rtol=1e-10)
    assert torch.equal(got, told)


@pytest.mark.parametrize("name", DECODERS)
def test_infix_boundary_of_each_row_comes_from_its_labels(name):
    model = zoo.build(name)
    tokens = zoo.ids(3, 8)
    labels = tokens.clone()
    for row, start in enumerate((2, 5, 8)):  # the last row has no output: nothing sees the infix
        labels[row, :start] = -100
    base = zoo.logits(model, input_ids=tokens)
    tuning = fw.attach(model, visible_prefix(model, "infix"))
    got = zoo.logits(model, input_ids=tokens, labels=labels)
    tuning.detach()
    for row, start in enumerate((2, 5, 8)):
        torch.testing.assert_close(got[row, :start], base[row, :start], atol=1e-5, rtol=1e-4)
        assert start == 8 or not torch.allclose(got[row, start], base[row, start], atol=1e-3)


@pytest.mark.parametrize("visible", ["infix", "infix:1", "first:6", "window:2:9"])
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}, {"num_beams": 3}])
def test_generation_is_a_full_pass_a_token(visible, options):
    """Greedy tokens with a cache are those of whole passes; beams and other caches run and agree where greedy."""
    model = zoo.build("llama")
    tokens, mask = zoo.ids(2, 6), torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0
    tuning = fw.attach(model, visible_prefix(model, visible))
    got = model.generate(tokens, attention_mask=mask, max_new_tokens=5, do_sample=False, **options)
    ids, seen = tokens, mask
    with fw.boundary(6):
        for _ in range(5):
            positions = (seen.cumsum(-1) - 1).clamp(min=0)
            step = zoo.logits(model, input_ids=ids, attention_mask=seen, position_ids=positions)[:, -1].argmax(-1)
            ids, seen = torch.cat([ids, step[:, None]], 1), torch.cat([seen, seen.new_ones(2, 1)], 1)
    tuning.detach()
    assert got.shape == ids.shape
    if "num_beams" not in options:
        assert torch.equal(got, ids)
    assert "generate" not in model.__dict__


@pytest.mark.parametrize(("visible", "seeing"), [("first:2", [0, 1]), ("window:2:4", [2, 3]), (lambda p: p == 3, [3])])
def test_positions_count_real_tokens(visible, seeing):
    """Left padding doesn't count: a padded row sees what it sees alone."""
    model = zoo.build("llama")
    tokens = zoo.ids(1, 5)
    prefix = visible_prefix(model, visible)
    base = zoo.logits(model, input_ids=tokens)
    tuning = fw.attach(model, prefix)
    alone = zoo.logits(model, input_ids=tokens)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), tokens], 1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    left = zoo.logits(model, input_ids=padded, attention_mask=mask, position_ids=positions)[:, 3:]
    tuning.detach()
    torch.testing.assert_close(left, alone, atol=2e-5, rtol=1e-4)
    for position in range(seeing[0] + 1):  # before the first that sees it, all is the base model's
        same = torch.allclose(alone[:, position], base[:, position], atol=1e-5)
        assert same == (position not in seeing)


def test_encoders_count_their_own_positions():
    model = zoo.build("t5")
    arguments = zoo.inputs("t5")
    base = zoo.logits(model, **arguments)
    config = fw.PrefixConfig(length=3, init="random", visible="first:4", kinds=("encoder",))
    tuning = fw.attach(model, config)
    got = zoo.logits(model, **arguments)
    model.generate(arguments["input_ids"], max_new_tokens=3)
    tuning.detach()
    assert not torch.allclose(got, base, atol=1e-4)


def test_checkpointing_gives_the_same_gradients():
    model = zoo.build("llama").train()
    config = fw.PrefixConfig(length=3, init="random", visible="infix:1")
    tokens, labels = zoo.ids(2, 8), zoo.ids(2, 8)
    labels[0, :3], labels[1, :6] = -100, -100
    found = []
    for on in (False, True):
        tuning = fw.attach(model, config)
        if on:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(input_ids=tokens, labels=labels).loss.backward()
        found.append([p.grad.clone() for p in tuning.parameters()])
        tuning.detach()
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b) and a.abs().sum() > 0


@pytest.mark.parametrize("visible", ["infix", "infix:3", "first:7", "window:1:5", "all"])
def test_rules_are_saved(visible, tmp_path):
    model = zoo.build("llama")
    prefix = visible_prefix(model, visible)
    prefix.save(tmp_path / "p")
    loaded = fw.Prefix.load(tmp_path / "p")
    assert loaded == prefix and loaded.visible == parse(visible)


def test_functions_are_not_saved(tmp_path):
    with pytest.raises(fw.ConfigError, match="is a function, which can't be saved"):
        visible_prefix(zoo.build("llama"), lambda p: p > 1).save(tmp_path / "p")


@pytest.mark.parametrize(
    ("visible", "said"),
    [("sometimes", "expected"), ("first:0", "leaves no position"), ("window:5:2", "leaves no position"),
     ("infix:-1", "expected")],
)  # fmt: skip
def test_bad_rules_are_refused_at_once(visible, said):
    with pytest.raises(fw.ConfigError, match=said):
        fw.PrefixConfig(visible=visible)


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_infix_on_an_encoder_is_refused(name):
    model = zoo.build(name)
    with pytest.raises(fw.ConfigError, match="infix"):
        fw.attach(model, fw.PrefixConfig(length=2, init="random", visible="infix"))
    fw.attach(model, fw.PrefixConfig(length=2, init="random")).detach()  # nothing was left behind


def test_functions_must_give_one_answer_a_position():
    model = zoo.build("llama")
    fw.attach(model, fw.PrefixConfig(length=2, init="random", visible=lambda p: p.float()))
    with pytest.raises(fw.ConfigError, match="expected a bool tensor"):
        model(input_ids=zoo.ids())


@pytest.mark.parametrize("index", [-1, torch.tensor([[1]]), torch.tensor([0.5]), torch.tensor([-2])])
def test_boundaries_are_indices(index):
    with pytest.raises(fw.ConfigError, match="index of the first output token"), fw.boundary(index):
        pass


def test_boundary_fits_the_batch():
    model = zoo.build("llama")
    fw.attach(model, visible_prefix(model, "infix"))
    with pytest.raises(fw.AttachError, match="names 3 rows"), fw.boundary([1, 2, 3]):
        model(input_ids=zoo.ids(2))


def test_rules_are_plain():
    assert parse("first:3") == Visibility("window", 0, 3)


def test_a_copy_of_the_model_has_its_own_boundary():
    model = zoo.build("llama")
    fw.attach(model, visible_prefix(model, "infix"))
    other, tokens = copy.deepcopy(model), zoo.ids(2, 6)
    want = model.generate(tokens, max_new_tokens=4, do_sample=False)
    with torch.no_grad():
        for parameter in model.parameters():  # what the copy says doesn't come from here
            parameter.zero_()
    assert torch.equal(other.generate(tokens, max_new_tokens=4, do_sample=False), want)
