#!/usr/bin/env bash
#SBATCH --job-name=gpt-oss-pretrain
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --output=%x-%j.out
#
# Pretrain gpt-oss-20b on several nodes: one process a GPU, started by srun.  Five minutes before
# its time is up the job saves and leaves; the same command goes on from there.
#
#   DCLM_DATA_DIR=data/dclm sbatch examples/slurm/pretrain.sh [--steps 2000 ...]
#
# from the root of this repository.  Words after the script's name are flags of `ossature train` and
# win over everything here.  Not run on a cluster: tests/test_slurm.py runs it with a tiny model
# and a stand-in for srun.
#
#   DCLM_DATA_DIR       folder of `ossature data build`, or one with *_text_document.bin and .idx
#   CONFIG              run file (default configs/20b_pretrain.toml)
#   TP, PP, EP, CP      layout (default 2, 4, 4, 1; also published: 4 2 4 1 and 2 4 4 2)
#   WORKSPACE and others: see ranks.sh
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
source examples/slurm/ranks.sh

need_path DCLM_DATA_DIR "the tokens to train on"
CONFIG=${CONFIG:-configs/20b_pretrain.toml}
need_path CONFIG "a run file"
TP=${TP:-2} PP=${PP:-4} EP=${EP:-4} CP=${CP:-1}

if [ -e "$DCLM_DATA_DIR/manifest.json" ]; then
    blend=("$DCLM_DATA_DIR")
else
    shopt -s nullglob
    blend=("$DCLM_DATA_DIR"/*_text_document.bin)
    [ ${#blend[@]} -gt 0 ] ||
        fail "DCLM_DATA_DIR = $DCLM_DATA_DIR: has neither manifest.json nor *_text_document.bin"
    blend=("${blend[@]%.bin}")
fi

# Sequence parallelism is on whenever TP > 1.
sp=$([ "$TP" -gt 1 ] && echo True || echo False)
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
ranks train "$CONFIG" \
    --run "$WORKSPACE/results/gpt_oss_20b_pretrain_tp${TP}_pp${PP}_ep${EP}_sp${sp}_cp${CP}" \
    --data.blend "${blend[@]}" \
    --parallel.tp "$TP" --parallel.pp "$PP" --parallel.ep "$EP" --parallel.cp "$CP" \
    --compile false \
    --steps 1000 --global-batch-tokens $((128 * 4096)) --micro-batch-tokens 4096 \
    --optim.warmup-steps 50 --eval.tokens $((10 * 128 * 4096)) --log.every-steps 1 \
    "$@"
