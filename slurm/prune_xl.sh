#!/usr/bin/env bash
# Train and prune on all GPUs of all nodes of a Slurm job: one task per GPU.
#
#   sbatch --nodes 4 slurm/prune_xl.sh preset=sit_xl2_256 model.weights=sit_xl2 data.shards='/data/in256_latents/train' \
#       prune.target_depth=14 prune.end_step=20000 train.num_steps=100000 run.name=half
#
# Words after the script go to `entprune_ds.cli.train` as they are. sbatch options win over the defaults below: --nodes,
# --gpus-per-node, --time, --account, --partition. Without GPUs, say how many tasks of how many CPUs a node gets:
#
#   sbatch --nodes 2 --gpus-per-node=0 --ntasks-per-node=4 --cpus-per-task=8 slurm/prune_xl.sh ...
#
# A job lives on until the training is finished:
# - Slurm sends USR1 (--signal) three minutes before the time limit: the ranks agree on a step, save a checkpoint and
#   leave, and this script requeues the job, which goes on with the same run folder and the same W&B run. What has not
#   left when a quarter of that time remains is ended, and goes on from the newest checkpoint.
# - pre-emption and scontrol requeue send TERM: the ranks do the same within Slurm's KillWait (30 s, mostly), or go on from the
#   newest checkpoint. A node that fails is the same without the TERM.
# - a rank that crashes ends the others; the job is requeued, up to ENTPRUNE_MAX_RESTARTS times without a newer checkpoint.
#   So it is when ranks are refused (status 2) after they have written one: such trouble may pass.
# - scancel JOB ends it for good; scancel --signal=USR1 JOB saves first; scancel --batch --signal=USR1 JOB saves and requeues.
# The same sbatch line goes on with a run whose job has ended.
#
# Exit status: 0 finished, or requeued; 2 refused, with the reason; 85 saved and left because somebody asked for it; else
# that of the ranks (entprune-ds train --help).
#
# Variables for interpreter, container, logs: see slurm/env.sh. And:
#   ENTPRUNE_MAX_RESTARTS   restarts without a newer checkpoint (default: 3); what a run has had is in its restarts.json
#
#SBATCH --job-name=prune_xl
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append

script=prune_xl.sh
root="${ENTPRUNE_ROOT:-${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}}"  # Slurm runs a copy: the script's own path says nothing
# shellcheck source=slurm/env.sh
source "$root/slurm/env.sh" || {
    echo "error: call sbatch in the folder that holds slurm/, or set \`ENTPRUNE_ROOT\` to it." >&2
    exit 2
}

requeue() {  # WHY
    echo "$1: job $SLURM_JOB_ID is requeued"
    local try
    for try in {1..12}; do  # Slurm's controller may be away for a moment
        scontrol requeue "$SLURM_JOB_ID" && exit 0
        ((try == 12)) || sleep 5
    done
    echo "error: Slurm does not requeue the job. The same sbatch line goes on with the run." >&2
    exit 1
}

start_job
number ENTPRUNE_MAX_RESTARTS 3
count=("most=$ENTPRUNE_MAX_RESTARTS" "start=$SLURM_RESTART_COUNT" "job=$SLURM_JOB_ID" "logs=$logs")
for pause in 10 20 40 0; do
    folder=$(on_first_node begin "${count[@]}" -- "$@") && break || status=$?
    # The first time an error is the user's to mend. Later it was right before: a node or the controller is in trouble.
    ((SLURM_RESTART_COUNT > 0 && status != 2 && status != 3 && pause > 0)) || exit "$status"
    sleep "$pause"
done
if ! check_nodes "$folder" "${folder:+$folder/restarts.json}"; then
    ((SLURM_RESTART_COUNT > 0)) || exit 2
    requeue "a node failed its check, though the job has run before"
fi
[[ "$stop" != USR1 ]] || requeue "the time limit is near"
run_ranks entprune_ds.cli.train "$@"

[[ "$stop" != TERM ]] || exit "$status"  # Slurm has decided already: it requeues, or somebody has cancelled
[[ "$stop" != USR1 || "$status" == 0 || "$status" == 2 ]] || requeue "the time limit is near"
case "$status" in
    0 | "$STOPPED") exit "$status" ;;
esac
on_first_node again "${count[@]}" "status=$status" -- "$@" && again=0 || again=$?
case "$again" in
    2 | 3) exit "$status" ;;  # anything else that is not 0 says nothing of the run; the next start counts
esac
requeue "the ranks ended with status $status"
