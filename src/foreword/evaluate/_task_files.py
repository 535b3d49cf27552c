"""What a task file of lm-evaluation-harness would run, found before the harness reads it.

The harness imports functions that a file names with ``!function``, and hands metrics that it does not know to the
package evaluate, which loads them as programs. The file is looked at as YAML nodes, so that another way to write a tag
or a key changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import yaml

from foreword.errors import ConfigError

_PLAIN = "tag:yaml.org,2002:"


def check_task_file(path: Path, *, trust_code: bool = False) -> None:
    """Look at a task file, and at those that it includes.

    Raises:
        ConfigError: a file cannot be read, or would run code and ``trust_code`` is not given.
    """
    _check(path, trust_code, set())


def _check(path: Path, trust_code: bool, seen: set[Path]) -> None:
    if path.resolve() in seen:
        return
    seen.add(path.resolve())
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as exc:
        raise ConfigError(f"the task file {path} cannot be read: {exc}") from exc
    nodes = list(_nodes(root)) if root is not None else []
    if not trust_code and (what := next(filter(None, map(_code, nodes)), None)):
        raise ConfigError(
            f"{path} names {what}, which would be run; read them, and pass --trust-code (trust_code=True) if you "
            "trust them"
        )
    for name in _values(nodes, "include"):
        _check(path.parent / name, trust_code, seen)


def _code(node: yaml.Node) -> str | None:
    """What a node has run, in words; None for plain data."""
    if node.tag == "!function":
        return "Python functions (!function)"
    if not node.tag.startswith(_PLAIN) or node.tag.startswith(f"{_PLAIN}python"):
        return f"Python objects ({node.tag})"
    if "true" in (v.casefold() for v in _values([node], "hf_evaluate")):
        return "metrics of the package evaluate (hf_evaluate)"
    from lm_eval.api import metrics  # noqa: F401  (fills the registry)
    from lm_eval.api.registry import metric_registry

    unknown = next((name for name in _values([node], "metric") if name not in metric_registry), None)
    return f"programs of the package evaluate (the harness has no metric {unknown!r})" if unknown is not None else None


def _nodes(root: yaml.Node) -> Iterator[yaml.Node]:
    """All nodes, each once: anchors may make circles."""
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        if isinstance(node, yaml.MappingNode):
            waiting += [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            waiting += node.value


def _values(nodes: list[yaml.Node], key: str) -> Iterator[str]:
    """The scalars under a key, alone or in a list, wherever it stands."""
    for node in nodes:
        for name, value in node.value if isinstance(node, yaml.MappingNode) else ():
            if name.value == key:
                each = value.value if isinstance(value, yaml.SequenceNode) else [value]
                yield from (v.value for v in each if isinstance(v, yaml.ScalarNode))
