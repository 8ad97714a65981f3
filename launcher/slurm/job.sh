#!/bin/bash
# %%title
%%options
#SBATCH --requeue
#SBATCH --open-mode=append
# If the submitting shell sets these, they would take precedence over slurm's.
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE LOCAL_SIZE PMI_RANK PMI_SIZE MASTER_ADDR MASTER_PORT

# Before the time limit slurm signals this shell, which signals the ranks: they save and exit, and the job is requeued.
# An array's last task has the job id of the whole array, so the task's index is needed to tell them apart.
me=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
warned=
trap 'warned=yes; scancel --signal=USR1 "$me"' USR1

%%setup
set -u
export MASTER_ADDR=${MASTER_ADDR:-$(hostname)}

# --wait: if a rank dies, end the others too; they would wait for it forever.
srun %%step --wait=60 %%command &
ranks=$!
wait $ranks
status=$?
while kill -0 $ranks 2>/dev/null; do  # the signal interrupted `wait`, not the ranks
  wait $ranks
  status=$?
done

if [ $status -eq %%stopped ] || { [ $status -ne 0 ] && [ -n "$warned" ]; }; then
  scontrol requeue "$me"
fi
exit $status
