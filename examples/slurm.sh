#!/bin/bash
# Several machines with several GPUs each: sbatch examples/slurm.sh train config.yaml
# srun starts one torchrun on each machine, and torchrun one process for each GPU.
#SBATCH --job-name=transom
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=transom-%j.log
set -euo pipefail

# The first machine has the rendezvous. Its port follows from the job, so that two jobs differ.
endpoint=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p):$((20000 + SLURM_JOB_ID % 20000))

# A requeued job continues its run.
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then
    set -- "$@" --resume
fi

# If a process ends with an error, all of them start again from the latest checkpoint, 3 times at
# most. The identifier of the job tells restarted processes that the run is theirs.
srun --kill-on-bad-exit=1 torchrun \
    --nnodes="$SLURM_JOB_NUM_NODES" \
    --nproc-per-node="${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}" \
    --rdzv-backend=c10d \
    --rdzv-endpoint="$endpoint" \
    --rdzv-id="$SLURM_JOB_ID" \
    --max-restarts="${MAX_RESTARTS:-3}" \
    -m transom "$@"
