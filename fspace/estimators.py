"""The scikit-learn front: fit a Gaussian process regression or classification with one line."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import torch
from gpytorch.likelihoods import (
    BernoulliLikelihood,
    GaussianLikelihood,
    Likelihood,
    SoftmaxLikelihood,
)

from fspace.data import check_target, target_names
from fspace.errors import DataError, OptionError
from fspace.fitting import GPEstimator
from fspace.front import ClassificationFront, RegressionFront, column_scales
from fspace.inference.candidates import EXACT_ROWS
from fspace.inference.gp import GPPosterior
from fspace.inference.likelihoods import NAMED, REAL, with_offset
from fspace.inference.optimise import gaussian_likelihood
from fspace.kernels.deep import DeepKernel
from fspace.posterior import MixturePosterior
from fspace.targets import (
    balanced,
    check_labels,
    check_likelihood,
    check_support,
    check_weights,
    known_classes,
)
from fspace.torch_data import unpacked

GAUSSIAN = ("auto", "gaussian", "heteroscedastic")
LIKELIHOODS = (*GAUSSIAN, *(name for name in NAMED if name != "bernoulli"))
INFERENCE = ("auto", "exact", "collapsed", "sites")
OUTPUTS = ("independent", "coregionalised")


class GPRegressor(RegressionFront, GPEstimator):
    """Gaussian process regression with deep or plain kernels, exact or sparse.

    kernel: "auto" (the data choose between plain and deep), "deep", "matern", "rbf", "neural" (infinitely wide
        network), "additive" (a sum over the columns), or a gpytorch kernel, which sees standardised inputs, and whose
        registered priors count. Images [n, c, h, w] and sequences [n, t, d] need a `DeepKernel` with an extractor that
        reads them.
    inference: "auto", "exact" (Cholesky over all rows), "collapsed" (Titsias' bound), or "sites" (kernel and network
        learned from minibatches by natural-gradient steps; the posterior is then that of "collapsed", or, where the
        noise is not Gaussian, of sites).
    likelihood: "auto" (with kernel="auto" the data say whether Gaussian noise varies over the inputs; else constant),
        "gaussian" (constant), "heteroscedastic" (varies), or a gpytorch GaussianLikelihood, whose noise is in units
        of standardised y and is where the fit starts; its noise_prior counts in exact inference. Heavy tails:
        "student_t", "laplace". Counts: "poisson", "negative_binomial". Positive y: "gamma". Shares between 0 and 1:
        "beta". Or another gpytorch likelihood of one function, which sees y as it is. latent(x) of those with a link
        is of the function before it.
    outputs: of y [n, t], "independent" (one kernel, a noise variance for each), or "coregionalised": functions of
        covariance B_st k(x, x') and noise that is correlated between the outputs, B and the noise covariance learned
        from the data (Gaussian noise only; Bonilla, Chai and Williams 2008). Predictions are joint over the outputs.
        Where the evidence gains less than a nat for each number learned, the outputs stay independent.
    inducing: most inducing inputs of the collapsed posterior; or a number below 1, the share of the prior variance
        they may leave unexplained, and as many are taken (2,000 at most).
    members: deep kernels in the ensemble.
    categories, missing: as in `TableEncoder`; missing="impute" fills NaN.
    device: "auto", "cpu", "cuda". dtype: of networks; GP algebra is float64.
    seed: the same seed gives the same fit on the same machine.
    progress: "auto" (a bar on a terminal, where the fit takes more than two seconds) or False.

    After fit: posterior_, log_evidence_ (nats, standardised y, of the heaviest member), history_ (dicts with "step",
    "stage", "loss", "heldout"), choice_ ("scores" of the kernels tried, the one "chosen", and the "weights" with which
    they predict together), relevance_ (share of each encoded column or channel; NaN, with a warning, where the slope
    of a kernel is), target_names_, interrupted_ (Ctrl-C ended the fit early: the best state so far is kept, and a
    warning says which), coregionalisation_ and noise_covariance_ (of the outputs, where the noise is Gaussian).
    """

    def __init__(  # scikit-learn: options are checked in fit, so that they can be set in any order
        self,
        kernel: Any = "auto",
        inference: Any = "auto",
        likelihood: Any = "auto",
        outputs: Any = "independent",
        inducing: Any = 512,
        members: Any = 3,
        categories: Any = None,
        missing: Any = "error",
        device: Any = "auto",
        dtype: Any = "float32",
        seed: Any = 0,
        progress: Any = "auto",
    ):
        self.kernel = kernel
        self.inference = inference
        self.likelihood = likelihood
        self.outputs = outputs
        self.inducing = inducing
        self.members = members
        self.categories = categories
        self.missing = missing
        self.device = device
        self.dtype = dtype
        self.seed = seed
        self.progress = progress

    def fit(self, X: Any, y: Any = None) -> GPRegressor:
        """Fit to X [n, d] (or images, sequences) and y [n] or [n, t], or to a torch data set of pairs (x, y). Raises a
        FspaceError for data or options that cannot be used."""
        self._check_options()
        encoder, x, target, names = self._read(X, y)
        columns = target.reshape(len(x), -1)
        if self.outputs == "coregionalised" and columns.shape[1] == 1:
            raise OptionError(
                "outputs='coregionalised' is for several outputs, and y has one; leave outputs='independent'."
            )
        given = NAMED[self.likelihood]() if self.likelihood in tuple(NAMED) else self.likelihood
        link = isinstance(given, Likelihood) and not isinstance(given, GaussianLikelihood)
        if link:
            check_likelihood(given, columns)
        if link and not isinstance(given, REAL):
            check_support(columns, given, target.ndim == 1)
            shift, scale = np.zeros(columns.shape[1]), np.ones(columns.shape[1])
        else:
            shift, scale, constant = column_scales(columns)
            if self.outputs == "coregionalised" and constant.any():
                raise DataError(
                    f"Target {names[constant.argmax()]!r} has the same value in every row; it "
                    "is correlated with nothing: leave it out, or take outputs='independent'."
                )
        exact = self.inference == "exact" or (self.inference == "auto" and len(x) <= EXACT_ROWS)
        likelihood: Any = None
        if link:
            likelihood = with_offset(copy.deepcopy(given), torch.from_numpy((columns - shift) / scale))
        elif not isinstance(given, str):
            likelihood = own_likelihood(given, columns.shape[1])
            self._check_noise_prior(likelihood, exact)
        vary = {"auto": None, "heteroscedastic": True}.get(given, False) if isinstance(given, str) else False
        self._fit_plan(
            encoder,
            x,
            (columns - shift) / scale,
            shift,
            scale,
            vector=target.ndim == 1,
            exact=exact and not link,
            sites=self.inference == "sites",
            vary=vary,
            likelihood=likelihood,
            coregionalised=self.outputs == "coregionalised",
        )
        self.target_names_ = names
        return self

    @property
    def coregionalisation_(self) -> np.ndarray:
        """Prior covariance B [t, t] of the outputs' functions at one input, in the units of y: f_s(x) and f_t(x') have
        covariance B_st k(x, x') / k(x, x). Of the heaviest member; diagonal where outputs are independent.

        Raises OptionError where the noise is not Gaussian.
        """
        return self._heaviest("coregionalisation_").coregionalisation.cpu().numpy()

    @property
    def noise_covariance_(self) -> np.ndarray:
        """Covariance [t, t] of the noise of the outputs, in the units of y (where it varies: at a noise ratio of one).
        Of the heaviest member; diagonal where outputs are independent.

        Raises OptionError where the noise is not Gaussian.
        """
        return self._heaviest("noise_covariance_").noise_covariance.cpu().numpy()

    def _heaviest(self, name: str) -> GPPosterior:
        members, posterior = self._members(), self.posterior_
        if not isinstance(members[0].basis.likelihood, GaussianLikelihood):
            raise OptionError(f"{name} is of Gaussian noise; this model has likelihood={self.likelihood!r}.")
        return (
            members[int(posterior.weights.argmax())]
            if isinstance(posterior, MixturePosterior)
            else members[0]
        )

    def partial_fit(self, X: Any, y: Any, site: Any = None, discount: Any = 1.0) -> GPRegressor:
        """Take in more rows as one more site, in the time of these rows; kernel and noise stay as `fit` left them. The
        first call is `fit`.

        site: a name to `forget` these rows by ("batch 1", ... by itself); discount: what older sites say is multiplied
        by it, so that below 1 old data fade. Raises a FspaceError for rows or options that do not fit.
        """
        if not hasattr(self, "posterior_"):
            return self.fit(X, y)
        x = np.asarray(self.encoder_.transform(X), dtype=np.float64)
        self._take_in(x, check_target(y, len(x)), site, discount)
        return self

    def _check_noise_prior(self, likelihood: GaussianLikelihood, exact: bool) -> None:
        deep = isinstance(self.kernel, DeepKernel) or self.kernel in ("auto", "deep")
        if list(likelihood.named_priors()) and (deep or not exact):
            raise OptionError(
                "likelihood has a prior on its noise, which counts in exact inference with a kernel that is not deep; "
                f"kernel={self.kernel!r} of inference={self.inference!r} would not keep it. Pass one without, or take "
                "kernel='matern', inference='exact'."
            )

    def _check_options(self) -> None:
        self._check_shared_options()
        if self.inference not in INFERENCE:
            raise OptionError(
                f"inference={self.inference!r} does not exist; choose one of {', '.join(INFERENCE)}."
            )
        like = self.likelihood
        if isinstance(like, str) and like not in LIKELIHOODS:
            raise OptionError(
                f"likelihood={like!r} does not exist; choose one of {', '.join(LIKELIHOODS)} or pass a "
                "gpytorch likelihood of one function. (Classes: GPClassifier.)"
            )
        if not isinstance(like, str | Likelihood) or isinstance(
            like, SoftmaxLikelihood | BernoulliLikelihood
        ):
            raise OptionError(
                f"likelihood is a {type(like).__name__}; pass a name or a gpytorch likelihood of one function. "
                "(Classes: GPClassifier.)"
            )
        if self.outputs not in tuple(OUTPUTS):
            raise OptionError(f"outputs={self.outputs!r} does not exist; choose one of {', '.join(OUTPUTS)}.")
        if self.outputs == "coregionalised" and not (isinstance(like, str) and like in GAUSSIAN):
            raise OptionError(
                f"outputs='coregionalised' learns a Gaussian noise covariance between outputs, which likelihood="
                f"{like if isinstance(like, str) else type(like).__name__!r} has not; choose one of "
                f"{', '.join(GAUSSIAN)}, or outputs='independent'."
            )
        gaussian = isinstance(like, GaussianLikelihood) or like in GAUSSIAN
        if not gaussian and self.inference in ("exact", "collapsed"):
            raise OptionError(
                f"inference={self.inference!r} is for Gaussian noise; likelihood={like!r} is fitted by sites: leave "
                "inference='auto'."
            )


class GPClassifier(ClassificationFront, GPEstimator):
    """Gaussian process classification with deep or plain kernels, of two classes (probit) or more (softmax).

    kernel, inducing, members, categories, missing, device, dtype, seed, progress: as for `GPRegressor`.
    class_weight: None (rows count alike) or "balanced" (classes do: rows of rare ones count more; probabilities are
        then those of a world in which all classes are equally frequent), or a dict from class to weight.

    After fit: classes_, posterior_ (latent(x) of the functions before the link, one a class where there are more than
    two; observed(x) is a `Categorical` over positions in classes_, with entropy and mutual_information), and what
    `GPRegressor` has: log_evidence_ (a lower bound), history_, choice_, relevance_, target_names_, interrupted_.
    """

    def __init__(
        self,
        kernel: Any = "auto",
        inducing: Any = 256,
        members: Any = 2,
        class_weight: Any = None,
        categories: Any = None,
        missing: Any = "error",
        device: Any = "auto",
        dtype: Any = "float32",
        seed: Any = 0,
        progress: Any = "auto",
    ):
        self.kernel = kernel
        self.inducing = inducing
        self.members = members
        self.class_weight = class_weight
        self.categories = categories
        self.missing = missing
        self.device = device
        self.dtype = dtype
        self.seed = seed
        self.progress = progress

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> GPClassifier:
        """Fit to X [n, d] (or images, sequences) and labels y [n] of any kind, or to a torch data set of pairs (x, y);
        sample_weight [n] says how often each row counts. Raises a FspaceError for data or options that cannot be used.
        """
        return self._fit_labels(X, y, sample_weight, None)

    def _fit_labels(self, X: Any, y: Any, sample_weight: Any, classes: Any) -> GPClassifier:
        self._check_shared_options()
        X, y = unpacked(X, y)
        encoder, x = self._encoded(X)
        weight = check_weights(sample_weight, len(x))
        if weight is not None and (weight == 0).any():  # as if these rows were not there
            x, y, weight = x[weight > 0], np.asarray(y)[weight > 0], weight[weight > 0]
        self.classes_, labels = check_labels(y, len(x), classes)
        weight = balanced(weight, self.class_weight, self.classes_, labels)
        columns = torch.from_numpy(labels.astype(np.float64)[:, None])
        count = len(self.classes_)
        two = count == 2
        inner = BernoulliLikelihood() if two else SoftmaxLikelihood(num_classes=count, mixing_weights=False)
        self._fit_plan(
            encoder,
            x,
            columns.numpy(),
            np.zeros(1 if two else count),
            np.ones(1 if two else count),
            weight,
            vector=two,
            exact=False,
            sites=True,
            vary=False,
            likelihood=with_offset(inner, columns, None if weight is None else torch.from_numpy(weight)),
        )
        self.target_names_ = target_names(y, labels)
        return self

    def partial_fit(
        self,
        X: Any,
        y: Any,
        classes: Any = None,
        sample_weight: Any = None,
        site: Any = None,
        discount: Any = 1.0,
    ) -> GPClassifier:
        """Take in more rows as one more site, in the time of these rows; the kernel stays as `fit` left it. The first
        call is `fit`; where its rows lack some classes, `classes` names all.

        site, discount: as in `GPRegressor.partial_fit`. Raises a FspaceError for rows or options that do not fit;
        sample_weight is for the first call.
        """
        if not hasattr(self, "posterior_"):
            return self._fit_labels(X, y, sample_weight, classes)
        if sample_weight is not None:
            raise OptionError("partial_fit takes sample_weight in its first call only; repeat rows instead.")
        if classes is not None and not np.array_equal(known_classes(classes), self.classes_):
            raise OptionError(
                f"classes={classes!r} are not those of the first call, {self.classes_.tolist()[:20]}; fit anew."
            )
        x = np.asarray(self.encoder_.transform(X), dtype=np.float64)
        labels = check_labels(y, len(x), self.classes_)[1]
        self._take_in(x, labels.astype(np.float64), site, discount)
        return self


def own_likelihood(given: GaussianLikelihood, outputs: int) -> GaussianLikelihood:
    """A copy in float64 with one noise an output; one given for all outputs starts them all."""
    like = copy.deepcopy(given).double()
    if not like.raw_noise.requires_grad:
        raise OptionError(
            "likelihood has a noise that is fixed; this estimator learns it. Leave requires_grad on."
        )
    constraint = like.noise_covar.raw_noise_constraint
    if math.isfinite(constraint.upper_bound) or constraint.lower_bound > 1e-4:
        raise OptionError(
            "likelihood has bounds on its noise, which this estimator would not keep; pass one without, whose noise "
            "is where the fit starts."
        )
    if like.noise.numel() not in (1, outputs):
        raise OptionError(
            f"likelihood has {like.noise.numel()} noise variances, but y has {outputs} outputs."
        )
    prior = getattr(like.noise_covar, "noise_prior", None)
    if len(list(like.named_priors())) > (prior is not None):
        raise OptionError(
            "likelihood has a prior that is not its noise_prior; this estimator would not keep it."
        )
    return gaussian_likelihood(outputs, like.noise.detach().reshape(-1), torch.device("cpu"), prior)
