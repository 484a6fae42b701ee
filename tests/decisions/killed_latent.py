"""Asks for objects and tells for ever; what it was told is printed after `tell` returned. Killed by its test."""

import sys

import numpy as np

from fspace.decisions import LatentOptimizer

optimizer = LatentOptimizer(np.random.default_rng(0).random((10_000, 3)), initial=10_000, state=sys.argv[1])
while True:
    objects = optimizer.ask()
    value = objects.double().sum().item()
    optimizer.tell(objects, [value])
    print(repr(value), flush=True)
