"""Sections of docs/benchmarks.md about the posterior server; make_docs.py puts them there."""

from __future__ import annotations

from typing import Any

from sections_markdown import table, where


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


def _mean_of(values: list[float]) -> str:
    """Mean and standard error over seeds."""
    mean = sum(values) / len(values)
    squares = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return f"{mean:.4f} ± {(squares / len(values)) ** 0.5:.4f}"


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
