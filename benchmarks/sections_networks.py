"""The section of docs/benchmarks.md about what networks cost; make_docs.py puts it there."""

from __future__ import annotations

from typing import Any

from sections_markdown import table, where


def network_times(result: dict[str, Any]) -> str:
    """A line a job and side, then what was the same for both."""
    body = []
    for name, r in result["tables"].items():
        for job, line in r["lines"].items():
            for side, figures in line["sides"].items():
                mixing = "-"
                if "rhat" in figures:
                    mixing = f"{figures['rhat']['median']:.3g}, {figures['ess']['median']:.0f}"
                body.append([
                    f"{name} ({r['rows']:,} x {r['columns']})", job, side,
                    _spread(figures["seconds"], ".3g"), f"{figures['log_likelihood']['median']:.3f}", mixing,
                    "1" if side == "fspace" else _spread(figures["ratio"], ".2g"),
                ])  # fmt: skip
    head = [
        "table", "job", "side", "processor seconds", "test log-lik.", "R-hat, effective draws", "its seconds / ours"
    ]  # fmt: skip
    repeats = {line["repeats"] for r in result["tables"].values() for line in r["lines"].values()}
    chains = result["langevin"]
    versions = ", ".join(f"{name} {number or 'not installed'}" for name, number in result["peers"].items())
    note = (
        f"Medians of {' or '.join(str(count) for count in sorted(repeats))} repeats (in brackets: least to most)."
        f" {result['epochs']} passes in batches of {result['batch']}; SGLD and SGHMC: {chains['chains']} chains of"
        f" {chains['steps']:,} steps each. {versions}."
    )
    return "\n\n".join([table(head, body), note, where(result["machine"])])


def _spread(figure: dict[str, float], style: str) -> str:
    middle, least, most = (format(figure[key], style) for key in ("median", "least", "most"))
    return middle if least == most else f"{middle} ({least} to {most})"
