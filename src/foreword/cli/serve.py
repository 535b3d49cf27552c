"""`foreword serve`: an HTTP server for many tasks of one model."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from foreword.cli import _serve_vllm
from foreword.cli._shared import pairs, quiet
from foreword.errors import BudgetError, ConfigError, ForewordError, MissingPartError

if TYPE_CHECKING:
    from foreword.prefix import Prefix
    from foreword.serve.budget import Budget
    from foreword.serve.library import Library
    from foreword.serve.shelf import Shelf

_TASKS, _BUDGET, _LIMITS, _KEYS, _MODEL = "Tasks", "Memory", "Limits", "Keys and logs", "Model"
_VLLM = "On vLLM"


def run(
    context: typer.Context,
    model: Annotated[str, Option(help="Base model: hub name, folder, .gguf file, or 'demo' (the packaged SmolLM2).")],
    prefix: Annotated[list[str] | None, Option(help="A task: NAME=DIR, the folder of a saved prefix (several).", rich_help_panel=_TASKS)] = None,
    prefix_dir: Annotated[Path | None, Option(help="A folder of saved prefixes: all are served, and tasks are loaded from here at run time.", rich_help_panel=_TASKS)] = None,
    max_tasks: Annotated[int, Option(min=1, help="Tasks served at once, at most.", rich_help_panel=_TASKS)] = 1000,
    force: Annotated[bool, Option("--force", help="Accept prefixes of a base model with other weights.", rich_help_panel=_TASKS)] = False,
    device_bytes: Annotated[str | None, Option(help="For prefixes and running requests on the model's device: 500000, 200MB, 1.5GiB.", show_default="no limit", rich_help_panel=_BUDGET)] = None,
    cpu_bytes: Annotated[str | None, Option(help="For prefixes moved off the device; what finds no room there goes to mapped files.", show_default="no limit", rich_help_panel=_BUDGET)] = None,
    when_full: Annotated[str, Option(help="What is done for room, in this order: compress (int8), shorten (fewer tokens; needs --texts), move (down a tier), queue, refuse.", rich_help_panel=_BUDGET)] = "move,queue,refuse",
    pin: Annotated[list[str] | None, Option(help="A task that stays on the device as it is (several).", rich_help_panel=_BUDGET)] = None,
    priority: Annotated[list[str] | None, Option(help="NAME=NUMBER: tasks of lower priority make room for it; 0 if not said (several).", rich_help_panel=_BUDGET)] = None,
    texts: Annotated[Path | None, Option(help="A file of typical prompts, one a line, to measure what each virtual token is worth (shorten).", rich_help_panel=_BUDGET)] = None,
    tier_dir: Annotated[Path | None, Option(help="Folder for the mapped files.", show_default="the system's temporary one", rich_help_panel=_BUDGET)] = None,
    host: Annotated[str, Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    name: Annotated[str | None, Option(help="What clients call the base model.", show_default="the model's name")] = None,
    rows: Annotated[int, Option(min=1, help="Answers written at once.", rich_help_panel=_LIMITS)] = 16,
    queue: Annotated[int, Option(min=1, help="Requests that may wait; more get status 429.", rich_help_panel=_LIMITS)] = 64,
    max_length: Annotated[int | None, Option(min=2, help="Tokens of a prompt and its answer together.", show_default="the model's", rich_help_panel=_LIMITS)] = None,
    max_columns: Annotated[int | None, Option(min=2, help="Tokens that all rows at work may come to hold: bounds the memory of keys and values.", show_default="rows times length", rich_help_panel=_LIMITS)] = None,
    step_tokens: Annotated[int, Option(min=1, help="Prompt tokens read between two tokens of running answers.", rich_help_panel=_LIMITS)] = 512,
    max_n: Annotated[int, Option(min=1, help="Answers to one prompt.", rich_help_panel=_LIMITS)] = 8,
    max_prompts: Annotated[int, Option(min=1, help="Prompts in one request.", rich_help_panel=_LIMITS)] = 16,
    chat_tokens: Annotated[int, Option(min=1, help="Tokens of an answer to a chat that doesn't say.", rich_help_panel=_LIMITS)] = 512,
    max_body: Annotated[int, Option(min=1024, help="Bytes of a request.", rich_help_panel=_LIMITS)] = 1 << 20,
    timeout: Annotated[float, Option(min=0.1, help="Seconds that an answer may take, the queue included.", rich_help_panel=_LIMITS)] = 300.0,
    idle_timeout: Annotated[float, Option(min=0.1, help="Seconds that a client may take to send its request, or leave its connection full.", rich_help_panel=_LIMITS)] = 30.0,
    drain: Annotated[float, Option(min=1, help="Seconds that running answers may take after SIGTERM.", rich_help_panel=_LIMITS)] = 30.0,
    api_keys: Annotated[Path | None, Option(help="File of keys, one a line; also FOREWORD_API_KEYS, with commas. None: anybody may ask.", rich_help_panel=_KEYS)] = None,
    admin_keys: Annotated[Path | None, Option(help="File of keys to load and unload tasks; also FOREWORD_ADMIN_KEYS. None: nobody may.", rich_help_panel=_KEYS)] = None,
    playground: Annotated[bool, Option("--playground/--no-playground", help="A page to try the tasks on, at /.")] = True,
    log_prompts: Annotated[bool, Option("--log-prompts", help="Write prompts into the log.", rich_help_panel=_KEYS)] = False,
    dtype: Annotated[str | None, Option(help="float32, bfloat16, …", rich_help_panel=_MODEL)] = None,
    attn: Annotated[str | None, Option(help="Attention implementation.", rich_help_panel=_MODEL)] = None,
    device: Annotated[str | None, Option(help="cpu, cuda:0, …", rich_help_panel=_MODEL)] = None,
    quantize: Annotated[str | None, Option(help="Base in int8 or int4.", rich_help_panel=_MODEL)] = None,
    engine: Annotated[str, Option(help="foreword: in this process. vllm: start vLLM's server with the prefixes of --prefix-dir (docs/vllm.md).", rich_help_panel=_VLLM)] = "foreword",
    dry_run: Annotated[bool, Option("--dry-run", help="Print vLLM's command and end.", rich_help_panel=_VLLM)] = False,
    vllm_python: Annotated[str | None, Option(help="The python that vLLM and foreword are installed for.", show_default="this one", rich_help_panel=_VLLM)] = None,
    prefix_memory: Annotated[str, Option(help="Of the CPU, for prefixes that each worker keeps.", rich_help_panel=_VLLM)] = "2GiB",
    prompt_logprobs: Annotated[bool, Option("--prompt-logprobs", help="Let requests for tasks ask for them; on GPUs it costs whole CUDA graphs.", rich_help_panel=_VLLM)] = False,
    events: Annotated[Path | None, Option(help="A file for a line of JSON at each load of a prefix.", rich_help_panel=_VLLM)] = None,
    vllm_arguments: Annotated[list[str] | None, Argument(help="vLLM's own options, after --.", show_default=False)] = None,
) -> None:  # fmt: skip
    """Serve tasks over HTTP, through the interface that OpenAI's clients speak: model="TASK" picks the prefix."""
    _serve_vllm.check_options(context, engine)
    if engine == "vllm":
        _serve_vllm.run(
            model, prefix_dir, name=name or _name_of(model), host=host, port=port, length=max_length, dtype=dtype,
            api_keys=api_keys, memory=prefix_memory, prompt_logprobs=prompt_logprobs, events=events, python=vllm_python,
            arguments=vllm_arguments or [], dry=dry_run,
        )  # fmt: skip
        return
    _check_installed()
    quiet()
    from foreword.models import load_model
    from foreword.serve.admission import Limits
    from foreword.serve.engine import Engine
    from foreword.serve.http import logs
    from foreword.serve.http.app import create_app
    from foreword.serve.http.keys import read_keys
    from foreword.serve.http.run import listen, serve
    from foreword.serve.http.service import Settings
    from foreword.serve.library import Library
    from foreword.serve.shelf import Shelf

    base = name or _name_of(model)
    shelf = Shelf(prefix_dir) if prefix_dir is not None else None
    keys, admin = read_keys(api_keys, "FOREWORD_API_KEYS"), read_keys(admin_keys, "FOREWORD_ADMIN_KEYS")
    limits = Limits(rows=rows, queue=queue, length=max_length, columns=max_columns, step_tokens=step_tokens)
    budget = _budget(device_bytes, cpu_bytes, when_full, tier_dir, texts)
    lines = _lines(texts)
    logs.set_up()
    named, lying = _tasks(prefix or [], shelf)  # and all else that can be wrong, before the model is loaded
    if base in named or base in lying:
        raise ConfigError(f"{base!r} is the base model's name; call it or the task something else (--name)")
    if len(named) + len(lying) > max_tasks:
        raise ConfigError(f"{len(named) + len(lying)} tasks are more than --max-tasks {max_tasks}")
    ranks = _ranks(priority or [], pin or [], [*named, *lying])
    bound = listen(host, port)
    try:
        network, tokenizer = load_model(model, dtype=dtype, attn=attn, device=device, quantize=quantize)
        library = Library(network, budget=budget)
        ids = [found for line in lines if (found := list(tokenizer(line)["input_ids"]))]
        _add(library, named, lying, ranks, ids, force=force)
        writer = Engine(library, tokenizer, limits)
    except BaseException:
        bound.close()
        raise
    settings = Settings(
        base, keys, admin, shelf, tasks=max_tasks, prompts=max_prompts, n=min(max_n, rows), chat_tokens=chat_tokens,
        body_bytes=max_body, body_seconds=idle_timeout, write_seconds=idle_timeout, seconds=timeout,
        log_prompts=log_prompts, force=force, folders={task: task for task in lying}, texts=ids, playground=playground,
    )  # fmt: skip
    if not len(keys) and host not in ("127.0.0.1", "::1", "localhost"):
        logs.event("no API key is set: whoever reaches this port may ask", level=logging.WARNING)

    def ready() -> None:
        address, number = bound.getsockname()[:2]
        shown = f"[{address}]" if ":" in address else address
        logs.event("ready", url=f"http://{shown}:{number}", base=base, tasks=len(library), length=writer.length,
                   most_kv_bytes=writer.columns * writer.column_bytes)  # fmt: skip

    serve(create_app(writer.start(), settings), writer, bound, drain=drain, ready=ready)


def _check_installed() -> None:
    missing = [n for n in ("fastapi", "uvicorn", "prometheus_client") if importlib.util.find_spec(n) is None]
    if missing:
        raise MissingPartError(f'the server needs {", ".join(missing)}; get it with: pip install "foreword[serve]"')


def _name_of(model: str) -> str:
    """What clients call the base model: a file's or folder's name, or the name that it is loaded by."""
    path = Path(model)
    if path.is_file():
        return path.stem
    return path.resolve().name if path.is_dir() else model


def _tasks(given: list[str], shelf: Shelf | None) -> tuple[dict[str, Prefix], dict[str, Prefix]]:
    """The prefixes to begin with: those that are named, and those that only lie in the folder.

    Whoever is named must load; what lies there and doesn't is left out.
    """
    from foreword.prefix import Prefix
    from foreword.serve.shelf import check_name

    named = {check_name(name): Prefix.load(folder) for name, folder in pairs(given, "--prefix").items()}
    lying = {}
    for name in shelf.names() if shelf is not None else ():
        if name not in named:
            try:
                assert shelf is not None
                lying[name] = shelf.load(name)
            except ForewordError as exc:
                _left_out(name, exc)
    return named, lying


def _budget(device: str | None, cpu: str | None, when_full: str, folder: Path | None, texts: Path | None) -> Budget:
    from foreword.serve.budget import SHORTEN, Budget, parse_bytes

    limits = [None if text is None else parse_bytes(text) for text in (device, cpu)]
    made = Budget(limits[0], limits[1], when_full, folder=folder)
    if SHORTEN in made.actions and texts is None:
        raise ConfigError("--when-full shorten needs --texts FILE, to know which tokens are worth least")
    if texts is not None and SHORTEN not in made.actions:
        raise ConfigError("--texts is for --when-full shorten, which isn't asked for")
    return made


def _lines(texts: Path | None) -> list[str]:
    if texts is None:
        return []
    try:
        found = [line for line in texts.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"--texts {texts} can't be read: {exc}") from exc
    if not found:
        raise ConfigError(f"--texts {texts} has no line; expected a prompt on each")
    return found


def _ranks(priority: list[str], pin: list[str], tasks: list[str]) -> dict[str, tuple[int, bool]]:
    """Priority and whether it is pinned, of each task."""
    from foreword.errors import nearest

    given = pairs(priority, "--priority")
    for name in (*given, *pin):
        if name not in tasks:
            raise ConfigError(f"--priority and --pin: no task is named {name!r}; {nearest(name, tasks)}")
    try:
        numbers = {name: int(number) for name, number in given.items()}
    except ValueError as exc:
        raise ConfigError(f"--priority NAME=NUMBER wants a whole number: {exc}") from exc
    return {name: (numbers.get(name, 0), name in pin) for name in tasks}


def _add(
    library: Library,
    named: dict[str, Prefix],
    lying: dict[str, Prefix],
    ranks: Mapping[str, tuple[int, bool]],
    texts: Sequence[list[int]] = (),
    *,
    force: bool,
) -> None:
    """Put tasks onto the model; those that only lie in the folder and belong to another one are taken out."""
    from foreword.serve.http import logs

    def add(name: str, prefix: Prefix) -> None:
        shares = library.measure_shares(prefix, texts, force=force) if texts else None
        library.add(name, prefix, priority=ranks[name][0], pinned=ranks[name][1], shares=shares, force=force)
        _check_readable(library, name)

    for name, prefix in named.items():
        try:
            add(name, prefix)
        except ForewordError as exc:
            raise type(exc)(f"--prefix {name}: {exc}") from exc
    for name, prefix in list(lying.items()):
        try:
            add(name, prefix)
        except ForewordError as exc:
            del lying[name]
            _left_out(name, exc)
    if not len(library):
        logs.event("no task is given (--prefix, --prefix-dir): the base model alone is served", level=logging.WARNING)


def _check_readable(library: Library, name: str) -> None:
    """Take a task out again that no request could ever have ready: it may wait below, and be read on the device only."""
    from foreword.serve.budget import SHORTEN

    budget, need = library.holdings.budget, library.holdings.find(name).whole
    if budget.device_bytes is None or need <= budget.device_bytes or SHORTEN in budget.actions:
        return
    library.remove(name)
    raise BudgetError(
        f"it takes {need:,} bytes while it is read, and the device may have {budget.device_bytes:,}, so that no request "
        "could be answered; give more --device-bytes, or --when-full with shorten",
        needed=need, limit=budget.device_bytes,
    )  # fmt: skip


def _left_out(name: str, reason: ForewordError) -> None:
    from foreword.serve.http import logs

    logs.event("prefix left out", level=logging.ERROR, task=name, reason=str(reason))
