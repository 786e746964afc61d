# Raw files → canonical battles → folds.


rule simulate_arena:
    output:
        files=[f"{R}/arena/{source}.csv" for source in (*SOURCES, "test_solution")],
        truth=f"{R}/arena/truth.parquet",
    log:
        f"{R}/logs/simulate_arena.log",
    benchmark:
        f"{R}/benchmarks/simulate_arena.tsv"
    conda:
        "../envs/arena.yaml"
    params:
        version=VERSIONS["simulate"],
        settings=CONFIG.data.arena.model_dump_json() if CONFIG.data.arena else None,
        folder=lambda wildcards, output: os.path.dirname(output.truth),
    message:
        "Simulating the synthetic arena"
    shell:
        "arena simulate-arena --output {params.folder} --settings {params.settings:q} > {log} 2>&1"


rule read_battles:
    input:
        train=battle_files("train"),
        extra=battle_files("extra"),
        ut=battle_files("ut"),
        test=battle_files("test"),
        unlabelled=battle_files("unlabelled"),
    output:
        battles=f"{R}/battles.parquet",
        rejected=f"{R}/rejected.parquet",
    log:
        f"{R}/logs/read_battles.log",
    benchmark:
        f"{R}/benchmarks/read_battles.tsv"
    conda:
        "../envs/arena.yaml"
    params:
        version=VERSIONS["battles"],
        files=lambda wildcards, input: [
            part
            for source in SOURCES
            for file in input.get(source)
            for part in (f"--{source}", file)
        ],
    message:
        "Reading battles: {input}"
    shell:
        "arena read-battles --output {output.battles} --rejected {output.rejected}"
        " --version {params.version} {params.files:q} > {log} 2>&1"


rule assign_folds:
    input:
        battles=f"{R}/battles.parquet",
    output:
        folds=f"{R}/folds.parquet",
    log:
        f"{R}/logs/assign_folds.log",
    benchmark:
        f"{R}/benchmarks/assign_folds.tsv"
    localrule: True
    conda:
        "../envs/arena.yaml"
    params:
        settings=settings_of(phase.FoldsSettings),
    message:
        f"Dealing battles into {CONFIG.folds.n} folds ({CONFIG.folds.method})"
    shell:
        "arena assign-folds --battles {input.battles} --output {output.folds}"
        " --settings {params.settings:q} > {log} 2>&1"
