#!/usr/bin/env bash
# Write the locks anew, with hashes: make lock
# requirements.lock and requirements-gptq.lock pin what is installed in the two environments; the others keep
# their pins. A pin has the SHA-256 of every file of its version on PyPI; that of torch also has the file that
# pip takes on this machine, since PyPI has no CPU build. requirements-cuda.lock: what only PyPI's torch needs.
set -euo pipefail
cd "$(dirname "$0")/.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python=.venv/bin/python
$python -m venv "$scratch/uv"
"$scratch/uv/bin/python" -m pip install --quiet --disable-pip-version-check uv==0.13.9

compile() { # INPUT OUTPUT [OPTION…]
    "$scratch/uv/bin/uv" pip compile --quiet --no-config --default-index https://pypi.org/simple \
        --python-version 3.11 --no-header --no-annotate --generate-hashes "$1" -o "$scratch/new" "${@:3}"
    mv "$scratch/new" "$2"
}

pins() { sed -n 's/^\([A-Za-z0-9_.-]*==[^ ]*\).*/\1/p' "$1"; }

freeze() { # ENVIRONMENT LOCK
    "$1/bin/python" -m pip freeze --all --exclude-editable --exclude pip | sed 's/+cpu//' >"$scratch/pins"
    compile "$scratch/pins" "$2" --no-deps
}

freeze .venv requirements.lock
freeze .venv-gptq requirements-gptq.lock
for lock in requirements-{qlora,publish,mutmut,auto-gptq,vllm,transformers4}.lock; do
    pins "$lock" >"$scratch/pins"
    compile "$scratch/pins" "$lock" --no-deps
done
pins requirements.lock >"$scratch/constraints"
grep '^torch==' "$scratch/constraints" >"$scratch/pins"
mapfile -t known < <(sed 's/==.*//; s/^/--no-emit-package=/' "$scratch/constraints")
compile "$scratch/pins" requirements-cuda.lock --universal --constraints "$scratch/constraints" "${known[@]}"
torch=$(cat "$scratch/pins")+cpu
digest=$($python -m pip install --quiet --disable-pip-version-check --dry-run --ignore-installed --no-deps \
    --report - "$torch" | grep -o '"sha256": "[0-9a-f]*"' | grep -o '[0-9a-f]\{64\}')
printf '%s \\\n    --hash=sha256:%s\n' "$torch" "$digest" >requirements-cpu.lock
