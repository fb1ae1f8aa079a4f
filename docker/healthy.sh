#!/bin/sh
# Whether the container can do its work: its packages are there, and so are the GPUs that it was given. Containers are
# known to lose them while they run, for example when the host reloads systemd. Costs 30 ms and a call of nvidia-smi;
# importing torch would take seconds from the run, each time.
# Not asked: whether training goes on. A rank that hangs is found and named by the run itself (runtime.timeout_seconds);
# from here one would have to guess how long a step may take.

find='from importlib.util import find_spec; exit(not (find_spec("torch") and find_spec("expert_parallel")))'
python3 -c "$find" || { echo "torch or expert_parallel cannot be found"; exit 1; }

# The container toolkit brings nvidia-smi in together with the GPUs.
if command -v nvidia-smi >/dev/null; then
    nvidia-smi --list-gpus || exit 1
fi
