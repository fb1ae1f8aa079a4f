#!/usr/bin/env bash
# Runs the tests: makes .venv if there is none, and installs the package, its test tools, DeepSpeed and MPI into it.
# Tests that need a GPU run where there is one.
#
# usage: bash launch/test.sh [--all | --system] [pytest arguments]
#   --all       also the tests marked `full`, which exercise the whole product and take long
#   --system    those marked `system` instead: clusters of Slurm, containers, nodes. They need root and Debian packages
#               (.ci/run installs them); where one is missing, they say so and are skipped. With --within SECONDS those
#               that have not begun by then are skipped, too

set -euo pipefail
source "$(dirname "$0")/install.sh"
case ${1:-} in -h | --help) usage && exit ;; esac
cd "$ROOT"

install all
selection="not full and not system"
case ${1:-} in
    --all) selection="not system" && shift ;;
    --system) selection="system" && shift ;;
esac
"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || selection="($selection) and not cuda"

export PATH="$VENV/bin:$PATH" # tests start mpiexec, ninja and deepspeed by name
exec "$PYTHON" -m pytest -rs -m "$selection" "$@"
