"""A small problem that server tests share: rows, their basis and the shards they are split into."""

import socket
import subprocess
import sys
import threading
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import uvicorn
from gpytorch.kernels import MaternKernel, ScaleKernel
from torch import Tensor

from fspace.inference.basis import Basis
from fspace.inference.likelihoods import BernoulliLikelihood, with_offset
from fspace.inference.optimise import gaussian_likelihood
from fspace.server import Limits, PosteriorServer, RemoteServer, Tokens, create_app
from fspace.server.http import KEEP_ALIVE


@dataclass
class Problem:
    basis: Basis
    x: Tensor
    y: Tensor

    def shard(self, k: int, of: int) -> tuple[Tensor, Tensor]:
        """Every `of`-th row, from the k-th."""
        return self.x[k::of], self.y[k::of]


def _kernel() -> ScaleKernel:
    kernel = ScaleKernel(MaternKernel(nu=2.5, ard_num_dims=2)).double()
    kernel.base_kernel.lengthscale = torch.tensor([[0.8, 1.2]])
    kernel.outputscale = 1.3
    return kernel.requires_grad_(False)


@pytest.fixture
def gaussian() -> Problem:
    """400 rows of two outputs with Gaussian noise, 30 inducing inputs."""
    torch.manual_seed(1)
    x = torch.randn(400, 2, dtype=torch.float64)
    y = torch.stack([torch.sin(2 * x[:, 0]), x[:, 1].tanh()], dim=1) + 0.2 * torch.randn(400, 2).double()
    likelihood = gaussian_likelihood(2, 0.04, torch.device("cpu"))
    likelihood.noise = torch.tensor([[0.04], [0.06]])
    return Problem(Basis(_kernel(), x[:30].clone(), likelihood.requires_grad_(False)), x, y)


@pytest.fixture
def binary() -> Problem:
    """480 rows of two classes, 25 inducing inputs."""
    torch.manual_seed(2)
    x = torch.randn(480, 2, dtype=torch.float64)
    f = 2 * torch.sin(2 * x[:, 0]) + x[:, 1]
    y = (torch.rand(480).double() < torch.special.ndtr(f)).double()[:, None]
    likelihood = with_offset(BernoulliLikelihood(), y).requires_grad_(False)
    return Problem(Basis(_kernel(), x[:25].clone(), likelihood), x, y)


@cache
def _why_no_ray() -> str | None:
    """Why Ray cannot run here at all, which is no fault of fspace; None where it can."""
    if find_spec("ray") is None:
        return "Ray is not installed"
    code = "import ray; ray.init(include_dashboard=False, log_to_driver=False); ray.shutdown()"
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180)
    except subprocess.TimeoutExpired:
        return "Ray does not start here within three minutes"
    return f"Ray does not start here: {done.stderr.strip()[-200:]}" if done.returncode else None


@pytest.fixture(autouse=True)
def _ray(request: pytest.FixtureRequest) -> None:
    """Skips tests of the Ray engine where Ray itself does not run."""
    about_ray = "ray" in request.node.name and request.node.get_closest_marker("slow")
    reason = _why_no_ray() if about_ray else None
    if reason is not None:
        pytest.skip(reason)


class Front:
    """A real uvicorn on a free port of 127.0.0.1, in a thread."""

    def __init__(self, server: PosteriorServer, limits: Limits | None = None, **options: str):
        self.server, self.tokens = server, Tokens()
        app = create_app(server, self.tokens, limits or Limits(rate=1e6, burst=10**6))
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self._listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._uvicorn = uvicorn.Server(
            uvicorn.Config(app, log_level="error", timeout_keep_alive=KEEP_ALIVE, **options)
        )
        self._thread = threading.Thread(target=self._uvicorn.run, kwargs={"sockets": [self._listener]})
        self._thread.start()
        kind = "https" if "ssl_certfile" in options else "http"
        self.url = f"{kind}://127.0.0.1:{self._listener.getsockname()[1]}"
        self.admin = self.tokens.issue(["read", "admin"])

    def token(self, site: str) -> str:
        """A worker's token."""
        return self.tokens.issue(["put", "read"], site)

    def client(self, site: str | None = None, **options: Any) -> RemoteServer:
        """A client with the token of a site, or an admin's."""
        return RemoteServer(self.url, self.admin if site is None else self.token(site), **options)

    def close(self) -> None:
        """End it."""
        self._uvicorn.should_exit = True
        self._thread.join()
        self._listener.close()


@pytest.fixture
def front():
    """Make a front for a server; all are ended after the test."""
    made = []

    def make(server: PosteriorServer, limits: Limits | None = None, **options: str) -> Front:
        made.append(Front(server, limits, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()
