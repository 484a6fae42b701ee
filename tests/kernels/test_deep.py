"""Deep kernels: one embedding, float64 behind it, statistics that stay put, any part of gpytorch or torch."""

import copy
import inspect

import gpytorch
import pytest
import torch
from gpytorch.kernels import (
    AdditiveKernel,
    Kernel,
    LinearKernel,
    MaternKernel,
    PeriodicKernel,
    ProductKernel,
    RBFKernel,
    RQKernel,
    ScaleKernel,
)
from torch import nn

from fspace.errors import DataError, OptionError
from fspace.kernels import (
    MLP,
    CausalConv,
    ConvNet,
    DeepKernel,
    FeatureNorm,
    NeuralKernel,
    ResidualMLP,
    embed,
    embedded_kernel,
)


def table(n: int = 12, d: int = 3) -> torch.Tensor:
    return torch.randn(n, d, dtype=torch.float64)


def make(plain: bool = True, **options) -> DeepKernel:
    on_inputs = ScaleKernel(MaternKernel(2.5, ard_num_dims=3)) if plain else None
    return DeepKernel(MLP(3, (16,), 4), ScaleKernel(MaternKernel(2.5, ard_num_dims=4)), on_inputs, **options)


BASES = {
    "rbf": lambda: ScaleKernel(RBFKernel(ard_num_dims=4)),
    "sum": lambda: ScaleKernel(RBFKernel()) + LinearKernel(),
    "product": lambda: RQKernel() * PeriodicKernel(),
    "some columns": lambda: ScaleKernel(RBFKernel(active_dims=(1, 3), ard_num_dims=2)),
    "neural": lambda: NeuralKernel(2, ard_num_dims=4),
}
PLAINS = {
    "none": lambda: None,
    "matern": lambda: ScaleKernel(MaternKernel(1.5, ard_num_dims=3)),
    "one column": lambda: LinearKernel(active_dims=(2,)),
    "neural": lambda: NeuralKernel(1, "erf"),
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("plain", PLAINS)
def test_embedding_then_kernel_is_the_kernel(base, plain):
    kernel = DeepKernel(MLP(3, (16,), 4), BASES[base](), PLAINS[plain]()).eval()
    x1, x2 = table(8), table(5)
    kernel.fix_statistics(x1)
    z1, z2 = embed(kernel, x1), embed(kernel, x2)
    assert z1.dtype is torch.float64 and z1.shape == (8, 4 if plain == "none" else 7)
    whole = kernel(x1, x2).to_dense()
    assert whole.dtype is torch.float64 and whole.shape == (8, 5)
    torch.testing.assert_close(embedded_kernel(kernel)(z1, z2).to_dense(), whole)
    torch.testing.assert_close(kernel(x1, diag=True), kernel(x1).to_dense().diagonal(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(embedded_kernel(kernel)(z1, diag=True), kernel(x1, diag=True))
    assert torch.linalg.eigvalsh(kernel(x1).to_dense())[0] > -1e-9


def test_it_is_base_on_features_plus_plain_on_inputs():
    kernel = make().eval()
    x1, x2 = table(8), table(5)
    kernel.fix_statistics(x1)
    with torch.no_grad():
        raw = [kernel.extractor(x.float()).double() for x in (x1, x2)]
        mean, std = raw[0].mean(0), raw[0].std(0, unbiased=False)
        z1, z2 = ((r - mean) / std for r in raw)
        by_hand = kernel.base(z1, z2).to_dense() + kernel.plain(x1, x2).to_dense()
        torch.testing.assert_close(kernel(x1, x2).to_dense(), by_hand, rtol=1e-5, atol=1e-5)


def test_other_kernels_pass_through():
    kernel = RBFKernel()
    x = torch.arange(6, dtype=torch.int64).reshape(3, 2)
    assert embedded_kernel(kernel) is kernel
    torch.testing.assert_close(embed(kernel, x), x.double())


def test_active_dims_select_before_the_network():
    whole, part = make(), make(active_dims=(0, 2, 4))
    part.load_state_dict(whole.state_dict() | {"active_dims": part.active_dims})
    x = table(7, 5)
    whole.eval(), part.eval()
    torch.testing.assert_close(part(x).to_dense(), whole(x[:, [0, 2, 4]]).to_dense())
    torch.testing.assert_close(part.embed(x), whole.embed(x[:, [0, 2, 4]]))


def test_batches_of_tables_also_through_modules_with_one_batch_dimension():
    foreign = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4))
    for kernel in (make(), DeepKernel(foreign, RBFKernel(), input_dims=1)):
        x = torch.randn(2, 5, 6, 3, dtype=torch.float64)
        kernel(x)  # the foreign module's first batch
        kernel.eval()
        full = kernel(x).to_dense()
        assert full.shape == (2, 5, 6, 6)
        torch.testing.assert_close(full[1, 2], kernel(x[1, 2]).to_dense())
        assert kernel(x, diag=True).shape == (2, 5, 6)


def test_kernels_with_a_batch_shape_and_expand_batch():
    base = ScaleKernel(RBFKernel(batch_shape=torch.Size([2])), batch_shape=torch.Size([2]))
    base.base_kernel.lengthscale = torch.tensor([0.5, 2.0]).view(2, 1, 1)
    kernel = DeepKernel(MLP(3), base).eval()
    x = table(6)
    assert kernel.batch_shape == (2,) and kernel(x.expand(2, 6, 3)).to_dense().shape == (2, 6, 6)

    single = make().eval()
    three = single.expand_batch(torch.Size([3]))
    values = three(x.expand(3, 6, 3)).to_dense()
    torch.testing.assert_close(values[2], single(x).to_dense())
    assert three.batch_shape == (3,) and set(three.state_dict()) == set(single.state_dict())
    torch.testing.assert_close(three[1](x).to_dense(), single(x).to_dense())


# -- float64 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_network_keeps_its_dtype_and_the_kernel_works_in_float64(dtype):
    kernel = make().eval()
    kernel.extractor.to(dtype)
    seen: list[torch.dtype] = []
    kernel.extractor.register_forward_hook(lambda *args: seen.append(args[-1].dtype))
    kernel.base.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    x = table()
    assert kernel(x).to_dense().dtype is torch.float64
    assert set(seen) <= {dtype, torch.float64} and seen[0] is dtype
    assert kernel.embed(x).dtype is torch.float64
    assert kernel.dtype is torch.float64
    assert kernel(x.float()).to_dense().dtype is torch.float32  # what gpytorch expects of float32 inputs


def test_float64_features_factorise_where_float32_ones_do_not():
    kernel = DeepKernel(MLP(2, (32,), 2), RBFKernel()).eval()
    x = table(512, 2)
    kernel.fix_statistics(x)
    z = kernel.embed(x)
    with torch.no_grad():
        matrix = embedded_kernel(kernel)(z).to_dense()
        assert torch.linalg.cholesky_ex(matrix + 1e-8 * torch.eye(512)).info == 0
        # the twin: the same features, kernel in float32, factorised in float64
        single = copy.deepcopy(kernel.base).float()(z.float()).to_dense().double()
        assert torch.linalg.cholesky_ex(single + 1e-8 * torch.eye(512)).info > 0


# -- statistics ---------------------------------------------------------------------------------------


def test_statistics_are_exact_fixed_in_evaluation_and_do_not_clamp():
    kernel = make(plain=False)
    x = table(500)
    kernel.fix_statistics(x, chunk=77)
    kernel.eval()
    z = kernel.embed(x)
    torch.testing.assert_close(z.mean(0), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        z.std(0, unbiased=False), torch.ones(4, dtype=torch.float64), rtol=1e-4, atol=0
    )

    alone = kernel.embed(x[:1])  # a batch of one: what a row becomes does not depend on its company
    torch.testing.assert_close(alone, z[:1], rtol=1e-4, atol=1e-5)
    before = copy.deepcopy(kernel.norm.state_dict())
    far = kernel.embed(1e4 * x)
    assert far.abs().max() > 100 * z.abs().max()
    assert kernel(x[:1], 1e4 * x[:1]).to_dense().abs().max() < 1e-6
    for name, value in kernel.norm.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_training_follows_the_features_by_momentum():
    norm = FeatureNorm(2, momentum=0.25)
    first, second = torch.randn(50, 2) + 3, 5 * torch.randn(50, 2)
    norm.update(first)
    torch.testing.assert_close(norm.mean, first.double().mean(0))
    norm.update(second)
    torch.testing.assert_close(norm.mean, 0.75 * first.double().mean(0) + 0.25 * second.double().mean(0))
    expected = 0.75 * first.double().var(0, unbiased=False) + 0.25 * second.double().var(0, unbiased=False)
    torch.testing.assert_close(norm.var, expected)
    before = norm.var.clone()
    norm.update(torch.randn(1, 2))  # one row has no spread
    torch.testing.assert_close(norm.var, before, rtol=0, atol=0)


def test_both_sides_of_a_training_batch_see_the_same_statistics():
    kernel = make()
    x = table(10)
    kernel.train()
    square = kernel(x, x.clone()[:4]).to_dense()
    torch.testing.assert_close(square[:4], square[:4].mT)


def test_a_dead_feature_stays_harmless():
    class Dead(nn.Module):
        out_features = 2

        def forward(self, x):
            return torch.stack([x[:, 0], 7.0 + 0.0 * x[:, 0]], dim=-1)

    kernel = DeepKernel(Dead(), RBFKernel(), input_dims=1).eval()
    x = table(50)
    kernel.fix_statistics(x)
    z = kernel.embed(x)
    assert z.isfinite().all() and z[:, 1].abs().max() < 1e-6


# -- parts --------------------------------------------------------------------------------------------


def test_images_and_sequences():
    images, sequences = torch.randn(5, 1, 8, 8), torch.randn(5, 9, 2)
    for extractor, x in ((ConvNet(1, out_features=6), images), (CausalConv(2, out_features=6), sequences)):
        kernel = DeepKernel(extractor, RBFKernel()).eval()
        kernel.fix_statistics(x)
        assert kernel.embed(x).shape == (5, 6)
        stacked = kernel.embed(torch.stack([x, 2 * x]))
        torch.testing.assert_close(stacked[0], kernel.embed(x))
        with pytest.raises(OptionError, match="plain"):
            DeepKernel(extractor, RBFKernel(), RBFKernel())
        with pytest.raises(DataError, match="rows first"):
            kernel.embed(x[0])


def test_any_module_as_extractor_learns_its_width_from_data_or_file():
    def foreign() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5))

    kernel = DeepKernel(foreign(), RBFKernel())
    x = torch.randn(6, 1, 8, 8)
    assert kernel.num_features is None
    assert kernel.embed(x).shape == (6, 5)
    assert kernel.num_features == 5
    kernel.eval()
    again = DeepKernel(foreign(), RBFKernel())
    again.load_state_dict(kernel.state_dict())
    assert again.num_features == 5
    torch.testing.assert_close(again.eval().embed(x), kernel.embed(x))

    undecided = DeepKernel(nn.Sequential(nn.Linear(3, 4)), RBFKernel(), RBFKernel())
    with pytest.raises(OptionError, match="num_features="):
        _ = undecided.on_embedding
    assert DeepKernel(nn.Linear(3, 4), RBFKernel(), RBFKernel()).on_embedding.split == 4


def test_refusals():
    unchecked = inspect.unwrap(DeepKernel.__init__)  # outside of tests nothing checks the annotations
    with pytest.raises(OptionError, match=r"torch\.nn\.Module"):
        unchecked(DeepKernel.__new__(DeepKernel), lambda x: x, RBFKernel())
    with pytest.raises(OptionError, match=r"base.*gpytorch"):
        unchecked(DeepKernel.__new__(DeepKernel), MLP(3), nn.Linear(2, 2))
    with pytest.raises(OptionError, match="last_dim_is_batch"):
        make().forward(table(), table(), last_dim_is_batch=True)


@pytest.mark.parametrize("extractor", [lambda: MLP(3), lambda: ResidualMLP(3, 16, 2)])
def test_state_dict_round_trip_and_deepcopy(extractor):
    def fresh() -> DeepKernel:
        return DeepKernel(extractor(), ScaleKernel(RBFKernel()), MaternKernel(ard_num_dims=3))

    kernel, x = fresh(), table()
    kernel.base.base_kernel.lengthscale = 0.3
    kernel.embed(x)
    kernel.eval()
    other = fresh().eval()
    other.load_state_dict(kernel.state_dict())
    copied = copy.deepcopy(kernel)
    for twin in (other, copied):
        torch.testing.assert_close(twin(x).to_dense(), kernel(x).to_dense(), rtol=0, atol=0)
    with torch.no_grad():
        copied.base.outputscale = 5.0
    assert kernel.base.outputscale.item() != pytest.approx(5.0)
    assert len(kernel.state_dict()) == len(
        {t.data_ptr() for t in kernel.state_dict().values()}
    )  # nothing twice


def test_gradients_reach_every_part():
    kernel = make()
    x = table(20).requires_grad_()
    kernel(x, table(7)).to_dense().square().sum().backward()
    for name, parameter in kernel.named_parameters():
        if name != "extractor.layers.1.bias":  # a shift of all features changes no distance
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert x.grad is not None and x.grad.isfinite().all() and x.grad.abs().sum() > 0


def test_gradient_to_inputs_against_finite_differences():
    kernel = make().eval()
    kernel.extractor.double()
    kernel.fix_statistics(table(50))
    x1, x2 = table(3).requires_grad_(), table(2).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: kernel(a, b).to_dense(), (x1, x2))


# -- in gpytorch --------------------------------------------------------------------------------------


class ExactModel(gpytorch.models.ExactGP):
    def __init__(self, x, y, likelihood, kernel):
        super().__init__(x, y, likelihood)
        self.mean_module = gpytorch.means.ZeroMean()
        self.covar_module = kernel

    def forward(self, x):
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "wrap", [lambda k: k, ScaleKernel, lambda k: AdditiveKernel(k, ScaleKernel(LinearKernel()))]
)
def test_in_a_stock_exact_gp(dtype, wrap):
    x = table(80).to(dtype)
    y = torch.sin(3 * x[:, 0]) + 0.05 * torch.randn(80, dtype=dtype)
    likelihood = gpytorch.likelihoods.GaussianLikelihood().to(dtype)
    model = ExactModel(x, y, likelihood, wrap(make()))
    mll = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    losses = []
    model.train(), likelihood.train()
    for _ in range(60):
        optimizer.zero_grad()
        loss = -mll(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    model.eval(), likelihood.eval()
    with torch.no_grad():
        prediction = likelihood(model(x))
    assert prediction.mean.dtype is dtype
    assert (prediction.mean - y).square().mean().sqrt() < 0.5 * y.std()

    if dtype is torch.float64 and isinstance(model.covar_module, DeepKernel):
        # the same posterior by the textbook formula on the embedding
        new = table(5)
        with torch.no_grad():
            on, z, z_new = (
                embedded_kernel(model.covar_module),
                model.covar_module.embed(x),
                model.covar_module.embed(new),
            )
            gram = on(z).to_dense() + likelihood.noise * torch.eye(80)
            mean = on(z_new, z).to_dense() @ torch.linalg.solve(gram, y)
            torch.testing.assert_close(model(new).mean, mean, rtol=1e-4, atol=1e-5)


def test_parts_of_products():
    kernel: Kernel = ProductKernel(make(), RBFKernel().double()).eval()
    x = table(6)
    assert kernel(x).to_dense().shape == (6, 6)
