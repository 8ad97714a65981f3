#!/bin/bash
# %%title
%%options
#SBATCH --requeue
#SBATCH --open-mode=append
# What the submitting shell has of these, if anything, would win.
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE LOCAL_SIZE MASTER_ADDR MASTER_PORT

# Before the time limit slurm signals this shell, which tells the ranks: they save and end, and the job waits again.
# The number of an array's last task is that of the whole array, unless its place in the array is said too.
me=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
warned=
trap 'warned=yes; scancel --signal=USR1 "$me"' USR1

%%setup
set -u
export MASTER_ADDR=${MASTER_ADDR:-$(hostname)}

# --wait: where a rank died, the others, which wait for it in vain, are ended too.
srun %%step --wait=60 %%command &
ranks=$!
wait $ranks
status=$?
while kill -0 $ranks 2>/dev/null; do  # the signal ended the waiting, not the ranks
  wait $ranks
  status=$?
done

if [ $status -eq %%stopped ] || { [ $status -ne 0 ] && [ -n "$warned" ]; }; then
  scontrol requeue "$me"
fi
exit $status
