"""Sections of docs/benchmarks.md about amortised models; make_docs.py puts them there."""

from __future__ import annotations

from typing import Any

from sections_markdown import table, where


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


def music(result: dict[str, Any]) -> str:
    """One line an objective and number of particles."""
    (found,) = (value for key, value in result.items() if key != "machine")
    best = max(row["fivo"] for row in found["rows"])
    body = []
    for row in found["rows"]:
        cells = [f"{row[bound]:.3f}" for bound in ("elbo", "iwae", "fivo")]
        cells[2] = f"**{cells[2]}**" if row["fivo"] == best else cells[2]
        body.append([row["trained_by"].upper(), str(row["particles"]), *cells, f"{row['seconds']:.0f}"])
    head = ["trained by", "particles", "ELBO", "IWAE", "FIVO", "seconds"]
    note = (
        f"{found['passes']} passes over {found['series'][0]} series, {found['series'][1]} tested; one seed."
    )
    return f"{table(head, body)}\n\n{note}\n\n{where(result['machine'])}"


def digits(result: dict[str, Any]) -> str:
    """A line a model, a column a number of samples."""
    found = result["digits"]
    by = {(row["model"], row["k"]): row for row in found["rows"]}
    cell = lambda row: f"{row['nll']:.2f} ± {row['se']:.2f}" if row else "as VAE"  # noqa: E731
    body = [[name, *(cell(by.get((name, k))) for k in (1, 5, 50))] for name in ("VAE", "IWAE", "DReG")]
    share = max(row["pareto_above_0.7"] for row in found["rows"])
    seconds = ", ".join(f"{row['model']} {row['k']}: {row['seconds']:.0f} s" for row in found["rows"])
    note = (
        f"Nats of {found['test_rows']} test digits by {found['samples']:,} samples, ± standard error over digits; at "
        f"most {found['passes']} passes, one seed. Pareto's k is above 0.7 for {share:.0%} of the digits at most. "
        f"{seconds}."
    )
    return f"{table(['', 'K = 1', 'K = 5', 'K = 50'], body)}\n\n{note}\n\n{where(result['machine'])}"


def draw(result: dict[str, Any]) -> str:
    """DRAW beside a VAE."""
    found = result["draw"]
    body = [
        [row["model"], f"{-row['elbo']:.2f}", f"{row['nll']:.2f} ± {row['se']:.2f}", f"{row['pareto_above_0.7']:.0%}",
         str(row["passes"]), f"{row['seconds']:.0f}"]
        for row in found["rows"]
    ]  # fmt: skip
    head = [
        "model",
        "negative ELBO",
        f"nats by {found['samples']} samples",
        "Pareto's k above 0.7",
        "passes",
        "seconds",
    ]
    note = f"{found['test_rows']} test digits, one seed."
    return f"{table(head, body)}\n\n{note}\n\n{where(result['machine'])}"


def discrete(result: dict[str, Any]) -> str:
    """A line an estimator: both bounds."""
    found = result["discrete"]
    body = [
        [row["objective"], str(row["k"]), f"{-row['elbo']:.2f}", f"{-row['relaxed']:.2f}",
         f"{row['nll']:.2f} ± {row['se']:.2f}", f"{row['pareto_above_0.7']:.0%}", f"{row['seconds']:.0f}"]
        for row in found["rows"]
    ]  # fmt: skip
    head = ["estimator", "samples", "negative ELBO, hard bits", "negative relaxed bound",
            f"nats by {found['samples']:,} samples", "Pareto's k above 0.7", "seconds"]  # fmt: skip
    note = f"{found['test_rows']} test digits, {found['passes']} passes, one seed."
    return f"{table(head, body)}\n\n{note}\n\n{where(result['machine'])}"


def frames(result: dict[str, Any]) -> str:
    """A line a model."""
    body = [
        [name, f"{row['rmse']:.4f}", f"{row['log_density']:.3f}", f"{row['seconds']:.0f}"]
        for name, row in result["frames"].items()
    ]
    head = ["model", "RMS error of a pixel", "log density of a pixel, nats", "seconds"]
    return f"{table(head, body)}\n\n{where(result['machine'])}"


def pendulum(result: dict[str, Any]) -> str:
    """A line a model."""
    body = [
        [
            name,
            f"{row['log_density']:.3f}",
            f"{row['coverage_90']:.0%}",
            f"{row['rmse']:.3f}",
            f"{row['seconds']:.0f}",
        ]
        for name, row in result["pendulum"].items()
    ]
    head = ["model", "nats per step", "90% bands hold", "RMS error, 40 steps ahead", "seconds"]
    return f"{table(head, body)}\n\n{where(result['machine'])}"


def shapes(result: dict[str, Any]) -> str:
    """A line a beta."""
    body = [
        [f"{row['beta']:g}", f"{row['mig']:.3f} ± {row['spread']:.3f}", f"{row['active']:.1f}"]
        for row in result["shapes"]
    ]
    note = f"Means and standard deviations of {result['shapes'][0]['seeds']} seeds."
    head = ["beta", "mutual information gap", "active latents of 6"]
    return f"{table(head, body)}\n\n{note}\n\n{where(result['machine'])}"


def topics(result: dict[str, Any]) -> str:
    """A line a model, means over seeds."""
    body = []
    for name, runs in result["topics"]["rows"].items():
        mean = {key: sum(run[key] for run in runs) / len(runs) for key in runs[0]}
        covered = f"{mean['coverage_90']:.0%}" if "coverage_90" in mean else "none"
        body.append(
            [name, f"{mean['rmse']:.4f}", covered, f"{mean['perplexity']:.2f}", f"{mean['seconds']:.0f}"]
        )
    head = [
        "model",
        "RMS error of shares by year",
        "90% bands hold",
        "perplexity of new documents",
        "seconds",
    ]
    note = f"Means of {result['topics']['seeds']} corpora of 1,200 documents."
    return f"{table(head, body)}\n\n{note}\n\n{where(result['machine'])}"
