#!/usr/bin/env bash
# A real Slurm on one machine, for the tests: nodes gpu1 and gpu2, each with four fake A100s.
# Needs Debian or Ubuntu and root; no systemd, no database, no network.
#   scripts/slurm_cluster.sh start          start all daemons that are down (installs Slurm if it is missing)
#   eval "$(scripts/slurm_cluster.sh env)"  make this shell's sbatch, srun, squeue, scontrol … use it
#   scripts/slurm_cluster.sh status         list nodes and jobs; fails if a node cannot take jobs
#   scripts/slurm_cluster.sh lose NODE      simulate a power failure: daemon and jobs end at once
#   scripts/slurm_cluster.sh restore NODE   bring the node back, without jobs
#   scripts/slurm_cluster.sh stop           cancel the jobs, stop the daemons, remove the folder
# All files, logs included, are in one folder: $ARENA_SLURM or, by default, arena-slurm in $TMPDIR or /tmp.
# Only /etc/slurm/slurm.conf, a link to it, is elsewhere: Snakemake's jobs look for it there. The script does
# not touch a machine that already has a Slurm.
set -euo pipefail
umask 022

base=$(realpath -m "${ARENA_SLURM:-${TMPDIR:-/tmp}/arena-slurm}")
nodes=(gpu1 gpu2)
port=17816 # of the controller, the nodes have the next ones: a site's own Slurm has 6817 and 6818
marker="# Written by scripts/slurm_cluster.sh of Arena Distill"
export SLURM_CONF=$base/slurm.conf
link=/etc/slurm/slurm.conf
export PATH=$PATH:/usr/sbin:/sbin

main() {
    case "$# ${1:-}" in
        "1 start" | "1 stop") alone; "$1" ;;
        "1 status") status ;;
        "1 env") printf 'export SLURM_CONF=%q\n' "$SLURM_CONF" ;;
        "2 lose" | "2 restore")
            [[ " ${nodes[*]} " == *" $2 "* ]] || fail "there is no node $2, only ${nodes[*]}"
            alone; running; "$1" "$2" ;;
        *) fail "usage: $0 start | stop | status | env | lose NODE | restore NODE" ;;
    esac
}

# ---- commands

start() {
    [[ ! -e $link || $(readlink "$link") == "$SLURM_CONF" ]] || fail "$link: this machine has a Slurm already"
    write_files
    install_slurm
    mkdir -p "${link%/*}"
    ln -sfn "$SLURM_CONF" "$link"
    # --force: accept a parent folder that a group can write to.
    launch munged munged --force --pid-file="$base/run/munged.pid" --log-file="$base/log/munged.log" \
        --socket="$base/munge/socket" --key-file="$base/munge/key" --seed-file="$base/munge/seed"
    wait_for 10 munge --no-input --socket="$base/munge/socket" || broken munged
    launch slurmctld slurmctld -f "$SLURM_CONF" -L "$base/log/slurmctld.log"
    wait_for 30 scontrol ping || broken slurmctld
    for node in "${nodes[@]}"; do launch "slurmd.$node" slurmd -f "$SLURM_CONF" -N "$node"; done
    for node in "${nodes[@]}"; do wait_for 60 back "$node" || broken "slurmd.$node"; done
    say "${nodes[*]} ready after $SECONDS s; eval \"\$($0 env)\" makes a shell use them"
}

stop() {
    [[ -e $base ]] || { say "nothing to stop"; return; }
    if [[ $(pid_of slurmctld) ]]; then # give cancelled jobs a few seconds to clean up
        timeout 10 squeue --noheader --format=%A | timeout 10 xargs --no-run-if-empty scancel || true
        wait_for 5 no_jobs || true
    fi
    for node in "${nodes[@]}"; do lose "$node"; done
    for daemon in slurmctld munged; do finish "$daemon"; done
    [[ $(readlink "$link") != "$SLURM_CONF" ]] || rm "$link"
    rm -rf "$base"
    say "stopped, $base removed"
}

status() {
    running
    timeout 20 sinfo --format='%9P %10T %14G %N'
    timeout 20 squeue --format='%.6i %9P %24j %10T %.8M %R'
    for node in "${nodes[@]}"; do
        usable "$node" || fail "node $node is $(state "$node") or has no slurmd"
    done
}

lose() {
    local pids
    for _ in {1..50}; do # until none is left: one may have been starting another
        mapfile -t pids < <(pid_of "slurmd.$1"; job_processes "$1")
        (( ${#pids[@]} )) || return 0
        kill -KILL "${pids[@]}" 2>/dev/null || true
        sleep 0.1
    done
    fail "node $1: processes ${pids[*]} do not die"
}

restore() {
    # Back within SlurmdTimeout, a node would not be missed, and its young jobs would "run" for ever.
    [[ $(pid_of "slurmd.$1") ]] || scontrol update nodename="$1" state=down reason="lost its power"
    launch "slurmd.$1" slurmd -f "$SLURM_CONF" -N "$1"
    wait_for 60 back "$1" || broken "slurmd.$1"
    say "node $1 is $(state "$1")"
}

# ---- files

write_files() {
    local host address node listen=NoCtldInAddrAny,NoInAddrAny
    host=$(uname -n | cut -d. -f1)
    read -r address _ < <(getent ahostsv4 "$host") || fail "add 127.0.0.1 $host to /etc/hosts"
    # Slurm listens on the address of the machine's name, as a rule a loopback one, and on no other. Only if
    # that is Debian's 127.0.1.1, srun and the nodes listen on all: they see each other as 127.0.0.1.
    [[ $address != 127.0.1.1 ]] || listen=NoCtldInAddrAny
    mkdir -p "$base"/{log,run,state,spool,munge,dev}
    node="NodeHostname=$host NodeAddr=$address CPUs=32 RealMemory=256000 Gres=gpu:a100:4"
    # cred_expire: how long a requeued job waits before it starts again (120 s if unset).
    # DefMemPerCPU: without it, a job that requests no memory gets all memory of the node.
    # config_overrides: the nodes have the CPUs and the memory written here, whatever the machine has.
    cat > "$SLURM_CONF" <<CONF
$marker
ClusterName=arena
SlurmctldHost=$host($address)
SlurmctldPort=$port
SlurmUser=root
AuthInfo=socket=$base/munge/socket,cred_expire=10
CommunicationParameters=$listen
SlurmctldPidFile=$base/run/slurmctld.pid
SlurmdPidFile=$base/run/slurmd.%n.pid
SlurmctldLogFile=$base/log/slurmctld.log
SlurmdLogFile=$base/log/slurmd.%n.log
StateSaveLocation=$base/state
SlurmdSpoolDir=$base/spool/%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=8000
GresTypes=gpu
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=4
MinJobAge=7200
SlurmdTimeout=20
ReturnToService=2
NodeName=${nodes[0]} Port=$((port + 1)) $node
NodeName=${nodes[1]} Port=$((port + 2)) $node
PartitionName=gpu Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=8
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF
CONF
    # Slurm believes in a typed GPU only if it has a character device: copies of /dev/null, never opened.
    for gpu in "$base"/dev/a100_{0..3}; do [[ -c $gpu ]] || mknod "$gpu" c 1 3; done
    echo "Name=gpu Type=a100 File=$base/dev/a100_[0-3]" > "$base/gres.conf"
    # Nothing here uses cgroups, but slurmd loads a plugin for them: v1 is the one that never minds.
    echo "CgroupPlugin=cgroup/v1" > "$base/cgroup.conf"
    [[ -s $base/munge/key ]] || (umask 077 && head -c 1024 /dev/urandom > "$base/munge/key")
}

install_slurm() {
    local programs=(slurmctld slurmd sbatch munged)
    (( $(type -P "${programs[@]}" | wc -l) < ${#programs[@]} )) || return 0
    command -v apt-get >/dev/null || fail "needs Slurm and munge, or apt-get to install them"
    say "installing Slurm"
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        slurmctld slurmd slurm-client munge; } </dev/null >"$base/log/apt.log" 2>&1 || broken apt
}

# ---- processes

launch() { # NAME COMMAND…: the command goes to the background by itself and writes run/NAME.pid
    [[ -z $(pid_of "$1") ]] || return 0
    say "starting $1"
    rm -f "$base/run/$1.pid"
    "${@:2}" </dev/null 9<&- || broken "$1" # 9 is our lock: a daemon would hold it all its life
}

finish() {
    local pid
    pid=$(pid_of "$1")
    [[ -z $pid ]] || { kill "$pid" && wait_for 10 ended "$pid"; } || kill -KILL "$pid"
}

# After a crash the number in a pid file may be another program's, so the command line must be ours too:
# the program, a path in our folder, and the daemon's name or node.
pid_of() {
    local pid
    pid=$(cat "$base/run/$1.pid" 2>/dev/null) || return 0
    [[ $(command_line "$pid") != "${1%.*} "*"$base/"*"${1#*.}"* ]] || echo "$pid"
}

command_line() { { tr '\0' ' ' < "/proc/$1/cmdline"; } 2>/dev/null; } # a process that has ended has none
ended() { [[ -z $(command_line "$1") ]]; }

# Slurm's own process per step, slurmstepd, is no child of slurmd but keeps its node's log open. What it
# runs has the node in its environment, however far it has detached itself.
job_processes() {
    local pid
    for pid in $(find /proc/[0-9]*/fd -lname "$base/log/slurmd.$1.log" 2>/dev/null | cut -d/ -f3); do
        [[ $(cat "/proc/$pid/comm" 2>/dev/null) != slurmstepd ]] || echo "$pid"
    done
    { grep -lszxF "SLURMD_NODENAME=$1" /proc/[0-9]*/environ || true; } | cut -d/ -f3
}

no_jobs() { for node in "${nodes[@]}"; do [[ -z $(job_processes "$node") ]] || return 1; done; }

state() { timeout 20 sinfo --noheader --nodes="$1" --partition=gpu --format=%T; }

usable() {
    [[ $(pid_of "slurmd.$1") && $(state "$1") =~ ^(idle|mixed|allocated|completing|planned)[+-]?$ ]]
}

back() { # usable, after a word to the controller if it has given the node up
    [[ ! $(state "$1") =~ ^(down|drain) ]] || scontrol update nodename="$1" state=resume
    usable "$1"
}

# ---- helpers

alone() { # root, in a folder that is ours, and one of us at a time
    (( EUID == 0 )) || fail "needs root"
    # Slurm's files know no quotes, and sockets' paths no more than 107 bytes.
    [[ $base =~ ^/[A-Za-z0-9_./-]{1,70}$ ]] || fail "ARENA_SLURM: at most 70 plain characters, not $base"
    [[ ! -e $base || -z $(ls -A "$base") || (-O $base && $(head -n 1 "$SLURM_CONF" 2>&1) == "$marker") ]] ||
        fail "$base is not this script's: set ARENA_SLURM to another folder"
    exec 9< "${BASH_SOURCE[0]}"
    flock 9
}

running() { [[ $(pid_of slurmctld) ]] || fail "not running: $0 start"; }

wait_for() { # SECONDS COMMAND…
    local deadline=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        (( SECONDS < deadline )) || return 1
        sleep 0.2
    done
}

broken() { tail -n 20 "$base/log/$1.log" >&2 2>/dev/null || true; fail "$1 failed; log: $base/log/$1.log"; }
say() { echo "slurm: $*"; }
fail() { echo "slurm: $*" >&2; exit 1; }

main "$@"
