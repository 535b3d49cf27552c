"""Prefixes in llama.cpp's own server, beside transformers with the prefix attached; the file's bytes; refusals."""

from __future__ import annotations

import json
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import foreword as fw
import zoo
from foreword.errors import ConfigError, MismatchError
from foreword.exchange.gguf_base import GgufBase, paired, read_gguf
from foreword.exchange.llama_cpp import Form, export_llama_cpp, placeholders, state_of

ggufs = pytest.importorskip("ggufs")
FAMILIES = {"llama": ("llama", True), "qwen2": ("qwen2", False), "qwen3": ("qwen3", False)}


def made(name="llama", length=5, seed=0, **more):
    model = zoo.build(name)
    return model, fw.Prefix.from_tensors(model, zoo.random_prefix(model, fw.sites(model), length, seed), **more)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    return {n: ggufs.write(zoo.build(n), folder / f"{n}.gguf", a, p) for n, (a, p) in FAMILIES.items()}


def written(model, prefix, ids, new=12):
    """Greedy tokens of a prompt, and the log-probabilities of the first."""
    tuning = fw.attach(model, prefix)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    first = torch.log_softmax(zoo.logits(model, input_ids=ids)[0, -1], -1)
    tuning.detach()
    return out[0, ids.shape[1] :].tolist(), first


def ask(post, done, ids, slot=0, **more):
    return post(
        "/completion", prompt=[*done.tokens, *ids], id_slot=slot, n_predict=12, temperature=0, n_probs=5,
        return_tokens=True, ignore_eos=True, **more,
    )  # fmt: skip


# ---------------------------------------------------------------- the oracle: llama.cpp itself


@pytest.mark.parametrize("flash_attention", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_llama_cpp_writes_what_transformers_writes(files, tmp_path, name, flash_attention):
    model, prefix = made(name)
    form, ids = Form(cache="f32", flash_attention=flash_attention), zoo.ids(1, 7)
    done = export_llama_cpp(prefix, model, files[name], tmp_path / "task.bin", form)
    assert done.base.paired == FAMILIES[name][1] and done.length == 5
    want, logs = written(model, prefix, ids)
    with ggufs.server(files[name], tmp_path, flash_attention=flash_attention) as post:
        without = ask(post, replace(done, tokens=()), ids[0].tolist())["tokens"]
        assert without != want
        post("/slots/0?action=restore", filename="task.bin")
        for _ in range(2):  # the second time what was written after the prefix is thrown away, and the prefix is kept
            answer = ask(post, done, ids[0].tolist())
            assert answer["timings"]["cache_n"] >= 5 and answer["tokens"] == want
        top = answer["completion_probabilities"][0]["top_logprobs"]
        near = 1e-4 if not flash_attention else 5e-3  # llama.cpp's flash attention for CPUs computes in 16 bits
        assert all(abs(t["logprob"] - float(logs[t["id"]])) < near for t in top)


def test_the_order_of_a_heads_dimensions_matters(files, tmp_path):
    """What the proof on the weights is for: keys in the other order are silently wrong."""
    model, prefix = made()
    done = export_llama_cpp(prefix, model, files["llama"], tmp_path / "task.bin", Form(cache="f32"))
    wrong = state_of(prefix, replace(done.base, paired=False), done.tokens, done.form)
    (tmp_path / "wrong.bin").write_bytes(wrong)
    ids = zoo.ids(1, 7)
    _, logs = written(model, prefix, ids)
    with ggufs.server(files["llama"], tmp_path, flash_attention=True) as post:
        post("/slots/0?action=restore", filename="wrong.bin")
        top = ask(post, done, ids[0].tolist())["completion_probabilities"][0]["top_logprobs"]
    assert max(abs(t["logprob"] - float(logs[t["id"]])) for t in top) > 0.05


def test_a_task_in_each_slot(files, tmp_path):
    """Different prefixes of different lengths, in 16 bits, side by side in one server."""
    model, ids = zoo.build("llama"), zoo.ids(1, 6)
    tasks = [made(length=n, seed=n)[1] for n in (3, 9)]
    done = [export_llama_cpp(p, model, files["llama"], tmp_path / f"{i}.bin") for i, p in enumerate(tasks)]
    assert done[0].tokens[:3] != done[1].tokens[:3]
    with ggufs.server(files["llama"], tmp_path, slots=2, cache="f16", flash_attention=True) as post:
        for i in range(2):
            assert post(f"/slots/{i}?action=restore", filename=f"{i}.bin")["n_restored"] == done[i].length
        for i in (0, 1, 0):
            answer = ask(post, done[i], ids[0].tolist(), slot=i)
            assert answer["timings"]["cache_n"] >= done[i].length
            _, logs = written(model, tasks[i], ids)
            top = answer["completion_probabilities"][0]["top_logprobs"]
            assert all(abs(t["logprob"] - float(logs[t["id"]])) < 2e-2 for t in top)


def test_keys_are_found_in_a_matrix_of_all_three(tmp_path):
    """Phi-3 has queries, keys and values in one matrix, here and in its GGUF files."""
    model, prefix = made("phi3")
    file = ggufs.write(model, tmp_path / "phi3.gguf", "phi3", False)
    assert not read_gguf(file, model, prefix).paired


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_keys_are_found_in_quantised_files(tmp_path, kind):
    import gguf

    model, prefix = made("llama")
    file = ggufs.write(model, tmp_path / "q.gguf", "llama", True, gguf.GGMLQuantizationType[kind])
    assert read_gguf(file, model, prefix).paired


def test_a_state_in_another_form_is_refused_by_llama_cpp(files, tmp_path):
    import urllib.error

    model, prefix = made()
    for name, form in (("numbers", Form(cache="f16")), ("values", Form(cache="f32", flash_attention=False))):
        export_llama_cpp(prefix, model, files["llama"], tmp_path / f"{name}.bin", form)
    with ggufs.server(files["llama"], tmp_path, flash_attention=True) as post:
        for name in ("numbers", "values"):
            with pytest.raises(urllib.error.HTTPError):
                post("/slots/0?action=restore", filename=f"{name}.bin")


# ---------------------------------------------------------------- the bytes


@settings(max_examples=25)
@given(
    st.integers(1, 9), st.sampled_from(["slot", "session"]), st.sampled_from(["f16", "f32"]), st.booleans(),
    st.booleans(), st.booleans(),
)  # fmt: skip
def test_reading_a_state_gives_the_prefix_back(length, kind, cache, flash_attention, old, permuted):
    _, prefix = made(length=length, seed=length)
    form = Form(kind, cache, flash_attention, old)
    base, tokens = GgufBase(None, "llama", 2, 128, permuted), placeholders(prefix, 128)
    state, at = state_of(prefix, base, tokens, form), 0

    def take(layout):
        nonlocal at
        found = struct.unpack_from(f"<{layout}", state, at)
        at += struct.calcsize(f"<{layout}")
        return found

    magic = {"slot": b"qsgg", "session": b"nsgg"}[kind]
    assert state[:4] == magic and take("III")[1:] == (form.version, length)
    assert take(f"{length}i") == tokens and all(0 <= t < 128 for t in tokens)
    if kind == "session":
        assert take(f"I{len('llama')}s") == (5, b"llama")
    assert take("II") == (1, length)
    assert [take("iIi") for _ in range(length)] == [(p, 1, 0) for p in range(length)]
    assert take("II") == (int(not flash_attention), 2)
    if not old:
        assert take("II") == (0, 0)
    moved = prefix.shift(length)
    kind_number, dtype = {"f32": (0, np.float32), "f16": (1, np.float16)}[cache]
    for group, transposed in ((moved.keys, False), (moved.values, not flash_attention)):
        for name in sorted(group):
            want = group[name]
            if group is moved.keys and permuted:
                want = paired(want)
            want = want.transpose(0, 1).flatten(1)
            if transposed:
                assert take("iII") == (kind_number, dtype().itemsize, want.shape[1])
                want = want.T
            else:
                assert take("iQ") == (kind_number, dtype().itemsize * want.shape[1])
            got = np.frombuffer(state, dtype, want.numel(), at).reshape(want.shape)
            at += got.nbytes
            torch.testing.assert_close(torch.from_numpy(got.copy()).float(), want, atol=2e-3, rtol=1e-3)
    assert at == len(state)


def test_placeholders_tell_prefixes_apart():
    prefixes = [made(length=4, seed=s)[1] for s in range(20)]
    found = [placeholders(p, 50_000) for p in prefixes]
    assert len(set(found)) == 20 and found[3] == placeholders(made(length=4, seed=3)[1], 50_000)


@given(st.integers(1, 8), st.integers(1, 3))
def test_pairs_stand_side_by_side(half, heads):
    keys = torch.arange(heads * 2 * half).view(heads, 2 * half)
    assert [sorted(p) for p in paired(keys).view(heads * half, 2).tolist()] == [
        [h * 2 * half + i, h * 2 * half + i + half] for h in range(heads) for i in range(half)
    ]


def test_the_record_beside_it_says_what_a_prompt_begins_with(files, tmp_path):
    model, prefix = made()
    done = export_llama_cpp(prefix, model, files["llama"], tmp_path / "new" / "task.bin")
    record = json.loads((tmp_path / "new" / "task.bin.json").read_text())
    assert record["tokens"] == list(done.tokens) and record["length"] == 5 and record["cache"] == "f16"
    assert done.path.stat().st_size == done.bytes
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["task.bin", "task.bin.json"]


# ---------------------------------------------------------------- refusals


def test_a_file_of_another_model_is_refused(files, tmp_path):
    model, prefix = made()
    other = ggufs.write(zoo.build("llama", seed=1), tmp_path / "other.gguf", "llama", True)
    with pytest.raises(MismatchError, match=r"is not of this base model: the keys' weights of layer 0 differ by 1\.\d"):
        export_llama_cpp(prefix, model, other, tmp_path / "task.bin")
    (tmp_path / "text.gguf").write_text("GGUF? no")
    for path, match in (
        (tmp_path / "text.gguf", "can't be read as a GGUF file"),
        (tmp_path / "no", "there is no file"),
    ):
        with pytest.raises(ConfigError, match=match):
            export_llama_cpp(prefix, model, path, tmp_path / "task.bin")
    windowed = ggufs.write(model, tmp_path / "w.gguf", "llama", True, **{"attention.sliding_window": 16})
    with pytest.raises(MismatchError, match="sliding window of 16 tokens"):
        export_llama_cpp(prefix, model, windowed, tmp_path / "task.bin")
    with pytest.raises(MismatchError, match="other weights"):
        export_llama_cpp(prefix, zoo.build("llama", seed=1), other, tmp_path / "task.bin")
    assert not (tmp_path / "task.bin").exists()


def test_what_a_cache_cannot_hold_is_refused(files, tmp_path):
    model, prefix = made()
    sites = fw.sites(model)
    some = fw.Prefix.from_tensors(model, {s.name: zoo.random_prefix(model, sites)[s.name] for s in sites[:1]})
    large = replace(prefix, values={n: v * 1e6 for n, v in prefix.values.items()})
    for bad, match in (
        (some, "keys for 1 of 2 layers, and llama.cpp"),
        (replace(prefix, bias={sites[0].name: torch.zeros(4)}), "gates, which weigh it against the text"),
        (large, "beyond 16 bits; export with cache f32"),
    ):
        with pytest.raises(MismatchError, match=match):
            export_llama_cpp(bad, model, files["llama"], tmp_path / "task.bin")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="cache='q8_0'; expected one of f16, f32"):
        Form(cache="q8_0")
