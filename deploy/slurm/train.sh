#!/bin/bash
#SBATCH --job-name=detr
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --gpus-per-node=4
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#
# Ray on the nodes of a Slurm job, and one training there. From the checkout, after `make setup`:
#
#   sbatch deploy/slurm/train.sh deformable_detr_r50 --workers 8 --cpus-per-worker 8 \
#       --output /shared/runs/r50 --data.train /shared/train --data.val /shared/val
#
# 180 s before the time is up the training saves, and the job is queued again, which goes on. The
# arguments are those of `python -m jobs submit`, but for --address and --wait. docs/slurm.md.
set -euo pipefail
export PATH=$PWD/.venv/bin:$PATH

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
first=${nodes[0]}
# Where a node's name stands for loopback, or for a slow network, HEAD_ADDRESS says another.
ip=${HEAD_ADDRESS:-$(getent ahostsv4 "$first" | awk 'NR == 1 { print $1 }')}
# Four ports of this job, below those that the system gives to whoever asks for any.
port=$((20000 + SLURM_JOB_ID % 3000 * 4)) dashboard=$((port + 1))
agent=$((port + 2)) client=$((port + 3))
address=http://127.0.0.1:$dashboard # this script runs on the first node, and so does the head
export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN
# Seconds that Ray leaves a node which Slurm takes away to save.
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=${RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S:-120}

trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
srun --nodes=1 --ntasks=1 --nodelist="$first" \
    ray start --head --block --num-cpus "$SLURM_CPUS_PER_TASK" --node-ip-address "$ip" \
    --port "$port" --dashboard-host 127.0.0.1 --dashboard-port "$dashboard" \
    --dashboard-agent-listen-port "$agent" --ray-client-server-port "$client" \
    --temp-dir "/tmp/ray-$SLURM_JOB_ID" --disable-usage-stats &
head=$!
until python -m jobs status --address "$address" >/dev/null 2>&1; do
    kill -0 "$head" 2>/dev/null || { echo "error: Ray's head has ended; its log is above" >&2; exit 1; }
    sleep 2
done
others=$((${#nodes[@]} - 1))
if [ "$others" -gt 0 ]; then
    srun --nodes="$others" --ntasks="$others" --exclude="$first" \
        ray start --block --num-cpus "$SLURM_CPUS_PER_TASK" --address "$ip:$port" \
        --dashboard-agent-listen-port "$agent" &
fi

# The job waits for nodes that are still starting.
said=$(python -m jobs submit "$@" --address "$address" --no-wait)
echo "$said"
job=$(sed -n 's/^submitted \([^ ]*\) to .*/\1/p' <<<"$said")

asked=
save() {
    asked=1
    echo "told to end; saving"
    python -m jobs stop --job "$job" --address "$address"
}
trap save TERM
python -m jobs logs --job "$job" --address "$address" &
status=0
wait $! || status=$?
if [ -n "$asked" ]; then
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$status"
