"""transformers, imported without its advice."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Import and use transformers without its advice to install torch and torchvision, which no user of ours needs.

    Errors are still logged. Every import of transformers in this package stands under it.
    """
    # Read when transformers is first imported and whenever it advises; a level set before would be overwritten.
    variables = {"TRANSFORMERS_NO_ADVISORY_WARNINGS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
