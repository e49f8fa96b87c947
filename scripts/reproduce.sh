#!/usr/bin/env bash
# Tests the papers' claims on the bundled models and writes docs/reproduction.md with its pictures. Sets itself up on first
# use. What was measured before is not measured again; a run that was killed goes on where it was.
#
#   bash scripts/reproduce.sh                     # all of it: hours on a CPU
#   bash scripts/reproduce.sh --quick             # under 15 minutes; its page stays in results/reproduction-quick
#   bash scripts/reproduce.sh --parts savs,beyond --models tiny
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
setup
cd "$root"

exec "$venv_python" -m scripts.reproduction "$@"
