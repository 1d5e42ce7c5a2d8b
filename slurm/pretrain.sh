#!/usr/bin/env bash
#SBATCH --job-name=matformer
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@180
#
# Pretrain:   bash slurm/pretrain.sh [CONFIG] [key=value ...]                      on this machine
#             sbatch --nodes=4 --gpus-per-node=8 slurm/pretrain.sh CONFIG [...]    on a cluster
#
# CONFIG is a run file (default configs/run/demo.yaml); parallel.* in it says how many ranks start.
# Exit code: the run's own; 2 for a config, data or environment that cannot run, before any rank starts.
# MATFORMER_PYTHON names another interpreter than the project's .venv.

set -euo pipefail

# A job script runs as a copy in slurmd's spool: only Slurm knows where it was submitted.
under_slurm() { [[ -n "${SLURM_JOB_ID:-}" && -n "${SLURM_SUBMIT_DIR:-}" ]]; }

find_project() {
    if under_slurm; then
        project=$SLURM_SUBMIT_DIR
    else
        project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    fi
    if [[ ! -f "$project/matformer/plan.py" ]]; then
        echo "the job must be submitted from the project's folder, got $project; cd there and call sbatch again" >&2
        exit 2
    fi
}

# Environment and data need the internet, which a compute node may not have: there they are only looked for.
require_prepared() {
    local missing
    if find_python && missing=$(plan --missing) && [[ -z "$missing" ]]; then
        return
    fi
    # A mistake in the config is another matter: its own sentence has been written, preparing would not help.
    if find_python && ! plan --check 2>/dev/null; then
        exit 2
    fi
    echo "environment and data must be made before the job runs, got ${missing:-no .venv} missing;" \
        "on a login node run: bash $project/slurm/prepare.sh $config ${overrides[*]-}" >&2
    exit 2
}

# torchrun gives a signal on to its workers, and waits for them to save before it kills.
launch_options=("--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-170}

# exec: signals reach the run itself, and its exit code is ours.
run_here() {
    if ((ranks == 1)); then
        exec "$python" -m matformer.train "$config" ${overrides[@]+"${overrides[@]}"}
    fi
    exec "$python" -m matformer.launch "${launch_options[@]}" --standalone --nproc-per-node="$ranks" \
        -m matformer.train "$config" ${overrides[@]+"${overrides[@]}"}
}

# One launcher a node; they meet on the first node, at a port that two jobs do not share.
run_on_nodes() {
    local nodes=${SLURM_JOB_NUM_NODES:-${SLURM_NNODES:-1}} first port code=0
    if ((ranks % nodes)); then
        echo "the ranks (parallel.tp * cp * pp * dp) must be divisible by the nodes, got $ranks and $nodes;" \
            "change parallel.dp or sbatch --nodes" >&2
        exit 2
    fi
    # srun does not take over by itself what sbatch was asked for.
    if [[ -n "${SLURM_CPUS_PER_TASK:-}" ]]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    first=${first%%$'\n'*}
    port=$((20000 + SLURM_JOB_ID % 20000))
    # shellcheck disable=SC2016  # SLURM_NODEID is known on each node alone
    srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --kill-on-bad-exit=1 \
        bash -c 'exec "$0" -m matformer.launch --node-rank="$SLURM_NODEID" "$@"' "$python" \
        "${launch_options[@]}" --nnodes="$nodes" --nproc-per-node="$((ranks / nodes))" \
        --master-addr="$first" --master-port="$port" \
        -m matformer.train "$config" ${overrides[@]+"${overrides[@]}"} &
    step=$!
    trap 'signalled=1; kill -TERM "$step" 2>/dev/null' TERM
    trap 'signalled=1; kill -USR1 "$step" 2>/dev/null' USR1
    # A trapped signal ends `wait` early, with a code of its own: wait again for that of the step.
    signalled=1
    while ((signalled)); do
        signalled=0 code=0
        wait "$step" || code=$?
    done
    exit "$code"
}

find_project
# shellcheck source=slurm/common.sh
source "$project/slurm/common.sh"
find_config "$@"
cd "$project"
if under_slurm; then
    require_prepared
else
    bash slurm/prepare.sh "$config" ${overrides[@]+"${overrides[@]}"}
    find_python
fi
ranks=$(plan --ranks 2>/dev/null)
if under_slurm; then run_on_nodes; else run_here; fi
