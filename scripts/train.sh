#!/usr/bin/env bash
# Train one job file: NGPU=8 CONFIG=configs/530m/stage1.toml scripts/train.sh [overrides]
# On many nodes the same command runs on each of them, with NNODES and RDZV_ENDPOINT (host:port, the host being
# one of them) set too; scripts/train.slurm does that for a cluster.
set -euo pipefail
: "${CONFIG:?CONFIG is not set: name a job file, for example CONFIG=configs/530m/stage1.toml}"
if [[ ! -f $CONFIG ]]; then
    echo "CONFIG = $CONFIG: there is no such file in $PWD; give the path of a job file from there" >&2
    exit 1
fi
if [[ ${NNODES:-1} != 1 ]]; then
    : "${RDZV_ENDPOINT:?RDZV_ENDPOINT is not set: NNODES = $NNODES nodes meet at the host:port of one of them}"
fi
# Segments of GPU memory that can grow leave no gaps that an activation of a long sequence doesn't fit into.
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
exec torchrun --nnodes="${NNODES:-1}" --nproc_per_node="${NGPU:-8}" --rdzv_backend=c10d \
    --rdzv_endpoint="${RDZV_ENDPOINT:-localhost:0}" --rdzv_id="${RDZV_ID:-train}" \
    -m torchtitan.train --job.config_file "$CONFIG" "$@"
