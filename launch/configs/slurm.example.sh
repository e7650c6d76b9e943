#!/usr/bin/env bash
# Two machines with eight GPUs each: sbatch launch/configs/slurm.example.sh
#SBATCH --job-name=spml_fast
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=USR1@120
# train.py reads SLURM's variables itself. A fixed run directory lets a requeued job resume from its last checkpoint. Where
# one task ends with an error, the others would wait for it until the job's time is up: srun ends them.
srun --kill-on-bad-exit=1 python launch/train.py --config launch/configs/coco_boostlu.yaml --run.dir "runs/coco-$SLURM_JOB_ID" \
    --run.stop_seconds 100
status=$?
# Two minutes before the end SLURM sends SIGUSR1: train.py saves and ends with 138, and the job goes back into the queue.
# SLURM itself queues a preempted job again.
if [ "$status" -eq 138 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
