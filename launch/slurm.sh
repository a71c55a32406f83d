#!/bin/bash
# Train on several nodes of GPUs under Slurm, with the arguments of gptoss_jax.train:
#
#   sbatch launch/slurm.sh --config configs/120b_h200x8.py --init /data/gpt-oss-120b \
#       --data.train /data/chats.jsonl --workdir /data/runs/first \
#       --mesh.fsdp -1 --data.batch-size 16
#
# The batch size is a multiple of the number of GPUs, here 2 nodes of 8.
# The workdir has to lie on a disk that all nodes share; weights and data may, too. Send the same
# line again, with any number of nodes, and the run goes on from its newest checkpoint. To stop it:
# scancel --signal=TERM JOB (all nodes agree on a step, save, and exit 0).
#
#SBATCH --job-name=gptoss
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1     # one process a node has all of its GPUs
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --mem=0                 # all of the node's
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300       # five minutes before the time is up: save and stop
#SBATCH --requeue               # after a node has failed

set -u
cd "$SLURM_SUBMIT_DIR"
source .venv/bin/activate
unset http_proxy https_proxy HTTP_PROXY HTTPS_PROXY  # they keep JAX's processes apart
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

# srun tells each process who it is, and JAX finds the rest. A process that dies ends the step; then
# it starts again, at most three times. Exit code 2 is what a person has to put right.
for attempt in 1 2 3 4; do
    srun --kill-on-bad-exit=1 python -u -m gptoss_jax.train "$@"
    code=$?
    [ $code -eq 0 ] || [ $code -eq 2 ] && exit $code
    echo "attempt $attempt ended with $code"
    sleep 10
done
exit $code
