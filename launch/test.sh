#!/usr/bin/env bash
# Runs the tests: makes .venv if there is none, and installs the package, its test tools, DeepSpeed and MPI into it.
# Tests that need a GPU run where there is one. One worker for each core, at most 8, and one thread for each worker and
# rank; the last lines show the slowest tests and what was skipped.
#
# usage: bash launch/test.sh [--all | --system] [pytest arguments]
#   --all       also the tests marked `full`, which exercise the whole product and take long
#   --system    those marked `system` instead: clusters of Slurm, containers, nodes. They need root and Debian packages
#               (.ci/run installs them); where one is missing, they say so and are skipped. One worker. With --within
#               SECONDS those that have not begun by then are skipped, too
#   -n 0        runs without workers, as a debugger needs it (--pdb)

set -euo pipefail
source "$(dirname "$0")/install.sh"
case ${1:-} in -h | --help) usage && exit ;; esac
cd "$ROOT"

install all
selection="not full and not system"
# A file stays on one worker, which shares its fixtures and rank pools; tests/conftest.py puts long files first.
workers=(-n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder)
case ${1:-} in
    --all) selection="not system" && shift ;;
    --system) selection="system" && workers=() && shift ;; # these take the whole machine, and fixed ports and names
esac
"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || selection="($selection) and not cuda"

export PATH="$VENV/bin:$PATH" # tests start mpiexec, ninja and deepspeed by name
export OMP_NUM_THREADS=1      # the workers and their ranks take all cores already
exec "$PYTHON" -m pytest -rs --durations 15 "${workers[@]}" -m "$selection" "$@"
