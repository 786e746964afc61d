# Inputs of rules/judging.smk: the files of benchmarks.
BENCHMARKED = [
    (name, str(file))
    for name, sources in CONFIG.benchmarks.items()
    for source in sources
    for file in source.inputs()
]


def benchmark_files(wildcards):
    return [existing(file) for _, file in BENCHMARKED]


def named_benchmarks(wildcards, input):
    """The files of benchmarks, each with the name of its own."""
    return named([name for name, _ in BENCHMARKED], input.files)
