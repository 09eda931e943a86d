# shellcheck shell=bash
# Sourced by the scripts beside it: what every job sets, and `ranks`, which starts one process a GPU.
#
#   WORKSPACE           base folder of models and results (default: where sbatch was called)
#   CONTAINER_IMAGE     image to run in (needs pyxis); empty runs the `ossature` on PATH
#   CONTAINER_MOUNTS    what it sees besides WORKSPACE, as /from:/to,/from:/to
#   SRUN_OPTIONS        more words for srun, such as --mpi=pmix
#   HF_TOKEN, HF_HOME, WANDB_API_KEY go on to the ranks as they are

WORKSPACE=${WORKSPACE:-$PWD}

fail() {
    echo "error: $*" >&2
    exit 2
}

# need NAME WHAT: the variable is set.  Nothing is made up in place of data or weights.
need() { [ -n "${!1:-}" ] || fail "$1 is not set: $2"; }

# need_path NAME WHAT: it is set, to something that is there.
need_path() {
    need "$1" "$2"
    [ -e "${!1}" ] || fail "$1 = ${!1}: no such file or folder: $2"
}

# A rank that dies is named by the others within the run's timeout_seconds, and by srun.
ranks() {
    local options=(--kill-on-bad-exit=1)
    [ -z "${SRUN_OPTIONS:-}" ] || read -ra more <<<"$SRUN_OPTIONS"
    if [ -n "${CONTAINER_IMAGE:-}" ]; then
        local mounts="$WORKSPACE:$WORKSPACE,$PWD:$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}"
        options+=(--container-image="$CONTAINER_IMAGE" --container-mounts="$mounts")
        options+=(--container-workdir="$PWD")
    fi
    echo "srun ${options[*]} ${more[*]:-} ossature $*"
    srun "${options[@]}" ${more[@]+"${more[@]}"} ossature "$@"
}

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
export TORCH_NCCL_AVOID_RECORD_STREAMS=${TORCH_NCCL_AVOID_RECORD_STREAMS:-1}
export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0}
# NCCL's own watchdog is the second line: parallel/watch.py names a dead rank before it.
export TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC=${TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC:-7200}
