"""`foreword train`: from a file of examples to a saved prefix."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from foreword.cli._data import ChatOption, Source, Turns, TurnsOption
from foreword.cli._methods import Gate, Method, Reparam, configs
from foreword.cli._shared import pairs, print_json, quiet
from foreword.cli._tasks import TaskSources
from foreword.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

    from foreword.data import EncodedDataset, TaskMixture
    from foreword.methods import Config
    from foreword.train.run import RunResult

_PREFIX, _DATA, _RUN, _PLAN, _TASKS = "Prefix", "Data", "Run", "Strategy", "Several tasks"


def run(
    model: Annotated[str, Option(help="Base model: hub name, folder, .gguf file, or 'demo' (the packaged SmolLM2).")],
    data: Annotated[list[str] | None, Option(help="Examples: .jsonl, .csv, .parquet, a datasets name, or - (several are joined). Columns messages, prompt/completion, instruction/output, input/output, text, or input/references.", show_default="one of --data and --task")] = None,
    out: Annotated[Path | None, Option(help="Folder for the prefix.")] = None,
    valid: Annotated[list[str] | None, Option(help="Validation examples, in the same form.")] = None,
    valid_share: Annotated[float | None, Option(help="Hold this share of --data out for validation instead, chosen by --seed.", rich_help_panel=_DATA)] = None,
    method: Annotated[list[Method] | None, Option(help="What to train: several train together.", rich_help_panel=_PREFIX, show_default="prefix")] = None,
    length: Annotated[int, Option(help="Virtual tokens.", rich_help_panel=_PREFIX)] = 20,
    init: Annotated[str | None, Option(help="A text about the task, 'words:good film', 'random', or, of several tasks, 'orthogonal'.", rich_help_panel=_PREFIX)] = None,
    repeat: Annotated[bool, Option(help="Repeat an init text that is shorter than the prefix.", rich_help_panel=_PREFIX)] = False,
    reparam: Annotated[Reparam, Option(help="What is trained.", rich_help_panel=_PREFIX)] = Reparam.direct,
    depth: Annotated[int, Option(help="Layers of the MLP.", rich_help_panel=_PREFIX)] = 2,
    hidden: Annotated[int, Option(help="Width of the MLP.", rich_help_panel=_PREFIX)] = 512,
    orthogonal: Annotated[bool, Option("--orthogonal", help="Start the MLP's layers orthogonal.", rich_help_panel=_PREFIX)] = False,
    per_kind: Annotated[bool, Option("--per-kind", help="An MLP for each kind of attention instead of one for all.", rich_help_panel=_PREFIX)] = False,
    share_layers: Annotated[bool, Option("--share-layers", help="One small MLP that makes each layer's tokens in turn.", rich_help_panel=_PREFIX)] = False,
    rank: Annotated[int, Option(help="Rank of the low-rank change, and of LoRA.", rich_help_panel=_PREFIX)] = 8,
    memory_rank: Annotated[int | None, Option(help="Rank of a memory; without it the memory is whole.", rich_help_panel=_PREFIX)] = None,
    width: Annotated[int, Option(help="Width of adapters.", rich_help_panel=_PREFIX)] = 32,
    sites: Annotated[str | None, Option(help="first:4, last:4, every:2, or a regular expression over attention sites.", rich_help_panel=_PREFIX)] = None,
    kinds: Annotated[str, Option(help="Kinds of site, with commas.", rich_help_panel=_PREFIX)] = "self,cross,encoder",
    visible: Annotated[str, Option(help="Who sees the prefix: all, infix, infix:1, first:16, window:4:32.", rich_help_panel=_PREFIX)] = "all",
    gate: Annotated[Gate, Option(help="Learned weight of the prefix.", rich_help_panel=_PREFIX)] = Gate.none,
    dropout: Annotated[float, Option(help="Dropout on the prefix.", rich_help_panel=_PREFIX)] = 0.0,
    freeze_first: Annotated[bool, Option(help="Keep the first token as initialised.", rich_help_panel=_PREFIX)] = False,
    position_offset: Annotated[int, Option(help="Position that the text starts at.", rich_help_panel=_PREFIX)] = 0,
    task: Annotated[list[str] | None, Option(help="Instead of --data, examples of one of several tasks: reviews=F.jsonl (several). A prefix for each, in a folder of its name in --out.", rich_help_panel=_TASKS)] = None,
    valid_task: Annotated[list[str] | None, Option(help="Validation examples of a task: reviews=V.jsonl (several).", rich_help_panel=_TASKS)] = None,
    task_init: Annotated[list[str] | None, Option(help="What a task's prefix starts from: reviews=TEXT (several); --init is for the others.", rich_help_panel=_TASKS)] = None,
    sampling: Annotated[str, Option(help="How often tasks are drawn: size, uniform, or temperature:2.", rich_help_panel=_TASKS)] = "size",
    common: Annotated[int, Option(min=0, help="The first N virtual tokens are one set for all tasks.", rich_help_panel=_TASKS)] = 0,
    share_keys: Annotated[bool, Option("--share-keys", help="One set of keys for all tasks, values for each.", rich_help_panel=_TASKS)] = False,
    orthogonality: Annotated[float, Option(min=0, help="Strength of a penalty on what tasks share.", rich_help_panel=_TASKS)] = 0.0,
    start: Annotated[Path | None, Option(help="Go on training this saved prefix instead.", rich_help_panel=_PREFIX)] = None,
    column: Annotated[list[str] | None, Option(help="Map a column: input=question (several); of one task reviews:input=question.", rich_help_panel=_DATA)] = None,
    where: Annotated[list[str] | None, Option(help="Keep rows only: label=1 (several); of one task reviews:label=1.", rich_help_panel=_DATA)] = None,
    split: Annotated[str | None, Option(help="Split of a datasets name.", rich_help_panel=_DATA)] = None,
    limit: Annotated[int | None, Option(min=1, help="Use the first N examples.", rich_help_panel=_DATA)] = None,
    max_length: Annotated[int, Option(min=1, help="Longest example in tokens; longer inputs are cut.", rich_help_panel=_DATA)] = 512,
    turns: TurnsOption = Turns.all,
    chat: ChatOption = False,
    show_batch: Annotated[bool, Option("--show-batch", help="Print what the model will see, and stop.", rich_help_panel=_DATA)] = False,
    steps: Annotated[int | None, Option(min=1, help="Optimizer steps (instead of epochs).", rich_help_panel=_RUN)] = None,
    epochs: Annotated[float, Option(help="Passes over the data.", rich_help_panel=_RUN)] = 3.0,
    batch_size: Annotated[int, Option(min=1, help="Examples a step and device.", rich_help_panel=_RUN)] = 8,
    accumulate: Annotated[int, Option(min=1, help="Batches a step.", rich_help_panel=_RUN)] = 1,
    learning_rate: Annotated[float | None, Option(help="Default: what suits the reparameterisation.", rich_help_panel=_RUN)] = None,
    warmup: Annotated[float, Option(min=0, help="Warm-up: steps, or a share of them below 1.", rich_help_panel=_RUN)] = 0.1,
    clip: Annotated[float, Option(min=0, help="Gradient norm to clip at.", rich_help_panel=_RUN)] = 1.0,
    save_every: Annotated[int, Option(min=1, help="Steps between checkpoints.", rich_help_panel=_RUN)] = 100,
    eval_every: Annotated[int, Option(min=1, help="Steps between validations.", rich_help_panel=_RUN)] = 50,
    checkpointing: Annotated[bool, Option(help="Gradient checkpointing: less memory, slower.", rich_help_panel=_RUN)] = False,
    show_memory: Annotated[bool, Option("--show-memory", help="Print what a step will need in memory, and stop.", rich_help_panel=_RUN)] = False,
    dtype: Annotated[str | None, Option(help="Of the base model: float32, bfloat16, …", rich_help_panel=_RUN)] = None,
    quantize: Annotated[str | None, Option(help="Load the base in int8 or int4, by an installed backend (or int4:quanto, …).", rich_help_panel=_RUN)] = None,
    offload: Annotated[str | None, Option(help="Hold no more than this of the base in memory, e.g. 2GB; bring the rest in when it is used.", rich_help_panel=_RUN)] = None,
    attn: Annotated[str | None, Option(help="Attention implementation of the base model.", rich_help_panel=_RUN)] = None,
    seed: Annotated[int, Option(rich_help_panel=_RUN)] = 0,
    grow_from: Annotated[int | None, Option(min=1, help="Begin with N virtual tokens and grow to --length.", rich_help_panel=_PLAN)] = None,
    grow_by: Annotated[int, Option(min=1, help="Tokens that come in at a time.", rich_help_panel=_PLAN)] = 5,
    grow_threshold: Annotated[float, Option(min=0, help="Grow when the validation loss gains less than this share.", rich_help_panel=_PLAN)] = 0.01,
    layer_groups: Annotated[int | None, Option(min=1, help="Train the layers in N stages, from the top down.", rich_help_panel=_PLAN)] = None,
    roll_back: Annotated[int, Option(min=0, help="On divergence go back and on with a third of the step, N times.", rich_help_panel=_PLAN)] = 0,
    monitor: Annotated[int | None, Option(min=1, help="Every N steps note each site's gradient and share of attention.", rich_help_panel=_PLAN)] = None,
    resume: Annotated[bool, Option("--resume", help="Go on from the last checkpoint in --out.", rich_help_panel=_RUN)] = False,
    as_json: Annotated[bool, Option("--json", help="Print the result as JSON.")] = False,
) -> None:  # fmt: skip
    """Train a prefix: the base model stays frozen, only the virtual tokens learn."""
    if out is None and not (show_batch or show_memory):
        raise ConfigError(
            "--out names the folder for the prefix; give one (or --show-batch or --show-memory, to only look)"
        )
    for name, value in (("--learning-rate", learning_rate), ("--epochs", epochs)):
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{name} {value}; expected a number above 0")
    kept: dict[str, Any] = {
        "valid_share": valid_share, "column": column or (), "where": where or (), "split": split, "limit": limit,
        "max_length": max_length, "seed": seed, "turns": turns.value, "chat": chat,
    }  # fmt: skip
    tasks: TaskSources | None = None
    if task:
        _check_tasks(data, valid, start, method)
        tasks = TaskSources.of(task, valid_task or (), **kept)
    elif not data:
        raise ConfigError(
            "--data names the examples of one prefix, --task NAME=FILE those of several; give one of them"
        )
    elif valid_task or task_init or common or share_keys or orthogonality or sampling != "size":
        raise ConfigError(
            "--valid-task, --task-init, --sampling, --common, --share-keys and --orthogonality are for several tasks; "
            "name their data with --task NAME=FILE instead of --data"
        )
    quiet()
    from rich.console import Console

    from foreword.models import load_model
    from foreword.prefix import Prefix
    from foreword.train.run import memory_of_run, train_prefix

    console = Console(stderr=True)
    what: Prefix | list[Config]
    if start is not None:
        what = Prefix.load(start)
    else:
        several: dict[str, Any] = {}
        if tasks is not None:
            several = {"init": _starts(tasks, init, task_init or []), "tasks": tuple(tasks.sources), "common": common}
        what = configs(
            method or [Method.prefix], length=length, init=init, repeat=repeat, reparam=reparam, depth=depth, hidden=hidden,
            rank=rank, memory_rank=memory_rank, width=width, sites=sites, kinds=kinds, visible=visible, gate=gate, seed=seed,
            position_offset=position_offset, dropout=dropout, freeze_first=freeze_first, per_kind=per_kind,
            orthogonal=orthogonal, share="layers" if share_layers else "keys" if share_keys else None, several=several,
        )  # fmt: skip
    load = partial(load_model, model, dtype=dtype, attn=attn, quantize=quantize, offload=offload)
    train_set: EncodedDataset | TaskMixture
    valid_set: EncodedDataset | TaskMixture | None
    if tasks is not None:
        base, tokenizer, train_set, valid_set = _mixtures(tasks, sampling, load, console)
    else:
        assert data
        source = Source(data, valid, **kept)
        examples = source.read()
        base, tokenizer = load()
        train_set, valid_set = source.encode(examples, tokenizer, base)
        console.print(f"data: {train_set.stats.describe()}")
    if show_batch:
        _show(train_set, tokenizer, base, batch_size, seed)
        return
    arguments: dict[str, Any] = {
        "per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulate, "seed": seed,
        "learning_rate": learning_rate, "warmup_steps": warmup, "max_grad_norm": clip, "save_steps": save_every,
        "eval_steps": eval_every, "gradient_checkpointing": checkpointing, "num_train_epochs": epochs,
        "max_steps": steps if steps is not None else -1, "orthogonality": orthogonality,
    }  # fmt: skip
    if show_memory:
        needed = memory_of_run(base, tokenizer, what, train_set, arguments)
        print_json(needed.to_json()) if as_json else Console().print(needed.table())
        return
    assert out is not None
    result = train_prefix(
        base,
        tokenizer,
        what,
        train_set,
        out,
        arguments,
        valid=valid_set,
        resume=resume,
        label=out.name,
        console=console,
        callbacks=_strategies(base, steps, grow_from, grow_by, grow_threshold, layer_groups, roll_back, monitor),
    )
    _report(result, out, as_json)
    if result.interrupted:
        typer.echo(f"interrupted; go on with --resume --out {out}", err=True)
        raise typer.Exit(130)


def _report(result: RunResult, out: Path, as_json: bool) -> None:
    """Say what a run left."""
    told = {
        task: {"out": str(out / task), "bytes": p.nbytes, **dict(p.metadata.get("metrics", {}))}
        for task, p in result.prefixes.items()
    }
    prefixes = list(result.prefixes.values())
    record = {
        "out": str(out), "steps": result.steps, "interrupted": result.interrupted, "parameters": result.parameters,
    }  # fmt: skip
    record |= told.get("", {"tasks": told})
    if growth := prefixes[0].metadata.get("growth"):
        record["recommended_length"] = growth["recommended_length"]
    if as_json:
        print_json(record)
        return
    for (task, numbers), prefix in zip(told.items(), prefixes, strict=True):
        losses = ", ".join(f"{k} {numbers[k]:.4f}" for k in ("loss", "eval_loss") if k in numbers)
        typer.echo(f"{out / task}: {prefix!r}; {result.steps} steps, {losses}")
    if growth:
        typer.echo(f"length recommended: {growth['recommended_length']} (the curve is in {out / 'growth.png'})")


def _check_tasks(
    data: list[str] | None, valid: list[str] | None, start: Path | None, method: list[Method] | None
) -> None:
    """Raise ConfigError for options that are for one prefix."""
    instead = {
        "--data": (data, "--task alone"),
        "--valid": (valid, "--valid-task NAME=FILE"),
        "--start": (start, "--data"),
    }
    for name, (value, other) in instead.items():
        if value:
            raise ConfigError(f"{name} is for one prefix, and --task for several; use {other}")
    if method and Method.prefix not in method:
        raise ConfigError("--task trains a prefix for each task; add --method prefix, or use --data")


def _starts(tasks: TaskSources, init: str | None, given: list[str]) -> str | dict[str, str | None] | None:
    """What ``PrefixConfig(init=...)`` takes."""
    if not given:
        return init
    named = pairs(given, "--task-init")
    if unknown := [name for name in named if name not in tasks.sources]:
        raise ConfigError(
            f"--task-init names {unknown[0]!r}, and --task does not; there are: {', '.join(tasks.sources)}"
        )
    return {**named, "*": init}


def _mixtures(
    tasks: TaskSources, sampling: str, load: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]], console: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, TaskMixture, TaskMixture | None]:
    """The model, and the data of several tasks."""
    from foreword.data import TaskMixture
    from foreword.data.mixture import parse_sampling

    how = parse_sampling(sampling)
    examples = tasks.read()
    base, tokenizer = load()
    train, valid = tasks.encode(examples, tokenizer, base)
    mixture = TaskMixture(train, **how)
    for name, part in train.items():
        console.print(f"data: {name}: {part.stats.describe()}", highlight=False)
    console.print(f"data: {mixture.describe()}", highlight=False)
    return base, tokenizer, mixture, TaskMixture(valid) if valid else None


def _strategies(
    model: PreTrainedModel,
    steps: int | None,
    grow_from: int | None,
    grow_by: int,
    grow_threshold: float,
    layer_groups: int | None,
    roll_back: int,
    monitor: int | None,
) -> list[TrainerCallback]:
    """The callbacks of the plan."""
    from collections import Counter

    from foreword.sites import sites as find_sites
    from foreword.train.growth import Growth
    from foreword.train.monitor import Monitor
    from foreword.train.rollback import RollBack
    from foreword.train.stages import LayerByLayer

    chosen: list[TrainerCallback] = []
    if grow_from is not None:
        chosen.append(Growth(start=grow_from, step=grow_by, threshold=grow_threshold))
    if layer_groups is not None:
        if steps is None:
            raise ConfigError("--layer-groups divides the run into stages; give its length as well: --steps N")
        layers = max(Counter(s.kind for s in find_sites(model) if not s.tower).values())
        chosen.append(LayerByLayer.in_groups(layers, layer_groups, steps))
    if roll_back:
        chosen.append(RollBack(times=roll_back))
    if monitor is not None:
        chosen.append(Monitor(every=monitor))
    return chosen


def _show(
    dataset: EncodedDataset | TaskMixture,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    rows: int,
    seed: int,
) -> None:
    from rich.console import Console

    from foreword.data import Collator, TaskMixture, show_batch

    collator = Collator.for_tokenizer(tokenizer, seq2seq=model.config.is_encoder_decoder)
    order = dataset.order(seed, 0) if isinstance(dataset, TaskMixture) else range(len(dataset))
    batch = collator([dataset[i] for i in order[:rows]])
    if "task" in batch:
        Console().print(f"tasks of the rows: {', '.join(batch['task'])}", highlight=False)
    Console().print(show_batch(batch, tokenizer))
