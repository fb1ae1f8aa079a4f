# shellcheck shell=bash
# What the batch scripts here share, to be sourced: where the repository and Python are, the container if one is wanted,
# and how a job's ranks are run, stopped in time, and started again.

source "$(dirname "${BASH_SOURCE[0]}")/../install.sh"

job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID} # of an array, this task alone
job=${job:-$SLURM_JOB_ID}
restarts=${SLURM_RESTART_COUNT:-0}

srun_options=(--kill-on-bad-exit=0 --wait="${WAIT_SECONDS:-60}")
# srun does not take this over from sbatch (since Slurm 22.05), and a task would have one core.
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || srun_options+=(--cpus-per-task="$SLURM_CPUS_PER_TASK")

[[ -x $PYTHON ]] || PYTHON=python3
inside=() # what goes before a command to run it in the container
mounts="$ROOT,$PWD${MOUNTS:+,$MOUNTS}"
case ${CONTAINER:-} in
    "") ;;
    apptainer:?*) inside=(apptainer exec --nv --bind "$mounts" --pwd "$PWD" "${CONTAINER#*:}") ;;
    pyxis:?*)
        pairs=$(sed -E 's/[^,]+/&:&/g' <<<"$mounts")
        srun_options+=(--container-image="${CONTAINER#*:}" --container-mounts="$pairs" --container-workdir="$PWD")
        ;;
    *) fail "CONTAINER is '$CONTAINER', it must be apptainer:IMAGE or pyxis:IMAGE" ;;
esac
if [[ -n ${CONTAINER:-} ]]; then # the image's Python, not the .venv of this machine
    PYTHON=python3
    export EXPERT_PARALLEL_VENV=/none
fi

# run_tasks COMMAND...: runs it as the job's tasks, on all its nodes, and ends the job: with the tasks' exit code, or by
# requeueing it, if they were stopped by a SIGUSR1 to this script.
run_tasks() {
    local limit=${MAX_RESTARTS:-20} stopping="" interrupted="" status=0 srun
    ((restarts <= limit)) || fail "job $job was started again $restarts times, MAX_RESTARTS is $limit: it stays ended"
    echo "job $job, start $((restarts + 1)) of at most $((limit + 1)), on $SLURM_JOB_NODELIST"

    # Again and again: a rank that is only starting does not listen yet, and one that is leaving does not mind.
    trap 'stopping=yes interrupted=yes; while kill -USR1 "$srun"; do sleep 10; done 2>/dev/null &' USR1
    srun "${srun_options[@]}" "${inside[@]}" "$@" &
    srun=$!
    while # a trapped signal ends the waiting early
        interrupted=""
        wait "$srun" && status=0 || status=$?
        [[ -n $interrupted ]]
    do :; done
    trap '' USR1

    if [[ -n $stopping ]] && ((status == 0 || status == 75)); then # 0: torchrun's
        ((restarts < limit)) || fail "stopped in time, not requeued: MAX_RESTARTS is $limit; submit it again to go on"
        echo "job $job: stopped in time, going back into the queue"
        scontrol requeue "$job" || fail "could not requeue job $job; submit it again to go on"
        sleep 60 # Slurm ends this script
    fi
    ((status == 0)) || await_lost_node
    exit "$status"
}

# Ranks notice a lost node long before Slurm does. This script must not end the job as failed then: Slurm only requeues
# jobs that were still running when it gave up the node.
await_lost_node() {
    local patience
    timeout 60 srun --overlap --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 true && return
    patience=$(scontrol show config | sed -n 's/^SlurmdTimeout *= *\([0-9]*\).*/\1/p')
    echo "job $job: a node does not answer (its name is above); giving Slurm $((patience + 60)) s to take the job back"
    sleep $((patience + 60))
}
