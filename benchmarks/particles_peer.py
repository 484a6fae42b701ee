"""The side of `particles` in amortised_particles.py, run by an interpreter that has it: it imports nothing of fspace.

    python benchmarks/particles_peer.py data.npz out.json

data.npz holds one series x, the model's parameters (a, standard deviations of the state's and the observation's noise),
particles and rounds. out.json holds the median processor seconds of a bootstrap filter and its mean log evidence.
"""

import json
import sys
import time
from importlib.metadata import version

import numpy as np
import particles  # type: ignore[import-not-found]
from particles import distributions  # type: ignore[import-not-found]
from particles import state_space_models as ssm


class Linear(ssm.StateSpaceModel):
    """z_0 ~ N(0, q^2), z_t ~ N(a z_t-1, q^2), x_t ~ N(z_t, r^2)."""

    def PX0(self):
        """Of the first state."""
        return distributions.Normal(scale=self.q)

    def PX(self, t, xp):
        """Of the next."""
        return distributions.Normal(loc=self.a * xp, scale=self.q)

    def PY(self, t, xp, x):
        """Of an observation."""
        return distributions.Normal(loc=x, scale=self.r)


def main(data_path, out_path):
    """Run the filter a number of times; the first two rounds compile."""
    data = np.load(data_path)
    a, q, r = (float(value) for value in data["parameters"])
    taken, evidence = [], []
    for k in range(int(data["rounds"]) + 2):
        bootstrap = ssm.Bootstrap(ssm=Linear(a=a, q=q, r=r), data=data["x"])
        start = time.process_time()
        filtered = particles.SMC(fk=bootstrap, N=int(data["particles"]), resampling="systematic", ESSrmin=0.5)
        filtered.run()
        if k > 1:
            taken.append(time.process_time() - start)
            evidence.append(filtered.logLt)
    versions = {name: version(name) for name in ("particles", "numpy", "numba")}
    with open(out_path, "w") as file:
        json.dump(
            {
                "seconds": float(np.median(taken)),
                "log_evidence": float(np.mean(evidence)),
                "versions": versions,
            },
            file,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
