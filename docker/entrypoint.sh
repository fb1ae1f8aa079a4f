#!/bin/sh
# What the image runs: a launcher, Python or a shell as it is given; anything else is a command of expert-parallel.

case "${1:-}" in
    */* | torchrun | deepspeed | mpiexec | mpirun | python | python3 | bash | sh) ;;
    expert-parallel) ;;
    *) set -- expert-parallel "$@" ;;
esac
exec "$@"
