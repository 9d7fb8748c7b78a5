#!/usr/bin/env bash
# transformers 5.23.0: AutoTokenizer opens a directory whose config.json has model_type "qwen2" with its own class, which
# takes only vocabulary and merges from tokenizer.json and replaces the pre-tokenizer. The same tokenizer.json gives other
# ids than in a directory with model_type "llama", and than the tokenizers library gives.
#
# Seen: tokenizer.json encodes "no 2024" as one token (its pre-tokenizer does not split). The llama directory does the
# same; the qwen2 directory gives six tokens, because its class splits words and digits.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.23.0 tokenizers==0.23.3
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import json
from pathlib import Path

import tokenizers
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
tokenizer.decoder = decoders.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()
trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"])
tokenizer.train_from_iterator(["no 2024"] * 100, trainer)
text = "no 2024"
expected = tokenizer.encode(text).tokens

print(f"transformers {transformers.__version__}, tokenizers {tokenizers.__version__}")
print(f"{'tokenizers':10} {len(expected)} tokens {expected}")
tokens = {}
for model_type in ("llama", "qwen2"):
    directory = Path(model_type)
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    loaded = transformers.AutoTokenizer.from_pretrained(directory)
    tokens[model_type] = loaded.convert_ids_to_tokens(loaded(text, add_special_tokens=False).input_ids)
    print(f"{model_type:10} {len(tokens[model_type])} tokens {tokens[model_type]} by {type(loaded).__name__}")
assert tokens["llama"] == expected, "the llama directory no longer gives the ids of tokenizer.json"
assert tokens["qwen2"] != expected, "the qwen2 directory now gives the ids of tokenizer.json"
PY
