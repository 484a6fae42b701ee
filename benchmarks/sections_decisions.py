"""The section of docs/benchmarks.md about decisions; make_docs.py puts it there."""

from __future__ import annotations

from collections import Counter
from typing import Any

from sections_markdown import table, where


def decisions(result: dict[str, Any]) -> str:
    """A table a part: cases down, methods across, mean and standard error over seeds."""
    words = {
        "newsvendor": ("lost", "Money lost a flight (lower is better)", ".2f"),
        "wheel": ("regret", "Wheel bandit: cumulative regret, by delta", ",.0f"),
        "tables": ("regret", "Classification tables as bandits: cumulative regret", ",.0f"),
        "labels": (
            "labels",
            "Labels to 95% of what all labels gain over the first 20 (RMSE, accuracy of classes)",
            ".0f",
        ),
        "selective": (
            "aurc",
            "Selective prediction: area under the risk-coverage curve (squared error, errors of digits)",
            ".3g",
        ),
        "optimisation": ("regret", "Bayesian optimisation: simple regret", ".3g"),
    }
    parts = []
    for part, cases in result["parts"].items():
        figure, title, style = words[part]
        methods = list(dict.fromkeys(method for row in cases.values() for method in row))
        parts.append(f"### {title}\n\n" + _decision_table(cases, methods, figure, style))
        parts.append(f"Mean ± standard error over seeds: {_seeds(cases)}.")
        beside = {
            "optimisation": [
                (
                    "recommended_regret",
                    "Regret of what the model expects to be best, where there is noise",
                    ".3g",
                ),
                ("processor_seconds_a_step", "Processor seconds a step", ".2f"),
            ],
            "newsvendor": [("beyond_posterior", "More than the posterior's, flight by flight", ".2f")],
            "wheel": [("percent_of_uniform", "In percent of the regret of uniform arms", ".1f")],
            "tables": [("percent_of_uniform", "In percent of the regret of uniform arms", ".1f")],
            "selective": [
                ("augrc", "Area under the generalised risk-coverage curve", ".3g"),
                ("risk", "Risk where all rows are answered", ".3g"),
            ],
        }
        for figure, title, style in beside.get(part, []):
            shown = {
                case: rows for case, rows in cases.items() if any(figure in row for row in rows.values())
            }
            parts.append(f"{title}:\n\n" + _decision_table(shown, methods, figure, style))
        if part == "selective":
            parts.append(
                f"At most {result['budget'].get('selective_seconds', 20)} s of wall time a fit; † where that ended it "
                "and its best state was measured."
            )
    evaluations = ", ".join(f"{case} {count}" for case, count in result["budget"]["evaluations"].items())
    parts.append(f"Budget: {result['budget']['bandit_steps']:,} bandit steps; evaluations: {evaluations}.")
    parts.append(where(result["machine"]))
    return "\n\n".join(parts)


def _seeds(cases: dict[str, Any]) -> str:
    """How many each case has, and which of its methods have another number."""
    counts = {case: {method: row["seeds"] for method, row in rows.items()} for case, rows in cases.items()}
    if len(found := {n for rows in counts.values() for n in rows.values()}) == 1:
        return str(found.pop())
    words = []
    for case, rows in counts.items():
        usual = Counter(rows.values()).most_common(1)[0][0]
        others = ", ".join(f"{method} {n}" for method, n in rows.items() if n != usual)
        words.append(f"{case} {usual}" + (f" ({others})" if others else ""))
    return "; ".join(words)


def _decision_table(cases: dict[str, Any], methods: list[str], figure: str, style: str) -> str:
    """Cases down and methods across, or the other way where there are more than ten methods."""
    cells = {
        case: {m: _decision_cell(row.get(m), figure, style) for m in methods} for case, row in cases.items()
    }
    if len(methods) > 10:
        return table(["", *cases], [[m, *(cells[case][m] for case in cases)] for m in methods])
    return table(["", *methods], [[case, *row.values()] for case, row in cells.items()])


def _decision_cell(row: dict[str, Any] | None, figure: str, style: str) -> str:
    if row is None or figure not in row:
        return "-"
    of, status = row[figure], row.get("status", {})
    if of["mean"] is None:
        return "failed" if status else "not reached"
    text = format(of["mean"], style)
    if "standard_error" in of:
        text += f" ± {format(of['standard_error'], style)}"
    text += " †" if "stopped" in status else ""
    return text + (f" ({of['missing']} {'failed' if status else 'never'})" if of["missing"] else "")
