"""GPflow's side of speed.py, run by GPflow's own interpreter: it imports nothing of fspace.

    python benchmarks/gpflow_peer.py data.npz out.json

data.npz holds X, y, X_test, y_test (standardised) and the JSON string `config`: model ("sgpr" or "svgp"),
inducing, seconds, seed, batch. out.json holds the curve: [seconds, rmse, mean log-likelihood] on the test
rows, evaluated with the clock stopped. The clock starts once TensorFlow has compiled the first step, so
that compilation is not counted.
"""

import json
import os
import sys
import time

os.environ.setdefault(
    "TF_USE_LEGACY_KERAS", "1"
)  # GPflow's recipes call Adam.minimize, which Keras 3 has not

import gpflow
import numpy as np
import tensorflow as tf


class Clock:
    """Seconds of training; stopped while the test rows are scored."""

    def __init__(self) -> None:
        self.spent = 0.0
        self.since: float | None = None

    def start(self) -> None:
        self.since = time.perf_counter()

    def stop(self) -> float:
        if self.since is not None:
            self.spent += time.perf_counter() - self.since
        self.since = None
        return self.spent


class OutOfTime(Exception):
    """The budget is spent."""


def score(model, X, y):
    """Root mean squared error and mean log density of the test rows."""
    means, densities = [], []
    for start in range(0, len(X), 4096):
        rows = slice(start, start + 4096)
        mean, _ = model.predict_y(X[rows])
        means.append(mean.numpy())
        densities.append(model.predict_log_density((X[rows], y[rows])).numpy().reshape(-1))
    return (
        float(np.sqrt(np.mean((np.concatenate(means) - y) ** 2))),
        float(np.mean(np.concatenate(densities))),
    )


def kernel_and_inducing(X, config):
    """Matern-5/2 with one lengthscale a column; inducing inputs from the rows, as in GPflow's notebooks."""
    rng = np.random.default_rng(config["seed"])
    Z = X[rng.choice(len(X), min(config["inducing"], len(X)), replace=False)]
    return gpflow.kernels.Matern52(lengthscales=np.ones(X.shape[1])), Z


def run_sgpr(X, y, X_test, y_test, config):
    """L-BFGS on the collapsed bound, everything trained (notebook: sparse regression)."""
    kernel, Z = kernel_and_inducing(X, config)
    model = gpflow.models.SGPR((X, y), kernel=kernel, inducing_variable=Z, noise_variance=0.1)
    clock, curve, due = Clock(), [], [0.0]

    def record(step, variables, values):
        spent = clock.stop()
        if spent >= due[0]:
            for variable, value in zip(variables, values):
                variable.assign(value)
            curve.append([spent, *score(model, X_test, y_test)])
            due[0] = max(spent + 0.5, 1.15 * spent)
        if spent > config["seconds"]:
            raise OutOfTime
        clock.start()

    try:
        gpflow.optimizers.Scipy().minimize(
            model.training_loss_closure(),
            model.trainable_variables,
            step_callback=record,
            options={"maxiter": 10_000},
        )
        curve.append([clock.stop(), *score(model, X_test, y_test)])
    except OutOfTime:
        pass
    return curve


def run_svgp(X, y, X_test, y_test, config):
    """Natural gradients (0.1) for q(u), Adam (0.01) for the rest, in turn (notebook: natural gradients)."""
    kernel, Z = kernel_and_inducing(X, config)
    likelihood = gpflow.likelihoods.Gaussian(0.1)
    model = gpflow.models.SVGP(kernel, likelihood, inducing_variable=Z, num_data=len(X))
    gpflow.set_trainable(model.q_mu, False)
    gpflow.set_trainable(model.q_sqrt, False)
    rows = tf.data.Dataset.from_tensor_slices((X, y)).repeat().shuffle(len(X), seed=config["seed"])
    loss = model.training_loss_closure(iter(rows.batch(config["batch"]).prefetch(2)), compile=False)
    natural, adam = gpflow.optimizers.NaturalGradient(gamma=0.1), tf.optimizers.Adam(0.01)

    @tf.function
    def step():
        adam.minimize(loss, model.trainable_variables)
        natural.minimize(loss, [(model.q_mu, model.q_sqrt)])

    step()
    clock, curve, due = Clock(), [], 0.0
    clock.start()
    while True:
        step()
        spent = clock.stop()
        if spent >= due:
            curve.append([spent, *score(model, X_test, y_test)])
            due = max(spent + 0.5, 1.15 * spent)
        if spent > config["seconds"]:
            return curve
        clock.start()


def main(data_path, out_path):
    """Run the model that the data file asks for."""
    data = np.load(data_path)
    config = json.loads(str(data["config"]))
    tf.random.set_seed(config["seed"])
    columns = [np.asarray(data[name], dtype=np.float64) for name in ("X", "y", "X_test", "y_test")]
    X, y, X_test, y_test = (array if array.ndim == 2 else array[:, None] for array in columns)
    run = {"sgpr": run_sgpr, "svgp": run_svgp}[config["model"]]
    curve = run(X, y, X_test, y_test, config)
    versions = {"gpflow": gpflow.__version__, "tensorflow": tf.__version__, "numpy": np.__version__}
    with open(out_path, "w") as file:
        json.dump({"curve": curve, "versions": versions}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
