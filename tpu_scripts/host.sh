#!/usr/bin/env bash
# Runs on every host of a slice, in ~/lmops, where install.sh puts it; the other scripts call it.
#
#   host.sh install PYTHON KIND WHAT   a venv with the upload: KIND checkout, wheel or requirement
#   host.sh check shared|any WORKDIR   whether a job could start here
#   host.sh start COMMAND...           one job, detached, its output in job/log
#   host.sh state                      idle, running PID, finished CODE, stopped CODE, or lost
#   host.sh stop                       SIGTERM to the job
#   host.sh tail LINES [follow]        the job's log
#   host.sh pack WORKDIR               report, logs and manifests of a run to collect.tgz
#
# Answers with one line, "lmops-host HOSTNAME STATE ...". The job holds a lock on job/lock, which
# ends with its last process, so that no number of a process that is long gone is believed.

set -euo pipefail
cd "$(dirname "$0")"
mkdir -p job
LOCK=$PWD/job/lock

reply() { printf 'lmops-host %s %s\n' "$(hostname)" "$*"; }
refuse() { reply "refused: $*"; exit 1; }
running() { ! flock --nonblock "$LOCK" true; }

state() {
  if running; then echo "running $(cat job/pid 2>/dev/null || echo '-')"
  elif [[ -s job/exit_code && -e job/stop_requested ]]; then echo "stopped $(cat job/exit_code)"
  elif [[ -s job/exit_code ]]; then echo "finished $(cat job/exit_code)"
  elif [[ -e job/command ]]; then echo "lost"  # its host was restarted, or it was killed
  else echo "idle"; fi
}

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

pip() {
  venv/bin/python -m pip install --quiet "$@" >install.log 2>&1 </dev/null ||
    refuse "pip failed (~/lmops/install.log): $(tail -n 1 install.log)"
}

install() {
  local python=$1 kind=$2 what=$3 version
  running && refuse "a job is running; stop it first (stop.sh)"
  version=$(version_of "$python") ||
    refuse "there is no $python; install one and name it with --python"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    refuse "$python is Python $version, but lmops_jax needs 3.11 or newer; install one (on" \
      "Ubuntu 22.04 the package python3.11-venv) and name it with --python python3.11"
  if [[ $(version_of venv/bin/python) != "$version" ]]; then
    "$python" -m venv --clear venv >install.log 2>&1 ||
      refuse "$python cannot make a virtual environment: $(tail -n 1 install.log)"
  fi
  if [[ $kind == checkout ]]; then
    rm -rf checkout.new
    mkdir checkout.new
    tar -xzf upload/checkout.tgz -C checkout.new
    rm -rf checkout
    mv checkout.new checkout
    set -- --editable "$PWD/checkout[$what]"
  elif [[ $kind == wheel ]]; then
    rm -rf checkout
    set -- "$PWD/upload/$what"
  else
    rm -rf checkout
    set -- --upgrade "$what"
  fi
  pip "$@"
  # Another build of the version that is there would be left out.
  [[ $kind != wheel ]] || pip --force-reinstall --no-deps "$@"
  reply "installed $(venv/bin/lmops --version), Python $version"
}

check() {
  local shared=$1 workdir=$2 folder=$2
  [[ -x venv/bin/lmops ]] || refuse "lmops_jax is not installed; run install.sh"
  running && refuse "a job is running (process $(cat job/pid)); wait for it, or stop it (stop.sh)"
  while [[ ! -d $folder ]]; do folder=$(dirname "$folder"); done
  # df --local knows network file systems by their source, as in server:/share.
  if [[ $shared == shared ]] && df --local "$folder" >/dev/null 2>&1; then
    refuse "$workdir is on storage of this host alone ($(stat --file-system \
      --format=%T "$folder")); mount one that all hosts share there, or give --assume-shared"
  fi
  reply ready
}

start() {
  exec 9>>"$LOCK"
  flock --nonblock 9 || refuse "a job is running (process $(cat job/pid)); stop it first (stop.sh)"
  rm -f job/exit_code job/stop_requested job/pid
  printf '%q ' "$@" >job/command
  printf '%s launched: %s\n' "$(date -u +%FT%TZ)" "$(cat job/command)" >>job/log
  local home=$PWD folder=$PWD
  [[ -d checkout ]] && folder=$PWD/checkout
  # shellcheck disable=SC2016  # for the inner shell, which outlives this one
  PATH=$PWD/venv/bin:$PATH setsid bash -c '
    home=$1 folder=$2; shift 2
    cd "$folder"
    "$@" &
    echo $! >"$home/job/pid"
    code=0
    wait $! || code=$?
    echo "$code" >"$home/job/exit_code"
  ' lmops "$home" "$folder" "$@" </dev/null >>job/log 2>&1 &
  until [[ -s job/pid ]]; do sleep 0.05; done
  reply "started $(cat job/pid)"
}

stop() {
  if running; then
    touch job/stop_requested
    kill -TERM "$(cat job/pid)" 2>/dev/null || true  # it may end just now
    reply "stopping $(cat job/pid)"
  else
    reply "$(state)"
  fi
}

follow() {
  local lines=$1 how=${2:-}
  [[ -e job/log ]] || refuse "no job has been launched here"
  if [[ $how == follow ]] && running; then
    set -- --follow=name "--pid=$(cat job/pid)"
  else
    set --
  fi
  tail --lines="$lines" "$@" job/log | sed --unbuffered "s/^/$(hostname): /"
}

pack() {
  local workdir=$1
  [[ -d $workdir ]] || refuse "there is no folder $workdir"
  local archive=$PWD/collect.tgz
  (
    cd "$workdir"
    find . \( -path ./report/\* -o -name manifest.json -o -name metrics.jsonl \
      -o -path ./log.txt -o -path ./config.gin -o -path ./lmops.json \) -type f -print0 |
      tar --create --gzip --null --files-from=- --file="$archive"
  )
  reply "packed $(tar --list --file="$archive" | wc -l) files"
}

action=$1; shift
case $action in
  install | check | start | stop | pack) "$action" "$@" ;;
  state) reply "$(state)" ;;
  tail) follow "$@" ;;
  *) refuse "host.sh knows no action $action; run install.sh to bring it up to date" ;;
esac
