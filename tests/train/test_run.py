"""train_prefix: the rules for the out folder, what it leaves there, and that the model comes back untouched."""

from __future__ import annotations

import io

import pytest
import tiny
import torch
from rich.console import Console

import foreword as fw
import zoo
from foreword.data import encode, read_examples
from foreword.train.curves import draw_curves
from foreword.train.run import train_prefix

PNG = b"\x89PNG\r\n\x1a\n"
CONFIG = fw.PrefixConfig(length=4, init="random")


def run(model, out, what=CONFIG, *, resume=False, valid=False, label="here", console=None, **arguments):
    tokenizer = zoo.tokenizer()
    data = encode(read_examples([{"text": s} for s in zoo.SENTENCES * 2]), tokenizer, max_length=40)
    settings = {"max_steps": 4, "per_device_train_batch_size": 3, "save_steps": 2, "logging_steps": 1, "use_cpu": True,
                "report_to": "none", "eval_steps": 2, **arguments}  # fmt: skip
    return train_prefix(
        model, tokenizer, what, data, out, settings, valid=data if valid else None, resume=resume, label=label,
        console=console or Console(file=io.StringIO()),
    )  # fmt: skip


def assert_untouched(model, before, logits):
    assert fw.tuning.tuning_of(model) is None and "foreword" not in model._modules
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(module.training for module in model.modules())  # as it was
    assert torch.equal(zoo.logits(model, input_ids=zoo.ids()), logits)
    tiny.assert_base_unchanged(model, before)


def test_a_run_leaves_a_prefix_a_curve_and_metrics(tmp_path):
    model, out = zoo.build("llama"), tmp_path / "deep" / "out"
    before, logits = tiny.base_weights(model), zoo.logits(model, input_ids=zoo.ids())
    result = run(model, out, valid=True)
    assert_untouched(model, before, logits)
    assert result.steps == 4 and not result.interrupted and result.parameters == 4 * 2 * 2 * 16
    prefix = fw.Prefix.load(out)
    assert prefix == result.prefix and prefix.longest == 4
    last = [e for e in result.history if "eval_loss" in e][-1]
    assert prefix.metadata["metrics"]["eval_loss"] == pytest.approx(last["eval_loss"], abs=1e-9)
    assert prefix.metadata["metrics"]["loss"] == [e["loss"] for e in result.history if "loss" in e][-1]
    assert prefix.metadata["training"]["steps"] == 4 and prefix.metadata["training"]["learning_rate"] == 2e-2
    config = prefix.metadata["config"]
    assert fw.PrefixConfig(**{**config, "kinds": tuple(config["kinds"])}) == CONFIG
    assert (out / "curve.png").read_bytes().startswith(PNG)
    assert {p.name for p in out.iterdir()} == {
        "prefix.safetensors", "foreword.json", "README.md", "curve.png", "checkpoint-2", "checkpoint-4",
    }  # fmt: skip


def test_the_out_folder_is_never_overwritten_by_chance(tmp_path):
    model, out = zoo.build("llama"), tmp_path / "out"
    run(model, out)
    with pytest.raises(fw.ConfigError, match="holds a prefix already; choose another --out"):
        run(model, out)
    for name in ("foreword.json", "prefix.safetensors"):
        (out / name).unlink()
    with pytest.raises(fw.ConfigError, match=r"README\.md of something else"):
        run(model, out)
    (out / "README.md").unlink()
    with pytest.raises(fw.ConfigError, match=r"holds an unfinished run \(checkpoint-4\); pass --resume"):
        run(model, out)
    assert run(model, out, resume=True, max_steps=6).steps == 6
    with pytest.raises(fw.ConfigError, match="holds no whole checkpoint; leave --resume out"):
        run(model, tmp_path / "empty", resume=True)
    assert not (tmp_path / "empty").exists()
    (tmp_path / "file").touch()
    with pytest.raises(fw.ConfigError, match="is a file"):
        run(model, tmp_path / "file")


@pytest.mark.parametrize("trouble", ["diverges", "bad arguments", "bad data"])
def test_the_model_comes_back_after_an_error(trouble, tmp_path, monkeypatch):
    model = zoo.build("llama")
    before, logits = tiny.base_weights(model), zoo.logits(model, input_ids=zoo.ids())
    if trouble == "diverges":
        with pytest.raises(fw.DivergedError):
            run(model, tmp_path, learning_rate=1e38, warmup_steps=0, max_steps=30)
        assert (tmp_path / "last-good" / "prefix.safetensors").exists() and not (tmp_path / "foreword.json").exists()
    elif trouble == "bad arguments":
        with pytest.raises((ValueError, TypeError)):
            run(model, tmp_path, lr_scheduler_type="nonsense")
    else:
        monkeypatch.setattr("foreword.data.Collator.__call__", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(model, tmp_path)
    assert_untouched(model, before, logits)


@pytest.mark.parametrize("what", ["config", "prefix"])
def test_the_same_seed_gives_the_same_prefix(what, tmp_path):
    model = zoo.build("llama")
    start = CONFIG if what == "config" else run(model, tmp_path / "first", seed=7).prefix
    found = [run(model, tmp_path / str(i), start, seed=seed).prefix for i, seed in enumerate((3, 3, 4))]
    equal = [all(torch.equal(found[0].keys[s], p.keys[s]) for s in p.keys) for p in found]
    assert equal == [True, True, False]


def test_the_bar_shows_the_losses(tmp_path):
    told = io.StringIO()
    run(
        zoo.build("llama"),
        tmp_path,
        valid=True,
        label="film",
        console=Console(file=told, force_terminal=True, width=120),
    )
    shown = told.getvalue()
    assert "film" in shown and "4/4" in shown and "validation" in shown and "{'loss'" not in shown


def test_several_tasks_with_one_data_set_are_refused_before_training(tmp_path):
    with pytest.raises(fw.ConfigError, match="trains several prefixes, and the data are one set"):
        run(zoo.build("llama"), tmp_path / "out", what=fw.PrefixConfig(length=2, init="random", tasks=("a", "b")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("history", [[], [{"step": 1, "loss": 2.0}], [{"step": 2, "eval_loss": 1.0}], [{"epoch": 1}]])
def test_curves_of_little(history, tmp_path):
    path = draw_curves({"a": history, "b": history}, tmp_path / "new" / "c.png", title="t")
    assert path.read_bytes().startswith(PNG) and [p.name for p in path.parent.iterdir()] == ["c.png"]
