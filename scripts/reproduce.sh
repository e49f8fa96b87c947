#!/usr/bin/env bash
# Tests the papers' claims on the bundled models and writes docs/reproduction.md with its pictures. Sets itself up on first
# use. What was measured before is not measured again; a run that was killed goes on where it was. Other models and
# tasks, all that "sav-jax eval" knows, get a page in results/ (docs/tasks.md says where their files go).
#
#   bash scripts/reproduce.sh                     # all of it: hours on a CPU
#   bash scripts/reproduce.sh --quick             # under 15 minutes; its page stays in results/reproduction-quick
#   bash scripts/reproduce.sh --parts savs,beyond --models tiny
#   bash scripts/reproduce.sh --models llava-hf/llava-onevision-qwen2-7b-ov-hf --tasks eurosat,vlguard --data-dir DIR
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
setup

# Paths that it is given count from where it is called; -P keeps what else lies there from being imported.
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec "$venv_python" -P -m scripts.reproduction "$@"
