"""`foreword meta`: from several tasks to a start that a new one is learned from in a few steps."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from foreword.cli._data import ChatOption, Source, Turns, TurnsOption
from foreword.cli._methods import Gate, Method, Reparam, configs
from foreword.cli._shared import pairs, print_json, quiet
from foreword.cli._tasks import own

_PREFIX, _DATA, _RUN = "Prefix", "Data", "Run"


class Algorithm(StrEnum):
    reptile = "reptile"
    fomaml = "fomaml"


class Optimizer(StrEnum):
    adam = "adam"
    sgd = "sgd"


def run(
    model: Annotated[str, Option(help="Base model: hub name, folder, .gguf file, or 'demo' (the packaged SmolLM2).")],
    task: Annotated[list[str], Option(help="A task: NAME=FILE (two or more), in the forms of train's --data.")],
    out: Annotated[Path, Option(help="Folder for the prefix.")],
    algorithm: Annotated[Algorithm, Option(help="How the start is learned.")] = Algorithm.reptile,
    method: Annotated[list[Method] | None, Option(help="What to train: several train together.", rich_help_panel=_PREFIX, show_default="prefix")] = None,
    length: Annotated[int, Option(help="Virtual tokens.", rich_help_panel=_PREFIX)] = 20,
    init: Annotated[str | None, Option(help="What the start begins from: a text about the tasks, 'words:good film', or 'random'.", rich_help_panel=_PREFIX)] = None,
    repeat: Annotated[bool, Option(help="Repeat an init text that is shorter than the prefix.", rich_help_panel=_PREFIX)] = False,
    reparam: Annotated[Reparam, Option(help="What is trained.", rich_help_panel=_PREFIX)] = Reparam.direct,
    depth: Annotated[int, Option(help="Layers of the MLP.", rich_help_panel=_PREFIX)] = 2,
    hidden: Annotated[int, Option(help="Width of the MLP.", rich_help_panel=_PREFIX)] = 512,
    rank: Annotated[int, Option(help="Rank of the low-rank change, and of LoRA.", rich_help_panel=_PREFIX)] = 8,
    memory_rank: Annotated[int | None, Option(help="Rank of a memory; without it the memory is whole.", rich_help_panel=_PREFIX)] = None,
    width: Annotated[int, Option(help="Width of adapters.", rich_help_panel=_PREFIX)] = 32,
    sites: Annotated[str | None, Option(help="first:4, last:4, every:2, or a regular expression over attention sites.", rich_help_panel=_PREFIX)] = None,
    kinds: Annotated[str, Option(help="Kinds of site, with commas.", rich_help_panel=_PREFIX)] = "self,cross,encoder",
    visible: Annotated[str, Option(help="Who sees the prefix: all, infix, infix:1, first:16, window:4:32.", rich_help_panel=_PREFIX)] = "all",
    gate: Annotated[Gate, Option(help="Learned weight of the prefix.", rich_help_panel=_PREFIX)] = Gate.none,
    start: Annotated[Path | None, Option(help="Begin from this saved prefix instead.", rich_help_panel=_PREFIX)] = None,
    column: Annotated[list[str] | None, Option(help="Map a column: input=question (several); of one task reviews:input=question.", rich_help_panel=_DATA)] = None,
    where: Annotated[list[str] | None, Option(help="Keep rows only: label=1 (several); of one task reviews:label=1.", rich_help_panel=_DATA)] = None,
    split: Annotated[str | None, Option(help="Split of datasets names.", rich_help_panel=_DATA)] = None,
    limit: Annotated[int | None, Option(min=1, help="Use the first N examples of each task.", rich_help_panel=_DATA)] = None,
    max_length: Annotated[int, Option(min=1, help="Longest example in tokens; longer inputs are cut.", rich_help_panel=_DATA)] = 512,
    turns: TurnsOption = Turns.all,
    chat: ChatOption = False,
    meta_steps: Annotated[int, Option(help="Updates of the start.", rich_help_panel=_RUN)] = 100,
    tasks_per_step: Annotated[int, Option(help="Tasks that an update is a mean over.", rich_help_panel=_RUN)] = 4,
    inner_steps: Annotated[int, Option(help="Steps that each task is adapted for.", rich_help_panel=_RUN)] = 5,
    batch_size: Annotated[int, Option(help="Examples of an inner step.", rich_help_panel=_RUN)] = 4,
    query_size: Annotated[int | None, Option(help="Examples of FOMAML's query batch.", rich_help_panel=_RUN, show_default="as many as a batch")] = None,
    inner_optimizer: Annotated[Optimizer, Option(help="Of the inner steps: Adam without momentum, or plain steps.", rich_help_panel=_RUN)] = Optimizer.adam,
    inner_learning_rate: Annotated[float | None, Option(help="Of the inner steps. Default: what suits the reparameterisation.", rich_help_panel=_RUN)] = None,
    meta_optimizer: Annotated[Optimizer | None, Option(help="Of the start.", rich_help_panel=_RUN, show_default="sgd for reptile, adam for fomaml")] = None,
    meta_learning_rate: Annotated[float | None, Option(help="Of the start. Default: 1 for reptile (all the way to the tasks' mean), else what suits the reparameterisation.", rich_help_panel=_RUN)] = None,
    anneal: Annotated[bool, Option(help="Let the meta learning rate fall to 0.", rich_help_panel=_RUN)] = True,
    clip: Annotated[float, Option(help="Gradient norm to clip at; 0: none.", rich_help_panel=_RUN)] = 1.0,
    save_every: Annotated[int, Option(help="Meta-steps between saved states.", rich_help_panel=_RUN)] = 10,
    dtype: Annotated[str | None, Option(help="Of the base model: float32, bfloat16, …", rich_help_panel=_RUN)] = None,
    quantize: Annotated[str | None, Option(help="Load the base in int8 or int4, by an installed backend (or int4:quanto, …).", rich_help_panel=_RUN)] = None,
    attn: Annotated[str | None, Option(help="Attention implementation of the base model.", rich_help_panel=_RUN)] = None,
    seed: Annotated[int, Option(rich_help_panel=_RUN)] = 0,
    resume: Annotated[bool, Option("--resume", help="Go on with the run in --out.", rich_help_panel=_RUN)] = False,
    as_json: Annotated[bool, Option("--json", help="Print the result as JSON.")] = False,
) -> None:  # fmt: skip
    """Learn a start over several tasks, from which `train --start` learns a new one in a few steps."""
    files = pairs(task, "--task")
    quiet()
    from rich.console import Console

    from foreword.models import load_model
    from foreword.prefix import Prefix
    from foreword.train.meta import MetaConfig, What, meta_train

    console = Console(stderr=True)
    plan = MetaConfig(
        algorithm=algorithm.value, meta_steps=meta_steps, tasks_per_step=tasks_per_step, inner_steps=inner_steps,
        batch_size=batch_size, query_size=query_size, inner_optimizer=inner_optimizer.value,
        inner_learning_rate=inner_learning_rate, meta_optimizer=meta_optimizer.value if meta_optimizer else None,
        meta_learning_rate=meta_learning_rate, anneal=anneal, clip=clip, save_every=save_every, seed=seed,
    )  # fmt: skip
    what: What
    if start is not None:
        what = Prefix.load(start)
    else:
        what = configs(
            method or [Method.prefix], length=length, init=init, repeat=repeat, reparam=reparam, depth=depth, hidden=hidden,
            rank=rank, memory_rank=memory_rank, width=width, sites=sites, kinds=kinds, visible=visible, gate=gate, seed=seed,
        )  # fmt: skip
    sources = {
        n: Source(
            f, None, None, own(column or (), n, files), own(where or (), n, files), split, limit, max_length, seed,
            turns.value, chat, n,
        )
        for n, f in files.items()
    }  # fmt: skip
    examples = {name: source.read() for name, source in sources.items()}
    base, tokenizer = load_model(model, dtype=dtype, attn=attn, quantize=quantize)
    tasks = {name: source.encode(examples[name], tokenizer, base)[0] for name, source in sources.items()}
    for name, dataset in tasks.items():
        console.print(f"{name}: {dataset.stats.describe()}", highlight=False, markup=False)
    result = meta_train(base, tokenizer, what, tasks, out, plan, resume=resume, label=out.name, console=console)
    record: dict[str, Any] = {
        "out": str(out), "steps": result.steps, "interrupted": result.interrupted, "parameters": result.parameters,
        "bytes": result.prefix.nbytes, **dict(result.prefix.metadata["metrics"]),
    }  # fmt: skip
    if as_json:
        print_json(record)
    else:
        losses = ", ".join(
            f"{n} adapting {record[f'loss_{n}']:.4f}" for n in ("before", "after") if f"loss_{n}" in record
        )
        typer.echo(f"{out}: {result.prefix!r}; {result.steps} meta-steps, loss {losses}")
        typer.echo(
            f"train a new task from it: foreword train --model {model} --start {out} --warmup 0 --data … --out …"
        )
    if result.interrupted:
        typer.echo(f"interrupted; go on with --resume --out {out}", err=True)
        raise typer.Exit(130)
