"""Amortised inference: objectives that are pure functions of log-weights, their gradients, and particles."""
