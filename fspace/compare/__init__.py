"""Which method serves my data better? Metrics, distances between posteriors as functions, studies and their report.

Study([Uci("yacht"), diabetes()], named_methods(["gp", "ensemble"]), splits=5, budget=Budget(seconds=60)).run(jobs=2)
"""

from __future__ import annotations

from typing import Any

_WHERE = {
    "Budget": "fspace.compare.cells",
    "Method": "fspace.compare.cells",
    "InBetween": "fspace.compare.problems",
    "Table": "fspace.compare.problems",
    "Uci": "fspace.compare.problems",
    "diabetes": "fspace.compare.problems",
    "digits": "fspace.compare.problems",
    "Results": "fspace.compare.results",
    "Study": "fspace.compare.study",
    "named_methods": "fspace.compare.methods",
    "findings": "fspace.compare.sentences",
    "write_report": "fspace.compare.report",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    """Public names are imported when first used: fspace.scores needs the metrics alone."""
    if name in _WHERE:
        from importlib import import_module

        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'fspace.compare' has no attribute {name!r}")
