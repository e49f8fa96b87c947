#!/usr/bin/env bash
# From a fresh clone to a few-shot classifier of real handwritten digits. Sets itself up on first use, then compares
# chance, the bundled model asked directly, raw pixels, random features and sparse attention vectors, from 20 labelled
# images per class. Arguments go to `sav-jax eval` (for example --shots 5 --seed 1).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
setup

exec "$venv_python" -m sav_jax eval --model tiny --tasks digits --methods chance,zero-shot,pixels,sav-random,sav \
    --shots 20 --seed 0 --output-path "$root/results/quickstart" "$@"
