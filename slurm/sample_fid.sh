#!/usr/bin/env bash
# Draw the samples of a model on all GPUs of all nodes of a Slurm job, then measure them: FID and its companions.
#
#   sbatch --nodes 2 slurm/sample_fid.sh run=runs/half sample.out=half.npz sample.num_samples=50000 sample.cfg_scale=1.5 \
#       sample.vae=/models/sd-vae-ft-ema evaluate.extractor=inception evaluate.reference=VIRTUAL_imagenet256_labeled.npz
#
# Words after the script go to `entprune-ds sample` and then to `entprune-ds evaluate` as they are; `sample.out` is needed.
# The figures go to `evaluate.out`, unless that is given: the same name ending in .json. The same line again goes on where
# a job ended. sbatch options win over the defaults below; without GPUs: see slurm/prune_xl.sh.
#
# An array evaluates many things, one per line of a file: task N adds the words of line N (separated by blanks) to its own.
#
#   printf 'sample.cfg_scale=%s sample.out=half_%s.npz\n' 1.25 1.25 1.5 1.5 >scales.txt
#   ENTPRUNE_LINES=scales.txt sbatch --array=1-2 slurm/sample_fid.sh run=runs/half ...
#
# Variables for interpreter, container, logs: see slurm/env.sh.
#
#SBATCH --job-name=sample_fid
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue

script=sample_fid.sh
root="${ENTPRUNE_ROOT:-${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}}"  # Slurm runs a copy: the script's own path says nothing
# shellcheck source=slurm/env.sh
source "$root/slurm/env.sh" || {
    echo "error: call sbatch in the folder that holds slurm/, or set \`ENTPRUNE_ROOT\` to it." >&2
    exit 2
}

words=("$@")
add_line() {  # of the array task
    local line more
    [[ -n "${ENTPRUNE_LINES:-}" ]] ||
        fail "every task of the array would do the same. Set \`ENTPRUNE_LINES\` to a file that has the words of task N on line N."
    [[ -f "$ENTPRUNE_LINES" ]] || fail "\`ENTPRUNE_LINES\`: $ENTPRUNE_LINES is not there."
    line=$(sed -n "${SLURM_ARRAY_TASK_ID}p" "$ENTPRUNE_LINES")
    [[ -n "$line" ]] || fail "$ENTPRUNE_LINES has no line $SLURM_ARRAY_TASK_ID. Give --array=1-$(wc -l <"$ENTPRUNE_LINES")."
    read -r -a more <<<"$line"
    words+=("${more[@]}")
}

start_job
[[ -z "${SLURM_ARRAY_TASK_ID:-}" ]] || add_line
out='' figures=''
for word in ${words[@]+"${words[@]}"}; do
    case "$word" in
        sample.out=*) out=${word#*=} ;;
        evaluate.out=*) figures=$word ;;
        out=*) fail "\`out\` could be the samples or the figures. Give sample.out=FILE.npz, and evaluate.out=FILE.json if you like." ;;
    esac
done
[[ -n "$out" ]] || fail "\`sample.out\` is missing. Give sample.out=FILE.npz."
check_nodes "$(dirname "$out")" || exit 2
run_ranks entprune_ds.cli.sample "${words[@]}"
[[ "$status" == 0 ]] || exit "$status"
run_ranks entprune_ds.cli.evaluate "${words[@]}" "evaluate.samples=$out" "${figures:-evaluate.out=${out%.npz}.json}"
exit "$status"
