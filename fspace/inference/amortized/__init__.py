"""Amortised inference."""
