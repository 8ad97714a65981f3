#!/bin/bash
# %%title
%%options
#SBATCH --requeue
#SBATCH --open-mode=append
set -u
%%setup
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE LOCAL_SIZE  # the submitting shell's, if any, would win
export MASTER_ADDR=$(hostname) MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))

# Before the time limit slurm signals this shell, which tells the ranks: they save and end, and the job waits again.
warned=
trap 'warned=yes; scancel --signal=USR1 "$SLURM_JOB_ID"' USR1

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
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
