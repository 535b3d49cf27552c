"""Logs for machines: one JSON object a line on stderr. Prompts and answers are not in them."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

_log = logging.getLogger("foreword.serve")


class JsonLines(logging.Formatter):
    """``{"time": …, "level": …, "event": …, …}``, and the traceback of an exception."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **{k: v for k, v in getattr(record, "fields", {}).items() if v is not None},
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class _Stderr(logging.StreamHandler[Any]):
    """To stderr as it is when something is logged: a program may have put another one there meanwhile."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def set_up(level: int = logging.INFO) -> None:
    """Send foreword's and uvicorn's logs to stderr as JSON lines."""
    handler = _Stderr()
    handler.setFormatter(JsonLines())
    for name, least in (("foreword", level), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(max(level, least))


def event(name: str, /, *, level: int = logging.INFO, exc_info: Any = None, **fields: Any) -> None:
    """One line."""
    _log.log(level, name, extra={"fields": fields}, exc_info=exc_info)
