#!/usr/bin/env bash
# Measure a GPU's speed beside seven others: scripts/bench_eight.sh fsdp|cp|one [arguments of bench_train.py]
#
#   fsdp   NGPU=8 GPUs, 98,304 tokens each: stage 1 and dense
#   cp     one sequence on all of them: 1,048,576 tokens (1m, 1m-selective) and 262,144 with dense layers (256k)
#   one    the comparison on one GPU: stage 1, dense, 1m, and for 1m-selective one GPU's share of its tokens
#
# Two to five minutes each. The rows of all go to OUTPUT=outputs/bench_eight.json.
set -uo pipefail
[[ ${1:-} =~ ^(-h|--help)$ ]] && sed -n '2,/^set/s/^# \{0,1\}//p' "$0" && exit
cd "$(dirname "$0")/.."
n=${NGPU:-8}
part=${1:-}
shift
shared=parallelism.context_parallel_degree=$n
selective=activation_checkpoint.per_op_sac_force_recompute_mm_shapes_by_fqns=none    # every other product is kept
recipe=(--run stage1 configs/530m/stage1.toml --run dense configs/530m/dense.toml)

bench() {
    # A worker reads: every rank reads its whole sequence, which takes 0.25 s per million tokens.
    python3 scripts/bench_train.py --append --output "${OUTPUT:-outputs/bench_eight.json}" \
        --steps 8 --window 2 --settings training.dataloader.num_workers=1 "$@" || failed=1
}

case $part in
fsdp)
    bench --nproc "$n" "${recipe[@]}" "$@"
    ;;
cp)
    bench --nproc "$n" \
        --run 1m configs/530m-1m/stage1.toml "$shared" \
        --run 1m-selective configs/530m-1m/stage1.toml "$shared" "$selective" \
        --run 256k configs/530m-256k/stage1.toml "$shared" activation_checkpoint.mode=none "$@"
    ;;
one)
    # An eighth of the tokens can't hold top_k = 4096 (their coarsest level has 2,048 entries). With 1,760 each token
    # attends to as many rows as one of the whole sequence: gathered_len squared over seq_len is the same.
    bench "${recipe[@]}" \
        --run 1m configs/530m-1m/stage1.toml \
        --run 1m-selective configs/530m-1m/stage1.toml "$selective" training.seq_len=131072 \
        lighthouse.top_k=1760 lighthouse.tile_winners=110 "$@"
    ;;
*)
    echo "'$part': must be fsdp, cp or one; see --help" >&2
    exit 2
    ;;
esac
exit "${failed:-0}"
