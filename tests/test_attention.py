"""Merged and concatenated attention against one plain softmax over [prefix; text] in float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AttentionInterface

import foreword as fw
import zoo
from foreword import _masks, _memo
from foreword._kernels import kernel_for, self_check
from foreword.attention import SitePrefix, attend, attention_path, merged_attention

CPU = torch.device("cpu")
SDPA = AttentionInterface._global_mapping["sdpa"]
EXACT = {"atol": 1e-12, "rtol": 1e-12}


def eager(module, query, key, value, mask, scaling=None, **kwargs):
    """The eager attention of transformers' Llama, without its float32 softmax."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * scaling
    if mask is not None:
        scores = scores + mask
    weights = scores.softmax(-1)
    return (weights @ value).transpose(1, 2), weights


def oracle(q, k, v, pk, pv, *, seen, bias, scale, rows=None, visible=None):
    """One softmax over the concatenation, a row at a time: ``(B, H, S, Dv)``, zero where a query sees nothing.

    ``seen`` is ``(B, H, S, N)``, True where a query may see a text key, or numbers to add to the scores.
    """
    batch, heads, group = q.shape[0], q.shape[1], q.shape[1] // k.shape[1]
    out = []
    for b in range(batch):
        task = 0 if rows is None else int(rows[b])
        length = pk.shape[2] if visible is None else int(visible[task].sum())
        keys = torch.cat([pk[task, :, :length], k[b]], 1).repeat_interleave(group, 0)
        values = torch.cat([pv[task, :, :length], v[b]], 1).repeat_interleave(group, 0)
        scores = q[b] @ keys.transpose(-1, -2) * scale
        text = (
            seen[b] if seen.dtype != torch.bool else torch.zeros(seen[b].shape).to(q).masked_fill(~seen[b], -torch.inf)
        )
        before = torch.zeros(heads, q.shape[2], length).to(q)
        if bias is not None:
            before = before + bias[:, None, None]
        scores = scores + torch.cat([before, text], -1)
        dead = (scores == -torch.inf).all(-1, keepdim=True)
        weights = scores.masked_fill(dead, 0.0).softmax(-1).masked_fill(dead, 0.0)
        out.append(weights @ values)
    return torch.stack(out)


def draw_tensors(generator, batch, heads, groups, length, text, tasks, prefix, dim, value_dim):
    shapes = (
        (batch, heads, length, dim), (batch, groups, text, dim), (batch, groups, text, value_dim),
        (tasks, groups, prefix, dim), (tasks, groups, prefix, value_dim), (heads,),
    )  # fmt: skip
    return [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


def draw_seen(generator, style, batch, heads, length, text):
    """``(B, 1|H, S, N)`` bool."""
    offset = text - length
    queries, keys = torch.arange(length)[:, None] + offset, torch.arange(text)[None]
    causal = (keys <= queries)[None, None]
    if style == "left padding":  # some rows' first tokens are padding: their own queries see nothing at all
        start = torch.randint(0, text + 1, (batch,), generator=generator)[:, None, None, None]
        return (causal & (keys[None, None] >= start)).expand(batch, 1, length, text)
    if style == "window":
        return (causal & (queries - keys < 2)[None, None]).expand(batch, 1, length, text)
    if style == "random":
        return torch.rand(batch, heads, length, text, generator=generator) < 0.5
    return (causal if style == "causal" else torch.ones_like(causal)).expand(batch, 1, length, text)


@st.composite
def cases(draw, value_dims=(4,)):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    batch, groups, per_group = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    length = draw(st.integers(1, 6))
    style = draw(st.sampled_from(["none", "causal", "full", "left padding", "window", "random"]))
    text = length if style in ("none", "causal") else length + draw(st.integers(0, 3))
    prefix = draw(st.integers(1, 5))
    tasks = draw(st.sampled_from([0, 2, 3]))  # 0: one prefix for all rows
    heads = groups * per_group
    tensors = draw_tensors(
        generator, batch, heads, groups, length, text, tasks or 1, prefix, 4, draw(st.sampled_from(value_dims))
    )
    rows = torch.randint(0, tasks, (batch,), generator=generator) if tasks else None
    lengths = torch.randint(0, prefix + 1, (tasks,), generator=generator) if tasks else None
    visible = torch.arange(prefix) < lengths[:, None] if tasks else None
    kind = draw(st.sampled_from(["bool", "float", "float per head"])) if style != "none" else "bool"
    return SimpleNamespace(
        generator=generator, tensors=tensors, rows=rows, visible=visible, style=style, kind=kind,
        seen=draw_seen(generator, style, batch, heads, length, text), bias=draw(st.booleans()), scale=0.37,
    )  # fmt: skip


def mask_of(case):
    """The mask as transformers hands it over, and what the oracle reads."""
    heads = case.tensors[0].shape[1]
    seen = case.seen
    if case.style == "none":
        return None, seen.expand(-1, heads, -1, -1)
    if case.kind == "bool":
        return seen, seen.expand(-1, heads, -1, -1)
    scores = torch.randn(seen.shape, generator=case.generator, dtype=torch.float64).masked_fill(~seen, -torch.inf)
    if case.kind == "float per head":
        scores = scores.expand(-1, heads, -1, -1).clone()
    return scores, scores.expand(-1, heads, -1, -1)


def prefix_of(case):
    *_, pk, pv, bias = case.tensors
    return SitePrefix(pk, pv, case.rows, case.visible, bias if case.bias else None)


def expected(case, seen, causal):
    q, k, v, pk, pv, bias = case.tensors
    if causal:
        seen = torch.ones_like(seen).tril()
    return oracle(q, k, v, pk, pv, seen=seen, bias=bias if case.bias else None, scale=case.scale,
                  rows=case.rows, visible=case.visible)  # fmt: skip


def live(case, seen):
    """``(B, H, S)``: the queries that see a text key or a virtual token."""
    alive = (seen if seen.dtype == torch.bool else seen > -torch.inf).any(-1)
    if case.visible is None:
        return torch.ones_like(alive)
    return alive | case.visible.any(-1)[case.rows][:, None, None]


def compare(case, got, want, seen):
    """Outputs and every gradient agree at the queries that see a key; all gradients are numbers."""
    alive = live(case, seen)[..., None]
    torch.testing.assert_close(torch.where(alive, got, 0), torch.where(alive, want, 0), **EXACT)
    weight = torch.where(alive, torch.randn(got.shape, generator=case.generator, dtype=torch.float64), 0.0)
    used = case.tensors if case.bias else case.tensors[:5]
    for a, b in zip(torch.autograd.grad(got, used, weight), torch.autograd.grad(want, used, weight), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@settings(max_examples=250)
@given(cases())
def test_merged_is_the_joint_softmax(case):
    mask, seen = mask_of(case)
    q, k, v = case.tensors[:3]
    causal = case.style == "none"
    got = merged_attention(
        q, k, v, prefix_of(case).for_batch(q), mask=_masks.additive(mask, q.dtype), causal=causal,
        scale=case.scale, kernel=kernel_for(CPU),
    )  # fmt: skip
    compare(case, got, expected(case, seen, causal), seen)


@settings(max_examples=150)
@given(cases(value_dims=(4, 6)), st.sampled_from(["sdpa", "eager"]), st.sampled_from(["auto", "concat", "step"]))
def test_attend_is_the_joint_softmax(case, name, path):
    mask, seen = mask_of(case)
    q, k, v = case.tensors[:3]
    if name == "eager":
        if mask is None:
            mask = torch.zeros(1, 1, q.shape[2], k.shape[2]).to(q).masked_fill_(~seen.tril()[:1, :1], -torch.inf)
        elif mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape).to(q).masked_fill_(~mask, -torch.inf)
        lowest = torch.finfo(q.dtype).min
        mask = mask.clamp(min=lowest)  # as transformers writes eager masks: a dead query is uniform, not NaN
    module = SimpleNamespace(num_key_value_groups=q.shape[1] // k.shape[1], is_causal=True)
    with attention_path(path):
        got, _ = attend(prefix_of(case), eager if name == "eager" else SDPA, name, module, q, k, v, mask,
                        scaling=case.scale, dropout=0.0)  # fmt: skip
    compare(case, got.transpose(1, 2), expected(case, seen, case.style == "none"), seen)


def plain_call(prefix, path="auto", *, batch=2, length=5, dtype=torch.float32, is_causal=True, **kwargs):
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(batch, h, length, 4, generator=generator).to(dtype) for h in (4, 2, 2))
    module = SimpleNamespace(num_key_value_groups=2, is_causal=is_causal)
    with attention_path(path):
        return attend(prefix, SDPA, "sdpa", module, q, k, v, kwargs.pop("mask", None), scaling=0.5, **kwargs)[0]


def plain_prefix(length=3, **kwargs):
    generator = torch.Generator().manual_seed(4)
    keys, values = (torch.randn(1, 2, length, 4, generator=generator) for _ in range(2))
    return SitePrefix(keys, values, **kwargs)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("length", [1, 5])
def test_paths_agree_without_a_mask(is_causal, length):
    prefix = plain_prefix()
    outs = [plain_call(prefix, p, is_causal=is_causal, length=length) for p in ("auto", "merged", "concat")]
    torch.testing.assert_close(outs[0], outs[2])
    torch.testing.assert_close(outs[1], outs[2])


def test_a_strong_and_a_weak_prefix():
    weak, strong = (plain_prefix(bias=torch.full((4,), b)) for b in (-60.0, 60.0))
    for path in ("merged", "concat"):
        text = plain_call(plain_prefix(length=1, bias=torch.full((4,), -torch.inf)), path)
        torch.testing.assert_close(plain_call(weak, path), text)
        first = plain_call(strong, path, length=1)
        torch.testing.assert_close(plain_call(strong, path)[:, :1].shape, first.shape)
        assert not torch.allclose(plain_call(strong, path), text, atol=0.1)


def test_zero_gate_keeps_the_softmaxes_apart():
    closed = plain_call(plain_prefix(gate=torch.zeros(4)))
    open_, text = (
        plain_call(plain_prefix(gate=torch.ones(4))),
        plain_call(plain_prefix(bias=torch.full((4,), -torch.inf))),
    )
    torch.testing.assert_close(closed, text)
    q = torch.randn(2, 4, 5, 4, generator=torch.Generator().manual_seed(3))
    prefix = plain_prefix()
    keys, values = (x.repeat_interleave(2, 1) for x in (prefix.keys, prefix.values))
    second = (q @ keys.transpose(-1, -2) * 0.5).softmax(-1) @ values
    torch.testing.assert_close(open_, text + second.transpose(1, 2))


def test_gated_rows_without_a_prefix_are_the_text():
    generator = torch.Generator().manual_seed(4)
    keys, values = (torch.randn(2, 2, 3, 4, generator=generator) for _ in range(2))
    visible = torch.tensor([[True, True, False], [False, False, False]])
    mixed = SitePrefix(keys, values, torch.tensor([0, 1]), visible, gate=torch.ones(4))
    short = SitePrefix(keys[:1, :, :2], values[:1, :, :2], gate=torch.ones(4))
    got, text = plain_call(mixed), plain_call(plain_prefix(gate=torch.zeros(4)))
    torch.testing.assert_close(got[0], plain_call(short)[0])
    assert torch.equal(got[1], text[1])


def test_beams_multiply_the_rows():
    generator = torch.Generator().manual_seed(4)
    keys, values = (torch.randn(2, 2, 3, 4, generator=generator) for _ in range(2))
    for path in ("merged", "concat"):
        got = plain_call(SitePrefix(keys, values, torch.tensor([1, 0])), path, batch=6)
        for task, chosen in ((1, slice(0, 3)), (0, slice(3, 6))):
            alone = plain_call(SitePrefix(keys[task : task + 1], values[task : task + 1]), path, batch=6)
            torch.testing.assert_close(got[chosen], alone[chosen])
    with pytest.raises(fw.AttachError, match="5 rows but 2 tasks"):
        plain_call(SitePrefix(keys, values, torch.tensor([1, 0])), batch=5)


@pytest.mark.parametrize("path", ["merged", "concat"])
def test_half_precision_and_autocast(path):
    full = plain_call(plain_prefix(), path)
    half = plain_call(plain_prefix(), path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), full, atol=0.05, rtol=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = plain_call(plain_prefix(), path)
    torch.testing.assert_close(cast.float(), full, atol=0.05, rtol=0.05)


def test_an_unused_static_cache_is_cut_off():
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(2, h, n, 4, generator=generator) for h, n in ((4, 5), (2, 9), (2, 9)))
    module = SimpleNamespace(num_key_value_groups=2, is_causal=True)
    for path in ("merged", "concat"):
        with attention_path(path):
            a, _ = attend(plain_prefix(), SDPA, "sdpa", module, q, k, v, None, scaling=0.5)
            b, _ = attend(plain_prefix(), SDPA, "sdpa", module, q, k[:, :, :5], v[:, :, :5], None, scaling=0.5)
        torch.testing.assert_close(a, b)


def test_unknown_path_is_refused():
    with pytest.raises(fw.ConfigError, match="'fast'"), attention_path("fast"):
        pass


def test_the_kernel_passes_its_own_check():
    assert self_check(kernel_for(CPU), CPU, torch.float32) < 1e-4
    assert self_check(kernel_for(CPU), CPU, torch.bfloat16) < 0.2
    assert kernel_for(torch.device("meta")) is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_mask_changed_in_place_is_read_again(mode):
    prefix = plain_prefix()
    with mode():
        mask = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
        for path in ("merged", "concat"):
            mask[...] = torch.ones(5, 5, dtype=torch.bool).tril()
            before = plain_call(prefix, path, mask=mask)
            torch.testing.assert_close(before, plain_call(prefix, path))
            mask[:, :, :, 0] = False
            after = plain_call(prefix, path, mask=mask)
            torch.testing.assert_close(after, plain_call(prefix, path, mask=mask.clone()))
            assert not torch.allclose(before, after)


def test_a_new_mask_at_an_old_address_is_read_anew():
    seen, memo = set(), _memo.current.memo
    before = len(memo)
    for i in range(50):
        mask = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
        mask[..., : i % 4 + 1] = True
        seen.add(id(mask))
        made = _masks.additive(mask, torch.float32)
        assert torch.equal(made == 0, mask)
        dead = _masks.dead_rows(made)
        assert not dead.any()
        del mask, made, dead
    assert len(seen) < 50  # an address did come back
    assert len(memo) <= before  # and nothing is kept of masks that are gone


def test_a_mask_is_derived_once():
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    assert _masks.additive(mask, torch.float32) is _masks.additive(mask, torch.float32)
    assert _masks.additive(mask, torch.float64).dtype == torch.float64


@pytest.mark.parametrize("mixed", [False, True])
def test_a_step_repeated_in_each_layer_is_the_concatenation(mixed, monkeypatch):
    """What the first layer of a step decided holds in the others, for this mask and for prefixes like it only."""
    from foreword import _step, attention

    model = zoo.build("llama")
    lengths = {"model.layers.0.self_attn": 3, "model.layers.1.self_attn": 5 if mixed else 3}
    fw.attach(model, fw.Prefix.from_tensors(model, zoo.random_prefix(model, fw.sites(model), lengths)))
    tokens, mask = zoo.ids(16, 40), torch.ones(16, 40, dtype=torch.long)
    mask[::2, :7] = 0
    common = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "output_logits": True,
              "return_dict_in_generate": True}  # fmt: skip
    with attention_path("concat"):
        want = model.generate(tokens, **common)
    found = []
    monkeypatch.setattr(attention, "repeated", lambda *a: found.append(_step.repeated(*a)) or found[-1])
    got = model.generate(tokens, **common)
    assert sum(h is not None for h in found) == (0 if mixed else 5)  # the second layer of each step after the prompt
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------- tensors as they come: transposed, sliced, expanded

LAYOUTS = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "every second column": lambda x: torch.stack((x, -x), -1).flatten(-2)[..., ::2],
    "heads inside": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "one for all": lambda x: x[..., :1].expand_as(x),
    "one token": lambda x: x[..., :1, :].expand_as(x),
    "one head": lambda x: x[:, :1].expand_as(x),
    "a slice": lambda x: torch.cat((x, x), -2)[..., 1 : x.shape[-2] + 1, :],
    "overlapping": lambda x: torch.arange(1.0 * x.numel()).sin().to(x).as_strided(x.shape, (x[0].numel(), 7, 1, 1)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", ["q", "k", "v", "mask", "pk", "pv", "gradient"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_paths_read_tensors_of_any_layout(layout, which, dtype):
    generator = torch.Generator().manual_seed(5)
    shapes = {"q": (2, 4, 6, 8), "k": (2, 2, 9, 8), "v": (2, 2, 9, 8), "mask": (2, 4, 6, 9), "pk": (1, 2, 40, 8),
              "pv": (1, 2, 40, 8), "gradient": (2, 4, 6, 8)}  # fmt: skip
    tensors = {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}
    tensors[which] = LAYOUTS[layout](tensors[which])
    module = SimpleNamespace(num_key_value_groups=2, is_causal=False)

    def run(path, tensors):
        leaves = {n: t.detach().requires_grad_(n not in ("mask", "gradient")) for n, t in tensors.items()}
        with attention_path(path):
            out, _ = attend(
                SitePrefix(leaves["pk"], leaves["pv"]), SDPA, "sdpa", module, leaves["q"], leaves["k"], leaves["v"],
                leaves["mask"], scaling=0.37,
            )  # fmt: skip
        wanted = [leaves[n] for n in ("q", "k", "v", "pk", "pv")]
        return out, *torch.autograd.grad(out, wanted, leaves["gradient"].transpose(1, 2))

    want = run("concat", {n: t.contiguous() for n, t in tensors.items()})
    close = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.05, "rtol": 0.05}
    for path in ("merged", "step", *(("concat",) if layout != "overlapping" else ())):  # torch's own reads it wrongly
        for got, right in zip(run(path, tensors), want, strict=True):
            torch.testing.assert_close(got, right, **close)


@pytest.mark.parametrize("length", [5, 512])
@pytest.mark.parametrize("queries", [1, 20])
def test_a_prefix_whose_keys_lie_the_other_way_round(length, queries):
    model, x = zoo.build("llama"), zoo.ids(1, queries)
    made = zoo.random_prefix(model, fw.sites(model), length)
    outs = []
    for lay in (lambda t: t, lambda t: t.mT.contiguous().mT, lambda t: torch.stack((t, t), -1)[..., 0]):
        tuning = fw.attach(model, fw.Prefix.from_tensors(model, {n: (lay(k), lay(v)) for n, (k, v) in made.items()}))
        outs.append(zoo.logits(model, input_ids=x))
        assert all(t.stride(-1) == 1 for pair in tuning.encoder().values() for t in pair)  # not copied in each pass
        tuning.detach()
    torch.testing.assert_close(outs[1], outs[0])
    torch.testing.assert_close(outs[2], outs[0])
