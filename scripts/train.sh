#!/usr/bin/env bash
# Train one job file on this node's GPUs:
#     NGPU=8 CONFIG=configs/530m/stage1.toml scripts/train.sh [overrides]
# CONFIG  the job file
# NGPU    processes, one per GPU (default: 8)
# Overrides are torchtitan's: --metrics.log_freq 1. On several nodes, run the same command on each, and set too:
# NNODES        number of nodes (default: 1)
# RDZV_ENDPOINT host:port at which they meet, on one of them
# RDZV_ID       a name for this launch (default: train)
# scripts/train.slurm does that on a SLURM cluster. PET_MAX_RESTARTS=3 is torchrun's --max_restarts=3.
set -euo pipefail
[[ ${1:-} =~ ^(-h|--help)$ ]] && sed -n '2,/^set/s/^# //p' "$0" && exit
fail() { echo "$1" >&2 && exit 1; }
: "${CONFIG:?is not set: name a job file, for example CONFIG=configs/530m/stage1.toml}"
[[ -f $CONFIG ]] || fail "CONFIG = $CONFIG: there is no such file in $PWD; give the path of a job file from there"
[[ ${NNODES:-1} == 1 ]] ||
    : "${RDZV_ENDPOINT:?is not set: NNODES = $NNODES nodes meet at the host:port of one of them}"
command -v torchrun > /dev/null ||
    fail "torchrun is not on the PATH: activate the environment first (after make setup: source .venv/bin/activate)"
# Growing segments of GPU memory leave no gaps too small for the activations of a long sequence.
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
# After SIGTERM: three steps of a slow job, and the save. Before torch 2.13 it is always 30 seconds.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240}"
# In a store that outlives torchrun's restart, ranks find addresses of killed ranks, and wait for them.
[[ ${PET_MAX_RESTARTS:-0} == 0 ]] || export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun --nnodes="${NNODES:-1}" --nproc_per_node="${NGPU:-8}" --rdzv_backend=c10d \
    --rdzv_endpoint="${RDZV_ENDPOINT:-localhost:0}" --rdzv_id="${RDZV_ID:-train}" \
    -m torchtitan_ext.train --job.config_file "$CONFIG" "$@"
