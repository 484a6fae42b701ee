"""Amortised inference: objectives that are pure functions of log-weights, their gradients, and particles."""

from __future__ import annotations

from typing import Any

_WHERE = {
    "bounds": ("elbo", "elbo_with_kl", "iwae", "miwae", "piwae", "ciwae", "renyi", "tvo"),
    "latent": ("LatentModel", "LogTerms", "Proposal", "log_terms", "log_weights"),
    "proposals": ("Bernoulli", "Categorical", "Chain", "DiagonalGaussian", "gumbel", "gumbel_max"),
    "gradients": ("Estimate", "backward", "dreg", "pathwise", "stl"),
    "score": ("reinforce", "reinforce_loo", "vimco", "wake_sleep", "wake_wake"),
    "control_variates": ("ControlEstimate", "Coupling", "couple_binary", "couple_categorical", "rebar", "relax"),
    "concrete": (
        "BinaryConcrete", "Concrete", "RelaxedAndHard", "exponential_temperature", "linear_temperature",
        "relaxed_log_weights", "straight_through",
    ),
    "sparse": ("sparse_elbo", "sparse_probabilities"),
    "evaluate": ("LogLikelihood", "log_likelihood"),
    "pareto": ("pareto_k",),
    "ais": ("AnnealedEvidence", "annealed_importance"),
    "smoothing": ("backward_simulation", "trajectories"),
    "model": ("AmortizedModel", "load"),
    "vae": ("VAE",),
    "semi_supervised": ("SemiSupervisedVAE",),
    "mixture_vae": ("MixtureVAE",),
    "draw": ("DRAW",),
    "vrnn": ("VRNN",),
    "causal": ("CausalVAE",),
    "switching": ("SwitchingLinear",),
    "gp_prior": ("GPPriorVAE",),
    "gp_state_space": ("GPStateSpace",),
    "vae_kernel": ("VAEKernelGP",),
    "topics": ("TopicsOverTime",),
}  # fmt: skip
_MODULES = ("resampling", "smc")  # whose names are read with the module's: smc.filter
_FILE = {name: file for file, names in _WHERE.items() for name in names}
__all__ = sorted([*_FILE, *_MODULES])


def __getattr__(name: str) -> Any:
    """Public names are imported when first used; `smc` and `resampling` are modules."""
    from importlib import import_module

    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name in _FILE:
        return getattr(import_module(f"{__name__}.{_FILE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
