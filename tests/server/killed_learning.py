"""Learning in a process that kills itself after so many puts on the learned basis (see test_learning.py)."""

import os
import signal
import sys

import torch

from fspace.server import PosteriorServer, learn_basis


class Mortal(PosteriorServer):
    def __init__(self, path, puts):
        super().__init__(path)
        self.left = puts

    def put(self, site):
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1
        return super().put(site)


if __name__ == "__main__":
    path, rows, puts = sys.argv[1:]
    server = Mortal(path, int(puts))
    held = torch.load(rows, weights_only=True)
    names = sorted(name[2:] for name in held if name.startswith("x "))
    shards = {name: (held[f"x {name}"], held[f"y {name}"]) for name in names}
    learn_basis(shards, *server.basis()[:1], server=server, steps=3)
    print("done")
