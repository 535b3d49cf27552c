"""Tasks of lm-evaluation-harness with a prefix, against the model's own likelihoods and texts."""

from __future__ import annotations

import json

import pytest
import torch

import foreword as fw
import zoo
from foreword.errors import ConfigError, DataError, MissingPartError
from foreword.evaluate import harness as module
from foreword.evaluate.harness import evaluate_tasks
from foreword.evaluate.predict import Decoding, predict

pytest.importorskip("lm_eval")
# Two answers, of one token and of several, as the task below asks for them.
ANSWERS = [" bad", " good and lovely"]
# No space at the end: the harness moves it to the answer.
ROWS = [{"text": s[:n].rstrip(), "label": (i + n) % 2} for i, s in enumerate(zoo.SENTENCES) for n in (9, 20, 31)]


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    """Local files are data sets too: they go through a cache, which is to be none of the user's."""
    import datasets

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("cache")
    yield
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture(scope="module")
def base():
    return zoo.build("llama").eval(), zoo.tokenizer()


@pytest.fixture(scope="module")
def prefix(base):
    model, _ = base
    torch.manual_seed(5)
    states = {s.name: (torch.randn(s.kv_heads, 4, s.key_dim), 3 * torch.randn(s.kv_heads, 4, s.value_dim))
              for s in fw.sites(model)}  # fmt: skip
    return fw.Prefix.from_tensors(model, states)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    (folder / "film.yaml").write_text(
        f"task: film\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder / 'rows.jsonl'}\n"
        "test_split: test\noutput_type: multiple_choice\ntarget_delimiter: ''\n"
        f'doc_to_text: "{{{{text}}}}"\ndoc_to_target: label\ndoc_to_choice: {json.dumps(ANSWERS)}\n'
        "metric_list:\n  - metric: acc\n"
    )
    return folder / "film.yaml"


def likelihood(model, tokenizer, context, answer):
    """The sum of log-probabilities of an answer's tokens after a context, in one pass without padding or cache."""
    before, whole = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (context, context + answer))
    with torch.no_grad():
        logs = model(torch.tensor([whole]), use_cache=False).logits[0].log_softmax(-1)
    return sum(float(logs[i - 1, whole[i]]) for i in range(len(before), len(whole)))


def expected(model, tokenizer):
    return [[likelihood(model, tokenizer, r["text"], a) for a in ANSWERS] for r in ROWS]


@pytest.mark.parametrize("which", ["base", "prefix", "prefix and memory"])
def test_likelihoods_are_the_models_own(base, prefix, task, which):
    model, tokenizer = base
    attached = {"base": None, "prefix": prefix, "prefix and memory": [prefix, memory(model)]}[which]
    found = evaluate_tasks(model, tokenizer, task, prefix=attached, batch_size=4)
    if attached is None:
        own = expected(model, tokenizer)
    else:
        tuning = fw.attach(model, attached)
        own = expected(model, tokenizer)
        tuning.detach()
    samples = sorted(found["samples"]["film"], key=lambda s: s["doc_id"])
    theirs = [[score for ((score, _),) in s["resps"]] for s in samples]
    torch.testing.assert_close(torch.tensor(theirs), torch.tensor(own), atol=1e-4, rtol=1e-5)
    right = [max(range(2), key=o.__getitem__) == r["label"] for o, r in zip(own, ROWS, strict=True)]
    acc = found["tasks"]["film"]["acc"]
    assert acc["value"] == pytest.approx(sum(right) / len(right)) and acc["higher_is_better"] and acc["stderr"] > 0


def memory(model):
    tuning = fw.attach(model, fw.MemoryConfig(rank=2))
    torch.manual_seed(1)
    with torch.no_grad():
        for p in tuning.parameters():
            p.copy_(torch.randn_like(p))
    made = tuning.bake()
    tuning.detach()
    return made


def test_the_prefix_changes_the_answers_and_leaves_no_trace(base, prefix, task):
    model, tokenizer = base
    before = expected(model, tokenizer)
    vocabulary = tokenizer.pad_token_id
    plain, prefixed = (evaluate_tasks(model, tokenizer, task, prefix=p, limit=4)["samples"]["film"]
                       for p in (None, prefix))  # fmt: skip
    assert len(plain) == 4 and [s["resps"] for s in plain] != [s["resps"] for s in prefixed]
    assert expected(model, tokenizer) == before and tokenizer.pad_token_id == vocabulary


def test_what_is_attached_already_counts(base, prefix, task):
    model, tokenizer = base
    tuning = fw.attach(model, prefix)
    try:
        found = evaluate_tasks(model, tokenizer, task)
    finally:
        tuning.detach()
    again = evaluate_tasks(model, tokenizer, task, prefix=prefix)
    assert [s["resps"] for s in found["samples"]["film"]] == [s["resps"] for s in again["samples"]["film"]]


def test_texts_are_those_that_predict_writes(base, prefix, task):
    model, tokenizer = base
    spec = {
        "task": "write", "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(task.parent / "rows.jsonl")}},
        "test_split": "test", "output_type": "generate_until", "doc_to_text": "{{text}}", "doc_to_target": "{{text}}",
        "generation_kwargs": {"until": ["</none>"], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }  # fmt: skip
    found = evaluate_tasks(model, tokenizer, spec, prefix=prefix, batch_size=2)
    texts = [s["resps"][0][0] for s in sorted(found["samples"]["write"], key=lambda s: s["doc_id"])]
    tuning = fw.attach(model, prefix)
    own = predict(model, tokenizer, [r["text"] for r in ROWS], settings=Decoding(max_new_tokens=6), batch_size=2)
    tuning.detach()
    assert texts == own and found["tasks"]["write"]["exact_match"]["value"] == 0


def test_an_infix_is_refused(base, task):
    model, tokenizer = base
    tuning = fw.attach(model, fw.PrefixConfig(length=2, init="random", visible="infix"))
    with pytest.raises(ConfigError, match="an infix has to know"):
        evaluate_tasks(model, tokenizer, task)
    prefix = tuning.bake()
    tuning.detach()
    with pytest.raises(ConfigError, match="an infix has to know"):
        evaluate_tasks(model, tokenizer, task, prefix=prefix)


def test_a_task_of_several_is_measured(base, task):
    model, tokenizer = base
    tuning = fw.attach(model, fw.PrefixConfig(length=3, init="random", tasks=("film", "food"), seed=1))
    try:
        with tuning.given(task="food"):
            found = evaluate_tasks(model, tokenizer, task, limit=4)["samples"]["film"]
        baked = tuning.bake(task="food")
    finally:
        tuning.detach()
    alone = evaluate_tasks(model, tokenizer, task, prefix=baked, limit=4)["samples"]["film"]
    scores = [torch.tensor([s for x in run for ((s, _),) in x["resps"]]) for run in (found, alone)]
    torch.testing.assert_close(*scores, atol=1e-5, rtol=1e-5)


def test_a_task_file_that_names_code_is_not_run(base, tmp_path, task):
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef text(doc): return doc['text']\n")
    content = task.read_text().replace('doc_to_text: "{{text}}"', "doc_to_text: !function code.text")
    (tmp_path / "inner.yaml").write_text(content)
    (tmp_path / "outer.yaml").write_text("include: inner.yaml\ntask: outer\n")
    for name in ("inner.yaml", "outer.yaml"):
        with pytest.raises(ConfigError, match=r"inner\.yaml names Python functions.*--trust-code"):
            evaluate_tasks(*base, tmp_path / name)
    assert not (tmp_path / "ran").exists()
    found = evaluate_tasks(*base, tmp_path / "inner.yaml", trust_code=True, limit=2)
    assert found["tasks"]["film"]["acc"]["value"] in (0, 0.5, 1) and (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content",
    [
        '"include": code.yaml\n',
        "include: [plain.yaml, 'code.yaml']\n",
        "<<: {include: code.yaml}\n",
        "{include: code.yaml}\n",
        "doc_to_text: !<!function> code.text\n",
        "%TAG !f! !func\n---\ndoc_to_text: !f!tion code.text\n",
        "doc_to_text: !!python/name:os.system\n",
        "metric_list:\n  - metric: ./evil\n",
        'metric_list: [{"metric": "frugalscore"}]\n',
        "metric_list:\n  - metric: acc\n    hf_evaluate: true\n",
    ],
)
def test_no_way_of_writing_it_runs_code(base, tmp_path, content):
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef text(doc): return doc['text']\n")
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (tmp_path / "code.yaml").write_text("doc_to_text: !function code.text\n")
    (tmp_path / "plain.yaml").write_text("metric_list:\n  - metric: acc\ninclude: outer.yaml\n")
    (tmp_path / "outer.yaml").write_text(content)
    with pytest.raises(ConfigError, match="which would be run; read them, and pass --trust-code"):
        evaluate_tasks(*base, tmp_path / "outer.yaml")
    assert not (tmp_path / "ran").exists()


def test_what_cannot_be_loaded_is_said(base, tmp_path, task):
    with pytest.raises(ConfigError, match="cannot be read"):
        evaluate_tasks(*base, tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("task: [unclosed\n")
    with pytest.raises(ConfigError, match=r"bad\.yaml cannot be read"):
        evaluate_tasks(*base, tmp_path / "bad.yaml")
    with pytest.raises(ConfigError, match="no task was asked for"):
        evaluate_tasks(*base, [])
    (tmp_path / "gone.yaml").write_text(task.read_text().replace("rows.jsonl", "gone.jsonl"))
    with pytest.raises(DataError, match=r"cannot be loaded.*Offline, a task needs its data"):
        evaluate_tasks(*base, tmp_path / "gone.yaml")


@pytest.mark.slow
def test_an_unknown_name_gets_near_ones(base):
    """Slow: the harness reads some 14,000 task files to know its names."""
    with pytest.raises(ConfigError, match=r"no task 'arc_eassy'; did you mean .*arc_easy"):
        evaluate_tasks(*base, "arc_eassy")


def test_without_the_package(base, monkeypatch, task):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(MissingPartError, match=r'pip install "foreword\[harness\]"'):
        evaluate_tasks(*base, task)
