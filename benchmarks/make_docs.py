"""Put the figures of benchmarks/results/ into docs/benchmarks.md, between its markers.

python benchmarks/make_docs.py            rewrite the page python benchmarks/make_docs.py --check    exit 1
if the page does not show the latest results
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from typing import Any

import common
import published

PAGE = common.ROOT / "docs" / "benchmarks.md"
BLOCK = re.compile(r"(<!-- results: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def where(machine: dict[str, Any]) -> str:
    """One line on the machine and the versions."""
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items() if number)
    gpu = f", {machine['gpu']}" if machine.get("gpu") else ""
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB{gpu};"
        f" Python {machine['python']}, {versions}; commit {machine['commit']}, {machine['date']}."
    )


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


def server(result: dict[str, Any]) -> str:
    """One part after the other."""
    parts = []
    rows = [
        [where_, f"{r['natural_parameters']:.0e}", f"{r['log_evidence']:.0e} of {r['of']:,.0f}"]
        for where_, r in result["equality"].items()
    ]
    parts.append(
        "20,000 rows in 8 shards against the same rows in one place, M = 200: largest error of a natural parameter,"
        " relative to the largest, and of the log evidence (nats).\n\n"
        + table(["over", "natural parameters", "log evidence"], rows)
    )
    rows = [[f"{r['m']:,}", f"{r['bytes']:,}", f"{r['full']:,}"] for r in result["bytes"]]
    parts.append("Bytes of a message, beside 8 (M² + M).\n\n" + table(["M", "bytes", "8 (M² + M)"], rows))
    rows = [[f"{r['m']:,}", r["where"], f"{r['per_second']:.0f}"] for r in result["puts"]]
    parts.append(
        "Acknowledged puts a second of one contributor; to a file, each is on the disk when it is answered.\n\n"
        + table(["M", "to", "puts a second"], rows)
    )
    timed = result["time"]
    rows = [[name, f"{seconds:.2f}"] for name, seconds in timed["seconds"].items()]
    parts.append(
        f"One posterior of {timed['rows']:,} rows, M = {timed['m']}: median seconds of three turns.\n\n"
        + table(["", "seconds"], rows)
    )
    r, m = result["recovery"], result["memory"]
    same = "the same to the last bit" if r["same"] else "DIFFERENT"
    parts.append(
        f"After SIGKILL, a server with {r['sites']:,} sites (M = {r['m']}, {r['file_mib']:.0f} MiB) answers"
        f" {r['seconds']:.1f} s after its start, {r['of_which_reading']:.1f} s of which it reads its file (the rest is"
        f" the start of Python); what it says is {same}. With {m['sites']:,} sites (M = {m['m']},"
        f" {m['file_mib']:.0f} MiB on disk), memory peaks {m['fill']['peak_mib']:.0f} MiB above the start while they"
        f" are put, and {m['reopen']['peak_mib']:.0f} MiB when the file is opened again, which takes"
        f" {m['reopen']['seconds']:.1f} s: sites stay on disk."
    )
    rows = [
        [name, str(r["rounds"]) if r["last"] < 1e-3 else f"not within {r['of']}", f"{r['last']:.0e}"]
        for name, r in result["rounds"].items()
    ]
    parts.append(
        "4,000 rows of two classes in 8 shards, M = 100: rounds until the product of all sites is within 1e-3 nats (KL)"
        " of the pooled posterior, for good, and where it ends.\n\n"
        + table(["split, order", "rounds", "KL in the end"], rows)
    )
    return "\n\n".join([*parts, where(result["machine"])])


def server_scale(result: dict[str, Any]) -> str:
    """One line a case."""
    rows = []
    for r in result["cases"]:
        costs = r["costs"]
        rows.append([
            r["kind"], f"{costs['m']:,}", str(r["rounds"]), f"{1 / costs['per_row']:,.0f}",
            f"{1e3 * costs['put']:.1f}", f"{costs['message'] / 1e6:.2f}", f"{60 * r['hours']:.1f}",
            f"{60 * r['compute_hours_slowest']:.1f}", f"{r['server_share']:.0%}", f"{r['gigabytes']:.1f}",
            f"{r['workers_at_full_server']:,.0f}",
        ])  # fmt: skip
    head = ["noise", "M", "rounds", "rows/s a worker", "put ms", "MB a message", "minutes", "of which computing",
            "server busy", "GB in all", "workers that fill it"]  # fmt: skip
    return (
        f"{result['workers']:,} workers, {result['rows']:,} rows, simulated.\n\n"
        + table(head, rows)
        + "\n\n"
        + where(result["machine"])
    )


SECTIONS: dict[str, Callable[[dict[str, Any]], str]] = {
    "uci": uci,
    "speed": speed,
    "memory": memory,
    "classification": classification,
    "streaming": streaming,
    "server": server,
    "server_scale": server_scale,
}


def render(page: str) -> str:
    """The page with every block replaced by its results, or by "Not run yet."."""

    def block(match: re.Match[str]) -> str:
        path = common.RESULTS / f"{match[2]}.json"
        text = SECTIONS[match[2]](json.loads(path.read_text())) if path.exists() else "Not run yet."
        return f"{match[1]}{text}\n{match[3]}"

    return BLOCK.sub(block, page)


def main() -> int:
    """Rewrite or check the page."""
    page = PAGE.read_text()
    fresh = render(page)
    if "--check" in sys.argv[1:]:
        if fresh != page:
            print("docs/benchmarks.md does not show benchmarks/results: run python benchmarks/make_docs.py")
        return int(fresh != page)
    PAGE.write_text(fresh)
    return 0


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


if __name__ == "__main__":
    raise SystemExit(main())
