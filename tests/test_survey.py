"""The survey of transformers' classes: some of it run here, and the page that is made of all of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def survey():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import survey as found

        yield found
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def results(survey):
    return json.loads(survey.RESULTS.read_text(encoding="utf-8"))


EXACT = (
    "DeepseekV32ForCausalLM", "Gemma4ForCausalLM", "GptOssForCausalLM", "Inkling2ForCausalLM", "JetMoeForCausalLM",
    "NanoChatForCausalLM", "DogeForCausalLM", "MiniMaxM3VLForCausalLM", "ModernBertForMaskedLM",
    "T5GemmaForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration", "BartForConditionalGeneration",
)  # fmt: skip
REFUSED = ("BloomForCausalLM", "MambaForCausalLM")


@pytest.mark.parametrize("name", EXACT)
def test_a_class_is_exact(survey, name):
    assert survey.look(name)[0] == "exact", survey.look(name)


@pytest.mark.parametrize("name", REFUSED)
def test_a_class_is_refused_with_the_reason(survey, name):
    result, why = survey.look(name)
    assert result == "refused" and why.startswith(name)


def test_what_is_wrong_is_seen(survey, monkeypatch):
    """The survey can fail: attention that is a thousandth off is wrong, and a kernel that raises fails."""
    from foreword import attention

    right = attention.concatenate
    monkeypatch.setattr(attention, "concatenate", lambda *args: (right(*args)[0] * 1.001, None))
    result, why = survey.look("LlamaForCausalLM")
    assert result == "wrong" and "path" in why

    def broken(*args):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(attention, "concatenate", broken)
    assert survey.look("LlamaForCausalLM") == ("fails", "RuntimeError: no kernel")


def test_no_class_is_wrong(results):
    bad = {n: c for n, c in results["classes"].items() if c["result"] in ("wrong", "fails")}
    assert not bad
    assert sum(c["result"] == "exact" for c in results["classes"].values()) > 200


def test_the_page_is_made_of_the_results(survey, results):
    page = survey.DOCS.read_text(encoding="utf-8")
    assert f"{survey.START}\n{survey.table(results)}\n{survey.END}" in page
