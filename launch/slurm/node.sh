#!/usr/bin/env bash
# One node of train.sbatch: launch/train.sh with the same arguments, the last of which are torchrun's, and with SIGUSR1
# passed on to the ranks. torchrun itself would die of it, and its ranks are in sessions of their own, where Slurm's
# signals do not come.

set -euo pipefail

# Whether this host is the one of the endpoint is not left to a comparison of names.
host=$([[ ${SLURM_NODEID:-0} == 0 ]] && echo true || echo false)

(
    trap '' USR1 # what is ignored here is ignored by torchrun, and by its ranks until they listen
    exec bash "$(dirname "$0")/../train.sh" "$@" --rdzv-conf "is_host=$host,join_timeout=300"
) &
torchrun=$!

# shellcheck disable=SC2046 # one word for each rank
trap 'interrupted=yes; kill -USR1 $(cat "/proc/$torchrun/task/"*/children) || true' USR1

while # a trapped signal ends the waiting early
    interrupted=""
    wait "$torchrun" && status=0 || status=$?
    [[ -n $interrupted ]]
do :; done
exit "$status"
