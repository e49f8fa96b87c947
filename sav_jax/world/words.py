"""Short words that scenes show as text."""

from __future__ import annotations

WORDS = (
    "cat", "dog", "sun", "hat", "box", "bus", "map", "egg", "pen", "bed", "net", "jam", "fox", "owl", "ant", "bee",
    "cow", "pig", "hen", "rat", "bat", "toy", "van", "zip", "ice", "oak", "sea", "sky", "mud", "web", "gym", "kit",
    "go", "up", "in", "we", "stop", "open", "exit", "milk", "rain", "snow", "wind", "lamp", "book", "desk", "frog",
    "duck",
)  # fmt: skip
"""Two to four letters: at 32 pixels a letter has eight."""
