"""Keep what notebook 04 shows of a comparison: ``python notebooks/keep.py FOLDER NAME [--untimed]``.

``FOLDER/results.json`` of ``foreword compare --preset length`` (or ``reparameterisation``) becomes
``results/NAME.json``: the table, the conditions and the curves of the runs that count. Trials of learning rates stay
behind; so do times with ``--untimed``, for runs that shared the machine with other work.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
_WHOLE = ("preset", "facts", "about", "rows", "failed", "missing_runs")
_OF_RUN = ("run", "outcome", "message", "valid_loss", "best", "curve")
_TIMES = ("training_seconds", "training_seconds_ratio")


def trimmed(record: dict[str, Any]) -> dict[str, Any]:
    """A comparison's ``results.json`` with what the notebook reads of it."""
    runs = {
        key: {name: result[name] for name in _OF_RUN if name in result}
        for key, result in record["runs"].items()
        if result["run"]["kind"] == "final"
    }
    return {**{name: record[name] for name in _WHOLE}, "runs": runs}


def untimed(record: dict[str, Any]) -> dict[str, Any]:
    """The same without the lines' times."""
    return {**record, "rows": [{**line, **dict.fromkeys(_TIMES)} for line in record["rows"]]}


def main(folder: Path, name: str, *, timed: bool = True) -> None:
    """Trim and write; numbers to six digits."""
    text = (folder / "results.json").read_text(encoding="utf-8")
    record = json.loads(text, parse_float=lambda digits: float(f"{float(digits):.6g}"))
    record = trimmed(record) if timed else untimed(trimmed(record))
    out = HERE / "results" / f"{name}.json"
    out.parent.mkdir(exist_ok=True)
    temporary = out.with_name(f".{out.name}")
    temporary.write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    temporary.replace(out)
    print(f"{out.name}: {out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], timed="--untimed" not in sys.argv[3:])
