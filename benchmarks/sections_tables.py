"""Sections of docs/benchmarks.md about Gaussian processes on tables; make_docs.py puts them there."""

from __future__ import annotations

from typing import Any

import published
from sections_markdown import table, where


def uci(result: dict[str, Any]) -> str:
    """Both measures beside the published rows, then what it took."""
    tables = result["tables"]
    parts = []
    for measure, title, rows in (
        ("log_likelihood", "Mean test log-likelihood (higher is better)", published.LOG_LIKELIHOOD),
        ("rmse", "Test RMSE (lower is better)", published.RMSE),
    ):
        body = []
        for name, row in rows.items():
            cells = []
            for column in tables:
                verdict = tables[column].get(measure, {}).get("verdict")
                top = verdict != "best" and row[column] == published.best(measure, column)[0]
                cells.append(f"**{row[column]}**" if top else row[column])
            body.append([name, *cells])
        body.append(["fspace", *(_ours(tables[column].get(measure), measure, column) for column in tables)])
        verdicts = [row[measure]["verdict"] for row in tables.values() if measure in row]
        parts.append(f"### {title}\n\n" + table(["", *tables], body))
        parts.append(
            f"Best of all rows on {verdicts.count('best')} of {len(verdicts)} tables, level at the printed"
            f" precision on {verdicts.count('ties')}, behind on {verdicts.count('behind')}."
            " Bold: the best; ±: standard error over splits."
        )
    took = [
        ["splits done", *(f"{row['splits']} of {row['of']}" for row in tables.values())],
        ["splits failed", *(str(row["failed"]) for row in tables.values())],
        ["coverage of 90% intervals", *_cells(tables, "coverage_90", ".3f")],
        ["seconds a fit", *_cells(tables, "fit_s", ".1f")],
    ]
    parts.append("### What it took\n\n" + table(["", *tables], took))
    machine = result["machine"]
    parts.append(
        f"{machine['fits_at_a_time']} fits at a time, {machine['threads']} thread(s) each. {where(machine)}"
    )
    if len(result["commits"]) > 1:
        parts.append(f"The splits were run at the commits {', '.join(result['commits'])}.")
    return "\n\n".join(parts)


def _ours(figure: dict[str, Any] | None, measure: str, column: str) -> str:
    if figure is None:
        return "failed"
    places = max(2, published.digits(figure["best_published"]))
    if measure == "rmse" and column == "naval":
        places = 5  # the published rows print two digits, which is none of the figure's
    text = f"{figure['mean']:.{places}f}"
    text = text if figure["verdict"] == "behind" else f"**{text}**"
    return f"{text} ± {figure['standard_error']:.2g}"


def _cells(tables: dict[str, Any], measure: str, style: str) -> list[str]:
    return [format(row[measure]["mean"], style) if measure in row else "-" for row in tables.values()]


def speed(result: dict[str, Any]) -> str:
    """One line a fit of ours, then where it ran."""
    body = []
    for name, row in result["cases"].items():
        if "error" in row:
            body.append([name, row["peer"], "", "failed", "", "", "", "", ""])
            continue
        best = row["peer_best"]
        target = best["log_likelihood"] - row["tolerance"]
        for fit in row["fspace_fits"]:
            options = fit["settings"]
            words = [options["kernel"], options.get("inference", ""), f"M = {options.get('inducing', 'n')}"]
            reached = fit["log_likelihood"] >= target
            body.append([
                name, row["peer"], f"{row['rows']:,}", f"{best['log_likelihood']:.3f}", f"{row['peer_s']:.1f}",
                " ".join(word for word in words if word), f"{fit['log_likelihood']:.3f}", f"{fit['seconds']:.1f}",
                f"{row['peer_s'] / fit['seconds']:.1f} x" if reached else "not reached",
            ])  # fmt: skip
    head = ["case", "peer", "rows", "its best log-lik.", "its s", "fspace", "log-lik.", "its s", "sooner"]
    cases = result["cases"].values()
    budgets = sorted({row["budget_s"] for row in cases if "budget_s" in row})
    notes = [
        f"Budget {' or '.join(f'{budget:.0f}' for budget in budgets)} s a peer;"
        " mean log-likelihood of a row, of the standardised target."
    ]
    for tolerance in sorted({row["tolerance"] for row in cases} - {0.0}):
        names = [name for name, row in result["cases"].items() if row["tolerance"] == tolerance]
        notes.append(f"Within {tolerance} nats of the best, for both sides: {', '.join(names)}.")
    notes += sorted({where(row["machine"]) for row in cases})
    return table(head, body) + "\n\n" + "\n\n".join(notes)


def memory(result: dict[str, Any]) -> str:
    """One line a phase."""
    fit = result["fit"]
    base = f"the imports ({result['base_mib']:.0f} MiB)"
    body = [
        [
            f"fit, M = {fit['inducing']}",
            f"{fit['rows']:,}",
            base,
            f"{fit['peak_mib']:.0f}",
            f"{fit['seconds']:.1f}",
        ]
    ]
    for part in result["predict"]:
        body.append(
            ["predict", f"{part['rows']:,}", base, f"{part['peak_mib']:.0f}", f"{part['seconds']:.1f}"]
        )
    return table(["phase", "rows", "above", "peak MiB", "seconds"], body) + "\n\n" + where(result["machine"])


def classification(result: dict[str, Any]) -> str:
    """One line a method on each table, the time to GPyTorch's best, and the doubt about classes never seen."""
    body, sooner = [], []
    for name, row in result["tables"].items():
        for method, r in row["methods"].items():
            body.append([
                f"{name} ({row['rows']:,} x {row['columns']})", method, f"{r['log_likelihood']:.3f}",
                f"{r['accuracy']:.3f}", f"{r['ece']:.3f}", f"{r['seconds']:.1f}",
            ])  # fmt: skip
        ratio = "not reached" if row["sooner"] is None else f"{row['sooner']:.1f} times sooner"
        sooner.append(f"{name}: {ratio}")
    parts = [table(["table", "method", "log-lik.", "accuracy", "calib. error", "seconds"], body)]
    parts.append(f"Time to GPyTorch's best log-likelihood: {'; '.join(sooner)}.")
    if "far" in result:
        rows = [[what, f"{value:.3f}"] for what, value in result["far"].items()]
        parts.append(
            "Digits 0 to 7 are learned, the test rows hold 8 and 9 as well: AUROC of telling these by doubt.\n\n"
            + table(["doubt", "AUROC"], rows)
        )
    machines = {where(row["machine"]) for row in result["tables"].values()}
    return "\n\n".join([*parts, *sorted(machines)])


def streaming(result: dict[str, Any]) -> str:
    """One line a table."""
    body = []
    for name, r in result["tables"].items():
        kept = "none to keep" if r["gain_kept"] is None else f"{r['gain_kept']:.0%}"
        body.append([
            name, f"{r['rows']:,}", f"{r['before']:.3f}", f"{r['updated']:.3f}", f"{r['ten_updated']:.3f}",
            f"{r['refitted']:.3f}", kept, f"{r['update_s']:.2f}", f"{r['ten_updates_s']:.2f}",
            f"{r['refit_s']:.1f}", f"{r['refit_s'] / r['update_s']:.0f} x",
        ])  # fmt: skip
    head = ["table", "rows", "log-lik. of half", "one update", "ten updates", "new fit", "gain kept", "update s",
            "ten updates s", "new fit s", "sooner"]  # fmt: skip
    return table(head, body) + "\n\n" + where(result["machine"])


def outputs(result: dict[str, Any]) -> str:
    """One line a table."""
    models = ("independent", "coregionalised", "GPyTorch multitask")
    body = []
    for name, r in result["tables"].items():
        gains = [f"{mean:+.3f} ± {error:.3f}" for mean, error in r["gain"].values()]
        body.append([
            name, f"{r['rows']:,}", str(r["outputs"]), *(f"{r['mean'][m]:.3f}" for m in models), *gains,
            " / ".join(f"{r['seconds'][m]:.1f}" for m in models),
        ])  # fmt: skip
    head = ["table", "rows", "outputs", *models, "gain over independent", "over GPyTorch", "seconds"]
    failed = [f"{name}, {what}" for name, r in result["tables"].items() for what in r["failed"]]
    parts = [table(head, body), *([f"Failed: {'; '.join(failed)}."] if failed else [])]
    return "\n\n".join([*parts, where(result["machine"])])
