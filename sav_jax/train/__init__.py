"""Optax programs that learn something small on top of a frozen model."""
