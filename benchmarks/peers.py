"""The other libraries' sides of speed.py, each by its own documented recipe; a side returns its curve.

A curve is a list of [seconds of training, test rmse, mean test log-likelihood]; scoring is never on the
clock. All get the same standardised arrays.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

Curve = list[list[float]]


class Arrays(NamedTuple):
    """Standardised on the training rows: X [n, d], y [n], and the test rows."""

    X: np.ndarray
    y: np.ndarray
    X_test: np.ndarray
    y_test: np.ndarray

    def tensors(self, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """The four as tensors."""
        return tuple(torch.as_tensor(array, dtype=dtype) for array in self)


class Clock:
    """Seconds of training, and when to score next: often at first, every tenth of the time spent later."""

    def __init__(self) -> None:
        self.spent, self.due, self._since = 0.0, 0.5, 0.0

    def start(self) -> None:
        """Training goes on."""
        self._since = time.perf_counter()

    def stop(self) -> float:
        """Training pauses; the seconds so far."""
        self.spent += time.perf_counter() - self._since
        return self.spent

    def is_due(self) -> bool:
        """Whether it is time to score."""
        if self.spent < self.due:
            return False
        self.due = max(self.spent + 0.5, 1.1 * self.spent)
        return True


def gaussian_score(mean: np.ndarray, variance: np.ndarray, y: np.ndarray) -> list[float]:
    """[rmse, mean log density] of y under independent Gaussians."""
    error = y - mean
    density = -0.5 * (np.log(2 * np.pi * variance) + error**2 / variance)
    return [float(np.sqrt(np.mean(error**2))), float(np.mean(density))]


def network(inputs: int, hidden: tuple[int, ...], outputs: int) -> torch.nn.Sequential:
    """The extractor that both sides train: SiLU layers, linear at the end."""
    sizes = (inputs, *hidden)
    layers: list[torch.nn.Module] = []
    for before, after in zip(sizes, sizes[1:]):
        layers += [torch.nn.Linear(before, after), torch.nn.SiLU()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(sizes[-1], outputs))


def gpytorch_svgp(
    data: Arrays, seconds: float, seed: int, extractor: torch.nn.Module, features: int, inducing: int = 512
) -> tuple[Curve, dict[str, Any]]:
    """GPyTorch's SVGP example with a network before the kernel: Adam (0.01), batches of 1,024, float32.

    As in its deep-kernel examples the GP stands on the features; the inducing points start at those of the
    first rows.
    """
    import gpytorch
    from gpytorch.variational import CholeskyVariationalDistribution, VariationalStrategy

    class FeatureGP(gpytorch.models.ApproximateGP):
        """The sparse GP on the features."""

        def __init__(self, points: torch.Tensor) -> None:
            strategy = VariationalStrategy(
                self, points, CholeskyVariationalDistribution(len(points)), learn_inducing_locations=True
            )
            super().__init__(strategy)
            self.mean_module = gpytorch.means.ConstantMean()
            self.covar_module = gpytorch.kernels.ScaleKernel(
                gpytorch.kernels.MaternKernel(2.5, ard_num_dims=points.shape[1])
            )

        def forward(self, x: torch.Tensor) -> Any:
            return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))

    torch.manual_seed(seed)
    X, y, X_test, _ = data.tensors(torch.float32)
    with torch.no_grad():
        points = extractor(X[:inducing]).clone()
    model, likelihood = FeatureGP(points), gpytorch.likelihoods.GaussianLikelihood()
    bound = gpytorch.mlls.VariationalELBO(likelihood, model, num_data=len(y))
    parameters = [*extractor.parameters(), *model.parameters(), *likelihood.parameters()]
    adam = torch.optim.Adam(parameters, lr=0.01)
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, y), batch_size=1024, shuffle=True)

    def score() -> list[float]:
        for module in (extractor, model, likelihood):
            module.eval()
        means, variances = [], []
        with torch.no_grad():
            for rows in X_test.split(1024):
                predicted = likelihood(model(extractor(rows)))
                means.append(predicted.mean)
                variances.append(predicted.variance)
        for module in (extractor, model, likelihood):
            module.train()
        return gaussian_score(
            torch.cat(means).double().numpy(), torch.cat(variances).double().numpy(), data.y_test
        )

    clock, curve, steps = Clock(), [], 0
    clock.start()
    while True:
        for rows, targets in batches:
            adam.zero_grad()
            loss = -bound(model(extractor(rows)), targets)
            loss.backward()
            adam.step()
            steps += 1
            spent = clock.stop()
            if clock.is_due() or spent > seconds:
                curve.append([spent, *score()])
            if spent > seconds:
                return curve, {"steps": steps, "inducing": inducing, "batch": 1024, "features": features}
            clock.start()


def gpytorch_classes(
    data: Arrays, seconds: float, seed: int, hidden: tuple[int, ...], features: int, inducing: int = 512
) -> list[tuple[float, np.ndarray]]:
    """GPyTorch's SVGP with a network before the kernel, for classes; [seconds of training, test probabilities].

    Bernoulli likelihood for two classes; for more a softmax over independent functions, as in its multitask and
    deep-kernel classification examples. Adam (0.01), batches of 1,024 (256 of small tables), float32.
    """
    import gpytorch
    from gpytorch.variational import (
        CholeskyVariationalDistribution,
        IndependentMultitaskVariationalStrategy,
        VariationalStrategy,
    )

    classes = int(data.y.max()) + 1
    batch_shape = torch.Size([] if classes == 2 else [classes])

    class FeatureGP(gpytorch.models.ApproximateGP):
        """The sparse GPs on the features."""

        def __init__(self, points: torch.Tensor) -> None:
            q = CholeskyVariationalDistribution(len(points), batch_shape=batch_shape)
            strategy: Any = VariationalStrategy(
                self, points.expand(*batch_shape, *points.shape).clone(), q, learn_inducing_locations=True
            )
            if classes > 2:
                strategy = IndependentMultitaskVariationalStrategy(strategy, num_tasks=classes)
            super().__init__(strategy)
            self.mean_module = gpytorch.means.ConstantMean(batch_shape=batch_shape)
            base = gpytorch.kernels.MaternKernel(2.5, ard_num_dims=points.shape[1], batch_shape=batch_shape)
            self.covar_module = gpytorch.kernels.ScaleKernel(base, batch_shape=batch_shape)

        def forward(self, x: torch.Tensor) -> Any:
            return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))

    torch.manual_seed(seed)
    X, X_test = (torch.as_tensor(a, dtype=torch.float32) for a in (data.X, data.X_test))
    y = torch.as_tensor(data.y)
    y = y.float() if classes == 2 else y.long()
    extractor = network(X.shape[1], hidden, features)
    with torch.no_grad():
        points = extractor(X[: min(inducing, len(X))]).clone()
    model = FeatureGP(points)
    likelihood: Any = (
        gpytorch.likelihoods.BernoulliLikelihood()
        if classes == 2
        else gpytorch.likelihoods.SoftmaxLikelihood(num_classes=classes, mixing_weights=False)
    )
    bound = gpytorch.mlls.VariationalELBO(likelihood, model, num_data=len(y))
    adam = torch.optim.Adam([*extractor.parameters(), *model.parameters(), *likelihood.parameters()], lr=0.01)
    size = 1024 if len(y) > 10_000 else 256
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, y), batch_size=size, shuffle=True)

    def probabilities() -> np.ndarray:
        for module in (extractor, model, likelihood):
            module.eval()
        parts = []
        with torch.no_grad(), gpytorch.settings.num_likelihood_samples(64):
            for rows in X_test.split(1024):
                probs = likelihood(model(extractor(rows))).probs
                parts.append(torch.stack([1 - probs, probs], -1) if classes == 2 else probs.mean(0))
        for module in (extractor, model, likelihood):
            module.train()
        return torch.cat(parts).double().numpy()

    clock, curve = Clock(), []
    clock.start()
    while True:
        for rows, labels in batches:
            adam.zero_grad()
            loss = -bound(model(extractor(rows)), labels)
            loss.backward()
            adam.step()
            spent = clock.stop()
            if clock.is_due() or spent > seconds:
                curve.append((spent, probabilities()))
            if spent > seconds:
                return curve
            clock.start()


def ensemble_probabilities(data: Arrays, hidden: tuple[int, ...], members: int, epochs: int) -> torch.Tensor:
    """Test probabilities [members, n, classes] of networks that differ in their seed: Adam (0.001, decay 1e-4)."""
    X, X_test = (torch.as_tensor(a, dtype=torch.float32) for a in (data.X, data.X_test))
    y = torch.as_tensor(data.y)
    batch = 128 if len(y) < 50_000 else 1024
    found = []
    for seed in range(members):
        torch.manual_seed(seed)
        net = network(X.shape[1], hidden, int(y.max()) + 1)
        adam = torch.optim.Adam(net.parameters(), lr=1e-3, weight_decay=1e-4)
        for _ in range(epochs):
            for rows in torch.randperm(len(y)).split(batch):
                adam.zero_grad()
                torch.nn.functional.cross_entropy(net(X[rows]), y[rows]).backward()
                adam.step()
        with torch.no_grad():
            found.append(torch.softmax(net(X_test).double(), 1))
    return torch.stack(found)


def botorch_exact(data: Arrays, seconds: float, seed: int) -> tuple[Curve, dict[str, Any]]:
    """SingleTaskGP by fit_gpytorch_mll: float64, inputs to the unit cube, own priors and stopping rule."""
    import gpytorch
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import SingleTaskGP
    from botorch.models.transforms import Normalize
    from botorch.models.utils.gpytorch_modules import get_covar_module_with_dim_scaled_prior

    torch.manual_seed(seed)
    X, y, X_test, _ = data.tensors(torch.float64)
    kernel = get_covar_module_with_dim_scaled_prior(ard_num_dims=X.shape[1], use_rbf_kernel=False)
    model = SingleTaskGP(X, y[:, None], covar_module=kernel, input_transform=Normalize(X.shape[1]))
    bound = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)
    clock, states = Clock(), []

    def record(*_: Any) -> None:
        states.append((clock.stop(), deepcopy(model.state_dict())))
        clock.start()

    clock.start()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the budget ended the fit
        fit_gpytorch_mll(bound, optimizer_kwargs={"callback": record, "timeout_sec": seconds})
    states.append((clock.stop(), deepcopy(model.state_dict())))
    curve = []
    for spent, state in _some(states):
        model.train()
        model.load_state_dict(state)
        model.eval()
        with torch.no_grad():
            parts = [model.posterior(rows, observation_noise=True) for rows in X_test.split(500)]
            mean = torch.cat([part.mean for part in parts]).squeeze(-1)
            variance = torch.cat([part.variance for part in parts]).squeeze(-1)
        curve.append([spent, *gaussian_score(mean.numpy(), variance.numpy(), data.y_test)])
    return curve, {"iterations": len(states) - 1}


def sklearn_exact(data: Arrays, seconds: float, seed: int) -> tuple[Curve, dict[str, Any]]:
    """GaussianProcessRegressor by its own L-BFGS-B, one start, with a learnt noise (WhiteKernel)."""
    from scipy.optimize import minimize
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    columns = data.X.shape[1]
    kernel = ConstantKernel(1.0) * Matern(np.ones(columns), nu=2.5) + WhiteKernel(0.1)
    clock, states = Clock(), []

    def optimise(objective: Any, start: np.ndarray, bounds: np.ndarray) -> tuple[np.ndarray, float]:
        def record(theta: np.ndarray) -> None:
            states.append((clock.stop(), theta.copy()))
            clock.start()
            if clock.spent > seconds:
                raise StopIteration

        found = minimize(objective, start, method="L-BFGS-B", jac=True, bounds=bounds, callback=record)
        return found.x, found.fun

    model = GaussianProcessRegressor(kernel, optimizer=optimise, random_state=seed)
    clock.start()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a hyperparameter is at its bound
        model.fit(data.X, data.y)
        states.append((clock.stop(), model.kernel_.theta))
        curve = []
        for spent, theta in _some(states):
            fixed = GaussianProcessRegressor(model.kernel_.clone_with_theta(theta), optimizer=None).fit(
                data.X, data.y
            )
            mean, deviation = fixed.predict(data.X_test, return_std=True)
            curve.append([spent, *gaussian_score(mean, deviation**2, data.y_test)])
    return curve, {"iterations": len(states) - 1}


def gpflow(
    data: Arrays, seconds: float, seed: int, python: str, model: str, inducing: int = 512
) -> tuple[Curve, dict[str, Any]]:
    """GPflow's SGPR or SVGP in its own environment (gpflow_peer.py)."""
    config = {"model": model, "inducing": inducing, "seconds": seconds, "seed": seed, "batch": 1024}
    with tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder, "data.npz"), Path(folder, "out.json")
        np.savez(before, **data._asdict(), config=np.array(json.dumps(config)))
        script = Path(__file__).with_name("gpflow_peer.py")
        environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
        done = subprocess.run(
            [python, str(script), str(before), str(after)], env=environment, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"GPflow's side failed:\n{done.stderr[-2000:]}")
        result = json.loads(after.read_text())
    return result["curve"], config | {"versions": result["versions"]}


def _some(states: list[Any], most: int = 20) -> list[Any]:
    """At most `most` of the states, evenly spread, the last always: scoring all takes too long."""
    keep = np.unique(np.linspace(0, len(states) - 1, most).round().astype(int))
    return [states[i] for i in keep]
