#!/usr/bin/env bash
# A real Slurm of several nodes on this one machine, to try the scripts of slurm/ as a cluster would run them.
#
#   eval "$(tools/local_slurm.sh up)"   # starts it, or finds it running, and sets SLURM_CONF, which all Slurm commands read
#   sbatch --gpus-per-node=0 --ntasks-per-node=2 --cpus-per-task=1 slurm/encode_latents.sh ...
#   tools/local_slurm.sh status         # says what runs; exit status 0 when all of it does
#   tools/local_slurm.sh down           # ends its jobs and its daemons, and removes its folder
#   tools/local_slurm.sh install        # installs Debian's slurm-wlm and munge, as `up` does when they are missing
#
# Only the installation needs root.
#
# Variables:
#   LOCAL_SLURM_DIR     folder of this instance; another folder is another Slurm  (default: ${TMPDIR:-/tmp}/local_slurm_$UID)
#   LOCAL_SLURM_NODES   nodes                                                     (default: 2)
#   LOCAL_SLURM_CPUS    CPUs that a node claims to have, whatever the machine has (default: 4)
#   LOCAL_SLURM_GPUS    GPUs that a node claims to have, though there is none     (default: 0)

set -euo pipefail
umask 022
PATH="$PATH:/usr/sbin:/sbin"
dir="${LOCAL_SLURM_DIR:-${TMPDIR:-/tmp}/local_slurm_$UID}"
nodes="${LOCAL_SLURM_NODES:-2}" cpus="${LOCAL_SLURM_CPUS:-4}" gpus="${LOCAL_SLURM_GPUS:-0}"
export SLURM_CONF="$dir/slurm.conf"  # for the commands below and for the daemons

say() { echo "local_slurm: $*" >&2; }
fail() { say "error: $*"; exit 1; }

check_settings() {
    # Unix sockets lie in the folder, and their names may have 107 characters.
    [[ "$dir" =~ ^/[[:alnum:]/._-]{1,70}$ ]] ||
        fail "\`LOCAL_SLURM_DIR\` is '$dir'; it must be an absolute path of at most 71 letters, digits and /._-"
    [[ "$nodes" =~ ^[1-9][0-9]?$ ]] || fail "\`LOCAL_SLURM_NODES\` is '$nodes'; it must be a number from 1 to 99"
    [[ "$cpus" =~ ^[1-9][0-9]{0,2}$ ]] || fail "\`LOCAL_SLURM_CPUS\` is '$cpus'; it must be a number from 1 to 999"
    [[ "$gpus" =~ ^[0-9]{1,2}$ ]] || fail "\`LOCAL_SLURM_GPUS\` is '$gpus'; it must be a number from 0 to 99"
}

install() {
    command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v munged >/dev/null && return
    { [[ $UID == 0 ]] && command -v apt-get >/dev/null; } ||
        fail "Slurm is not installed; run, as root, on Debian or Ubuntu: apt-get install slurm-wlm munge"
    say "installing slurm-wlm and munge"
    export DEBIAN_FRONTEND=noninteractive
    local command=(timeout 300 apt-get install -qq -y --no-install-recommends slurm-wlm munge)
    "${command[@]}" >/dev/null 2>&1 && return  # without an update, where the lists of packages are there
    { timeout 120 apt-get update -qq && "${command[@]}"; } >&2 || fail "apt-get could not install slurm-wlm and munge, see above"
}

# The first of `nodes` + 1 free ports in a row, below those that slurm/encode_latents.sh takes.
find_ports() {
    local first port try
    for try in {1..100}; do
        first=$((10000 + RANDOM % 9900))
        for ((port = first; port <= first + nodes; port++)); do
            (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null && continue 2  # somebody answers
        done
        echo "$first"
        return
    done
    fail "no free ports between 10000 and 19999 after $try tries"
}

write_conf() {
    local port host me memory i
    port=$(find_ports) host=$(hostname -s) me=$(id -un) memory=$(awk '/MemTotal/ { print int($2 / 1024) }' /proc/meminfo)
    mkdir -p "$dir"/{state,log,pid,spool}
    (umask 077 && head -c 128 /dev/urandom >"$dir/munge.key")
    cat >"$SLURM_CONF" <<CONF
# local_slurm: $1
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
AuthType=auth/munge
AuthInfo=socket=$dir/munge.socket
SlurmUser=$me
SlurmdUser=$me
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/pid/slurmctld
SlurmdPidFile=$dir/pid/slurmd-%n
SlurmctldLogFile=$dir/log/slurmctld
SlurmdLogFile=$dir/log/slurmd-%n
MailProg=/bin/true
# Jobs of two instances must not choose the same rendezvous port, so each instance counts from a number of its own.
FirstJobId=$((RANDOM + 1))
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
# A job that can never run is refused; one that is cancelled ends soon; a node that was down is used again.
EnforcePartLimits=ANY
KillWait=5
ReturnToService=2
PartitionName=all Nodes=ALL Default=YES
NodeName=DEFAULT CPUs=$cpus RealMemory=$memory
CONF
    : >"$dir/gres.conf"
    if ((gpus > 0)); then
        for ((i = 0; i < gpus; i++)); do : >"$dir/gpu$i"; done
        echo "Name=gpu Count=$gpus File=$dir/gpu[0-$((gpus - 1))]" >"$dir/gres.conf"
        printf '%s\n' "GresTypes=gpu" "NodeName=DEFAULT Gres=gpu:$gpus" >>"$SLURM_CONF"
    fi
    for ((i = 1; i <= nodes; i++)); do
        mkdir "$dir/spool/n$i"
        echo "NodeName=n$i NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + i))" >>"$SLURM_CONF"
    done
}

# The number of the process of a pid file, as long as it is that daemon of this instance and not a later namesake.
process() {
    local pid
    pid=$(cat "$dir/pid/$1" 2>/dev/null) && [[ "$pid" =~ ^[0-9]+$ ]] &&
        [[ "$(cat "/proc/$pid/comm" 2>/dev/null)" == "${1%%-*}" ]] &&
        grep -qF -- "$dir/" "/proc/$pid/cmdline" && echo "$pid"
}

wait_for() {  # SECONDS COMMAND...: until the command succeeds, or the time is over
    local end=$((SECONDS + $1))
    shift
    until "$@"; do
        ((SECONDS < end)) || return 1
        sleep 0.1
    done
}

ours() { grep -qs '^# local_slurm: ' "$SLURM_CONF"; }
daemons() { echo munged slurmctld; sed -n 's/^NodeName=\(n[0-9]*\) .*/slurmd-\1/p' "$SLURM_CONF"; }

complete() {
    local name usable
    for name in $(daemons); do process "$name" >/dev/null || return 1; done
    usable=$(timeout 10 sinfo --noheader --Node --format=%t 2>/dev/null | grep -cxE 'idle|mix|alloc|comp')
    ((usable == $(daemons | grep -c '^slurmd-')))
}

# Start the daemons that do not run; those that died find their jobs again.
start() {
    local name
    for name in $(daemons); do
        process "$name" >/dev/null && continue
        case "$name" in
            munged)  # by force: the folder may be closed to other users, or open to their writing
                timeout 20 munged --force --socket="$dir/munge.socket" --key-file="$dir/munge.key" \
                    --pid-file="$dir/pid/munged" --log-file="$dir/log/munged" --seed-file="$dir/munge.seed" 2>/dev/null ;;
            slurmctld) timeout 20 slurmctld -f "$SLURM_CONF" ;;
            *) timeout 20 slurmd -f "$SLURM_CONF" -N "${name#slurmd-}" ;;
        esac || return
    done
    wait_for 60 complete
}

up() {
    check_settings
    install
    local description="$nodes node(s) with $cpus CPU(s) and $gpus GPU(s)"
    if [[ ! -e "$dir" ]]; then
        write_conf "$description"
    elif ! ours; then
        fail "$dir was not made by this script; set \`LOCAL_SLURM_DIR\` to another folder, or remove it"
    elif ! grep -qxF "# local_slurm: $description" "$SLURM_CONF"; then
        fail "a Slurm with other settings is in $dir; run \`tools/local_slurm.sh down\` first, or set \`LOCAL_SLURM_DIR\`"
    fi
    if ! start >&2 </dev/null; then
        tail -n 20 "$dir"/log/* >&2 || true
        down
        fail "Slurm did not start; the ends of its logs are above"
    fi
    echo "export SLURM_CONF=$SLURM_CONF"
}

no_jobs() { [[ -z "$(timeout 10 squeue --noheader)" ]]; }
no_steps() { [[ -z "$(find "$dir/spool" -type s)" ]]; }  # a step of a job has a socket there as long as it runs
ended() { [[ -z "$(tr -d '\0' 2>/dev/null <"/proc/$1/cmdline")" ]]; }  # or nobody has asked for its exit status yet

end_jobs() {
    no_steps || complete || start >&2 </dev/null || return  # jobs live on when a daemon dies
    process slurmctld >/dev/null || return 0
    timeout 10 squeue --noheader --format=%A 2>/dev/null | sort -u | xargs -r timeout 10 scancel
    wait_for 20 no_jobs && wait_for 10 no_steps
}

down() {
    [[ -e "$dir" ]] || return 0
    ours || fail "$dir was not made by this script, and stays"
    local name pid
    end_jobs || say "warning: processes of jobs may be left, see: ps ax | grep slurmstepd"
    for name in $(daemons | tac); do
        pid=$(process "$name") || continue
        kill "$pid" 2>/dev/null || continue
        wait_for 15 ended "$pid" || kill -KILL "$pid" 2>/dev/null || true
    done
    rm -rf "$dir"
}

status() {
    ours || { echo "no Slurm in $dir"; return 1; }
    local name
    for name in $(daemons); do process "$name" >/dev/null || { echo "$name does not run"; return 1; }; done
    complete || { echo "not all nodes are up"; return 1; }
    echo "$(sed -n 's/^# local_slurm: //p' "$SLURM_CONF") up"
}

case "${1:-}" in
    up | down | status | install) "$1" ;;
    *) fail "call it with one of: up, down, status, install" ;;
esac
