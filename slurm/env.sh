# shellcheck shell=bash
# What the scripts of slurm/ share: checks of the job, rendezvous, settings of the ranks, one task per GPU, logs, signals.
# The scripts source it from the folder in which sbatch was called, or from ENTPRUNE_ROOT; it is not run by itself.
#
# Variables, set before sbatch or in slurm/site.sh, which is read first when it is there (a place for `module load`):
#   ENTPRUNE_PYTHON         interpreter of the environment                  (default: python3)
#   ENTPRUNE_TASKS          tasks per node, when not one per GPU            (default: the GPUs of a node, else --ntasks-per-node)
#   ENTPRUNE_CONTAINER      image for srun --container-image (pyxis)        (default: none)
#   ENTPRUNE_MOUNTS         --container-mounts for it                       (default: none)
#   ENTPRUNE_SRUN           further srun options, separated by spaces       (default: none)
#   ENTPRUNE_LOGS           folder of the ranks' logs                       (default: logs)
#   ENTPRUNE_CHECK_SECONDS  longest check of a node before the start; 0: no check (default: 180)
#   ENTPRUNE_ROOT           folder that holds slurm/, and where relative paths start  (default: where sbatch was called)
#   SBATCH_ACCOUNT, SBATCH_PARTITION, SBATCH_TIMELIMIT, SBATCH_EXCLUDE ...  are read by sbatch itself
#
# A script sets `script` (its name) and `root`, sources this file, and calls start_job, then check_nodes FOLDER, then
# run_ranks MODULE WORDS... .
# shellcheck disable=SC2154,SC2034  # `script` and `root` come from the script, which reads `status` and `stop`

set -euo pipefail
if [[ -f "$root/slurm/site.sh" ]]; then
    set +u  # the functions of environment modules and of conda read variables that nobody has set
    # shellcheck source=/dev/null
    source "$root/slurm/site.sh"
    set -u
fi

# ---------------------------------------------------------------- settings of the ranks

settings() {
    export ENTPRUNE_PYTHON="${ENTPRUNE_PYTHON:-python3}"
    # Threads of a rank: the CPUs that it was given. Without it every rank would start a thread per CPU of the node.
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
    # NCCL says what went wrong, and nothing else. INFO shows which networks it has found: set it when a job is slow.
    export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
    # A node with several networks: name the one between the nodes (e.g. ib0). NCCL and gloo, which carries small
    # messages, must take the same one; neither is set here, since no name holds for every cluster.
    [[ -z "${NCCL_SOCKET_IFNAME:-}" ]] || export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$NCCL_SOCKET_IFNAME}"
    export PYTHONUNBUFFERED=1    # the last line of a log is the last thing that happened
    export PYTHONFAULTHANDLER=1  # a crash in C code leaves the Python stack in the log
}

# ---------------------------------------------------------------- checks of the job

fail() {
    echo "error: $*" >&2
    exit 2
}

number() {  # NAME DEFAULT: a variable that must be a whole number
    local value="${!1:-$2}"
    [[ "$value" =~ ^[0-9]{1,9}$ ]] || fail "\`$1\` is '$value'; it must be a whole number."
    printf -v "$1" %d "$((10#$value))"
}

check_job() {
    local name
    [[ -n "${SLURM_JOB_ID:-}" ]] || fail "this script runs in a Slurm job. Start it with: sbatch slurm/$script key=value ..."
    for name in SLURM_JOB_NODELIST SLURM_JOB_NUM_NODES; do
        [[ -n "${!name:-}" ]] ||
            fail "\`$name\` is missing, though \`SLURM_JOB_ID\` is $SLURM_JOB_ID. Start the script with sbatch slurm/$script, and unset nothing of Slurm."
    done
    # sbatch in an interactive step hands its variables on; Slurm's own process above a batch script tells the truth.
    [[ -z "${SLURM_STEP_ID:-}" || "$(tr '\0' ' ' <"/proc/$PPID/cmdline")" == *.batch\]* ]] ||
        fail "srun has started this script, so every task would start a whole job. Start it with: sbatch slurm/$script ..."
    [[ -z "${SLURM_GPUS_PER_TASK:-}" ]] ||
        fail "\`--gpus-per-task\` hides the other GPUs of a node from a rank, which NCCL needs to see. Give --gpus-per-node instead."
    for name in SLURM_JOB_ID SLURM_JOB_NUM_NODES; do number "$name" 0; done
    mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    ((${#hosts[@]} == SLURM_JOB_NUM_NODES)) ||
        fail "\`SLURM_JOB_NUM_NODES\` is $SLURM_JOB_NUM_NODES, but \`SLURM_JOB_NODELIST\` ($SLURM_JOB_NODELIST) names ${#hosts[@]} node(s). Start the script with sbatch, from a shell without variables of another job."
    number ENTPRUNE_CHECK_SECONDS 180
    number SLURM_RESTART_COUNT 0
}

count_tasks() {
    gpus="${SLURM_GPUS_ON_NODE:-0}" tasks="${SLURM_NTASKS_PER_NODE:-1}"
    number gpus 0
    ((gpus == 0)) || tasks=$gpus
    [[ -z "${ENTPRUNE_TASKS:-}" ]] || tasks=$ENTPRUNE_TASKS
    [[ "$tasks" =~ ^[1-9][0-9]{0,3}$ ]] ||
        fail "there must be one task per node or more, got '$tasks'. Set \`ENTPRUNE_TASKS\` or --ntasks-per-node to a number."
    ((gpus == 0 || tasks <= gpus)) ||
        fail "$tasks tasks share $gpus GPU(s) of a node, but every rank needs one. Lower \`ENTPRUNE_TASKS\` or raise --gpus-per-node."
    local wanted=$((tasks * ${SLURM_CPUS_PER_TASK:-1}))
    ((wanted <= ${SLURM_CPUS_ON_NODE:-$wanted})) ||
        fail "$tasks tasks of ${SLURM_CPUS_PER_TASK:-1} CPU(s) need $wanted CPUs of a node, but the job has $SLURM_CPUS_ON_NODE on ${hosts[0]}. Lower --cpus-per-task, or raise --ntasks-per-node."
}

# ---------------------------------------------------------------- the job

start_job() {  # the rest of the scripts relies on what this sets: hosts, tasks, logs, step, MASTER_ADDR, MASTER_PORT
    check_job
    cd "$root" || fail "cannot enter $root"
    count_tasks
    settings
    local label="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID:-}}"
    label="${SLURM_JOB_NAME:-${script%.sh}}-${label:-$SLURM_JOB_ID}"
    logs="${ENTPRUNE_LOGS:-logs}/${label//[^[:alnum:]._-]/_}"
    mkdir -p "$logs" || fail "the ranks' logs cannot be written to $logs. Set \`ENTPRUNE_LOGS\` to a folder that all nodes see."
    logs=$(cd "$logs" && pwd)
    step=(--overlap)  # options of every step; a check and the ranks may share a node's resources
    [[ -z "${ENTPRUNE_CONTAINER:-}" ]] || step+=(--container-image="$ENTPRUNE_CONTAINER")
    [[ -z "${ENTPRUNE_MOUNTS:-}" ]] || step+=(--container-mounts="$ENTPRUNE_MOUNTS")
    local further=()
    [[ -z "${ENTPRUNE_SRUN:-}" ]] || read -r -a further <<<"$ENTPRUNE_SRUN"
    step+=(${further[@]+"${further[@]}"})

    # The address is the one that Slurm reaches the first node by: a node's name need not resolve. A fixed port would meet
    # another job; the job's number, and how often it was started, give one between 20000 and 31999, below those that Linux
    # hands out itself, and check_nodes goes on to the next one that is free.
    MASTER_ADDR=$(scontrol show node "${hosts[0]}" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p') || true
    MASTER_ADDR="${MASTER_ADDR:-${hosts[0]}}"
    MASTER_PORT=$((20000 + (SLURM_JOB_ID + 37 * SLURM_RESTART_COUNT) % 12000))
    export MASTER_ADDR MASTER_PORT
}

on_first_node() {  # WORDS...: `entprune_ds.cli.slurm WORDS...` in the environment (and container) of the ranks
    srun "${step[@]}" --nodes=1 --ntasks=1 --nodelist="${hosts[0]}" "$ENTPRUNE_PYTHON" -m entprune_ds.cli.slurm "$@"
}

# Every node by itself and all at once, so that one that fails is known by name: the interpreter imports what the ranks
# need, the GPUs are there and work, the folder can be written. The first one finds the port of the rendezvous.
check_nodes() {  # FOLDER [FILE]: to write to; a file that the first node has written, which all must see. 1: a node failed
    ((ENTPRUNE_CHECK_SECONDS > 0)) || return 0
    local node pids=() failed=() i status
    ((gpus == 0)) || gpus=$tasks
    for node in "${hosts[@]}"; do
        timeout --kill-after=10 "$ENTPRUNE_CHECK_SECONDS" srun "${step[@]}" --nodes=1 --ntasks=1 --nodelist="$node" \
            "$ENTPRUNE_PYTHON" -m entprune_ds.cli.slurm node "gpus=$gpus" "folder=$1" "sees=${2:-}" "port=$MASTER_PORT" \
            >"$logs/node_$node.log" 2>&1 &
        pids+=($!)
    done
    for i in "${!hosts[@]}"; do
        node=${hosts[i]} status=0
        wait_for "${pids[i]}" || status=$?
        ((status == 0)) && grep -q '^port ' "$logs/node_$node.log" && continue
        failed+=("$node")
        echo "error: node $node failed its check before the start (log: $logs/node_$node.log):" >&2
        if ((status == 124 || status == 137)); then
            echo "    no answer within $ENTPRUNE_CHECK_SECONDS s (\`ENTPRUNE_CHECK_SECONDS\`)" >&2
        else
            grep . "$logs/node_$node.log" | tail -n 4 | sed 's/^/    /' >&2 || echo "    exit status $status" >&2
        fi
    done
    if ((${#failed[@]} > 0)); then
        local names
        names=$(IFS=,; echo "${failed[*]}")
        echo "error: ${#failed[@]} of ${#hosts[@]} node(s) cannot run this job: $names. Mend what is said above, or leave them out: sbatch --exclude=$names ..." >&2
        return 1
    fi
    MASTER_PORT=$(sed -n 's/^port //p' "$logs/node_${hosts[0]}.log")
}

wait_for() {  # PID: its exit status, however many signals interrupt the waiting
    local status
    while :; do
        signalled=
        wait "$1" && status=0 || status=$?
        [[ -n "$signalled" ]] || return "$status"
    done
}
signalled=

# ---------------------------------------------------------------- the ranks

STOPPED=85  # exit status of a rank that was asked to stop, has saved a checkpoint and left (entprune_ds/stop_request.py)

# One rank, in a shell of its own on its node. Its number comes from Slurm; its output goes to a file of its own, that of
# rank 0 to the job's output too. The first rank that does not end well writes down how, since srun would tell the highest
# status of all, those included that it has killed then. A rank that stopped as asked leaves with 0 here, since
# --kill-on-bad-exit would end the others in the middle of leaving.
#
# Where Slurm tracks processes by cgroups, which is usual, a signal reaches this shell and nothing below it, so it hands on
# USR1 and TERM. USR1 must not kill a Python that does not listen yet: it starts with the signal ignored.
rank() {
    local python='' shown=''
    trap '' USR1 INT TERM
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_JOB_NUM_NODES))
    local log=$ENTPRUNE_RANK_LOGS/rank_$RANK.log status
    if ! mkdir -p "$ENTPRUNE_RANK_LOGS" || ! echo "== rank $RANK on $SLURMD_NODENAME, start $1, $(date -Is)" >>"$log"; then
        echo "error: node $SLURMD_NODENAME cannot write $log. Set \`ENTPRUNE_LOGS\` to a folder that all nodes see." >&2
        exit 2
    fi
    shift
    if ((RANK == 0)); then
        exec 3> >(exec tee -a "$log")
        shown=$!
    else
        exec 3>>"$log"
    fi
    trap 'signalled=1; [[ -z "$python" ]] || kill -TERM "$python" 2>/dev/null' TERM
    "$ENTPRUNE_PYTHON" -m "$@" >&3 2>&1 &
    python=$!
    exec 3>&-
    trap 'signalled=1; kill -USR1 "$python" 2>/dev/null' USR1
    trap 'signalled=1; kill -INT "$python" 2>/dev/null' INT
    wait_for "$python" 2>/dev/null
    status=$?
    local try=0
    while [[ -n "$shown" ]] && kill -0 "$shown" 2>/dev/null && ((try++ < 300)); do sleep 0.1; done  # its last lines
    ((status != 0)) || exit 0
    (set -o noclobber && echo "$status $RANK $SLURMD_NODENAME" >"$ENTPRUNE_RANK_LOGS/ended") 2>/dev/null
    ((status == STOPPED)) || exit "$status"
}

hand_on() {  # SIGNAL: the batch shell tells the ranks to save and leave; again and again, for one may not listen yet
    signalled=$1 stop=$1
    [[ -n "$ranks" ]] || return 0
    echo "$1 arrived: the ranks are asked to save and leave" >&2
    local seconds=0
    [[ "$1" != USR1 ]] || seconds=$(seconds_to_save)
    kill "$asking" 2>/dev/null || true
    ask "$seconds" &
    asking=$!
}

ask() {  # SECONDS: what does not leave in that time is ended, so that the script can still requeue the job; 0: no limit
    local end=$((SECONDS + $1)) second=0
    while kill -0 "$ranks" 2>/dev/null; do
        ((second++ % 5)) || kill -USR1 "$ranks" || true
        sleep 1  # what is left of it when the script ends
        if (($1 > 0 && SECONDS >= end)); then
            echo "the ranks did not leave within $1 s; they are ended before the time limit" >&2
            kill -TERM "$ranks"
            return
        fi
    done
}

seconds_to_save() {  # three quarters of what the job has left; 0 when it has no limit
    local end
    end=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/.*EndTime=\([^ ]*\).*/\1/p') || true
    if [[ -z "$end" ]] || ! end=$(date -d "$end" +%s 2>/dev/null); then
        echo 0  # nobody says: no limit
        return
    fi
    local left=$(((end - $(date +%s)) * 3 / 4))
    echo $((left > 0 ? left : 1))
}
ranks='' stop='' asking=''
trap 'hand_on USR1' USR1  # --signal: the time limit is near
trap 'hand_on TERM' TERM  # pre-emption, scontrol requeue, scancel: Slurm knows what comes next

# Runs a module on all ranks. Sets `status`: 0 done, 85 stopped as asked, 2 refused; anything else is a crash.
run_ranks() {  # MODULE WORDS...: every word arrives as it is
    echo "job $SLURM_JOB_ID, start $((SLURM_RESTART_COUNT + 1)): $SLURM_JOB_NUM_NODES node(s) x $tasks task(s)," \
        "rendezvous $MASTER_ADDR:$MASTER_PORT, logs in $logs"
    rm -f "$logs/ended"
    local options=(--ntasks-per-node="$tasks" --ntasks="$((tasks * SLURM_JOB_NUM_NODES))" --kill-on-bad-exit=1)
    [[ -z "${SLURM_CPUS_PER_TASK:-}" ]] || options+=(--cpus-per-task="$SLURM_CPUS_PER_TASK")
    export STOPPED ENTPRUNE_RANK_LOGS=$logs
    srun "${options[@]}" "${step[@]}" bash -c "$(declare -f rank wait_for)"'; rank "$@"' rank "$((SLURM_RESTART_COUNT + 1))" "$@" &
    ranks=$! status=0
    [[ -z "$stop" ]] || hand_on "$stop"  # it came before there was anybody to tell
    wait_for "$ranks" || status=$?
    ranks=''
    kill "$asking" 2>/dev/null || true
    local rank node
    [[ -s "$logs/ended" ]] || return 0
    read -r status rank node <"$logs/ended"
    ((rank == 0 || status == STOPPED)) || tell_end "$rank" "$node"
}

tell_end() {  # RANK NODE: why the first rank has ended, which srun does not show; rank 0 may have been ended before it spoke
    echo "rank $1 on $2 ended first, with status $status; its log ($logs/rank_$1.log) ends with:" >&2
    tac "$logs/rank_$1.log" | sed '/^== rank /q' | tac | grep . | tail -n 4 | sed 's/^/    /' >&2 || true
}
