"""Kernels through JSON and back: the same values, constraints, priors and dtypes; clear refusals otherwise."""

import json

import gpytorch
import pytest
import torch
from gpytorch.constraints import GreaterThan, Interval, LessThan, Positive
from gpytorch.kernels import (
    AdditiveKernel,
    ConstantKernel,
    CosineKernel,
    CylindricalKernel,
    HammingIMQKernel,
    Kernel,
    LinearKernel,
    MaternKernel,
    MultitaskKernel,
    PeriodicKernel,
    PiecewisePolynomialKernel,
    PolynomialKernel,
    ProductKernel,
    RBFKernel,
    RFFKernel,
    RQKernel,
    ScaleKernel,
    SpectralMixtureKernel,
)
from gpytorch.priors import (
    GammaPrior,
    HalfCauchyPrior,
    HalfNormalPrior,
    LogNormalPrior,
    NormalPrior,
    UniformPrior,
)
from safetensors.torch import load, save
from torch import nn

from fspace.errors import ModelFileError
from fspace.kernels import (
    MLP,
    CausalConv,
    ConvNet,
    DeepKernel,
    NeuralKernel,
    ResidualMLP,
    kernel_from_spec,
    kernel_to_spec,
)

D = 4
TWO = torch.Size([2])


def shake(kernel: Kernel) -> Kernel:
    """Move every parameter off its initial value."""
    with torch.no_grad():
        for parameter in kernel.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return kernel


def through_json(kernel: Kernel, modules=None) -> Kernel:
    """What saving and loading do: JSON for the structure, safetensors for the parameters."""
    spec = json.loads(json.dumps(kernel_to_spec(kernel), allow_nan=False))
    again = kernel_from_spec(spec, modules)
    again.load_state_dict(load(save({k: v.clone() for k, v in kernel.state_dict().items()})), strict=True)
    return again.train(kernel.training)


def assert_same(again: Kernel, kernel: Kernel) -> None:
    state, expected = again.state_dict(), kernel.state_dict()
    assert list(state) == list(expected)
    for name, value in expected.items():
        assert state[name].dtype is value.dtype, name
        torch.testing.assert_close(state[name], value, rtol=0, atol=0)
    assert str(again) == str(kernel)
    assert again.batch_shape == kernel.batch_shape
    assert kernel_to_spec(again) == kernel_to_spec(kernel)


TABLES = {
    "rbf": lambda: RBFKernel(),
    "rbf ard": lambda: RBFKernel(ard_num_dims=D),
    "matern": lambda: MaternKernel(nu=0.5, ard_num_dims=D),
    "rq": lambda: RQKernel(alpha_constraint=GreaterThan(0.3)),
    "periodic": lambda: PeriodicKernel(ard_num_dims=D),
    "linear": lambda: LinearKernel(ard_num_dims=D),
    "polynomial": lambda: PolynomialKernel(power=3),
    "cosine": lambda: CosineKernel(),
    "constant": lambda: ConstantKernel(constant_constraint=GreaterThan(0.1)),
    "spectral mixture": lambda: SpectralMixtureKernel(num_mixtures=3, ard_num_dims=D),
    "piecewise polynomial": lambda: PiecewisePolynomialKernel(q=1),
    "random features": lambda: RFFKernel(num_samples=7, num_dims=D),
    "hamming": lambda: HammingIMQKernel(vocab_size=2),
    "cylindrical": lambda: CylindricalKernel(2, MaternKernel(nu=1.5)),
    "scale": lambda: ScaleKernel(MaternKernel(nu=1.5), outputscale_constraint=Interval(0.05, 20.0)),
    "active dims": lambda: ScaleKernel(RBFKernel(active_dims=(1, 3), ard_num_dims=2)),
    "neural": lambda: NeuralKernel(3, "erf", ard_num_dims=D),
    "neural, constrained": lambda: NeuralKernel(1, bias_variance_constraint=Interval(0.1, 3.0)),
    "less than": lambda: RBFKernel(lengthscale_constraint=LessThan(5.0)),
    "exp": lambda: RBFKernel(lengthscale_constraint=Positive(transform=torch.exp, inv_transform=torch.log)),
    "bound without transform": lambda: RBFKernel(
        lengthscale_constraint=GreaterThan(2.5e-2, transform=None, initial_value=1.0)
    ),
    "bounds for each column": lambda: RBFKernel(
        ard_num_dims=D, lengthscale_constraint=Interval(torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor(9.0))
    ),
    "gamma prior": lambda: ScaleKernel(
        RBFKernel(lengthscale_prior=GammaPrior(3.0, 6.0)), outputscale_prior=GammaPrior(2.0, 0.15)
    ),
    "other priors": lambda: AdditiveKernel(
        RBFKernel(lengthscale_prior=LogNormalPrior(0.3, 1.2)),
        PeriodicKernel(lengthscale_prior=NormalPrior(1.0, 0.5), period_length_prior=HalfNormalPrior(2.0)),
        NeuralKernel(weight_variance_prior=HalfCauchyPrior(1.5)),
    ),
    "float64": lambda: ScaleKernel(RBFKernel(lengthscale_constraint=GreaterThan(1e-4))).double(),
    "batch": lambda: ScaleKernel(RBFKernel(ard_num_dims=D, batch_shape=TWO), batch_shape=TWO),
    "neural batch": lambda: NeuralKernel(2, batch_shape=TWO),
    "nested": lambda: ScaleKernel(
        AdditiveKernel(
            ProductKernel(RBFKernel(active_dims=(0,)), ScaleKernel(PeriodicKernel(active_dims=(0,)))),
            *(
                ScaleKernel(MaternKernel(nu=0.5, active_dims=(i % D,))) for i in range(11)
            ),  # more than ten: order
            LinearKernel(),
        )
    ),
    "deep": lambda: DeepKernel(MLP(D, (5,), 3), ScaleKernel(RBFKernel(ard_num_dims=3))),
    "deep and plain": lambda: DeepKernel(
        ResidualMLP(D, 8, 2), NeuralKernel(2), ScaleKernel(MaternKernel(nu=2.5, ard_num_dims=D)), momentum=0.3
    ),
    "deep in float64": lambda: DeepKernel(MLP(D).double(), RBFKernel()).double(),
    "deep within": lambda: ScaleKernel(DeepKernel(MLP(D), RBFKernel())) + RBFKernel(),
    "deep, some columns": lambda: DeepKernel(MLP(2), RBFKernel(), active_dims=(1, 2)),
    "deep, torch layers": lambda: DeepKernel(
        nn.Sequential(
            nn.Linear(D, 6, bias=False),
            nn.BatchNorm1d(6),
            nn.Sequential(nn.LeakyReLU(0.2), nn.LayerNorm(6), nn.Dropout(0.1)),
            nn.Linear(6, 3),
            nn.GELU(approximate="tanh"),
        ),
        RBFKernel(),
        RBFKernel(),
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_round_trip(name):
    kernel = shake(TABLES[name]())
    x1, x2 = torch.rand(2, 6, D, dtype=torch.float64)
    if name == "hamming":
        x1, x2 = (nn.functional.one_hot((x[:, :2] > 0.5).long(), 2).flatten(-2) for x in (x1, x2))
    if name == "cylindrical":
        x1, x2 = 0.5 * x1 / 2, 0.5 * x2 / 2
    x1, x2 = x1.to(kernel.dtype if name == "float64" else torch.float32), x2.to(torch.float32)
    x2 = x2.to(x1.dtype)
    for module in kernel.modules():
        if isinstance(module, DeepKernel):  # statistics that are not the initial ones
            module.embed(3 * torch.rand(9, D) + 1)
    kernel.eval()
    again = through_json(kernel)
    assert_same(again, kernel)
    torch.testing.assert_close(again(x1, x2).to_dense(), kernel(x1, x2).to_dense(), rtol=0, atol=0)
    # the twin: the description alone, without the parameters, is another kernel
    fresh = kernel_from_spec(kernel_to_spec(kernel)).eval()
    assert not torch.equal(fresh(x1, x2).to_dense(), kernel(x1, x2).to_dense())


@pytest.mark.parametrize(
    ("extractor", "row"),
    [
        (lambda: ConvNet(1, (3, 4), 2, kernel_size=5), (1, 6, 6)),
        (lambda: CausalConv(2, 4, (1, 2), 3), (7, 2)),
        (
            lambda: nn.Sequential(
                nn.Conv2d(1, 4, 3, padding="same"),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
            ),
            (1, 6, 6),
        ),
    ],
)
def test_round_trip_for_images_and_sequences(extractor, row):
    kernel = shake(DeepKernel(extractor(), RBFKernel()))
    x = torch.randn(5, *row)
    kernel.fix_statistics(x)
    kernel.eval()
    again = through_json(kernel)
    assert_same(again, kernel)
    torch.testing.assert_close(again.embed(x), kernel.embed(x), rtol=0, atol=0)


def test_constraints_and_priors_act_after_loading():
    kernel = ScaleKernel(
        RBFKernel(lengthscale_constraint=Interval(0.5, 2.0), lengthscale_prior=GammaPrior(3.0, 6.0))
    )
    again = through_json(kernel)
    with torch.no_grad():
        again.base_kernel.raw_lengthscale.fill_(100.0)
    assert again.base_kernel.lengthscale.item() == pytest.approx(2.0)
    with pytest.raises(RuntimeError):
        again.base_kernel.lengthscale = 3.0
    (_, module, prior, closure, _), *_ = again.named_priors()
    expected = GammaPrior(3.0, 6.0).log_prob(torch.tensor(2.0))
    torch.testing.assert_close(prior.log_prob(closure(module)).squeeze(), expected)


def test_kernels_that_botorch_makes():
    modules = pytest.importorskip("botorch.models.utils.gpytorch_modules")
    for kernel in (
        modules.get_covar_module_with_dim_scaled_prior(ard_num_dims=D),
        modules.get_matern_kernel_with_gamma_prior(ard_num_dims=D),
    ):
        assert_same(through_json(shake(kernel)), kernel)


class Own(nn.Module):
    out_features = 2

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, D))

    def forward(self, x):
        return torch.sin(x @ self.weight.T)


def test_foreign_extractors_are_handed_in():
    kernel = ScaleKernel(DeepKernel(Own(), RBFKernel(), LinearKernel())) + DeepKernel(Own(), RBFKernel())
    spec = kernel_to_spec(kernel.eval())
    with pytest.raises(
        ModelFileError, match=r"Own.*modules=\{'kernels\.0\.base_kernel\.extractor': \.\.\.\}"
    ):
        kernel_from_spec(spec)
    modules = {"kernels.0.base_kernel.extractor": Own(), "kernels.1.extractor": Own()}
    again = through_json(kernel, modules)
    x = torch.randn(5, D)
    torch.testing.assert_close(again(x).to_dense(), kernel(x).to_dense(), rtol=0, atol=0)
    assert kernel_to_spec(DeepKernel(Own(), RBFKernel()))["extractor"]["name"] == "extractor"


class Mine(RBFKernel):
    pass


class MyPositive(Positive):
    pass


class MyMLP(MLP):
    pass


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        (lambda: Mine(), ["Mine", "state_dict", "MaternKernel"]),
        (lambda: ScaleKernel(RBFKernel() + Mine()), ["Mine", "base_kernel.kernels.1"]),
        (lambda: MultitaskKernel(RBFKernel(), num_tasks=2), ["MultitaskKernel"]),
        (lambda: DeepKernel(MLP(2), Mine()), ["Mine", "at base"]),
        (
            lambda: RBFKernel(lengthscale_constraint=MyPositive()),
            ["MyPositive", "raw_lengthscale", "GreaterThan"],
        ),
        (
            lambda: RBFKernel(
                lengthscale_constraint=Positive(transform=torch.square, inv_transform=torch.sqrt)
            ),
            ["transform", "softplus"],
        ),
        (lambda: RBFKernel(lengthscale_prior=UniformPrior(0.1, 2.0)), ["UniformPrior", "GammaPrior"]),
        (
            lambda: ScaleKernel(RBFKernel(lengthscale_prior=NormalPrior(0.0, 1.0, transform=torch.log))),
            ["NormalPrior", "transform", "base_kernel"],
        ),
    ],
)
def test_what_cannot_be_saved_is_named_with_its_place(kernel, words):
    with pytest.raises(ModelFileError) as error:
        kernel_to_spec(kernel())
    for word in words:
        assert word in str(error.value)


def test_a_prior_on_something_else_is_refused():
    kernel = RBFKernel()
    kernel.register_prior("other_prior", GammaPrior(1.0, 1.0), lambda m: m.lengthscale.log())
    with pytest.raises(ModelFileError, match="other_prior"):
        kernel_to_spec(kernel)


def test_a_subclass_of_an_extractor_counts_as_foreign():
    assert kernel_to_spec(DeepKernel(MyMLP(2), RBFKernel()))["extractor"]["type"] == "custom"


GOOD = kernel_to_spec(ScaleKernel(DeepKernel(MLP(2), MaternKernel(lengthscale_prior=GammaPrior(1.0, 2.0)))))


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.clear(),
        lambda s: s.update(type="EvilKernel"),
        lambda s: s.update(type="__builtins__"),
        lambda s: s["children"].clear(),
        lambda s: s["args"].update(surprise=1),
        lambda s: s.update(dtype="complex64"),
        lambda s: s["constraints"]["raw_outputscale"].update(type="Module"),
        lambda s: s["constraints"]["raw_outputscale"].update(transform="eval"),
        lambda s: s["constraints"].update(raw_nothing={"type": "Positive", "transform": "softplus"}),
        lambda s: s["children"]["base_kernel"]["extractor"].update(type="os.system"),
        lambda s: s["children"]["base_kernel"]["extractor"]["args"].update(in_features="many"),
        lambda s: s["children"]["base_kernel"]["extractor"]["args"].update(activation="sine"),
        lambda s: s["children"]["base_kernel"]["children"]["base"]["args"].update(nu=7),
        lambda s: s["children"]["base_kernel"]["children"]["base"]["priors"]["lengthscale_prior"].pop("rate"),
        lambda s: s["children"]["base_kernel"]["children"]["base"]["priors"]["lengthscale_prior"].update(
            type="X"
        ),
    ],
)
def test_damaged_descriptions(change):
    spec = json.loads(json.dumps(GOOD))
    kernel_from_spec(spec)
    change(spec)
    with pytest.raises(ModelFileError):
        kernel_from_spec(spec)


def test_a_kernel_from_a_later_version_says_so():
    with pytest.raises(ModelFileError, match=r"'FutureKernel'.*version"):
        kernel_from_spec({"type": "FutureKernel"})
    assert gpytorch.kernels.RBFKernel is RBFKernel
