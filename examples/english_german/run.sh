#!/usr/bin/env bash
# From text in two languages and a word list to a tokenizer, datasets, a table and its control, three runs and a report.
# Usage: run.sh EN.jsonl.gz DE.jsonl.gz EN-DE.tsv.gz [PROCESSES]
set -euo pipefail
if [ $# -lt 3 ]; then
  echo "usage: $0 EN.jsonl.gz DE.jsonl.gz EN-DE.tsv.gz [PROCESSES]" >&2
  exit 2
fi
english=$1 german=$2 words=$3 processes=${4:-2}
here=$(dirname "$0")
runs=runs/english_german
data=$runs/data
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
mkdir -p "$data"

[ -d "$data/tokenizer" ] || megatron-prealign train-tokenizer --input "$english:en" "$german:de" --output "$data/tokenizer" --vocab-size 4096 --held-out 0
[ -f "$data/en.json" ] || megatron-prealign preprocess --input "$english" --tokenizer "$data/tokenizer" --output "$data/en" --language en --resume
[ -f "$data/de.json" ] || megatron-prealign preprocess --input "$german" --tokenizer "$data/tokenizer" --output "$data/de" --language de --resume
# Words that occur in the text of both languages, each with its two most frequent translations.
[ -f "$data/table.safetensors" ] || megatron-prealign dictionary build --input "$words:en-de" --tokenizer "$data/tokenizer" \
  --output "$data/table.safetensors" --corpus "$data/en" "$data/de" --min-count 10 --min-target-count 1 --max-words 1 \
  --max-translations 2 --order frequency
[ -f "$data/shuffled.safetensors" ] || megatron-prealign dictionary shuffle --table "$data/table.safetensors" --output "$data/shuffled.safetensors"

train() {
  # Reports errors of the recipe before processes start.
  megatron-prealign pretrain "$@" --validate --world-size "$processes"
  torchrun --standalone --nproc-per-node "$processes" -m megatron_prealign pretrain "$@"
}
train --config "$here/base.yaml"
train --config "$here/base.yaml" --config "$here/prealign.yaml"
train --config "$here/base.yaml" --config "$here/prealign.yaml" --config "$here/shuffled.yaml"
megatron-prealign evaluate --run "joint=$runs/joint" "prealign=$runs/prealign" "shuffled=$runs/shuffled" --output "$runs"
echo "shuffled is the control: what it gains over joint does not come from true translations"
