#!/usr/bin/env bash
# From a fresh clone to a trained model: makes .venv if there is none, installs the package into it, and trains
# configs/quickstart.yaml on 2 processes on the CPU, the same on every machine.
#
# usage: bash launch/quickstart.sh [key=value ...]      settings to change, such as training.steps=50

set -euo pipefail
source "$(dirname "$0")/install.sh"
case ${1:-} in -h | --help) usage && exit ;; esac
cd "$ROOT"

install core
echo "Training configs/quickstart.yaml on 2 processes on the CPU."
CUDA_VISIBLE_DEVICES="" bash launch/train.sh configs/quickstart.yaml --nproc 2 "$@"

command=${VENV#"$ROOT"/}/bin/expert-parallel
cat <<END

Done. 2 processes on this CPU trained a small mixture-of-experts model, each holding half of its experts.
The run is in runs/quickstart:
  config.yaml      every setting of the run
  metrics.jsonl    loss, load of the experts, dropped tokens, speed: one line a step
  tensorboard/     the same as curves: ${command%/*}/tensorboard --logdir runs
  checkpoints/     plain safetensors

Next:
  $command generate runs/quickstart --prompt "def "
  bash launch/train.sh configs/quickstart.yaml training.steps=600      # goes on from the last checkpoint; see training/README
  bash launch/train.sh configs/quickstart.yaml run.folder=runs/mine data='{kind: files, paths: my.txt}'
  bash launch/train.sh -h                                              # more processes, torchrun's options, more nodes
END
