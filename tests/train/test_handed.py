"""What PrefixTrainer is handed: wrapped models, a model_init, data without a collator, arguments for writing."""

from __future__ import annotations

import re
import warnings

import numpy
import pytest
import tiny
import torch
import transformers
from torch.utils.data import Subset

import foreword as fw
import zoo
from foreword.data import Collator, TaskMixture, encode, read_examples
from foreword.tuning import tuning_of


def arguments(out, kind=transformers.TrainingArguments, **changes):
    settings = {"output_dir": str(out), "max_steps": 4, "per_device_train_batch_size": 4, "save_strategy": "no",
                "logging_steps": 1, "learning_rate": 0.02, **tiny.QUIET}  # fmt: skip
    return kind(**{**settings, **changes})


# ---------------------------------------------------------------- wrapped models

WRAPPERS = {
    "torch.compile": (torch.compile, r"a compiled model \(torch.compile\).*give foreword the model itself"),
    "DataParallel": (torch.nn.DataParallel, r"a DataParallel around the model.*\(wrapper.module\)"),
}


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("taker", ["attach", "attach a prefix", "trainer", "library"])
def test_a_wrapped_model_is_refused_by_all(name, taker, tmp_path):
    wrap, said = WRAPPERS[name]
    model = zoo.build("llama")
    tuning = fw.attach(model, fw.PrefixConfig(length=4, init="random"))
    prefix = tuning.bake()
    if taker != "trainer":
        tuning.detach()
    wrapped = wrap(model)
    calls = {
        "attach": lambda: fw.attach(wrapped, fw.PrefixConfig(length=4, init="random")),
        "attach a prefix": lambda: fw.attach(wrapped, prefix),
        "trainer": lambda: fw.PrefixTrainer(wrapped, arguments(tmp_path), train_dataset=tiny.rows()),
        "library": lambda: fw.Library(wrapped),
    }
    with pytest.raises(fw.ConfigError, match=said):
        calls[taker]()


def test_no_model_at_all():
    with pytest.raises(fw.ConfigError, match=r"expected a transformers model .*, not str; load one first"):
        fw.attach("demo", fw.PrefixConfig(length=4))


def test_several_gpus_in_one_process_use_one(tmp_path):
    """Trainer would copy the model to each with DataParallel, whose copies know nothing of the prefix."""
    model, _ = tiny.tuned()
    args = arguments(tmp_path)
    args.n_gpu  # noqa: B018 - found out now
    args._n_gpu = 2
    with pytest.warns(UserWarning, match="uses one GPU in one process; launch the script with torchrun"):
        made = fw.PrefixTrainer(model, args, train_dataset=tiny.rows(), data_collator=Collator(0))
    assert made.args.n_gpu == 1 and made._train_batch_size == 4
    made.train()
    assert made.model_wrapped is model and len(tiny.losses(made)) == 4


def test_a_model_compiled_in_place_trains_alike(tmp_path):
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model, _ = tiny.tuned()
        if compiled:
            model.compile(backend="eager")
        made = fw.PrefixTrainer(model, arguments(tmp_path), train_dataset=tiny.rows(), data_collator=Collator(0))
        made.train()
        found.append(tiny.losses(made))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


# ---------------------------------------------------------------- model_init


def initial():
    torch.manual_seed(0)
    return tiny.tuned()[0]


def test_model_init_makes_each_runs_model(tmp_path):
    given = {"train_dataset": tiny.rows(), "data_collator": Collator(0)}
    plain = transformers.Trainer(model_init=initial, args=arguments(tmp_path), **given)
    plain.train()
    made = fw.PrefixTrainer(model_init=initial, args=arguments(tmp_path), **given)
    first = made.model
    made.train()
    assert tiny.losses(made) == pytest.approx(tiny.losses(plain)) and len(tiny.losses(made)) == 4
    assert made.model is not first and made.tuning.model is made.model
    once = made.tuning.bake()
    assert once == tuning_of(plain.model).bake()
    made.save_model(tmp_path / "saved")
    assert fw.Prefix.load(tmp_path / "saved") == once
    made.train()  # anew
    assert made.tuning.bake() == once


def test_model_init_may_change_the_method_and_with_it_the_rate(tmp_path):
    configs = iter([{}, {"reparam": "mlp", "hidden": 8}])
    made = fw.PrefixTrainer(
        model_init=lambda: tiny.tuned(**next(configs))[0],
        args=arguments(tmp_path, fw.PrefixTrainingArguments, learning_rate=None),
        train_dataset=tiny.rows(), data_collator=Collator(0),
    )  # fmt: skip
    assert made.args.learning_rate == 2e-2
    made.train()
    assert made.args.learning_rate == 1e-3 == made.optimizer.param_groups[0]["initial_lr"]


def test_a_search_over_rates(tmp_path):
    pytest.importorskip("optuna")
    made = fw.PrefixTrainer(
        model_init=lambda trial: initial(), args=arguments(tmp_path, eval_strategy="steps", eval_steps=4),
        train_dataset=tiny.rows(), eval_dataset=tiny.rows(6, seed=1), data_collator=Collator(0),
    )  # fmt: skip
    rates = [0.02, 0.2]

    def space(trial):
        return {"learning_rate": trial.suggest_categorical("learning_rate", rates)}

    best = made.hyperparameter_search(space, n_trials=2, backend="optuna", direction="minimize")
    assert best.hyperparameters["learning_rate"] in rates
    assert made.optimizer.param_groups[0]["initial_lr"] == made.args.learning_rate


def test_model_init_is_refused_what_it_can_not_do(tmp_path):
    model, tuning = tiny.tuned()
    with pytest.raises(fw.AttachError, match="a prefix, and what model_init returned has no trainable one"):
        fw.PrefixTrainer(model_init=lambda: zoo.build("llama"), args=arguments(tmp_path))
    with pytest.raises(fw.ConfigError, match="was given a model and model_init"):
        fw.PrefixTrainer(model, arguments(tmp_path), model_init=initial)
    optimizer = torch.optim.SGD(tuning.parameters(), 0.1)
    with pytest.raises(fw.ConfigError, match="the optimizer that was given holds the parameters of another"):
        fw.PrefixTrainer(model_init=initial, args=arguments(tmp_path), optimizers=(optimizer, None))
    with pytest.raises(fw.ConfigError, match=r"expected a transformers model .*, not NoneType"):
        fw.PrefixTrainer(args=arguments(tmp_path))


# ---------------------------------------------------------------- data without a collator


def encoded(name="llama"):
    rows = [
        {"input": "The film is", "output": " a lovely old confection"},
        {"input": "There is", "output": " a place"},
    ] * 4
    return encode(read_examples(rows), zoo.tokenizer(), max_length=64, seq2seq=name == "t5")


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("kind", ["encoded", "part", "parts", "mixture", "valid only"])
def test_encoded_data_need_no_collator(name, kind, tmp_path):
    data = encoded(name)
    what = {"tasks": ("a", "b")} if kind == "mixture" else {}
    train = {"part": Subset(data, [0, 1, 2, 3]), "parts": data + data, "mixture": TaskMixture({"a": data, "b": data})}
    found = []
    for collator in (None, Collator.for_tokenizer(zoo.tokenizer(), seq2seq=name == "t5")):
        model, _ = tiny.tuned(name, **what)
        made = fw.PrefixTrainer(
            model, arguments(tmp_path), train_dataset=None if kind == "valid only" else train.get(kind, data),
            eval_dataset=data if kind == "valid only" else None, data_collator=collator,
            processing_class=zoo.tokenizer(),
        )  # fmt: skip
        assert isinstance(made.data_collator, Collator)
        if kind == "valid only":
            found.append(made.evaluate()["eval_loss"])
        else:
            made.train()
            found.append(tiny.losses(made))
    assert found[0] == pytest.approx(found[1]) and found[0]


def test_the_padding_token_is_the_tokenizers_or_the_models(tmp_path):
    def collator(tokenizer=None, **ids):
        model, _ = tiny.tuned()
        for key, value in ({"pad_token_id": None, "eos_token_id": None} | ids).items():
            setattr(model.config, key, value)
        made = fw.PrefixTrainer(model, arguments(tmp_path), train_dataset=encoded(), processing_class=tokenizer)
        return made.data_collator

    tokenizer = zoo.tokenizer()
    assert collator(tokenizer, pad_token_id=7).pad_token_id == tokenizer.pad_token_id
    tokenizer.pad_token = None
    assert collator(tokenizer, pad_token_id=7).pad_token_id == tokenizer.eos_token_id
    assert collator(pad_token_id=7).pad_token_id == 7 and collator(eos_token_id=[8, 9]).pad_token_id == 8
    with pytest.raises(fw.ConfigError, match=r"neither processing_class nor the model's .*data_collator="):
        collator()


def test_other_data_are_left_to_trainer(tmp_path):
    model, _ = tiny.tuned()
    made = fw.PrefixTrainer(model, arguments(tmp_path), train_dataset=tiny.rows())
    assert made.data_collator is transformers.default_data_collator
    mine = Collator(5)
    assert (
        fw.PrefixTrainer(model, arguments(tmp_path), train_dataset=encoded(), data_collator=mine).data_collator is mine
    )


# ---------------------------------------------------------------- predict_with_generate


def writing(out, kind, name="t5", what=None, given=None, **changes):
    torch.manual_seed(0)
    model = zoo.build(name)
    fw.attach(model, what or fw.PrefixConfig(length=4, init="random"))
    seen = []

    def metrics(prediction):
        seen.append((prediction.predictions, prediction.label_ids))
        return {"length": float(prediction.predictions.shape[1])}

    settings = {"predict_with_generate": True, "generation_max_length": 9, "generation_num_beams": 2,
                "eval_strategy": "steps", "eval_steps": 2, **changes}  # fmt: skip
    data = given or encoded("t5")
    made = kind(model, arguments(out, transformers.Seq2SeqTrainingArguments, **settings), train_dataset=data,
                eval_dataset=data, data_collator=Collator(0, seq2seq=True), compute_metrics=metrics)  # fmt: skip
    made.train()
    predicted = made.predict(data)
    seen.append((predicted.predictions, predicted.label_ids))
    return seen, [{k: v for k, v in e.items() if "runtime" not in k and "per_second" not in k}
                  for e in made.state.log_history]  # fmt: skip


@pytest.mark.parametrize("config", [False, True])
def test_evaluating_by_writing_is_seq2seq_trainers(config, tmp_path):
    changes = {"generation_config": transformers.GenerationConfig(
        max_new_tokens=6, decoder_start_token_id=0, eos_token_id=1, pad_token_id=0, repetition_penalty=3.0),
        "generation_max_length": None} if config else {}  # fmt: skip
    ours = writing(tmp_path, fw.PrefixTrainer, **changes)
    theirs = writing(tmp_path, transformers.Seq2SeqTrainer, **changes)
    assert len(ours[0]) == len(theirs[0]) == 4
    for (a, b), (c, d) in zip(ours[0], theirs[0], strict=True):
        assert numpy.array_equal(a, c) and numpy.array_equal(b, d)
    for own, other in zip(ours[1], theirs[1], strict=True):
        assert own == pytest.approx(other, rel=1e-5)


def test_each_row_is_written_with_its_own_task(tmp_path):
    model = zoo.build("t5")
    tuning = fw.attach(model, fw.PrefixConfig(length=4, init="random", tasks=("a", "b"), seed=3))
    with torch.no_grad():
        for parameter in tuning.parameters():
            parameter.mul_(20.0)  # the tasks write different things
    data = encoded("t5")
    mixture = TaskMixture({"a": data, "b": data})
    args = arguments(tmp_path, transformers.Seq2SeqTrainingArguments, predict_with_generate=True)
    args.generation_max_length = 9
    made = fw.PrefixTrainer(model, args, train_dataset=mixture, data_collator=Collator(0, seq2seq=True))
    written = torch.tensor(made.predict(mixture).predictions)[:, :9]
    model.eval()
    for i in range(len(mixture)):
        ids = torch.tensor([mixture[i]["input_ids"]])
        with tuning.given(task=mixture[i]["task"]):
            alone = model.generate(input_ids=ids, max_length=9)[0]
        assert torch.equal(written[i, : len(alone)], alone)
    assert not torch.equal(written[0], written[len(data)])


def test_decoder_only_models_do_not_evaluate_by_writing(tmp_path):
    with pytest.raises(fw.ConfigError, match=r"predict_with_generate=True continues input_ids, and those of Llama"):
        writing(tmp_path, fw.PrefixTrainer, name="llama")


# ---------------------------------------------------------------- rates that are far from the usual


@pytest.mark.parametrize(
    ("rate", "said"),
    [
        (1e-4, "learning_rate=0.0001 hardly moves a prefix; 0.02 is usual for reparam='direct'"),
        (
            0.7,
            "learning_rate=0.7 is 35 times what is usual for reparam='direct' (0.02), and will hardly train a prefix",
        ),
        (0.5, None),
        (1e-3, None),
    ],
)
@pytest.mark.parametrize("by", ["arguments", "configuration"])
def test_a_rate_far_from_the_usual_is_warned_of(rate, said, by, tmp_path):
    model, _ = tiny.tuned(**({"learning_rate": rate} if by == "configuration" else {}))
    args = arguments(tmp_path, learning_rate=rate if by == "arguments" else 0.02)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fw.PrefixTrainer(model, args, train_dataset=tiny.rows())
    told = [w for w in caught if "learning_rate" in str(w.message)]
    assert [str(w.message) for w in told] == ([said] if said else [])
    assert all(w.filename == __file__ for w in told)  # the line that made the trainer


def test_an_optimizer_of_ones_own_has_no_usual_rate(tmp_path):
    model, tuning = tiny.tuned()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fw.PrefixTrainer(model, arguments(tmp_path, learning_rate=5e-5), train_dataset=tiny.rows(),
                         optimizers=(torch.optim.SGD(tuning.parameters(), 1.0), None))  # fmt: skip


# ---------------------------------------------------------------- what is trained, counted


def test_trainable_parameters_are_printed_as_peft_does(capsys):
    peft = pytest.importorskip("peft")
    model, tuning = tiny.tuned()
    tuning.print_trainable_parameters()
    ours = capsys.readouterr().out
    base = sum(p.numel() for p in zoo.build("llama").parameters())
    trained = tuning.num_parameters
    assert trained == 2 * 4 * 2 * 16
    assert ours == f"trainable params: {trained:,d} || all params: {base + trained:,d} || trainable%: " + (
        f"{100 * trained / (base + trained):.4f}\n"
    )
    tuning.detach()
    wrapped = peft.get_peft_model(zoo.build("llama"), peft.LoraConfig(r=2, task_type="CAUSAL_LM"))
    wrapped.print_trainable_parameters()
    theirs = capsys.readouterr().out
    fw.attach(model, fw.LoRAConfig(rank=2)).print_trainable_parameters()
    assert capsys.readouterr().out == theirs
    assert re.sub(r"[\d.,]+", "N", ours) == re.sub(r"[\d.,]+", "N", theirs)
