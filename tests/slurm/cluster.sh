#!/usr/bin/env bash
# A real Slurm cluster on one machine, for tests: a controller, several nodes with fake GPUs, accounting where MariaDB is.
#
#   tests/slurm/cluster.sh install    Debian's packages (root; nothing is started by them)
#   tests/slurm/cluster.sh start      prints the two lines that make Slurm's commands use this cluster
#   tests/slurm/cluster.sh stop       ends every daemon that start began, and removes all it made
#
# Everything lies in $SLURM_TEST_DIR (default /tmp/patch-slurm): no systemd, no file in /etc, no cgroups. Run it as root.
# NODES, CPUS, MEMORY (MB), GPUS, PORT and ACCOUNTING=0 change what is started.
set -euo pipefail

DIR=${SLURM_TEST_DIR:-/tmp/patch-slurm}
NODES=${NODES:-3} CPUS=${CPUS:-4} MEMORY=${MEMORY:-16000} GPUS=${GPUS:-2} PORT=${PORT:-16800}
ACCOUNTING=${ACCOUNTING:-$(command -v mariadbd slurmdbd >/dev/null && echo 1 || echo 0)}
PLUGINS=$(dpkg -L slurm-wlm-basic-plugins 2>/dev/null | grep -m1 '/slurm-wlm$' || true)
export SLURM_CONF=$DIR/etc/slurm.conf
PACKAGES="slurmctld slurmd slurm-client munge slurm-wlm-basic-plugins slurmdbd mariadb-server"

install() {
  command -v slurmctld slurmd munged >/dev/null && return
  # Packages that start daemons ask this file first.
  local policy=/usr/sbin/policy-rc.d
  if [ ! -e $policy ]; then
    trap 'rm -f /usr/sbin/policy-rc.d' EXIT
    printf '#!/bin/sh\nexit 101\n' > $policy && chmod 755 $policy
  fi
  apt-get update -qq
  # shellcheck disable=SC2086
  DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $PACKAGES >/dev/null
}

# The daemon of a pid file, if it runs: after a crash another process may have its number.
alive() {
  local pid; pid=$(cat "$1" 2>/dev/null) || return 1
  [ -n "$pid" ] && grep -qE '^(slurm|mariadbd|munged)' "/proc/$pid/comm" 2>/dev/null
}

until_true() {  # until_true SECONDS COMMAND...
  local tries=$((5 * $1)); shift
  for _ in $(seq "$tries"); do "$@" >/dev/null 2>&1 && return; sleep .2; done
  echo "cluster.sh: gave up waiting for: $*" >&2; return 1
}

write_configuration() {
  echo "CgroupAutomount=no" > "$DIR/etc/cgroup.conf"
  slurmctld -V | grep -qE ' 2[0-2]\.' || echo "CgroupPlugin=disabled" > "$DIR/etc/cgroup.conf"
  # A GPU needs a device file, whose last digit becomes its index: these are /dev/null under other names.
  for ((i = 0; i < GPUS; i++)); do [ -e "$DIR/dev/gpu$i" ] || mknod -m 666 "$DIR/dev/gpu$i" c 1 3; done
  cat > "$DIR/etc/gres.conf" <<END
AutoDetect=off
NodeName=sim[1-$NODES] Name=gpu Type=fake File=$DIR/dev/gpu[0-$((GPUS - 1))]
END
  {
    cat <<END
ClusterName=sim
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$PORT
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
# Requeued jobs wait until the credential of their first run has expired: 5 seconds here, two minutes by default.
AuthInfo=socket=$DIR/run/munge.sock,cred_expire=5
PluginDir=$PLUGINS
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$DIR/run/slurmctld.pid
SlurmdPidFile=$DIR/run/slurmd-%n.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
DefMemPerCPU=200
# Nodes may have more CPUs than the machine.
SlurmdParameters=config_overrides
# Memory is enforced by sampling, as there are no cgroups.
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=2
JobAcctGatherParams=OverMemoryKill,UsePss
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=1,defer
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# A job that is preempted gets the signal that it asked for (--signal), then the partition's GraceTime.
SlurmctldParameters=preempt_send_user_signal
ReturnToService=2
JobRequeue=1
KillWait=5
MinJobAge=300
MaxArraySize=20001
MaxJobCount=50000
SlurmctldTimeout=30
SlurmdTimeout=60
MessageTimeout=30
END
    if [ "$ACCOUNTING" = 1 ]; then
      cat <<END
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$((PORT + 1))
AccountingStoragePass=$DIR/run/munge.sock
AccountingStorageTRES=gres/gpu
END
    else
      echo "AccountingStorageType=accounting_storage/none"
    fi
    for ((i = 1; i <= NODES; i++)); do
      echo "NodeName=sim$i NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=$((PORT + 10 + i)) CPUs=$CPUS" \
        "RealMemory=$MEMORY Gres=gpu:fake:$GPUS State=UNKNOWN"
    done
    echo "PartitionName=main Nodes=ALL Default=YES MaxTime=1-0 DefaultTime=30 PriorityTier=10 GraceTime=20"
    echo "PartitionName=urgent Nodes=ALL MaxTime=1-0 DefaultTime=30 PriorityTier=100 PreemptMode=OFF"
  } > "$SLURM_CONF"
}

start_munge() {
  [ -s "$DIR/etc/munge.key" ] || (umask 077; head -c 1024 /dev/urandom > "$DIR/etc/munge.key")
  rm -f "$DIR"/run/munge.sock*
  # As root it wants --force.
  munged --force --key-file="$DIR/etc/munge.key" --socket="$DIR/run/munge.sock" --pid-file="$DIR/run/munged.pid" \
    --log-file="$DIR/log/munged.log" --seed-file="$DIR/run/munged.seed" --num-threads=4
}

sql() { mariadb --no-defaults --socket="$DIR/run/mysql.sock" -e "$1"; }

start_accounting() {
  [ -d "$DIR/mysql/mysql" ] || mariadb-install-db --no-defaults --user=root --datadir="$DIR/mysql" \
    --auth-root-authentication-method=normal --skip-test-db > "$DIR/log/mariadb-install.log" 2>&1
  setsid mariadbd --no-defaults --user=root --datadir="$DIR/mysql" --socket="$DIR/run/mysql.sock" \
    --pid-file="$DIR/run/mariadbd.pid" --bind-address=127.0.0.1 --port=$((PORT + 2)) --innodb-buffer-pool-size=64M \
    --innodb-lock-wait-timeout=900 > "$DIR/log/mariadbd.log" 2>&1 < /dev/null &
  until_true 60 sql "SELECT 1"
  for host in % localhost; do
    sql "CREATE USER IF NOT EXISTS slurm@'$host' IDENTIFIED BY 'slurm'; GRANT ALL ON slurm_acct_db.* TO slurm@'$host'"
  done
  (umask 077; cat > "$DIR/etc/slurmdbd.conf" <<END
AuthType=auth/munge
AuthInfo=socket=$DIR/run/munge.sock,cred_expire=5
PluginDir=$PLUGINS
DbdHost=$(hostname -s)
DbdAddr=127.0.0.1
DbdPort=$((PORT + 1))
SlurmUser=root
LogFile=$DIR/log/slurmdbd.log
PidFile=$DIR/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$((PORT + 2))
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
END
  )
  slurmdbd
  until_true 60 timeout 5 sacctmgr -n show cluster
  sacctmgr -i add cluster sim >/dev/null || true
  sacctmgr -i add account lab cluster=sim >/dev/null || true
  sacctmgr -i add user root account=lab cluster=sim DefaultAccount=lab >/dev/null || true
}

nodes_are_idle() { [ "$(sinfo -h -N -p main -t idle -o %N | wc -l)" = "$NODES" ]; }

start() {
  for file in "$DIR"/run/*.pid; do
    alive "$file" && { echo "cluster.sh: it runs already in $DIR ($file); stop it first" >&2; exit 1; }
  done
  [ -n "$PLUGINS" ] || { echo "cluster.sh: Slurm is not installed; run: $0 install" >&2; exit 1; }
  mkdir -p "$DIR"/{bin,etc,log,run,state,spool,dev}
  chmod 755 "$DIR" "$DIR"/*
  # snakemake-executor-plugin-slurm-jobstep clears all SLURM_ variables, the path of this configuration among them.
  printf '#!/bin/sh\nSLURM_CONF=%s exec %s "$@"\n' "$SLURM_CONF" "$(PATH=${PATH//$DIR\/bin:/} command -v srun)" > "$DIR/bin/srun"
  chmod 755 "$DIR/bin/srun"
  start_munge
  write_configuration
  [ "$ACCOUNTING" = 0 ] || start_accounting
  slurmctld
  for ((i = 1; i <= NODES; i++)); do mkdir -p "$DIR/spool/sim$i"; slurmd -N "sim$i"; done
  until_true 60 nodes_are_idle
  echo "export SLURM_CONF=$SLURM_CONF"
  echo "export PATH=$DIR/bin:\$PATH"
}

end() {  # end PIDFILE...: terminate, and kill after ten seconds
  for file in "$@"; do
    alive "$file" || continue
    local pid; pid=$(cat "$file")
    kill "$pid" 2>/dev/null || true
    for _ in $(seq 100); do kill -0 "$pid" 2>/dev/null || break; sleep .1; done
    if alive "$file"; then kill -9 "$pid" 2>/dev/null || true; fi
    rm -f "$file"
  done
}

no_jobs() { [ -z "$(timeout 5 squeue -h)" ]; }

stop() {
  if alive "$DIR/run/slurmctld.pid"; then
    timeout 10 scancel --user=root || true
    until_true 15 no_jobs || true
  fi
  end "$DIR"/run/slurmd-*.pid
  end "$DIR/run/slurmctld.pid" "$DIR/run/slurmdbd.pid" "$DIR/run/mariadbd.pid" "$DIR/run/munged.pid"
  rm -rf "$DIR"
}

case "${1:-}" in
  install | start | stop) "$1" ;;
  *) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "$0"; exit 2 ;;
esac
