"""Figures that others published for the twenty splits (protein: five) of the nine UCI tables.

Root mean squared error and mean test log-likelihood, both in the target's own units. Values are strings as
printed, so that a comparison knows how many digits there are. Where a source printed the standard deviation
in one paper and the standard error in another, no ± is kept.
"""

from __future__ import annotations

TABLES = ("boston", "concrete", "energy", "kin8nm", "naval", "power", "protein", "wine", "yacht")

SOURCES = {
    "PBP": "Hernandez-Lobato & Adams 2015, as printed by Lakshminarayanan et al. 2017, table 1",
    "MC dropout": "Gal & Ghahramani 2016, as printed by Lakshminarayanan et al. 2017, table 1",
    "Deep ensemble (5)": "Lakshminarayanan et al. 2017, table 1",
    "MC dropout, 10x epochs, grid": "Gal's DropoutUncertaintyExps, readme of 2018",
    "Evidential": "Amini et al. 2020, table 1",
    "UB deterministic": "uncertainty-baselines, baselines/uci",
    "UB ensemble (10)": "uncertainty-baselines, baselines/uci",
    "UB MFVI": "uncertainty-baselines, baselines/uci",
    "UB refined VI": "uncertainty-baselines, baselines/uci",
    "VMG": "Louizos & Welling 2016",
    "HS-BNN": "Ghosh & Doshi-Velez 2017",
    "PBP-MV (2 layers)": "Sun et al. 2017",
}

_RMSE = """
PBP                          | 3.01 | 5.67 | 1.80 | .10 | .01 | 4.12 | 4.73 | .64 | 1.02
MC dropout                   | 2.97 | 5.23 | 1.66 | .10 | .01 | 4.02 | 4.36 | .62 | 1.11
Deep ensemble (5)            | 3.28 | 6.03 | 2.09 | .09 | .00 | 4.11 | 4.71 | .64 | 1.58
MC dropout, 10x epochs, grid | 2.90 | 4.82 | .54  | .08 | .00 | 4.01 | 4.27 | .62 | .67
Evidential                   | 3.06 | 5.85 | 2.06 | .09 | .00 | 4.23 | 4.64 | .61 | 1.57
"""

# As printed: negative log-likelihood.
_NLL = """
PBP                          | 2.57  | 3.16 | 2.04 | -.90  | -3.73 | 2.84 | 2.97 | .97  | 1.63
MC dropout                   | 2.46  | 3.04 | 1.99 | -.95  | -3.80 | 2.80 | 2.89 | .93  | 1.55
Deep ensemble (5)            | 2.41  | 3.06 | 1.38 | -1.20 | -5.63 | 2.79 | 2.83 | .94  | 1.18
MC dropout, 10x epochs, grid | 2.40  | 2.93 | 1.21 | -1.14 | -4.45 | 2.80 | 2.87 | .93  | 1.25
Evidential                   | 2.35  | 3.01 | 1.39 | -1.24 | -5.73 | 2.81 | 2.63 | .89  | 1.03
UB deterministic             | 16.11 | 3.94 | 1.29 | -1.06 | -5.06 | 3.28 | 3.16 | 1.05 | 1.89
UB ensemble (10)             | 6.11  | 3.20 | .61  | -1.17 | -5.17 | 3.18 | 3.12 | .97  | .73
UB MFVI                      | 3.12  | 3.22 | .93  | -1.03 | -6.12 | 2.85 | 2.93 | 1.00 | 2.01
UB refined VI                | 2.94  | 3.08 | .75  | -1.06 | -6.33 | 2.83 | 2.92 | .97  | 1.68
VMG                          | 2.46  | 3.01 | 1.06 | -1.10 | -2.46 | 2.82 | 2.84 | .95  | 1.30
HS-BNN                       | 2.54  | 3.09 | 2.66 | -1.12 | -5.52 | 2.81 | 2.89 | .95  | 2.33
PBP-MV (2 layers)            | 2.54  | 3.04 | 1.01 | -1.28 | -4.85 | 2.78 | 2.77 | .97  | 1.64
"""


def _rows(text: str) -> dict[str, dict[str, str]]:
    rows = {}
    for line in text.strip().splitlines():
        name, *values = (part.strip() for part in line.split("|"))
        rows[name] = dict(zip(TABLES, values, strict=True))
    return rows


def _negated(text: str) -> str:
    return text[1:] if text.startswith("-") else f"-{text}"


RMSE = _rows(_RMSE)
LOG_LIKELIHOOD = {
    name: {table: _negated(value) for table, value in row.items()} for name, row in _rows(_NLL).items()
}


def digits(text: str) -> int:
    """Digits after the point of a printed figure."""
    return len(text.partition(".")[2])


def verdict(ours: float, measure: str, table: str) -> str:
    """`best`, `ties` or `behind`: our figure against the best published one, at the printed precision."""
    sign = {"rmse": -1.0, "log_likelihood": 1.0}[measure]
    rows = RMSE if measure == "rmse" else LOG_LIKELIHOOD
    best = max((row[table] for row in rows.values()), key=lambda text: sign * float(text))
    gain = sign * (round(ours, digits(best)) - float(best))
    if gain > 0:
        return "best"
    return "ties" if gain == 0 else "behind"


def best(measure: str, table: str) -> tuple[str, str]:
    """The best published figure of a table, as printed, and whose it is."""
    rows = RMSE if measure == "rmse" else LOG_LIKELIHOOD
    choose = min if measure == "rmse" else max
    name = choose(rows, key=lambda row: float(rows[row][table]))
    return rows[name][table], name
