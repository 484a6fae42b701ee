"""Asks and tells for ever; what it was told is printed after `tell` returned. Killed by its test."""

import sys

from fspace.decisions import Optimizer

optimizer = Optimizer({"x": (0.0, 1.0), "n": range(5)}, state=sys.argv[1], initial=10_000)
while True:
    (configuration,) = optimizer.ask()
    value = configuration["x"] + configuration["n"]
    optimizer.tell(configuration, value)
    print(repr(value), flush=True)
