"""Posteriors over the weights of a network by other libraries, as their own pages do it. Used by network_times.py."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from fspace.inference.weights.problem import Problem


def module_of(problem: Problem, weights: Tensor | None = None) -> nn.Module:
    """The problem's network as a module of its own, with these weights."""
    module = copy.deepcopy(problem.network.module).requires_grad_(True)
    if weights is not None:
        nn.utils.vector_to_parameters(weights.clone(), module.parameters())
    return module


def _noise(problem: Problem) -> float:
    return problem.likelihood.log_noise(torch.zeros(1, 0)).exp().item()  # type: ignore[attr-defined]


def mode_by_torch(problem: Problem, start: Tensor) -> Tensor:
    """A plain loop: Adam with a one-cycle step size on minus the log joint density a row."""
    module, noise = module_of(problem, start), _noise(problem)
    loader = DataLoader(TensorDataset(problem.x, problem.y), problem.batch_size, shuffle=True, drop_last=True)
    optimiser = torch.optim.Adam(module.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-2, total_steps=problem.epochs * len(loader))
    for _ in range(problem.epochs):
        for x, y in loader:
            optimiser.zero_grad()
            decay = sum(p.square().sum() for p in module.parameters()) / (2 * problem.n)
            loss = nn.functional.mse_loss(module(x), y) / (2 * noise) + decay
            loss.backward()
            optimiser.step()
            schedule.step()
    return nn.utils.parameters_to_vector(module.parameters()).detach()


def laplace_torch(
    problem: Problem, weights: Tensor, x_test: Tensor, structure: str, layers: str, noise: float
) -> tuple[Tensor, Tensor]:
    """laplace-torch at these weights, all rows in one batch: mean and variance of f at the test rows."""
    import laplace

    found = laplace.Laplace(
        module_of(problem, weights),
        "regression",
        subset_of_weights={"all": "all", "last": "last_layer"}[layers],
        hessian_structure={"full": "full", "kronecker": "kron"}[structure],
        prior_precision=1.0,
        sigma_noise=math.sqrt(noise),
    )
    found.fit(DataLoader(TensorDataset(problem.x, problem.y), batch_size=problem.n))
    mean, variance = found(x_test)
    return mean[:, 0].detach(), variance[:, 0, 0].detach()


def _log_posterior(problem: Problem) -> Any:
    """What posteriors asks for: the log posterior a row and something beside it."""
    module, noise = module_of(problem), _noise(problem)

    def log_posterior(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, y = batch
        f = functional_call(module, params, (x,))
        likelihood = -0.5 * (y - f).square().mean() / noise
        prior = sum(-0.5 * p.square().sum() for p in params.values())
        return likelihood + prior / problem.n, torch.tensor([])

    return log_posterior


def _flat(params: dict[str, Tensor]) -> Tensor:
    return torch.cat([p.detach().flatten() for p in params.values()])


def vi_of_posteriors(problem: Problem, seed: int) -> Tensor:
    """vi.diag from the same start: 128 draws of the weights."""
    import posteriors
    import torchopt

    torch.manual_seed(seed)
    transform = posteriors.vi.diag.build(
        _log_posterior(problem), torchopt.adam(lr=1e-2), temperature=1 / problem.n, init_log_sds=math.log(0.1)
    )
    params = {k: v.clone() for k, v in problem.network.parameters(problem.start(1)[0]).items()}
    state = transform.init(params)
    loader = DataLoader(TensorDataset(problem.x, problem.y), problem.batch_size, shuffle=True, drop_last=True)
    for _ in range(problem.epochs):
        for batch in loader:
            state, _ = transform.update(state, batch)
    return torch.stack([_flat(posteriors.vi.diag.sample(state)) for _ in range(128)])


def langevin_of_posteriors(
    problem: Problem,
    starts: Tensor,
    kind: str,
    share: float,
    stiffness: float,
    burn: int,
    steps: int,
    thinning: int,
    seed: int,
) -> Tensor:
    """sgmcmc.sgld or .sghmc with all rows in a step, a chain after the other: kept weights [c, n, p].

    share, stiffness: the step is half of this share of that which is just stable in the stiffest direction of the log
    posterior of all rows; posteriors' is n times smaller and its temperature 1 / n. Its steps of SGHMC are explicit,
    stable only below friction / frequency^2: the friction is the highest frequency, which allows the longest."""
    import posteriors

    torch.manual_seed(seed)
    n = problem.n
    if kind == "sgld":
        transform = posteriors.sgmcmc.sgld.build(
            _log_posterior(problem), lr=share * n / stiffness, temperature=1 / n
        )
    else:
        frequency = math.sqrt(stiffness / n)
        transform = posteriors.sgmcmc.sghmc.build(
            _log_posterior(problem), lr=0.5 * share / frequency, alpha=frequency, temperature=1 / n
        )
    batch = (problem.x, problem.y)
    chains = []
    for start in starts:
        state = transform.init({k: v.clone() for k, v in problem.network.parameters(start).items()})
        kept = []
        for step in range(burn + steps):
            state, _ = transform.update(state, batch)
            if step >= burn and (step - burn + 1) % thinning == 0:
                kept.append(_flat(state.params))
        chains.append(torch.stack(kept))
    return torch.stack(chains)


def _pyro_model(problem: Problem) -> Any:
    """Weights from N(0, 1), the network, noise that is known."""
    import pyro
    import pyro.distributions as dist

    module, deviation = module_of(problem), math.sqrt(_noise(problem))
    shapes = problem.network.shapes

    def model(x: Tensor, y: Tensor) -> None:
        params = {
            name: pyro.sample(
                name.replace(".", "_"), dist.Normal(torch.zeros(shape), 1.0).to_event(len(shape))
            )
            for name, shape in shapes.items()
        }
        f = functional_call(module, params, (x,))
        with pyro.plate("rows", problem.n, subsample_size=len(x)):
            pyro.sample("y", dist.Normal(f[:, 0], deviation), obs=y[:, 0])

    return model


def autonormal(problem: Problem, seed: int) -> Tensor:
    """SVI with AutoNormal, from the same start: 128 draws of the weights."""
    import pyro
    from pyro.infer import SVI, Trace_ELBO
    from pyro.infer.autoguide import AutoNormal, init_to_value
    from pyro.optim import Adam  # type: ignore[attr-defined]  # made when pyro is imported

    pyro.set_rng_seed(seed)
    pyro.clear_param_store()
    model = _pyro_model(problem)
    start = problem.network.parameters(problem.start(1)[0])
    values = {name.replace(".", "_"): value.clone() for name, value in start.items()}
    guide = AutoNormal(model, init_loc_fn=init_to_value(values=values), init_scale=0.1)
    svi = SVI(model, guide, Adam({"lr": 1e-2}), Trace_ELBO())
    loader = DataLoader(TensorDataset(problem.x, problem.y), problem.batch_size, shuffle=True, drop_last=True)
    for _ in range(problem.epochs):
        for x, y in loader:
            svi.step(x, y)
    draws = []
    for _ in range(128):
        sample = guide(problem.x, problem.y)
        draws.append(torch.cat([sample[name].detach().flatten() for name in values]))
    pyro.clear_param_store()
    return torch.stack(draws)


def nuts_of_pyro(
    problem: Problem, seed: int, draws: int, warmup: int, chains: int, max_tree_depth: int
) -> Tensor:
    """NUTS on the model, a chain after the other from the same starts: weights [c, n, p]."""
    import pyro
    from pyro.infer import MCMC, NUTS

    pyro.set_rng_seed(seed)
    found = []
    for start in problem.start(chains):
        values = {k.replace(".", "_"): v.clone() for k, v in problem.network.parameters(start).items()}
        runs = MCMC(
            NUTS(_pyro_model(problem), max_tree_depth=max_tree_depth),
            num_samples=draws,
            warmup_steps=warmup,
            initial_params=values,
            disable_progbar=True,
        )
        runs.run(problem.x, problem.y)
        samples = runs.get_samples()
        found.append(torch.cat([samples[name].flatten(1) for name in values], dim=1))
    return torch.stack(found)
