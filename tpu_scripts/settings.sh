# shellcheck shell=bash disable=SC2153,SC2034  # variables that parse sets, or for others
# Sourced by the scripts of this folder: their settings, their messages, and how they call gcloud.
#
# A setting is an option (--num-slices 2) or a variable of the environment (NUM_SLICES=2); the
# option wins. A script names its settings in REQUIRED, OPTIONAL and SWITCHES, says what it does in
# SUMMARY, and calls `parse "$@"`, which exports the settings, so that one script can call another.

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "These scripts need bash 4.4 or newer; this is $BASH_VERSION." >&2
  exit 2
fi

SCRIPT=${0##*/}
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

declare -A ABOUT=(
  [PROJECT]="Google Cloud project"
  [ZONE]="zone of the TPUs, as us-central2-b"
  [NAME]="name of the queued resource; of the job for gpu_slurm.sh"
  [ACCELERATOR_TYPE]="type and size of a slice, as v4-32 or v5litepod-256"
  [RUNTIME_VERSION]="software of the TPU VMs, as tpu-ubuntu2204-base or v2-alpha-tpuv5-lite"
  [NUM_SLICES]="slices, joined by the data-centre network when more than one"
  [SPOT]="take pre-emptible capacity"
  [RESERVED]="take capacity of the project's reservation"
  [VALID_UNTIL]="give up waiting for capacity after this long, as 6h"
  [CREATE_FLAGS]="further flags of gcloud's create, separated by blanks"
  [SSH_FLAGS]="further flags of gcloud's ssh and scp, as --tunnel-through-iap"
  [POLL_SECONDS]="time between two looks at a state"
  [PYTHON]="the Python of the hosts to install with, 3.11 or newer"
  [EXTRAS]="extras of lmops_jax to install"
  [SOURCE]="checkout to copy: its files, committed or not, that git does not ignore"
  [WHEEL]="install this wheel file instead of a checkout"
  [REQUIREMENT]="install what pip finds under this instead, as lmops_jax[tpu]==0.1"
  [JOB_ENV]="NAME=VALUE for the job; may be given several times (variable: lines)"
  [ASSUME_SHARED]="believe that the workdir is shared, whatever its file system"
  [KEEP_ALIVE]="stay and watch; make a pre-empted slice anew and launch again"
  [MAX_RESTARTS]="end --keep-alive after so many restarts"
  [GRACE_POLLS]="looks at an ended job, or six times that at a silent one, before --keep-alive acts"
  [STOP_SECONDS]="how long to wait for the hosts to stop"
  [NODE]="slice to look at, from 0, or all"
  [WORKER]="host of the slice, from 0, or all"
  [TAIL_LINES]="lines of the log to begin with"
  [NO_FOLLOW]="print and end, do not wait for more"
  [WORKDIR]="the run's --workdir on the hosts"
  [DESTINATION]="folder here, or gs://BUCKET/FOLDER, to copy to"
  [YES]="do not ask"
  [DRY_RUN]="print the commands, run none"
  [NODES]="nodes"
  [GPUS_PER_NODE]="GPUs of a node, and so processes of a node"
  [PARTITION]="SLURM partition"
  [ACCOUNT]="SLURM account"
  [TIME]="time limit, as 24:00:00; the job requeues itself when it is over"
  [CPUS_PER_TASK]="CPU cores of a process"
  [VENV]="virtual environment with lmops_jax[gpu], on storage that all nodes share"
  [CONTAINER]="image with lmops_jax[gpu]: a .sif file (apptainer), or else a name for pyxis"
  [CONTAINER_MOUNTS]="FROM:TO[,FROM:TO] to mount into the container"
  [SAVE_SECONDS]="time before the limit at which the job is told to save and end"
  [LOG_DIR]="folder for the batch script and the logs, on storage that all nodes share"
  [SBATCH_FLAGS]="further flags of sbatch, separated by blanks"
)
declare -A DEFAULT=(
  [NUM_SLICES]=1 [POLL_SECONDS]=30 [PYTHON]=python3 [EXTRAS]=tpu [MAX_RESTARTS]=100
  [GRACE_POLLS]=5 [STOP_SECONDS]=600 [NODE]=0 [WORKER]=0 [TAIL_LINES]=50 [SOURCE]=$(dirname "$HERE")
  [NODES]=1 [SAVE_SECONDS]=120 [LOG_DIR]=lmops_slurm
)

say() { printf '%s: %s\n' "$SCRIPT" "$*" >&2; }
die() { say "$@"; exit 1; }
usage() { say "$*; see $SCRIPT --help."; exit 2; }

option() { local name=${1,,}; printf -- '--%s' "${name//_/-}"; }

# The arguments as words that any POSIX shell reads back as they are.
quote() {
  local word words=()
  for word; do
    if [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then words+=("$word")
    else words+=("'${word//\'/\'\\\'\'}'"); fi
  done
  printf '%s' "${words[*]}"
}

help() {
  local name
  printf '%s\n\nsettings, each an option or a variable of the environment:\n' "$SUMMARY"
  for name in "${REQUIRED[@]}" "${OPTIONAL[@]}" "${SWITCHES[@]}" DRY_RUN; do
    local note=""
    [[ " ${REQUIRED[*]} " == *" $name "* ]] && note=" (required)"
    [[ -n ${DEFAULT[$name]:-} ]] && note=" (default ${DEFAULT[$name]})"
    printf '  %-20s %-18s %s%s\n' "$(option "$name")" "$name" "${ABOUT[$name]}" "$note"
  done
}

# Reads options into exported variables and what follows -- into REST; refuses what is missing.
parse() {
  REST=()
  local word name value
  while (($#)); do
    word=$1; shift
    case $word in
      --help | -h) help; exit 0 ;;
      --) REST=("$@"); break ;;
      --*) ;;
      *) usage "'$word' is not an option" ;;
    esac
    name=${word%%=*} name=${name#--} name=${name//-/_} name=${name^^}
    if [[ " ${SWITCHES[*]} DRY_RUN " == *" $name "* && $word != *=* ]]; then
      declare -gx "$name=1"
    elif [[ " ${REQUIRED[*]} ${OPTIONAL[*]} " == *" $name "* ]]; then
      if [[ $word == *=* ]]; then value=${word#*=}
      elif (($#)); then value=$1; shift
      else usage "$word has no value"; fi
      [[ $name == JOB_ENV && -n ${JOB_ENV:-} ]] && value=$JOB_ENV$'\n'$value
      declare -gx "$name=$value"
    else
      usage "there is no option ${word%%=*}"
    fi
  done
  for name in "${OPTIONAL[@]}" "${SWITCHES[@]}" DRY_RUN; do
    declare -gx "$name=${!name:-${DEFAULT[$name]:-}}"
  done
  require "${REQUIRED[@]}"
  for name in NUM_SLICES POLL_SECONDS MAX_RESTARTS GRACE_POLLS STOP_SECONDS TAIL_LINES NODES \
    GPUS_PER_NODE CPUS_PER_TASK SAVE_SECONDS; do
    [[ " ${REQUIRED[*]} ${OPTIONAL[*]} " == *" $name "* && -n ${!name:-} ]] || continue
    [[ ${!name} =~ ^[0-9]+$ ]] ||
      usage "$(option "$name") ($name) is '${!name}', not a whole number"
  done
  [[ ${NUM_SLICES:-1} != 0 ]] || usage "--num-slices (NUM_SLICES) is 0; it must be at least 1"
}

# Refuses in one sentence the settings that have no value.
require() {
  local name missing=()
  for name; do
    [[ -n ${!name:-} ]] || missing+=("$(option "$name") ($name)")
  done
  ((${#missing[@]} == 0)) && return
  local list
  printf -v list '%s, ' "${missing[@]}"
  usage "missing: ${list%, }; give each as the option or set the variable of that name"
}

# Checks the lmops command in REST and the lines of JOB_ENV; sets RUN_DIR to its --workdir, and
# VARIABLES.
job_command() {
  local index line
  [[ ${REST[0]:-} != lmops ]] || REST=("${REST[@]:1}")
  ((${#REST[@]})) || usage "no command; write it after --, as -- run FILE.gin --workdir /SHARED/DIR"
  RUN_DIR="" VARIABLES=()
  for index in "${!REST[@]}"; do
    case ${REST[index]} in
      --workdir) RUN_DIR=${REST[index + 1]:-} ;;
      --workdir=*) RUN_DIR=${REST[index]#*=} ;;
    esac
  done
  [[ -n $RUN_DIR ]] || usage "the command has no --workdir; give a folder that all hosts share"
  [[ $RUN_DIR != *://* ]] || usage "--workdir is '$RUN_DIR', but lmops needs a path; mount shared" \
    "storage on the hosts and name a folder of it"
  [[ $RUN_DIR == /* ]] || usage "--workdir is '$RUN_DIR', which each host would look for in a" \
    "folder of its own; begin it with /"
  while IFS= read -r line; do
    [[ -n $line ]] || continue
    [[ $line =~ ^[A-Za-z_][A-Za-z_0-9]*= ]] ||
      usage "--job-env (JOB_ENV) is '$line', not NAME=VALUE"
    VARIABLES+=("$line")
  done <<<"$JOB_ENV"
}

# Runs a command, or prints it where this is a dry run.
run() {
  if [[ -n $DRY_RUN ]]; then quote "$@"; echo; else "$@"; fi
}

# ------------------------------------------------------------------------------------- Cloud TPU

queued() {
  local verb=$1; shift
  run gcloud compute tpus queued-resources "$verb" "$@" "--project=$PROJECT" "--zone=$ZONE"
}

# Sets STATE of the queued resource (ABSENT where there is none) and REASON; fails where gcloud
# cannot tell, with its words in REASON.
look() {
  local errors
  errors=$(mktemp)
  STATE="" REASON=""
  if STATE=$(queued describe "$NAME" \
    '--format=value(state.state,state.failedData.error.message)' 2>"$errors"); then
    [[ $STATE == *$'\t'* ]] && REASON=${STATE#*$'\t'}
    STATE=${STATE%%$'\t'*}
    rm -f "$errors"
    [[ -n $DRY_RUN ]] && { echo "$STATE"; STATE=ACTIVE; }
    return 0
  fi
  REASON=$(tr '\n' ' ' <"$errors")
  rm -f "$errors"
  [[ $REASON == *NOT_FOUND* ]] || return 1
  STATE=ABSENT REASON=""
}

look_or_die() { look || die "gcloud cannot describe $NAME: $REASON"; }

# Waits until the queued resource is ACTIVE; fails with STATE and REASON where it will not be.
wait_active() {
  local before=""
  while look_or_die; do
    [[ $STATE == "$before" || -n $DRY_RUN ]] || say "$NAME is $STATE"
    before=$STATE
    case $STATE in
      ACTIVE) return 0 ;;
      CREATING | ACCEPTED | WAITING_FOR_RESOURCES | PROVISIONING) sleep "$POLL_SECONDS" ;;
      *) return 1 ;;
    esac
  done
}

# Sets HOSTS, the number of hosts of each slice, NUM_HOSTS, of all, and PREEMPTED, a slice that was
# taken away; fails where gcloud does.
count_hosts() {
  local index node count state
  HOSTS=() NUM_HOSTS=0 PREEMPTED=""
  for ((index = 0; index < NUM_SLICES; index++)); do
    node=$NAME
    ((NUM_SLICES > 1)) && node=$NAME-$index
    count=$(run gcloud compute tpus tpu-vm describe "$node" "--project=$PROJECT" "--zone=$ZONE" \
      '--format=value(networkEndpoints.len(),state)') || return 1
    [[ -n $DRY_RUN ]] && { echo "$count"; count=1; }
    IFS=$'\t' read -r count state <<<"$count"
    [[ $state != PREEMPTED ]] || PREEMPTED=$node
    [[ $count =~ ^[0-9]+$ ]] || { say "gcloud tells '$count' for the hosts of $node."; return 1; }
    HOSTS+=("$count")
    NUM_HOSTS=$((NUM_HOSTS + count))
  done
}

# remote NODE WORKER COMMAND: a shell command on hosts, by number or all.
remote() {
  # shellcheck disable=SC2086  # several flags in one variable
  queued ssh "$NAME" "--node=$1" "--worker=$2" "--command=$3" --quiet ${SSH_FLAGS:-}
}

# copy NODE WORKER FROM TO: of which one begins with "$NAME:".
copy() {
  # shellcheck disable=SC2086
  queued scp "$3" "$4" "--node=$1" "--worker=$2" --quiet ${SSH_FLAGS:-}
}

# ask_at NODE WORKER COUNT ACTION ARGUMENTS...: host.sh on COUNT hosts. Sets REPLIES to one line a
# host, "HOST STATE ...", and REFUSED to those that could not. Fails, with REASON, where a host is
# silent: gcloud only warns of a slice that it cannot reach, so its exit code says too little.
ask_at() {
  local node=$1 worker=$2 count=$3 errors line said
  shift 3
  errors=$(mktemp)
  REPLIES=() REFUSED=()
  said=$(remote "$node" "$worker" "bash lmops/host.sh $(quote "$@")" 2>"$errors") || true
  [[ -n $DRY_RUN ]] && { echo "$said"; rm -f "$errors"; return 0; }
  while IFS= read -r line; do
    [[ $line == "lmops-host "* ]] || continue
    line=${line#lmops-host }
    REPLIES+=("$line")
    [[ $line == *" refused: "* ]] && REFUSED+=("${line/ refused:/:}")
  done <<<"$said"
  line=$(grep -v '^SSH: \|^Using ssh batch size' "$errors" | tail -n 1) || true
  rm -f "$errors"
  ((${#REPLIES[@]} == count)) && return 0
  REASON="${#REPLIES[@]} of $count hosts answered${line:+ ($line)}"
  [[ $line != *"lmops/host.sh: No such file"* ]] || REASON+="; run install.sh"
  return 1
}

ask() { ask_at all all "$NUM_HOSTS" "$@"; }

ask_or_die() {
  local text
  ask "$@" || die "$REASON."
  ((${#REFUSED[@]} == 0)) && return
  printf -v text '%s; ' "${REFUSED[@]}"
  die "${#REFUSED[@]} of $NUM_HOSTS hosts refused: ${text%; }"
}

replies() { ((${#REPLIES[@]} == 0)) || printf '%s\n' "${REPLIES[@]}" | sort; }
