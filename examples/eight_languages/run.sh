#!/usr/bin/env bash
# From text in eight languages and word lists to a tokenizer, datasets, one table and its control, three runs and a
# report. Languages without a list are trained on but not aligned.
# Usage: run.sh CORPUS_DIRECTORY DICTIONARY_DIRECTORY [PROCESSES], with XX.jsonl.gz and en-XX.tsv.gz in them.
set -euo pipefail
if [ $# -lt 2 ]; then
  echo "usage: $0 CORPUS_DIRECTORY DICTIONARY_DIRECTORY [PROCESSES]" >&2
  exit 2
fi
corpora=$1 lists=$2 processes=${3:-2}
here=$(dirname "$0")
runs=runs/eight_languages
data=$runs/data
languages=(en de es fr ru ar ja zh)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
mkdir -p "$data"

texts=()
for language in "${languages[@]}"; do
  texts+=("$corpora/$language.jsonl.gz:$language")
done
[ -d "$data/tokenizer" ] || megatron-prealign train-tokenizer --input "${texts[@]}" --output "$data/tokenizer" --vocab-size 8192 --held-out 0
for language in "${languages[@]}"; do
  [ -f "$data/$language.json" ] || megatron-prealign preprocess --input "$corpora/$language.jsonl.gz" --tokenizer "$data/tokenizer" \
    --output "$data/$language" --language "$language" --resume
done
inputs=()
for language in "${languages[@]:1}"; do
  [ ! -f "$lists/en-$language.tsv.gz" ] || inputs+=("$lists/en-$language.tsv.gz:en-$language")
done
# Words that occur in the English text, with their two most frequent translations in every language.
[ -f "$data/table.safetensors" ] || megatron-prealign dictionary build --input "${inputs[@]}" --tokenizer "$data/tokenizer" \
  --output "$data/table.safetensors" --corpus "${languages[@]/#/$data/}" --min-count 5 --max-words 1 --max-translations 2 --order frequency
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
