"""Extractors: distances survive, nothing looks ahead, any image size, ragged sequences."""

import json

import pytest
import torch
from torch import Tensor, nn

from fspace.errors import DataError, OptionError
from fspace.kernels import MLP, CausalConv, ConvNet, ResidualMLP


def fit(network: nn.Module, x: Tensor, y: Tensor, steps: int = 300) -> None:
    """Least squares under a throw-away head, with no mercy for features the target does not need."""
    head = nn.Linear(network.out_features, 1)
    optimizer = torch.optim.Adam([*network.parameters(), *head.parameters()], lr=0.02)
    network.train()
    for _ in range(steps):
        optimizer.zero_grad()
        (head(network(x)).squeeze(-1) - y).square().mean().backward()
        optimizer.step()
    network.eval()


@pytest.mark.parametrize(
    ("extractor", "row"),
    [
        (MLP(5, hidden=(7,), out_features=3, activation="tanh"), (5,)),
        (MLP(5, hidden=(), out_features=3), (5,)),
        (ResidualMLP(5, width=6, depth=2, spectral_norm=0.8), (5,)),
        (ResidualMLP(9, width=6, depth=2, out_features=3, activation="elu"), (9,)),
        (ConvNet(2, channels=(4, 8), out_features=3, activation="gelu"), (2, 8, 8)),
        (CausalConv(2, channels=4, dilations=(1, 3), out_features=3), (7, 2)),
    ],
)
def test_config_rebuilds_it(extractor, row):
    again = type(extractor)(**json.loads(json.dumps(extractor.config)))
    again.load_state_dict(extractor.state_dict())
    x = torch.randn(4, *row)
    assert extractor.input_dims == len(row)
    features = extractor.eval()(x)
    assert features.shape == (4, extractor.out_features)
    torch.testing.assert_close(again.eval()(x), features, rtol=0, atol=0)


def test_tables_in_batches():
    x = torch.randn(2, 3, 5)
    for network in (MLP(5), ResidualMLP(5)):
        network.eval()
        torch.testing.assert_close(network(x)[1], network(x[1]))


def branch_norms(network: ResidualMLP) -> list[float]:
    return [torch.linalg.matrix_norm(block.normalized_weight(), 2).item() for block in network.blocks]


def test_spectral_norms_stay_below_the_coefficient():
    x = torch.randn(200, 3)
    y = 5.0 * torch.sin(3 * x[:, 0])
    network = ResidualMLP(3, width=16, depth=3, spectral_norm=0.7)
    fit(network, x, y)
    free = [torch.linalg.matrix_norm(block.weight, 2).item() for block in network.blocks]
    assert max(free) > 0.8  # the twin: without the normalisation the bound is broken
    assert max(branch_norms(network)) <= 0.7 * 1.001

    # and it is soft: what is below the coefficient is left alone
    block = network.blocks[0]
    with torch.no_grad():
        block.weight.mul_(0.1 / free[0])
    block.power_iteration(50)
    torch.testing.assert_close(block.normalized_weight(), block.weight)


@pytest.mark.parametrize("activation", ["relu", "tanh", "elu", "silu", "gelu", "softplus"])
def test_every_branch_is_a_contraction(activation):
    network = ResidualMLP(4, width=8, depth=1, spectral_norm=0.9, activation=activation).double().eval()
    with torch.no_grad():
        network.blocks[0].weight.mul_(30)
    network.blocks[0].power_iteration(200)
    points = torch.randn(2000, 8, dtype=torch.float64) * 3
    jacobians = torch.func.vmap(torch.func.jacrev(lambda h: network.branch(0, h)))(points)
    norms = torch.linalg.matrix_norm(jacobians, 2)
    assert (
        0.5 < norms.max() <= 0.9 * (1 + 1e-6)
    )  # tight as well, so the constants of the activations are right


def distance_ratios(network: nn.Module, x: Tensor, direction: int) -> Tensor:
    """How much a unit step along one input moves the features."""
    step = torch.zeros(x.shape[-1])
    step[direction] = 1.0
    with torch.no_grad():
        return (network(x + step) - network(x)).norm(dim=-1)


def test_distances_survive_training_where_those_of_a_plain_network_collapse():
    x = torch.randn(300, 2)
    y = torch.tanh(4 * x[:, 0])  # the second input is of no use to the target
    coeff, depth = 0.5, 3
    residual = ResidualMLP(2, width=32, depth=depth, spectral_norm=coeff)
    plain = MLP(2, hidden=(32, 32), out_features=32)
    for network in (residual, plain):
        fit(network, x, y, steps=600)
    kept = distance_ratios(residual, x, 1)
    low, high = (1 - coeff) ** depth, (1 + coeff) ** depth
    assert kept.min() >= low * 0.999 and kept.max() <= high * 1.001
    # relative to the useful direction, too
    assert (kept.mean() / distance_ratios(residual, x, 0).mean()) > 0.3
    # the twin
    lost = distance_ratios(plain, x, 1).mean() / distance_ratios(plain, x, 0).mean()
    assert lost < 0.1


def test_the_input_map_is_an_isometry_that_training_leaves_alone():
    network = ResidualMLP(5, width=12)
    torch.testing.assert_close(network.isometry.T @ network.isometry, torch.eye(5), rtol=0, atol=1e-5)
    assert "isometry" in network.state_dict() and "isometry" not in dict(network.named_parameters())


def test_evaluation_is_a_fixed_function_and_two_passes_before_one_backward_work():
    network = ResidualMLP(3, width=8, depth=2)
    x = torch.randn(6, 3)
    network.train()
    (network(x).sum() + network(2 * x).sum()).backward()  # power iteration must not spoil the first graph
    network.eval()
    torch.testing.assert_close(network(x), network(x), rtol=0, atol=0)
    loaded = ResidualMLP(3, width=8, depth=2)
    loaded.load_state_dict(network.state_dict())
    torch.testing.assert_close(loaded.eval()(x), network(x), rtol=0, atol=0)


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (8, 8), (28, 28), (33, 2)])
def test_images_of_any_size(size):
    network = ConvNet(3, channels=(4, 4, 8), out_features=5)
    x = torch.randn(2, 3, *size, requires_grad=True)
    features = network(x)
    assert features.shape == (2, 5)
    features.sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0


def test_image_shapes_that_do_not_fit():
    with pytest.raises(DataError, match=r"\(4, 8, 8\).*\[n, 3, h, w\]"):
        ConvNet(3)(torch.randn(4, 8, 8))
    with pytest.raises(DataError, match=r"\[n, 3, h, w\]"):
        ConvNet(3)(torch.randn(4, 1, 8, 8))


@pytest.mark.parametrize(("kernel_size", "dilations"), [(2, (1, 2, 4)), (3, (1, 3)), (1, (1,))])
def test_nothing_looks_ahead_and_memory_ends_where_stated(kernel_size, dilations):
    network = CausalConv(2, channels=6, dilations=dilations, kernel_size=kernel_size).double()
    t, s = 24, 15
    x = torch.randn(3, t, 2, dtype=torch.float64)
    before = network.steps(x)

    future = x.clone()
    future[:, s + 1 :] += torch.randn(3, t - s - 1, 2)
    after = network.steps(future)
    torch.testing.assert_close(after[:, : s + 1], before[:, : s + 1], rtol=0, atol=1e-13)
    assert (after[:, s + 1 :] - before[:, s + 1 :]).abs().amax(
        -1
    ).min() > 0  # the twin: those steps do change

    gradient = torch.zeros(t)
    inputs = x.clone().requires_grad_()
    network.steps(inputs)[:, s].sum().backward()
    gradient = inputs.grad.abs().sum((0, 2))
    seen = gradient.nonzero().flatten()
    assert seen.max() == s and seen.min() == s - network.receptive_field + 1


def test_ragged_sequences():
    network = CausalConv(2, channels=6).eval()
    x = torch.randn(3, 10, 2)
    lengths = torch.tensor([10, 4, 1])
    alone = torch.cat([network(x[i : i + 1, :length]) for i, length in enumerate(lengths.tolist())])
    torch.testing.assert_close(network(x, lengths), alone)  # whatever stands in the padding
    padded = x.clone()
    for i, length in enumerate(lengths.tolist()):
        padded[i, length:] = torch.nan
    torch.testing.assert_close(network(padded), alone)
    torch.testing.assert_close(network(padded, lengths), alone)
    assert not torch.allclose(network(x), alone)  # the twin: padding read as data

    padded = padded.requires_grad_()
    network(padded).sum().backward()
    assert padded.grad.isfinite().all()


def test_sequences_that_do_not_fit():
    network = CausalConv(2)
    x = torch.randn(3, 6, 2)
    hole = x.clone()
    hole[1, 2, 0] = torch.nan
    empty = x.clone()
    empty[2] = torch.nan
    for bad, row in ((hole, 1), (empty, 2)):
        with pytest.raises(DataError, match=f"sequence {row}"):
            network(bad)
    with pytest.raises(DataError, match="sequence 0"):
        network(x, torch.tensor([0, 6, 6]))
    with pytest.raises(DataError, match="at most 6"):
        network(x, torch.tensor([7, 6, 6]))
    with pytest.raises(DataError, match=r"\[n, t, 2\]"):
        network(x[..., :1])


@pytest.mark.parametrize(
    "make",
    [
        lambda: MLP(0),
        lambda: MLP(3, hidden=(0,)),
        lambda: MLP(3, activation="sine"),
        lambda: ResidualMLP(3, depth=0),
        lambda: ResidualMLP(3, spectral_norm=0.0),
        lambda: ConvNet(1, channels=()),
        lambda: ConvNet(1, kernel_size=4),
        lambda: CausalConv(2, dilations=()),
    ],
)
def test_options_that_do_not_fit(make):
    with pytest.raises(OptionError):
        make()
