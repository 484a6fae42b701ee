"""Inference: exact and collapsed Gaussian processes, and the basis + site form that every sparse posterior takes."""
