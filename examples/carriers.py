"""Flights of 2013, each airline a worker with its own rows: they join, one is killed, the server is killed, one leaves.

Everything goes through the commands that one would type: `fspace serve`, `token`, `worker`, `forget`. In the end the
server's posterior is the one of all remaining rows together. Takes about a minute.

Run: python examples/carriers.py carriers.png
"""

import re
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import fspace
from fspace.datasets import load_flights
from fspace.inference.collapsed import fit_site, log_evidence
from fspace.server import RemoteServer
from fspace.server.serving import heaviest, table_rows

FSPACE = [sys.executable, "-m", "fspace.cli"]
folder = Path(tempfile.mkdtemp())

# A first model on a few thousand flights gives the basis; its rows do not count later.
X, y = load_flights(60_000, carrier=True)
table = X.assign(delay=y.clip(-60, 180))
first, rest, test = table[:3000], table[3000:57_000], table[57_000:]
inputs = [name for name in table if name not in ("carrier", "delay")]
model = fspace.GPRegressor(kernel="matern", inducing=200, progress=False).fit(first[inputs], first["delay"])
model.save(folder / "model.fspace")
carriers = ["UA", "B6", "EV", "DL", "AA"]
for name in carriers:
    rest[rest["carrier"] == name][[*inputs, "delay"]].to_parquet(folder / f"{name}.parquet")


def token(*options):
    """A file with a new token."""
    made = subprocess.run(
        [*FSPACE, "token", *options], cwd=folder, capture_output=True, text=True, check=True
    )
    file = folder / f"{options[-1].replace(',', '-')}.token"
    file.write_text(made.stdout)
    return str(file)


def serve():
    """`fspace serve` in a process of its own, and its address."""
    process = subprocess.Popen(
        [*FSPACE, "serve", "--store", "flights.db", "--model", "model.fspace", "--port", "0"],
        cwd=folder, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    return process, re.search(r"http://\S+", process.stdout.readline()).group()


def worker(name):
    """`fspace worker` in a process of its own."""
    words = [*FSPACE, "worker", "--data", f"{name}.parquet", "--site", name, "--server", url]
    return subprocess.Popen([*words, "--token-file", tokens[name]], cwd=folder, stdout=subprocess.DEVNULL)


story = []


def look(what):
    """What the server says now, and how well it predicts flights that nobody has sent."""
    with RemoteServer(url, Path(tokens["admin"]).read_text().strip()) as server:
        posterior, sites = (
            server.posterior(),
            [site["site_id"] for site in server.status()["bases"][0]["sites"]],
        )
        rows = server.total().count
    x = torch.tensor(test[inputs].to_numpy())
    with torch.no_grad():
        score = posterior.observed(x).log_prob(torch.tensor(test["delay"].to_numpy())).mean().item()
    story.append((what, rows, score))
    print(f"{what:28} {rows:6,} rows of {', '.join(sites) or 'nobody'}: mean log-likelihood {score:.4f}")


tokens = {name: token("--site", name) for name in carriers}
tokens["admin"] = token("--rights", "read,admin")
server, url = serve()
look("nobody yet")
for process in [worker("UA"), worker("B6")]:
    process.wait()
look("UA and B6 have joined")
process = worker("EV")
time.sleep(1)
process.kill()
process.wait()
look("EV's worker was killed")
server.kill()
server.wait()
server, url = serve()
look("the server was killed")
for process in [worker("EV"), worker("DL"), worker("AA")]:
    process.wait()
look("EV is back, DL, AA join")
subprocess.run(
    [*FSPACE, "forget", "--site", "B6", "--server", url, "--token-file", tokens["admin"]],
    cwd=folder, check=True, stdout=subprocess.DEVNULL,
)  # fmt: skip
look("B6 has left")

# The same rows in one place.
member = heaviest(model)
remaining = [name for name in carriers if name != "B6"]
parts = [
    table_rows(model, member.basis, member.scaling, str(folder / f"{name}.parquet")) for name in remaining
]
pooled = fit_site(member.basis, torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts]))
with RemoteServer(url, Path(tokens["admin"]).read_text().strip()) as remote:
    total, evidence = remote.total(), remote.log_evidence()
error = (total.precision - pooled.precision).abs().max() / pooled.precision.abs().max()
print(f"against all remaining rows in one place: natural parameters differ by {error:.0e} (relative),")
print(f"log evidence {evidence:.6f} against {log_evidence([pooled]):.6f}")
assert error < 1e-10
server.terminate()
server.wait()

figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
axes.plot([score for _, _, score in story], "o-", color="#2b6ca3")
for k, (_, rows, score) in enumerate(story):
    axes.annotate(
        f"{rows:,} rows",
        (k, score),
        textcoords="offset points",
        xytext=(0, 7 if k else -14),
        ha="center",
        fontsize=8,
    )
axes.set_xticks(range(len(story)), [textwrap.fill(what, 12) for what, _, _ in story], fontsize=8)
axes.set_ylabel("mean log-likelihood\nof 3,000 other flights")
axes.margins(0.08, 0.15)
picture = sys.argv[1] if len(sys.argv) > 1 else "carriers.png"
plt.savefig(picture, dpi=110)
print(f"open {picture}")
