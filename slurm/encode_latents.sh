#!/usr/bin/env bash
# Encode shards of pixels into VAE moments, on all GPUs of all nodes of a Slurm job: one task per GPU.
#
#   sbatch --nodes 4 slurm/encode_latents.sh data.shards=/data/in256 out=/data/in256_latents sample.vae=/models/sd-vae-ft-ema
#
# Words after the script go to the command as they are: key=value settings, --dry-run, --help. The same line again goes
# on where a job ended. sbatch options win over the defaults below: --nodes, --gpus-per-node, --time, --account, --partition.
# Without GPUs, say how many tasks of how many CPUs a node gets:
#
#   sbatch --nodes 2 --gpus-per-node=0 --ntasks-per-node=4 --cpus-per-task=8 slurm/encode_latents.sh ...
#
# Variables (set them before sbatch, or in slurm/env.sh, which is read when it is there):
#   ENTPRUNE_PYTHON      interpreter of the environment                     (default: python3)
#   ENTPRUNE_TASKS       tasks per node, when they are not one per GPU      (default: the GPUs of a node, or else --ntasks-per-node)
#   ENTPRUNE_CONTAINER   image for srun --container-image (pyxis)           (default: none)
#   ENTPRUNE_MOUNTS      --container-mounts for it                          (default: none)
#   ENTPRUNE_SRUN        further srun options, separated by spaces          (default: none)
#   SBATCH_ACCOUNT, SBATCH_PARTITION   are read by sbatch itself
#
#SBATCH --job-name=encode_latents
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append

set -euo pipefail

if [[ -z "${SLURM_JOB_ID:-}" ]]; then
    echo "error: this script runs in a Slurm job. Start it with: sbatch slurm/encode_latents.sh key=value ..." >&2
    exit 2
fi

root="${SLURM_SUBMIT_DIR:-$PWD}"  # Slurm runs a copy of this script, so its own path says nothing
if [[ -f "$root/slurm/env.sh" ]]; then
    # shellcheck source=/dev/null
    source "$root/slurm/env.sh"
fi
cd "$root"

# A fixed port would meet another job on the same node; the job's number gives one between 20000 and 31999, below those
# that Linux hands out itself. The address is the one that Slurm reaches the first node by: a node's name need not resolve.
MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000))
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
first=${hosts%%$'\n'*}
MASTER_ADDR=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p') || true
MASTER_ADDR="${MASTER_ADDR:-$first}"
gpus="${SLURM_GPUS_ON_NODE:-0}"
((gpus > 0)) || gpus="${SLURM_NTASKS_PER_NODE:-1}"
tasks="${ENTPRUNE_TASKS:-$gpus}"
export MASTER_ADDR MASTER_PORT
export ENTPRUNE_PYTHON="${ENTPRUNE_PYTHON:-python3}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
export PYTHONUNBUFFERED=1

options=(--ntasks-per-node="$tasks" --ntasks="$((tasks * SLURM_JOB_NUM_NODES))" --kill-on-bad-exit=1)
[[ -n "${SLURM_CPUS_PER_TASK:-}" ]] && options+=(--cpus-per-task="$SLURM_CPUS_PER_TASK")
[[ -n "${ENTPRUNE_CONTAINER:-}" ]] && options+=(--container-image="$ENTPRUNE_CONTAINER")
[[ -n "${ENTPRUNE_MOUNTS:-}" ]] && options+=(--container-mounts="$ENTPRUNE_MOUNTS")
if [[ -n "${ENTPRUNE_SRUN:-}" ]]; then
    read -r -a further <<<"$ENTPRUNE_SRUN"
    options+=("${further[@]}")
fi

echo "job $SLURM_JOB_ID: $SLURM_JOB_NUM_NODES node(s) x $tasks task(s), rendezvous $MASTER_ADDR:$MASTER_PORT"
# Each task learns its rank from Slurm; "$@" hands every word on unchanged, whatever is in it.
# shellcheck disable=SC2016
exec srun "${options[@]}" bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_JOB_NUM_NODES))
    exec "$ENTPRUNE_PYTHON" -m entprune_ds.cli.encode "$@"
' encode_latents "$@"
