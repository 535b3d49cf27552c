"""Methods compared under one budget on one task: what `foreword compare` does, for Python.

A :class:`Comparison` of :class:`Settings`, a :class:`TaskData` and a :class:`Plan` of :class:`Row`; its ``run``
leaves ``results.json``, a report and plots in a folder.
"""

from .budget import Budget
from .comparison import Comparison, Outcome, Watcher
from .plan import Plan, Run
from .presets import PRESETS, preset_rows
from .rows import METHODS, Row, make_rows
from .settings import Settings
from .tasks import Limits, TaskData, load_task

__all__ = [
    "METHODS",
    "PRESETS",
    "Budget",
    "Comparison",
    "Limits",
    "Outcome",
    "Plan",
    "Row",
    "Run",
    "Settings",
    "TaskData",
    "Watcher",
    "load_task",
    "make_rows",
    "preset_rows",
]
