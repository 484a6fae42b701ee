"""Models whose evidence and gradients are known: probabilistic PCA, and latents few enough to enumerate."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

from fspace.inference.amortized import Bernoulli, Categorical, DiagonalGaussian, iwae


class Ppca:
    """x = W z + noise, with orthogonal columns of W, so that the posterior of z is a diagonal Gaussian.

    The encoder is A x + b with standard deviations exp(log_std): the posterior's, moved by `off`.
    """

    def __init__(self, off=0.0, d=2, big=5, noise=0.5, seed=0, dtype=torch.float64, device="cpu"):
        g = torch.Generator().manual_seed(seed)
        basis, _ = torch.linalg.qr(torch.randn(big, d, generator=g, dtype=torch.float64))
        W = basis * torch.linspace(1.5, 0.7, d, dtype=torch.float64)
        self.noise = noise
        precision = 1 + W.square().sum(0) / noise**2
        A = (W / noise**2).T / precision[:, None]
        b = torch.zeros(d, dtype=torch.float64)
        log_std = -0.5 * precision.log()
        self.W, self.A, self.b, self.log_std = (
            p.to(dtype=dtype, device=device).requires_grad_() for p in (W, A + off, b - off, log_std + off)
        )
        self.decoder, self.encoder = [self.W], [self.A, self.b, self.log_std]

    def data(self, n, seed=1):
        g = torch.Generator().manual_seed(seed)
        z = torch.randn(n, self.W.shape[1], generator=g, dtype=torch.float64)
        e = torch.randn(n, self.W.shape[0], generator=g, dtype=torch.float64)
        return (z.to(self.W) @ self.W.detach().T + self.noise * e.to(self.W)).detach()

    def encode(self, x):
        mean = x @ self.A.T + self.b
        return DiagonalGaussian(mean, self.log_std.exp().expand_as(mean))

    def log_joint(self, x, z):
        fit = Normal(z @ self.W.T, self.noise, validate_args=False).log_prob(x)
        return fit.sum(-1) + Normal(torch.zeros_like(z), 1.0, validate_args=False).log_prob(z).sum(-1)

    def evidence(self, x):
        cov = self.W @ self.W.T + self.noise**2 * torch.eye(len(self.W), dtype=x.dtype, device=x.device)
        return MultivariateNormal(torch.zeros_like(x[0]), cov).log_prob(x)


class Enumerable:
    """One datum and a few discrete latents; its gradients by enumeration, and by R independent replicates.

    Bits: logits [n]. Categories: logits [n, c]. theta [p] are the decoder's parameters. Log p(x, b) is a smooth
    function of b, so that relaxed values may be put into it.
    """

    def __init__(self, kind):
        self.kind = kind
        f64 = torch.float64
        if kind == "binary":
            self.logits = torch.tensor([0.4, -0.9, 1.1], dtype=f64)
            self.states = torch.tensor(list(itertools.product([0.0, 1.0], repeat=3)), dtype=f64)
            self.proposal = Bernoulli
        else:
            self.logits = torch.tensor([[0.3, -0.5, 0.8], [-0.2, 0.6, 0.1]], dtype=f64)
            rows = torch.eye(3, dtype=f64)
            self.states = torch.stack([torch.stack(p) for p in itertools.product(rows, repeat=2)])
            self.proposal = Categorical
        p = self.states[0].numel()
        self.theta = torch.linspace(-1.2, 1.5, p, dtype=f64)

    def log_joint_with(self, theta, b):
        """theta [..., p] and b [..., latents] with the same leading axes, or broadcast."""
        flat = b.flatten(-self.logits.ndim)
        mean = (theta * flat).sum(-1) + 0.8 * flat[..., 0] * flat[..., -1]
        prior = (flat * math.log(0.4) + (1 - flat) * math.log(0.6)).sum(-1)
        return prior - 0.5 * ((1.3 - mean) / 0.6) ** 2

    def exact(self, K, objective=iwae):
        """Gradients of E objective(log-weights), in logits and theta."""
        logits, theta = self.logits.clone().requires_grad_(), self.theta.clone().requires_grad_()
        log_q = self.proposal(logits[None]).log_prob(self.states[:, None])[:, 0]
        log_w = self.log_joint_with(theta, self.states) - log_q
        tuples = torch.tensor(list(itertools.product(range(len(self.states)), repeat=K))).T
        chance = log_q[tuples].sum(0).exp()
        return torch.autograd.grad((chance * objective(log_w[tuples])).sum(), [logits, theta])

    def replicates(self, R):
        """A model of R copies of the datum, each with parameters of its own."""
        logits = self.logits.expand(R, *self.logits.shape).clone().requires_grad_()
        theta = self.theta.expand(R, -1).clone().requires_grad_()
        model = SimpleNamespace(
            encode=lambda x: self.proposal(logits),
            log_joint=lambda x, b: self.log_joint_with(theta, b),
            logits=logits,
            theta=theta,
            x=torch.zeros(R, 1, dtype=torch.float64),
        )
        return model


def z_scores(replicates, truth):
    """How many standard errors the mean of replicates [R, ...] lies from the truth."""
    error = replicates.std(0) / math.sqrt(len(replicates))
    return (replicates.mean(0) - truth) / error


@pytest.fixture
def ppca():
    return Ppca


@pytest.fixture(params=["binary", "categorical"])
def enumerable(request):
    return Enumerable(request.param)


@pytest.fixture
def scores():
    return z_scores
