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
# Variables for interpreter, container, logs: see slurm/env.sh.
#
#SBATCH --job-name=encode_latents
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue

script=encode_latents.sh
root="${ENTPRUNE_ROOT:-${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}}"  # Slurm runs a copy: the script's own path says nothing
# shellcheck source=slurm/env.sh
source "$root/slurm/env.sh" || {
    echo "error: call sbatch in the folder that holds slurm/, or set \`ENTPRUNE_ROOT\` to it." >&2
    exit 2
}

start_job
out=.
for word in "$@"; do
    case "$word" in out=* | data.out=*) out=${word#*=} ;; esac
done
check_nodes "$out" || exit 2
run_ranks entprune_ds.cli.encode "$@"
exit "$status"
