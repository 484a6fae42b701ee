"""Chooses and tells for ever; what it was told is printed after `tell` returned. Killed by its test."""

import sys

import numpy as np

from fspace.decisions import ArmPosterior, Bandit, linear_basis

rng = np.random.default_rng(int(sys.argv[2]))
bandit = Bandit(ArmPosterior(linear_basis(2), 3), journal=sys.argv[1])
waiting = []
while True:
    waiting.append(bandit.choose(rng.standard_normal(2)))
    if len(waiting) == 3:
        rewards = rng.standard_normal(2)
        bandit.tell([choice.id for choice in waiting[:2]], rewards)
        for choice, reward in zip(waiting[:2], rewards):
            print(choice.id, repr(float(reward)), flush=True)
        waiting = waiting[2:]
