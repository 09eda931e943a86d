#!/usr/bin/env bash
#SBATCH --job-name=gpt-oss-lora
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --output=%x-%j.out
#
# Train LoRA adapters of gpt-oss-20b on conversations.  The job saves and leaves before its time is
# up; the same command goes on from there.
#
#   SFT_DATA=data/chat sbatch examples/slurm/lora.sh [--steps 500 ...]
#
# from the root of this repository.  Words after the script's name are flags of `ossature train`.
# Not run on a cluster.
#
#   SFT_DATA                 folder of `ossature data chat`
#   PRETRAINED_CHECKPOINT    weights to start from, in any format
#                            (default $WORKSPACE/models/gpt-oss-20b)
#   CONFIG                   run file (default configs/20b_lora.toml)
#   TP, PP, EP, CP           layout (default 2, 2, 4, 1; also published: 4 1 4 1)
#   WORKSPACE and others: see ranks.sh
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
source examples/slurm/ranks.sh

need_path SFT_DATA "the conversations to train on, made by: ossature data chat"
PRETRAINED_CHECKPOINT=${PRETRAINED_CHECKPOINT:-$WORKSPACE/models/gpt-oss-20b}
need_path PRETRAINED_CHECKPOINT "the weights to start from"
CONFIG=${CONFIG:-configs/20b_lora.toml}
need_path CONFIG "a run file"
TP=${TP:-2} PP=${PP:-2} EP=${EP:-4} CP=${CP:-1}

# Sequence parallelism is on whenever TP > 1.
sp=$([ "$TP" -gt 1 ] && echo True || echo False)
ranks train "$CONFIG" \
    --run "$WORKSPACE/results/gpt_oss_20b_lora_finetune_tp${TP}_pp${PP}_ep${EP}_sp${sp}_cp${CP}" \
    --data.path "$SFT_DATA" --init "$PRETRAINED_CHECKPOINT" \
    --parallel.tp "$TP" --parallel.pp "$PP" --parallel.ep "$EP" --parallel.cp "$CP" \
    --compile false \
    "$@"
