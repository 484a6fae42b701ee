"""Put the figures of benchmarks/results/ into docs/benchmarks.md, between its markers.

python benchmarks/make_docs.py            rewrite the page python benchmarks/make_docs.py --check    exit 1
if the page does not show the latest results
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import common
import published
import sections_models
import sections_networks

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


def experts(result: dict[str, Any]) -> str:
    """Every way to combine on each table and split, then what fewer inducing inputs cost."""
    parts = []
    for name, r in result["tables"].items():
        parts.append(
            f"### {name}: {r['rows']:,} rows, {r['columns']} columns, {result['experts']} contributors\n\n"
            f"The server has {r['inducing']} inducing inputs; lifted sites come from {r['own_inducing']} of each"
            f" contributor's own (sites that stay experts, by seed: random {r['random']['lifted']['stay_experts']},"
            f" sorted {r['sorted']['lifted']['stay_experts']})."
        )
        body = [["exact regression", *(f"{_mean_of(r['exact'][key])}" for key in ("nlpd", "rmse") * 2)]]
        for method in r["random"]:
            scores = [r[split][method][key] for split in ("random", "sorted") for key in ("nlpd", "rmse")]
            body.append([method, *(_mean_of(score) for score in scores)])
        parts.append(table(["method", "NLPD random", "RMSE random", "NLPD sorted", "RMSE sorted"], body))
        body = [
            [own, *(_mean_of(row[key]) for key in ("shortfall", "lifted", "gpoe", "rbcm"))]
            for own, row in r["sweep"].items()
        ]
        head = [
            "inducing inputs of each",
            "short, nats",
            "lifted, no fallback",
            "gpoe",
            "rbcm",
        ]
        parts.append(
            "NLPD of the same contributors on fewer inducing inputs, random split:\n\n" + table(head, body)
        )
    parts.append(
        f"Means and standard errors over {len(result['seeds'])} seeds. Sites fall back above"
        f" {result['threshold']:g} nats an observation. The whole took {result['seconds']:.0f} s."
        f" {where(result['machine'])}"
    )
    return "\n\n".join(parts)


def amortised(result: dict[str, Any]) -> str:
    """One line a side, a column a number of samples; then the ratio to ours."""
    cases = result["samples"]
    sides = list(next(iter(cases.values()))["sides"])
    body = [
        [name, *(f"{1e3 * case['sides'][name]['cpu_s']:.1f}" for case in cases.values())] for name in sides
    ]
    for name in sides:
        if not name.startswith("fspace"):
            ratios = [c["sides"][name]["cpu_s"] / c["sides"]["fspace IWAE"]["cpu_s"] for c in cases.values()]
            body.append([f"{name} / fspace IWAE", *(f"{ratio:.2f}" for ratio in ratios)])
    setting = result["setting"]
    note = (
        f"Milliseconds of processor time a step, medians of {next(iter(cases.values()))['rounds']} turns; batches of"
        f" {setting['batch']}, {setting['pixels']} pixels, {setting['hidden']} hidden units, {setting['latent']}"
        f" latents; {result['machine']['threads']} thread(s). "
        + ", ".join(f"{name} {number}" for name, number in result["peers"].items())
        + "."
    )
    head = ["side", *(f"K = {samples}" for samples in cases)]
    return table(head, body) + f"\n\n{note}\n\n{where(result['machine'])}"


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


def continual(result: dict[str, Any]) -> str:
    """One table a set of digits and way of asking."""
    parts = []
    for name, ways in result["data"].items():
        for way, r in ways.items():
            body = []
            for method, m in r["methods"].items():
                forgot = f"{m['forgetting']:.3f}" if "forgetting" in m else "-"
                after = f"{m['right_after']:.3f}" if "right_after" in m else "-"
                body.append([method, f"{m['accuracy']:.3f} ± {m['accuracy_se']:.3f}", forgot, after,
                             f"{m['seconds']:.1f}"])  # fmt: skip
            head = ["method", "average accuracy", "forgetting", "right after a task", "seconds"]
            parts.append(f"{name}, {way}\n\n" + table(head, body))
    machines = sorted({where(r["machine"]) for ways in result["data"].values() for r in ways.values()})
    return "\n\n".join([*parts, *machines])


def particles(result: dict[str, Any]) -> str:
    """One line a size, then filters without a gradient."""
    body = []
    for r in result["fivo"]:
        times, faster = r["times"], r["faster"]
        compiled = times.get("fspace, compiled")
        body.append([
            "learned" if r["proposal"] else "bootstrap", f"{r['steps']} / {r['series']} / {r['particles']}",
            f"{1e3 * times['fspace']['cpu_s']:.0f}", f"{1e3 * compiled['cpu_s']:.0f}" if compiled else "-",
            f"{1e3 * times['plain filter']['cpu_s']:.0f}", f"{1e3 * times['plain, formulas']['cpu_s']:.0f}",
            f"{faster['fspace, against plain filter']:.1f} x",
            f"{faster['fspace, compiled, against plain filter']:.1f} x" if compiled else "-",
        ])  # fmt: skip
    head = ["proposal", "T / B / N", "fspace ms", "compiled ms", "plain ms", "plain, by formulas ms", "faster",
            "compiled, faster"]  # fmt: skip
    rows = [[name, f"{1e3 * seconds:.1f}"] for name, seconds in result["without_gradient_s"].items()]
    return "\n\n".join([
        table(head, body), "Without gradients:\n\n" + table(["filter", "ms"], rows), where(result["machine"])
    ])  # fmt: skip


def snep(result: dict[str, Any]) -> str:
    """One line a method and number of workers."""
    body = []
    for method, runs in result["methods"].items():
        for workers, r in runs.items():
            cells = [method, workers, f"{r['step_size']:g}"]
            for which in ("mean", "draws"):
                for measure in ("error", "nll"):
                    figure = r.get(which)
                    error = (
                        f" ± {figure[f'{measure}_se']:.4f}" if figure and f"{measure}_se" in figure else ""
                    )
                    cells.append(f"{figure[measure]:.4f}{error}" if figure else "-")
            body.append([*cells, f"{r['seconds']:.1f}"])
    head = ["method", "workers", "step size", "error at the mean", "nll at the mean", "error of draws",
            "nll of draws", "seconds of one core"]  # fmt: skip
    return table(head, body) + "\n\n" + where(result["machine"])


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


_ROWS = ("MC dropout", "Deep ensemble (5)", "UB MFVI", "UB deterministic")  # beside which of ours stand


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
        seeds = sorted({row["seeds"] for methods_of in cases.values() for row in methods_of.values()})
        parts.append(f"### {title}\n\n" + _decision_table(cases, methods, figure, style))
        parts.append(f"Mean ± standard error over {' to '.join(map(str, {seeds[0], seeds[-1]}))} seeds.")
        beside = {
            "optimisation": [("seconds_a_step", "Seconds a step", ".2f")],
            "newsvendor": [("beyond_posterior", "More than the posterior's, flight by flight", ".2f")],
            "wheel": [("percent_of_uniform", "In percent of the regret of uniform arms", ".1f")],
            "tables": [("percent_of_uniform", "In percent of the regret of uniform arms", ".1f")],
            "selective": [
                ("augrc", "Area under the generalised risk-coverage curve", ".3g"),
                ("risk", "Risk where all rows are answered", ".3g"),
            ],
        }
        for figure, title, style in beside.get(part, []):
            parts.append(f"{title}:\n\n" + _decision_table(cases, methods, figure, style))
        if part == "selective":
            parts.append(
                f"At most {result['budget'].get('selective_seconds', 20)} s of wall time a fit; † where that ended it "
                "and its best state was measured."
            )
    evaluations = ", ".join(f"{case} {count}" for case, count in result["budget"]["evaluations"].items())
    parts.append(f"Budget: {result['budget']['bandit_steps']:,} bandit steps; evaluations: {evaluations}.")
    parts.append(where(result["machine"]))
    return "\n\n".join(parts)


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


SECTIONS: dict[str, Callable[[dict[str, Any]], str]] = {
    "uci": uci,
    "speed": speed,
    "memory": memory,
    "classification": classification,
    "streaming": streaming,
    "server": server,
    "server_scale": server_scale,
    "experts": experts,
    "amortised": amortised,
    "amortised_particles": particles,
    "continual": continual,
    "decisions": decisions,
    "outputs": outputs,
    "snep": snep,
    **{
        f"amortised_{name}": partial(section, table=table, where=where)
        for name, section in (
            ("music", sections_models.music),
            ("nottingham", sections_models.music),
            ("digits", sections_models.digits),
            ("draw", sections_models.draw),
            ("discrete", sections_models.discrete),
            ("frames", sections_models.frames),
            ("pendulum", sections_models.pendulum),
            ("shapes", sections_models.shapes),
            ("topics", sections_models.topics),
        )
    },
    "compare": compare,
    "network_times": partial(sections_networks.network_times, table=table, where=where),
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


def _mean_of(values: list[float]) -> str:
    """Mean and standard error over seeds."""
    mean = sum(values) / len(values)
    squares = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return f"{mean:.4f} ± {(squares / len(values)) ** 0.5:.4f}"


def _cells(tables: dict[str, Any], measure: str, style: str) -> list[str]:
    return [format(row[measure]["mean"], style) if measure in row else "-" for row in tables.values()]


if __name__ == "__main__":
    raise SystemExit(main())
