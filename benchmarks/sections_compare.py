"""The section of docs/benchmarks.md about the comparison; make_docs.py puts it there."""

from __future__ import annotations

import math
from typing import Any

import published
from sections_markdown import table, where

_ROWS = ("MC dropout", "Deep ensemble (5)", "UB MFVI", "UB deterministic")  # beside which of ours stand


def compare(result: dict[str, Any]) -> str:
    """Between the clusters, rows of another kind, the nine tables beside the published rows, and their gaps."""
    parts = []
    if "between" in result:
        parts.append(_between(result["between"]))
    for name, r in (result["outside"]["tables"] if "outside" in result else {}).items():
        kinds = ("accuracy", "log_likelihood", "calibration_error", "auroc, largest probability", "auroc, entropy",
                 "auroc, mutual information", "cpu_seconds")  # fmt: skip
        body = [[m, *(_with_error(f.get(kind)) for kind in kinds)] for m, f in r["methods"].items()]
        head = ["method", "accuracy", "log-likelihood", "calibration error", "AUROC, largest probability",
                "AUROC, entropy", "AUROC, mutual information", "processor seconds"]  # fmt: skip
        parts.append(f"### {name}: {r['splits']} splits\n\n" + table(head, body))
    for part, words in (
        ("uci", "the published splits"),
        ("gap", "gap splits: the middle third along each input"),
    ):
        if part not in result:
            continue
        tables = result[part]["tables"]
        for kind, title in (
            ("log_likelihood", "test log-likelihood"),
            ("rmse", "test RMSE"),
            ("cpu_seconds", "processor seconds a fit"),
        ):
            methods = dict.fromkeys(m for r in tables.values() for m in r["methods"])
            body = [
                [m, *(_with_error(r["methods"].get(m, {}).get(kind)) for r in tables.values())]
                for m in methods
            ]
            if part == "uci" and kind != "cpu_seconds":
                rows = published.RMSE if kind == "rmse" else published.LOG_LIKELIHOOD
                body += [[f"*{name}*", *(rows[name][t] for t in tables)] for name in _ROWS if name in rows]
            splits = ", ".join(f"{name} {r['splits']}" for name, r in tables.items())
            parts.append(f"### {title[0].upper() + title[1:]}, {words}\n\n" + table(["", *tables], body))
        parts.append(f"Splits done: {splits}. Budget: {result[part]['budget']}.")
        for metric, r in (result[part].get("ranks") or {}).items():
            if r:
                ordered = ", ".join(
                    f"{m} {rank:.2f}" for m, rank in sorted(r["ranks"].items(), key=lambda item: item[1])
                )
                parts.append(
                    f"Mean ranks by {metric} over {r['data_sets']} data sets (critical difference"
                    f" {r['critical_difference']:.2f}; Friedman p = {r['p_value']:.2g}): {ordered}."
                )
    below = [line for line in result.get("uci", {}).get("published", []) if not line["at_least"]]
    if "uci" in result:
        met = len(result["uci"]["published"]) - len(below)
        short = "; ".join(
            f"{b['method']}, {b['table']}, {b['measure']}: {_with_error(b['ours'])} for {b['published']}"
            for b in below
        )
        parts.append(
            f"At least the published row (which are over all splits), within two of our standard errors: {met} of"
            f" {met + len(below)}."
        )
        parts.append(f"Below it: {short or 'none'}.")
    troubles = [
        f"{dataset}, {method}, split {split}: {status} ({reason})"
        for part in result.values() for dataset, r in part["tables"].items()
        for status in ("stopped", "diverged", "failed") for method, split, reason in r[status]
    ]  # fmt: skip
    shown = "; ".join(troubles[:12]) + (
        f"; and {len(troubles) - 12} more, in the result" if len(troubles) > 12 else ""
    )
    parts.append(f"Fits that were stopped, diverged or failed: {shown or 'none'}.")
    return "\n\n".join([*parts, *sorted({where(part["machine"]) for part in result.values()})])


def _between(result: dict[str, Any]) -> str:
    """Distances of every method to the references, then its scores."""
    parts = []
    scores = result["tables"]["in-between"]["methods"]
    for reference, lines in result["distances"].items():
        kinds = ("wasserstein", "sliced", "kl", "width_where_empty")
        body = []
        for name, r in sorted(lines.items(), key=lambda item: item[1]["wasserstein"]["mean"]):
            label = f"*two samples of {reference}*" if name == "chance" else name
            own = scores.get(name, {})
            body.append([
                label, *(_with_error(r.get(kind)) for kind in kinds), _with_error(own.get("log_likelihood")),
                _with_error(own.get("cpu_seconds")),
            ])  # fmt: skip
        head = [
            "method",
            "Wasserstein-2",
            "sliced",
            "KL, nats a probe",
            "width where no data",
            "log-likelihood",
            "processor seconds",
        ]
        cut = any(method == reference for method, _, _ in result["tables"]["in-between"]["stopped"])
        note = ", which the budget ended before it had converged" if cut else ""
        chains = result["tables"]["in-between"].get("chains", {}).get(reference)
        parts.append(f"### As a function, from {reference}{note}\n\n" + table(head, body))
        if chains:
            parts.append(
                f"Chains of {reference}: R-hat of function values, at rows and between them, at most"
                f" {chains['rhat']:.3f}; at least {chains['ess']:.0f} effective draws."
            )
    return "\n\n".join(
        [
            *parts,
            f"{result['tables']['in-between']['splits']} samples of the data. Budget: {result['budget']}.",
        ]
    )


def _with_error(figure: dict[str, Any] | None) -> str:
    """A mean and its standard error; "-" where there is none."""
    if figure is None:
        return "-"
    mean, error = figure["mean"], figure["standard_error"]
    if abs(mean) < 1e-9:  # rounding
        return "0"
    if not math.isfinite(error) or error <= 1e-9 * abs(mean):
        return f"{mean:.3g}"
    places = max(0, 1 - math.floor(math.log10(error)))
    return f"{mean:.{places}f} ± {error:.{places}f}"
