#!/usr/bin/env bash
# A slurm of two nodes on this host, without systemd: munged, slurmctld and two slurmd, all state in one folder.
#   testbed.sh install         Debian packages slurm-wlm and munge, where they are missing
#   testbed.sh start FOLDER    then: export SLURM_CONF=FOLDER/slurm.conf
#   testbed.sh stop FOLDER     ends every job and daemon; the folder stays
# Needs root. Ports 17000 to 17002 of the loopback interface. Not a model for a real cluster.
set -euo pipefail
PATH=$PATH:/usr/sbin

fail() { echo "testbed.sh: $*" >&2; exit 1; }

usage() { sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2; }

install() {
  local missing=
  for program in slurmctld slurmd sbatch munged; do
    command -v "$program" >/dev/null || missing="$missing $program"
  done
  [ -n "$missing" ] || return 0
  command -v apt-get >/dev/null || fail "no apt-get here: install$missing (of slurm and munge) yourself"
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq >/dev/null || fail "apt-get update failed"
  apt-get install -y -qq --no-install-recommends slurm-wlm munge >/dev/null ||
    fail "apt-get could not install slurm-wlm and munge"
}

configure() {
  mkdir -p "$folder"/{state,spool.n1,spool.n2,run}
  chmod 755 "$folder" "$folder/run"
  [ -s "$folder/munge.key" ] || (umask 077 && head -c 1024 /dev/urandom >"$folder/munge.key")
  local host
  host=$(hostname -s)
  # cred_expire is also how long a requeued job waits; config_overrides lets nodes claim more cores than there are.
  cat >"$folder/slurm.conf" <<CONF
ClusterName=testbed
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=17000
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/run/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool.%n
SlurmctldPidFile=$folder/run/slurmctld.pid
SlurmdPidFile=$folder/run/slurmd.%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2
ReturnToService=2
JobRequeue=1
KillWait=5
MinJobAge=600
GresTypes=gpu
NodeName=n[1-2] NodeHostname=$host NodeAddr=127.0.0.1 Port=[17001-17002] CPUs=4 Gres=gpu:2 State=UNKNOWN
PartitionName=all Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
CONF
  # Not GPUs, but slurm gives them out as such.
  echo "Name=gpu File=/dev/null,/dev/zero" >"$folder/gres.conf"
}

running() { # name of a pid file
  local file="$folder/run/$1.pid"
  [ -s "$file" ] && kill -0 "$(cat "$file")" 2>/dev/null
}

start() {
  configure
  export SLURM_CONF=$folder/slurm.conf
  running munged || munged --force --key-file="$folder/munge.key" --socket="$folder/run/munge.socket" \
    --pid-file="$folder/run/munged.pid" --log-file="$folder/munged.log" --seed-file="$folder/munge.seed" 2>/dev/null ||
    fail "munged did not start; see $folder/munged.log"
  running slurmctld || slurmctld -i || fail "slurmctld did not start; see $folder/slurmctld.log"
  for node in n1 n2; do
    running "slurmd.$node" || slurmd -N "$node" || fail "slurmd did not start; see $folder/slurmd.$node.log"
  done
  for _ in $(seq 100); do
    if [ "$(sinfo --noheader --format=%T 2>/dev/null | sort -u)" = idle ]; then return; fi
    sleep 0.2
  done
  sinfo >&2 || true
  fail "the nodes are not idle after 20 s; see $folder/slurmctld.log"
}

stop() {
  [ -d "$folder/run" ] || return 0
  export SLURM_CONF=$folder/slurm.conf
  if running slurmctld; then
    scancel --user="$(id -un)" || true
    for _ in $(seq 75); do
      if [ -z "$(squeue --noheader)" ]; then break; fi
      sleep 0.2
    done
  fi
  for name in slurmd.n1 slurmd.n2 slurmctld munged; do end "$name"; done
}

end() { # name of a pid file
  running "$1" || return 0
  local number
  number=$(cat "$folder/run/$1.pid")
  kill "$number"
  for _ in $(seq 100); do
    kill -0 "$number" 2>/dev/null || return 0
    sleep 0.1
  done
  kill -9 "$number"
}

[ $# -ge 1 ] || usage
[ "$(id -u)" = 0 ] || fail "slurm's daemons need root: run it as root, for example in a container"
case "$1 $#" in
  "install 1") install ;;
  "start 2" | "stop 2")
    folder=$(mkdir -p "$2" && cd "$2" && pwd)
    [ ${#folder} -le 80 ] || fail "$folder: too long a path for a socket, take a shorter one"
    "$1"
    ;;
  *) usage ;;
esac
