"""Chooses and tells for ever with a GP that learns its kernel; what was told is printed after `tell` returned."""

import sys

import numpy as np

from fspace.decisions import Bandit, GPArms

rng = np.random.default_rng(int(sys.argv[2]))
bandit = Bandit(GPArms(2, 3), journal=sys.argv[1])
while True:
    choice = bandit.choose(rng.standard_normal(2), propensity=False)
    reward = rng.standard_normal()
    bandit.tell([choice.id], [reward])
    print(choice.id, repr(float(reward)), flush=True)
