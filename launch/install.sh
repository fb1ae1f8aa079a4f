# shellcheck shell=bash
# What the scripts here share, to be sourced: where Python is, and how it gets its packages.
# Variable EXPERT_PARALLEL_VENV: a folder for the virtual environment other than .venv in the repository.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${EXPERT_PARALLEL_VENV:-$ROOT/.venv}
PYTHON=$VENV/bin/python
LOG=$VENV/install.log
unset PYTHONDONTWRITEBYTECODE # pip_install compiles nothing, so what is used is compiled at its first import, and kept

fail() {
    echo "error: $*" >&2
    exit 1
}

# Prints the comment that the calling script opens with.
usage() {
    sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
}

# install core|all: brings the virtual environment up to date. The stamp holds everything that decides what is
# installed, so a second call returns at once.
install() {
    local extras="" stamp wanted
    [[ $1 == core ]] || extras="[test,deepspeed,mpi,wrappers]"
    wanted=$(echo "$ROOT" && cat "$ROOT/pyproject.toml" "$ROOT/launch/constraints.txt")
    for stamp in "$VENV/installed-$1" "$VENV/installed-all"; do
        [[ -f $stamp && $(<"$stamp") == "$wanted" ]] && return
    done

    "$PYTHON" -m pip --version >/dev/null 2>&1 || make_venv
    echo "Installing ($1) into $VENV; this can take some minutes. pip's output: $LOG"
    : >"$LOG"
    # Two steps: DeepSpeed builds from source against the torch that is here; in a build environment of its own, pip
    # would download another one.
    pip_install setuptools wheel ninja torch
    DS_BUILD_OPS=0 pip_install --no-build-isolation --editable "$ROOT$extras"
    # A second MPI for the tests, beside Open MPI: in one folder, each would overwrite the other's mpiexec and libmpi.
    [[ $1 == core ]] || pip_install --no-deps --prefix "$VENV/mpich" mpich
    echo "$wanted" >"$VENV/installed-$1"
}

make_venv() {
    command -v python3 >/dev/null || fail "python3 is not on the PATH; Python 3.11 or newer is needed."
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "Python 3.11 or newer is needed, but python3 on the PATH is $(python3 --version)."
    python3 -c 'import ensurepip, venv' 2>/dev/null ||
        fail "python3 cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv"
    python3 -m venv "$VENV" || fail "could not make the virtual environment $VENV; remove that folder and try again."
}

# Without --no-compile, compiling all of torch takes more than half of the time.
pip_install() {
    "$PYTHON" -m pip install --no-compile --constraint "$ROOT/launch/constraints.txt" "$@" >>"$LOG" 2>&1 && return
    tail -n 15 "$LOG" >&2
    fail "pip could not install the packages (is the package index reachable?); its whole output is in $LOG"
}
