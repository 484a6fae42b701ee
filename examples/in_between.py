"""Between two clusters of data: what do priors over functions and priors over weights say where nothing was seen?

Every method is fitted to the same rows; the reference is the exact Gaussian process with the networks' own prior.

Run: python examples/in_between.py between.png
"""

import sys

from fspace.compare import Budget, InBetween, Study, named_methods
from fspace.compare.pictures import bands
from fspace.compare.sentences import empty_widths

methods = named_methods(["wide", "gp-rbf", "map", "ensemble", "mfvi", "laplace", "dropout"])
results = Study([InBetween()], methods, splits=1, budget=Budget(seconds=12)).run()
distances = results.distances("in-between", "wide network", InBetween.noise**2).xs(0, level="split")
widths = empty_widths(results, "in-between", "wide network").loc[0]
for name, row in distances.sort_values("wasserstein").iterrows():
    wide = (
        f"; its deviation between the clusters is {widths[name]:.2f} of the reference's"
        if name in widths
        else ""
    )
    print(f"{name}: {row['wasserstein']:.3f} from the exact posterior as a function{wide}")
for row in results.troubles():
    print(f"{row['method']} {row['status']}: {row['reason']}")
picture = sys.argv[1] if len(sys.argv) > 1 else "between.png"
bands(results, "in-between", "wide network", truth=InBetween.truth).savefig(picture, dpi=110)
print(f"open {picture}")
