#!/bin/bash
# sbatch cluster/slurm.sh configs/miniimagenet_gpu.yaml run.dir=/data/runs/miniimagenet
# Starts a Ray node on every machine of the allocation and the run on the first. Three minutes before the time is up the
# run is asked to stop; it saves, ends with code 75, and the job queues again and goes on from there. With
# `scancel --batch --signal=TERM JOB` it saves too, and the job stays ended. `--batch` and the `B:` matter: without them
# the signal goes to Ray's own processes, which it ends.
#SBATCH --job-name=dpkd
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

config=$1
shift

export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
[ -s "$HOME/.ray/auth_token" ] || ray get-auth-token --generate > /dev/null

head=$(hostname)
address=$(hostname --ip-address | cut -d' ' -f1):$((20000 + SLURM_JOB_ID % 10000))
export RAY_ADDRESS=$address

srun --nodes=1 --ntasks=1 --nodelist="$head" --overlap \
    ray start --head --block --node-ip-address="${address%:*}" --port="${address#*:}" --dashboard-host=127.0.0.1 &
if [ "$SLURM_NNODES" -gt 1 ]; then
    srun --nodes=$((SLURM_NNODES - 1)) --ntasks=$((SLURM_NNODES - 1)) --exclude="$head" --overlap \
        bash -c "until ray start --block --address=$address; do sleep 2; done" &
fi

for _ in $(seq 60); do
    alive=$(python -c 'import ray; ray.init(logging_level="ERROR"); print(sum(n["Alive"] for n in ray.nodes()))' \
        2> /dev/null || echo 0)
    [ "$alive" -ge "$SLURM_NNODES" ] && break
    sleep 2
done
[ "$alive" -ge "$SLURM_NNODES" ] || { echo "only $alive of $SLURM_NNODES nodes came up" >&2; exit 1; }

python -m dpkd.pretrain --config "$config" launcher.kind=ray "$@" &
driver=$!
time_is_up=no
trap 'time_is_up=yes; kill -USR1 $driver 2> /dev/null || true' USR1 USR2   # or the run has just ended
trap 'kill -TERM $driver 2> /dev/null || true' TERM
while kill -0 $driver 2> /dev/null; do   # in `wait` a signal that comes as the run ends could lose its status
    sleep 1 || true
done
status=0
wait $driver || status=$?
[ $status -eq 75 ] && [ $time_is_up = yes ] && scontrol requeue "$SLURM_JOB_ID"
exit $status
