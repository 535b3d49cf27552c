"""`foreword export` and `foreword import`: files, what is said, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from calling import call

import foreword as fw
import zoo

ggufs = pytest.importorskip("ggufs")


@pytest.fixture(scope="module")
def parts(folder, tmp_path_factory):
    """A folder with the base's GGUF file and two prefixes."""
    path = tmp_path_factory.mktemp("export")
    model = fw.load_model(folder)[0]
    fw.Prefix.from_tensors(model, zoo.random_prefix(model, fw.sites(model), 6)).save(path / "task")
    tuning = fw.attach(model, fw.PrefixConfig(length=2, init="random", gate="head"))
    tuning.bake().save(path / "gated")
    tuning.detach()
    ggufs.write(model, path / "base.gguf", "llama", True)
    return path


@pytest.fixture
def export(capsys, monkeypatch, folder, parts):
    def run(*options, to="llama.cpp", prefix="task", model=folder):
        return call(capsys, monkeypatch, "export", parts / prefix, "--to", to, "--model", model, *options)

    return run


def test_it_says_how_the_state_is_restored(export, parts, tmp_path):
    out = tmp_path / "states" / "task.bin"
    code, said, err = export("--gguf", parts / "base.gguf", "--out", out)
    assert code == 0, err
    assert "6 virtual tokens for llama.cpp" in said and "slot 4, f16, with flash attention" in said
    assert f"--slot-save-path {out.parent} --kv-unified" in said and '{"filename": "task.bin"}' in said
    assert len(json.loads((out.parent / "task.bin.json").read_text())["tokens"]) == 6
    with ggufs.server(parts / "base.gguf", out.parent, cache="f16", flash_attention=True) as post:
        assert post("/slots/0?action=restore", filename="task.bin")["n_restored"] == 6


def test_other_forms(export, parts, tmp_path):
    out = tmp_path / "task.bin"
    code, said, err = export("--gguf", parts / "base.gguf", "--out", out, "--kind", "session", "--old-format",
                             "--cache", "f32", "--no-flash-attention", "--json")  # fmt: skip
    assert code == 0, err
    found = json.loads(said)
    assert found["length"] == 6 and found["bytes"] == out.stat().st_size
    record = json.loads((tmp_path / "task.bin.json").read_text())
    assert [record[k] for k in ("kind", "version", "cache", "flash_attention")] == ["session", 10, "f32", False]


@pytest.mark.parametrize(
    "options, more, match",
    [
        ((), {}, "--gguf names the base model's file that llama.cpp runs"),
        (("--gguf", "{parts}/none.gguf"), {"model": "nobody"}, "there is no file"),
        (("--gguf", "{parts}/base.gguf", "--out", "{parts}"), {}, "is a folder; give the name of a file in it"),
        (("--gguf", "{parts}/base.gguf"), {"prefix": "gated", "model": "nobody"}, "gates, which weigh it against"),
        (("--gguf", "{parts}/base.gguf", "--out", "{parts}/base.gguf", "--overwrite"), {}, "is the base model itself"),
        (("--gguf", "{parts}/base.gguf", "--out", "{parts}/task/README.md"), {}, "exists; give another --out"),
        (("--gguf", "{parts}/base.gguf"), {"prefix": "nothing"}, "nothing"),
        (("--gguf", "{parts}/base.gguf"), {"model": "nobody"}, "nobody"),
    ],
)
def test_what_is_wrong_is_said(export, parts, tmp_path, options, more, match):
    given = [o.format(parts=parts) for o in options]
    if "--out" not in given:
        given += ["--out", str(tmp_path / "task.bin")]
    code, _, err = export(*given, **more)
    assert code == 1 and match in err
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_target_is_named(export, tmp_path):
    code, _, err = export("--out", tmp_path / "x", to="tensorrt")
    assert code == 2 and "llama.cpp" in err


# ---------------------------------------------------------------- PEFT


def test_to_peft_and_back(export, parts, folder, capsys, monkeypatch, tmp_path):
    code, said, err = export("--out", tmp_path / "adapter", to="peft")
    assert code == 0 and "6 virtual tokens, for peft.PeftModel.from_pretrained" in said, err
    give = ("import", tmp_path / "adapter", "--model", folder, "--out", tmp_path / "back")
    code, said, err = call(capsys, monkeypatch, *give)
    assert code == 0 and "6 virtual tokens at 2 sites; text starts at 0" in said, err
    want, got = fw.Prefix.load(parts / "task"), fw.Prefix.load(tmp_path / "back")
    for site in want.keys:
        torch.testing.assert_close(got.keys[site], want.keys[site], atol=1e-5, rtol=1e-5)
    code, said, err = call(capsys, monkeypatch, *give)
    assert code == 1 and "exists; give another --out, or --overwrite" in err
    code, said, err = call(capsys, monkeypatch, *give, "--overwrite", "--keep-positions", "--json")
    assert code == 0 and json.loads(said)["position_offset"] == 6 == fw.Prefix.load(tmp_path / "back").position_offset


def test_what_is_wrong_with_an_adapter_is_said(export, parts, folder, capsys, monkeypatch, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    for options, match in (
        (("--out", tmp_path / "full"), "give the name of a new one"),
        (
            ("--out", tmp_path / "a", "--gguf", parts / "base.gguf"),
            "--gguf is for llama.cpp; leave it out with --to peft",
        ),
    ):
        code, _, err = export(*options, to="peft")
        assert code == 1 and match in err
    export("--out", tmp_path / "adapter", to="peft")
    code, _, err = export("--out", tmp_path / "adapter", to="peft")
    assert code == 1 and "exists; give another --out, or --overwrite" in err
    assert export("--out", tmp_path / "adapter", "--overwrite", to="peft")[0] == 0
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    for source, more, match in (
        (tmp_path / "nothing", (), "holds no adapter_config.json"),
        (tmp_path / "adapter", (), "give --model"),
        (parts / "task", ("--model", folder), "holds no adapter_config.json"),
    ):
        code, _, err = call(capsys, monkeypatch, "import", source, "--out", tmp_path / "new", *more)
        assert code == 1 and match in err
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------- ONNX


@pytest.mark.slow
def test_to_onnx_the_model_once_and_each_prefix(export, parts, tmp_path):
    onnx = pytest.importorskip("foreword.exchange.onnx")
    pytest.importorskip("onnxruntime")
    out = tmp_path / "onnx"
    code, said, err = export("--out", out, to="onnx")
    assert code == 0 and "6 virtual tokens, its past_key_values" in said and "once" in err, err
    before = (out / "model.onnx").stat().st_mtime_ns
    fw.Prefix.load(parts / "task").slice(0, 4).save(parts / "short")
    code, said, err = export("--out", out, "--json", to="onnx", prefix="short")
    assert code == 0 and json.loads(said)["length"] == 4 and (out / "model.onnx").stat().st_mtime_ns == before
    ids, runs = zoo.ids(1, 5), onnx.OnnxModel.load(out)
    for name in ("task", "short"):
        model = zoo.build("llama")
        fw.attach(model, fw.Prefix.load(parts / name))
        want = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)[:, 5:]
        assert runs.generate(ids.numpy(), 8, out / f"{name}.safetensors").tolist() == want.tolist()


def test_what_is_wrong_for_onnx_is_said(export, parts, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "task.safetensors").write_text("x")
    short = fw.Prefix.load(parts / "task")
    first = short.sites[0]
    kept = {first.name: (short.keys[first.name], short.values[first.name])}
    fw.Prefix.from_tensors(zoo.build("llama"), kept).save(parts / "some")
    for options, more, match in (
        (("--out", tmp_path / "a"), {"prefix": "some"}, "keys for 1 of 2 layers, and ONNX Runtime has one length"),
        (("--out", tmp_path / "file"), {}, "is a file; give a folder"),
        (("--out", parts / "task"), {}, "is the folder of a saved prefix"),
        (("--out", tmp_path), {}, "task.safetensors exists; give another --out, or --overwrite"),
        (("--out", tmp_path / "a"), {"prefix": "gated", "model": "nobody"}, "gates, which weigh it against the text"),
        (("--out", tmp_path / "a", "--gguf", parts / "base.gguf"), {}, "leave it out with --to onnx"),
    ):
        code, _, err = export(*options, to="onnx", **more)
        assert code == 1 and match in err
    assert not (tmp_path / "a").exists()
