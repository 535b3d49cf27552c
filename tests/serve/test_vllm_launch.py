"""The command that starts vLLM: its parts, the placeholder, the template, and models that are refused beforehand."""

from __future__ import annotations

import json
import shlex

import pytest
import transformers as tf
from jinja2.sandbox import ImmutableSandboxedEnvironment

import foreword as fw
import zoo
from foreword.serve.vllm import launch
from foreword.serve.vllm.options import Options

OPTIONS = Options("/prefixes", 0, "<pad>")


def test_the_command_says_everything(tmp_path):
    made = launch.command("m", OPTIONS, name="base", host="::1", port=80, template=tmp_path / "a b", length=64,
        dtype="bfloat16",
                          python="py", more=["--enforce-eager"])  # fmt: skip
    words = shlex.split(str(made))
    assert words == made.arguments and words[-1] == "--enforce-eager"
    transfer = json.loads(words[words.index("--kv-transfer-config") + 1])
    assert transfer["kv_load_failure_policy"] == "fail"
    assert Options.from_json(transfer["kv_connector_extra_config"]) == OPTIONS
    given = dict(zip(words[3:-1:2], words[4::2], strict=True))
    assert given["--max-model-len"] == "64" and given["--chat-template"] == str(tmp_path / "a b")
    for word in ("--model", "--port=3", "--kv_transfer_config"):
        with pytest.raises(fw.ConfigError, match="set by foreword"):
            launch.command("m", OPTIONS, name="b", host="h", port=1, template=None, python="py", more=[word])


@pytest.mark.parametrize("change", [{"prefixes": 3}, {"more": 1}, {"placeholder": True}, {"prompt_logprobs": 1}])
def test_options_are_checked(change):
    with pytest.raises(fw.ConfigError):
        Options.from_json({**OPTIONS.to_json(), **change})
    with pytest.raises(fw.ConfigError, match="no 'placeholder'"):
        Options.from_json({"prefixes": "x", "placeholder_text": ""})


def test_the_placeholder_ends_no_text():
    tokenizer = zoo.tokenizer()
    assert launch.placeholder(tokenizer) == (0, "<pad>")
    assert launch.placeholder(tokenizer, [0]) == (1, "<bos>")
    tokenizer.chat_template = "<pad>{{ messages }}"
    assert launch.placeholder(tokenizer) == (1, "<bos>")


@pytest.mark.parametrize("template", ["\n{% for m in messages %}\n  {{ m }}\n{% endfor %}", "a", "  {{ messages[0] }}"])
def test_the_template_is_the_models_own_behind_placeholders(tmp_path, template):
    tokenizer = zoo.tokenizer()
    assert launch.chat_template(tokenizer, tmp_path) is None
    tokenizer.chat_template = template
    path = launch.chat_template(tokenizer, tmp_path / "new")
    assert launch.chat_template(tokenizer, tmp_path / "new") == path
    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)  # as transformers has it
    own, ours = jinja.from_string(template), jinja.from_string(path.read_text())
    assert ours.render(messages=["x"]) == own.render(messages=["x"])
    assert ours.render(messages=["x"], foreword_placeholders="<pad>" * 3) == "<pad>" * 3 + own.render(messages=["x"])


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (tf.Gemma3TextConfig(), "sliding_attention"), (tf.MistralConfig(sliding_window=64), "sliding window of 64"),
        (tf.T5Config(), "encoder"), (tf.DeepseekV3Config(), "MLA"), (tf.Qwen3NextConfig(), "linear_attention"),
        (tf.LlamaConfig(), None), (tf.Qwen3Config(), None), (tf.Qwen2Config(), None),
        (tf.MistralConfig(sliding_window=None), None),
        (tf.GPT2Config(), None),
    ],
)  # fmt: skip
def test_models_that_forget_are_refused(config, what):
    if what is None:
        launch.check_model(config)
        return
    with pytest.raises(fw.UnsupportedModelError, match=what):
        launch.check_model(config)
