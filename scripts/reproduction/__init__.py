"""The study behind docs/reproduction.md: ``python -m scripts.reproduction``."""
