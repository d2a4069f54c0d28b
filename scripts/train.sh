#!/usr/bin/env bash
# Train one job file on this machine: NGPU=8 CONFIG=configs/530m/stage1.toml scripts/train.sh [overrides]
set -euo pipefail
: "${CONFIG:?CONFIG is not set: name a job file, for example CONFIG=configs/530m/stage1.toml}"
exec torchrun --standalone --nproc_per_node="${NGPU:-8}" -m torchtitan.train --job.config_file "$CONFIG" "$@"
