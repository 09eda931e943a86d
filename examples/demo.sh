#!/usr/bin/env bash
# From text to a model that transformers loads, on a laptop: `make demo`.
#
# The text is the source code of the running Python's standard library, so nothing is downloaded.
# Every command is printed before it runs; type them yourself with other inputs.
#
#   examples/demo.sh [FOLDER]      everything is written there (default runs/demo)
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/demo}
rm -rf "$out"

heading() { printf '\n\033[1m%s\033[0m\n' "$1"; }
run() {
    printf '$ %s\n' "$*"
    "$@"
}

heading "1  Text -> tokens: a tokenizer is trained, and the text cut into shards"
run ossature data build python-stdlib --output "$out/data" --train-tokenizer 4096 \
    --split 98,2,0

heading "2  Tokens -> a model: a gpt-oss of the debug size, 4 layers with 8 experts each"
run ossature train configs/debug.toml --run "$out/run" --data.path "$out/data" \
    --log.every-steps 10
run ossature report "$out/run"

heading "3  The model -> text"
run ossature sample "$out/run" --prompt "def read_file(path" --prompt "import os" \
    --prompt "class Error(Exception):" --max-new-tokens 48 --temperature 0.7

heading "4  The model -> a folder that transformers and vLLM load"
run ossature convert "$out/run" "$out/export" --to bf16
run ossature info "$out/export"
run python examples/check_export.py "$out/run" "$out/export"

heading "Done"
echo "tokens   $out/data"
echo "run      $out/run  (curves and samples: $out/run/report.html)"
echo "export   $out/export"
