#!/usr/bin/env bash
# Submits one lmops command to a SLURM cluster with GPUs.
set -euo pipefail
SUMMARY="usage: gpu_slurm.sh --name NAME --partition P --time T ... -- ARGUMENTS OF lmops

Writes a batch script to LOG_DIR/NAME.sbatch and submits it; all processes write to
LOG_DIR/NAME-JOB.log. It starts one process a GPU, because that is how jax.distributed reads SLURM:
a process takes the GPU with its number within the node, so one process a node would use one GPU.
Every process sees all GPUs of its node.

SLURM sends SIGTERM --save-seconds before the time limit, and when it pre-empts the job; lmops then
ends with 143 and the job goes back into the queue (not after scancel), to continue at its last
checkpoint, since the command and its --workdir are the same. The --workdir begins with / and lies
on storage that all nodes share and lock on: NFS, Lustre, GPFS.

  gpu_slurm.sh --name tune --partition gpu --time 24:00:00 --nodes 2 --gpus-per-node 8 \\
      --venv /shared/venv -- run train/finetune.gin --workdir /shared/run ..."
REQUIRED=(NAME PARTITION TIME GPUS_PER_NODE)
OPTIONAL=(NODES ACCOUNT CPUS_PER_TASK VENV CONTAINER CONTAINER_MOUNTS SAVE_SECONDS LOG_DIR JOB_ENV
  SBATCH_FLAGS)
SWITCHES=()
. "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
parse "$@"
[[ -z $VENV || -z $CONTAINER ]] ||
  usage "both --venv (VENV) and --container (CONTAINER) are set; take one"
[[ -n $VENV$CONTAINER ]] ||
  usage "missing: --venv (VENV) or --container (CONTAINER), where lmops_jax is installed"
[[ $NAME =~ ^[A-Za-z0-9._-]+$ ]] || usage "--name (NAME) is '$NAME'; use letters, digits, . _ and -"
job_command

[[ $LOG_DIR == /* ]] || LOG_DIR=$PWD/$LOG_DIR
step=(srun --kill-on-bad-exit=1 --gpu-bind=none)
lmops=(lmops)
if [[ -n $VENV ]]; then
  lmops=("$VENV/bin/lmops")
elif [[ $CONTAINER == *.sif ]]; then
  lmops=(apptainer exec --nv ${CONTAINER_MOUNTS:+"--bind=$CONTAINER_MOUNTS"} "$CONTAINER" lmops)
else
  step+=("--container-image=$CONTAINER" ${CONTAINER_MOUNTS:+"--container-mounts=$CONTAINER_MOUNTS"})
fi

directives() {
  printf '#SBATCH %s\n' "--job-name=$NAME" "--partition=$PARTITION" "--time=$TIME" \
    "--nodes=$NODES" "--ntasks-per-node=$GPUS_PER_NODE" "--gpus-per-node=$GPUS_PER_NODE" \
    "--output=$LOG_DIR/%x-%j.log" --open-mode=append "--signal=TERM@$SAVE_SECONDS" --requeue
  [[ -z $ACCOUNT ]] || echo "#SBATCH --account=$ACCOUNT"
  [[ -z $CPUS_PER_TASK ]] || echo "#SBATCH --cpus-per-task=$CPUS_PER_TASK"
}

script=$(
  echo '#!/usr/bin/env bash'
  directives
  cat <<END

# --signal reaches the processes and not this shell; scancel reaches both.
cancelled=""
trap 'cancelled=1' TERM
code=0
$(quote "${step[@]}" env "${VARIABLES[@]}" "${lmops[@]}" "${REST[@]}") || code=\$?
if [[ \$code == 143 && -z \$cancelled ]]; then
  echo "The time is over; the job continues from the queue."
  scontrol requeue "\$SLURM_JOB_ID"
fi
exit "\$code"
END
)
read -ra flags <<<"$SBATCH_FLAGS"
if [[ -n $DRY_RUN ]]; then
  echo "$script"
else
  mkdir -p "$LOG_DIR"
  echo "$script" >"$LOG_DIR/$NAME.sbatch"
fi
run sbatch "${flags[@]}" "$LOG_DIR/$NAME.sbatch"
