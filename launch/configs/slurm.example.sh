#!/usr/bin/env bash
# Two machines with eight GPUs each: sbatch launch/configs/slurm.example.sh
#SBATCH --job-name=spml_fast
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
# train.py reads SLURM's variables itself. A fixed run directory lets a requeued job go on from its last checkpoint. Where
# one task ends with an error, the others would wait for it until the job's time is up: srun ends them.
srun --kill-on-bad-exit=1 python launch/train.py --config launch/configs/coco_boostlu.yaml --run.dir "runs/coco-$SLURM_JOB_ID"
