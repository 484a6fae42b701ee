"""Acting on the uncertainty: expected utility, rejecting, active learning, bandits, Bayesian optimisation, control.

Everything is written on the contract of `fspace.posterior`, so that any model can drive it.
"""

from __future__ import annotations

from typing import Any

_WHERE = {
    "utility": ("CostMatrix", "Decision", "Linear", "Newsvendor", "best_action"),
    "risks": ("CVaR", "MeanVariance"),
    "information": ("InformationValue", "value_of_information"),
    "rejecting": (
        "Reject", "RiskCoverage", "conformal_threshold", "expected_loss", "risk_coverage",
        "selective_threshold",
    ),
    "active": ("Selection", "select"),
    "labelling": ("learning_curve",),
    "bandits": ("ArmPosterior", "Bandit", "linear_basis"),
    "bandit_problems": ("LinearProblem", "TableProblem", "Wheel", "simulate"),
    "gp_arms": ("GPArms",),
    "neural_linear": ("NeuralLinear",),
    "off_policy": ("PolicyValue", "off_policy_value"),
    "space": ("Space",),
    "models": ("named_model",),
    "optimisation": ("Optimizer",),
    "loop": ("optimize",),
    "latent": ("LatentOptimizer", "optimize_latent"),
    "control": ("ControlRun", "Pendulum", "learn_to_control"),
    "gym_tasks": ("GymCartPole", "GymPendulum"),
}  # fmt: skip
_FILE = {name: file for file, names in _WHERE.items() for name in names}
__all__ = sorted(_FILE)


def __getattr__(name: str) -> Any:
    """Public names are imported when first used."""
    from importlib import import_module

    if name in _FILE:
        return getattr(import_module(f"{__name__}.{_FILE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
