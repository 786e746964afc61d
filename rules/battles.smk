# Raw files → canonical battles → folds.
#
# A module's prefix moves all outputs of this workflow. Files that the configuration names, and files that
# ship with the workflow, are `local`: the prefix does not move them.
from arena_distill.config.phases.battles import (
    ArenaSettings,
    BattlesSettings,
    CountSettings,
    FoldsSettings,
    SolutionSettings,
)


include: "inputs/battles.smk"


rule simulate_arena:
    output:
        files=[RUN.arena(source) for source in (*SOURCES, "test_solution")],
        truth=RUN.truth,
    log:
        RUN.log("simulate_arena"),
    benchmark:
        RUN.benchmark("simulate_arena")
    conda:
        "../envs/arena.yaml"
    params:
        settings=settings_of(ArenaSettings),
        folder=lambda wildcards, output: os.path.dirname(output.truth),
    message:
        "Simulating the synthetic arena"
    shell:
        "arena simulate-arena --output {params.folder:q} --settings {params.settings:q} > {log:q} 2>&1"


rule read_battles:
    input:
        train=battle_files("train"),
        extra=battle_files("extra"),
        ut=battle_files("ut"),
        test=battle_files("test"),
        unlabelled=battle_files("unlabelled"),
    output:
        battles=RUN.battles,
        rejected=RUN.rejected,
        reading=RUN.reading,
    log:
        RUN.log("read_battles"),
    benchmark:
        RUN.benchmark("read_battles")
    conda:
        "../envs/arena.yaml"
    params:
        settings=settings_of(BattlesSettings),
        files=as_options(*SOURCES),
    message:
        "Reading battles: {input}"
    shell:
        "arena read-battles --output {output.battles:q} --rejected {output.rejected:q}"
        " --reading {output.reading:q} --settings {params.settings:q} {params.files:q} > {log:q} 2>&1"


rule read_solution:
    # A separate job: if the solution is added later or corrected, nothing is trained again. It has priority, so
    # that a solution that does not match the test battles fails before any training.
    input:
        battles=RUN.battles,
        solution=solution,
    output:
        votes=RUN.test_votes,
    log:
        RUN.log("read_solution"),
    benchmark:
        RUN.benchmark("read_solution")
    priority: 1
    localrule: True
    conda:
        "../envs/arena.yaml"
    params:
        settings=settings_of(SolutionSettings),
    message:
        "Reading the votes of the test battles: {input.solution}"
    shell:
        "arena read-solution --battles {input.battles:q} --solution {input.solution:q}"
        " --output {output.votes:q} --settings {params.settings:q} > {log:q} 2>&1"


rule assign_folds:
    input:
        battles=RUN.battles,
    output:
        folds=RUN.folds,
    log:
        RUN.log("assign_folds"),
    benchmark:
        RUN.benchmark("assign_folds")
    localrule: True
    conda:
        "../envs/arena.yaml"
    params:
        settings=settings_of(FoldsSettings),
    message:
        f"Assigning battles to {CONFIG.folds.n} folds ({CONFIG.folds.method})"
    shell:
        "arena assign-folds --battles {input.battles:q} --output {output.folds:q}"
        " --settings {params.settings:q} > {log:q} 2>&1"


rule check_counts:
    # Its priority lets it run before trainings. It is no input of theirs: each new count would train again.
    # (As an `ancient` input it would hide their changed params from Snakemake 9.27.)
    input:
        battles=RUN.battles,
        folds=RUN.folds,
    output:
        counts=RUN.counts,
    log:
        RUN.log("check_counts"),
    benchmark:
        RUN.benchmark("check_counts")
    priority: 1
    localrule: True
    conda:
        "../envs/arena.yaml"
    params:
        settings=settings_of(CountSettings),
    message:
        "Counting the battles that each training has"
    shell:
        "arena check-counts --battles {input.battles:q} --folds {input.folds:q}"
        " --output {output.counts:q} --settings {params.settings:q} > {log:q} 2>&1"
