#!/usr/bin/env bash
# Everything a change must pass: ruff, mypy, pytest, and the documentation's commands. Sets itself up on first use;
# arguments go to pytest:
#
#   bash scripts/test.sh                        # all of it
#   bash scripts/test.sh tests/test_house.py    # the linters and one file of tests
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
setup test
cd "$root"

# The suite uses neither an accelerator nor a hub.
export JAX_PLATFORMS=cpu HF_HUB_OFFLINE=1

"$venv_python" -m ruff check .
"$venv_python" -m ruff format --check .
"$venv_python" -m mypy
# Most of the time goes into compiling on one core, so that two processes take little more than half as long as one. The
# tests of a file share what they compile: they stay together.
workers=$("$venv_python" -c 'import os; print(min(4, os.cpu_count() or 1))')
run() { "$venv_python" -m pytest -n "$workers" --dist loadfile "$@"; }

if [ $# -gt 0 ]; then
  run "$@"
  exit
fi
# Nearly every program of a test runs once: without optimising them, the suite takes half as long. Tests that bound how
# much a result may change by rounding need the programs that users run (tests/conftest.py): a process of their own runs
# them meanwhile.
rounding=$(mktemp)
"$venv_python" -m pytest -m rounding >"$rounding" 2>&1 &
other=$!
trap 'kill "$other" 2>/dev/null || true; rm -f "$rounding"' EXIT
status=0
XLA_FLAGS=${XLA_FLAGS-"--xla_cpu_use_fusion_emitters=false --xla_backend_optimization_level=0"} \
  run -m "not rounding" || status=$?
wait "$other" || status=$?
cat "$rounding"
# What the documentation says, done: every command and example, at small sizes.
"$venv_python" scripts/check_docs.py || status=$?
exit "$status"
