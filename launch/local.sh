#!/usr/bin/env bash
# Train on this machine: launch/local.sh [--nproc N] [overrides…]          (the same as `rung launch local`)
#
# N processes, by default one for each GPU, or one where there is none. Under a scheduler use launch/slurm/train.sbatch.
# With --module M after --nproc, `python -m M` is what they run, as rung.ckpt.
# PYTHON names the interpreter; by default that of the checkout's .venv, else python3.
set -euo pipefail

nproc_per_node=""
[[ "${1:-}" != --nproc=* ]] || set -- --nproc "${1#*=}" "${@:2}"
if [[ "${1:-}" == "--nproc" ]]; then
  [[ "${2:-}" =~ ^[1-9][0-9]*$ ]] || { echo "--nproc=${2:-} is not a number of processes; legal values: 1, 2, 3, …" >&2; exit 2; }
  nproc_per_node=$2
  shift 2
fi
module=rung.train
if [[ "${1:-}" == "--module" ]]; then
  module=$2
  shift 2
fi
[[ "${1:-}" == "--" ]] && shift

num_gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
[[ -n "$nproc_per_node" ]] || nproc_per_node=$((num_gpus > 0 ? num_gpus : 1))

if [[ -z "${PYTHON:-}" ]]; then
  PYTHON=$(dirname "${BASH_SOURCE[0]}")/../.venv/bin/python
  [[ -x "$PYTHON" ]] || PYTHON=python3
fi

# Every process would otherwise start a thread for each core, or torchrun would leave it one.
if [[ -z "${OMP_NUM_THREADS:-}" ]]; then
  cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
  export OMP_NUM_THREADS=$((cores > nproc_per_node ? cores / nproc_per_node : 1))
fi
# SIGUSR1 means "save and stop". The workers handle it; it would kill the agent, which has no handler for it.
trap '' USR1

options=(--rdzv-backend=c10d --rdzv-endpoint=localhost:0 --max-restarts=0 --nproc-per-node="$nproc_per_node")
# Without GPUs one process imports torch, and all ranks are forked from it.
[[ "$num_gpus" -gt 0 || "$module" != rung.train ]] || options+=(--start-method=forkserver)
exec "$PYTHON" -m rung.cli.torchrun "${options[@]}" -m "$module" "$@"
