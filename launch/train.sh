#!/usr/bin/env bash
# Trains any config under torchrun, on one node or as one of several. Installs nothing: it uses .venv if there is one
# (quickstart.sh makes it), else the python3 on the PATH.
#
# usage: bash launch/train.sh CONFIG [--nproc N] [key=value ...] [--log-level LEVEL] [-- torchrun options]
#   --nproc N          processes on this node; default: one per GPU, or 2 where there is none
#   key=value          settings to change in the config, by dotted path
#   --log-level LEVEL  the least severe messages to show on stderr, on every rank: debug, info, warning (the default), error
#   torchrun options   such as --max-restarts 3, or for each node of two:
#                      --nnodes 2 --rdzv-backend c10d --rdzv-endpoint HOST:29500
#
# Variables that are already set are kept: OMP_NUM_THREADS (default: cores / N), MALLOC_*_,
# TORCH_CPP_LOG_LEVEL, GLOO_SOCKET_IFNAME.

set -euo pipefail
source "$(dirname "$0")/install.sh"

processes=""
arguments=()
while (($#)); do
    case $1 in
        -h | --help) usage && exit ;;
        --nproc)
            (($# > 1)) || fail "--nproc needs a number"
            processes=$2
            shift
            ;;
        --nproc=*) processes=${1#*=} ;;
        --) break ;;
        *) arguments+=("$1") ;;
    esac
    shift
done
[[ ${1:-} != -- ]] || shift # what is left are torchrun's options
((${#arguments[@]})) || fail "no config given; usage: bash launch/train.sh CONFIG, or -h for more"
[[ -f ${arguments[0]} || -f ${arguments[0]}/config.yaml ]] || fail "there is no config file ${arguments[0]}, nor a run in such a folder"

[[ -x $PYTHON ]] || PYTHON=python3
"$PYTHON" -c 'from importlib.util import find_spec; assert find_spec("torch") and find_spec("expert_parallel")' 2>/dev/null ||
    fail "expert_parallel is not installed for $PYTHON: run bash launch/quickstart.sh, or pip install -e . in your environment"
[[ -n $processes ]] || processes=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count() or 2)')
[[ $processes =~ ^[1-9][0-9]*$ ]] || fail "--nproc must be a whole number of at least 1, not '$processes'"

# One node needs no address to meet at; who gives one means several nodes, which wait for each other as long as ranks do
# (runtime.rendezvous_seconds), unless torchrun is told otherwise.
case " $*" in
    *" --nnodes"* | *" --rdzv"* | *" --master"*) ;;
    *) # by the loopback interface: this host's name may have no address, or one that a firewall closes
        set -- --standalone --local-addr 127.0.0.1 "$@"
        [ "$(uname)" = Darwin ] && loopback=lo0 || loopback=lo
        export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$loopback}
        # When a rank is gone, torch's stores print frames of C++ around the one sentence that says who. On several
        # nodes its warnings stay, since they also name hosts that are unknown.
        export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}
        ;;
esac
case " $*" in *" --rdzv-conf"*) ;; *" --rdzv-endpoint"*) set -- --rdzv-conf join_timeout=300 "$@" ;; esac

if [[ -z ${OMP_NUM_THREADS:-} ]]; then
    cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
    export OMP_NUM_THREADS=$((cores > processes ? cores / processes : 1))
fi
# Restarts after a lost worker fail in torch 2.13 without this (pytorch#135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}
# glibc gives large blocks back to the kernel and faults them in anew at each step, which on a CPU can cost as much as
# the arithmetic: keep them.
export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-1073741824}
export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-1073741824}
export MALLOC_TOP_PAD_=${MALLOC_TOP_PAD_:-67108864}
export PATH="$VENV/bin:$PATH"

exec "$PYTHON" -m expert_parallel.runtime.torchrun --nproc-per-node "$processes" "$@" -m expert_parallel train "${arguments[@]}"
