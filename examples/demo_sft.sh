#!/usr/bin/env bash
# From the model of `make demo` to one that answers questions in chat form: `make demo-sft`.
#
# The conversations are generated (examples/make_chats.py), so nothing is downloaded.  The model is
# trained twice, whole and with LoRA, and asked questions that it has not seen, before and after.
#
#   examples/demo_sft.sh [FOLDER]      with the model of the demo in it (default runs/demo)
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/demo}
base=$out/run
[ -d "$base/checkpoints" ] || bash examples/demo.sh "$out"
rm -rf "$out/chats" "$out/chat-data" "$out/sft" "$out/lora" "$out/adapter" "$out/merged"

heading() { printf '\n\033[1m%s\033[0m\n' "$1"; }
run() {
    printf '$ %s\n' "$*"
    "$@"
}

ask() { run ossature eval "$@" --tasks "$out/chats/questions.jsonl" harmony --chat --max-new-tokens 32; }

heading "1  Conversations -> packed rows in harmony, and which tokens are learnt"
run python examples/make_chats.py "$out/chats"
run ossature data chat "$out/chats/train.jsonl" --output "$out/chat-data" --seq-len 576 \
    --tokenizer "$out/data"
run ossature data show "$out/chat-data" --index 0

heading "2  Before: the model has seen nothing but Python"
ask "$base"

heading "3  All weights"
run ossature train configs/debug_sft.toml --run "$out/sft" --init "$base" \
    --data.path "$out/chat-data" --log.every-steps 20
ask "$out/sft"

heading "4  LoRA, on attention and every expert"
run ossature train configs/debug_lora.toml --run "$out/lora" --init "$base" \
    --data.path "$out/chat-data" --log.every-steps 20
ask "$base" --adapter "$out/lora"

heading "5  The adapter alone for PEFT, and merged for transformers and vLLM"
run ossature convert "$out/lora" "$out/adapter" --to peft
run ossature merge "$base" "$out/lora" "$out/merged" --to bf16
ask "$out/merged"
