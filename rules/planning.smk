# What the run will cost. The plan asks Snakemake for this very graph, in a process of its own.


rule write_plan:
    output:
        plan=f"{R}/plan.json",
    log:
        f"{R}/logs/write_plan.log",
    benchmark:
        f"{R}/benchmarks/write_plan.tsv"
    localrule: True
    conda:
        "../envs/arena.yaml"
    params:
        settings=raw_configuration,
        snakefile=f"{CHECKOUT or '.'}/Snakefile",
    message:
        "Planning what the run will cost: {output.plan}"
    shell:
        "arena plan --output {output.plan} --settings {params.settings:q}"
        " --snakefile {params.snakefile:q} > {log} 2>&1"
