# Sourced by the scripts a person runs: finds a Python, makes .venv, installs this checkout into it. Not run by itself.
#
#   setup        what using sav_jax needs
#   setup test   that and what testing it needs
#
# Afterwards $root is the checkout, $venv_python the interpreter to use, and the working directory is unchanged. Installing is
# skipped while nothing that decides what gets installed has changed. PYTHON=/path/to/python chooses the interpreter.

unset CDPATH # with it, cd prints
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv_python=$root/.venv/bin/python

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

has_uv() {
    command -v uv >/dev/null 2>&1
}

# Succeeds when $1 runs and is new enough. (A name on the PATH may be a version manager's stand-in that only prints an error.)
is_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

# Succeeds when an environment with an installer in it can be made from $1. (Some systems package ensurepip separately.)
is_usable_python() {
    is_new_enough "$1" && { has_uv || "$1" -c 'import ensurepip' >/dev/null 2>&1; }
}

find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        is_usable_python "$PYTHON" || fail "PYTHON=$PYTHON is not a working Python 3.11 or newer with the venv and ensurepip modules"
        printf '%s\n' "$PYTHON"
        return
    fi
    # The versions the project is tested with come first; a newer one may lack wheels of a dependency.
    for candidate in python3.11 python3.12 python3.13 python3 python; do
        if is_usable_python "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or newer (with the venv and ensurepip modules) found; install one, or name it: PYTHON=/path/to/python bash $0"
}

make_venv() {
    local python
    if [ -e "$root/.venv" ]; then
        is_new_enough "$venv_python" ||
            fail "$root/.venv has no working Python 3.11 or newer; remove that folder and run this again"
        return
    fi
    python=$(find_python)
    printf 'Making .venv with %s\n' "$("$python" -c 'import sys; print(sys.executable, sys.version.split()[0])')"
    if has_uv; then
        uv venv --quiet --python "$python" "$root/.venv"
    else
        "$python" -m venv "$root/.venv"
    fi
}

# Prints what an installation depends on, as one hash.
fingerprint() {
    "$venv_python" - "$root" "$1" <<'PY'
import hashlib, pathlib, sys

root, extra = sys.argv[1:]
parts = [pathlib.Path(root, name).read_bytes() for name in ("setup.cfg", "pyproject.toml")]
print(hashlib.sha256(repr((root, extra, sys.version, parts)).encode()).hexdigest())
PY
}

is_installed() {
    [ "$(cat "$root/.venv/.installed-$1" 2>/dev/null)" = "$(fingerprint "$1")" ]
}

setup() {
    local extra=${1:-base} requirement=$root quiet=()
    make_venv
    is_installed "$extra" && return
    if [ "$extra" != base ]; then requirement=$root[$extra]; fi
    printf 'Installing sav_jax and its dependencies into .venv (minutes the first time)\n'
    if [ ! -t 1 ]; then quiet=(--quiet); fi
    if has_uv; then
        uv pip install ${quiet[@]+"${quiet[@]}"} --python "$venv_python" --editable "$requirement"
    else
        "$venv_python" -m pip --version >/dev/null 2>&1 || "$venv_python" -m ensurepip --upgrade >/dev/null
        "$venv_python" -m pip install ${quiet[@]+"${quiet[@]}"} --disable-pip-version-check --editable "$requirement"
    fi
    # Every extra includes the base. Written last: an interrupted installation is taken up again.
    fingerprint base >"$root/.venv/.installed-base"
    fingerprint "$extra" >"$root/.venv/.installed-$extra"
}
