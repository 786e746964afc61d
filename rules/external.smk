# Judges that are not trained here: their logits come from a file, or from an endpoint that is asked.


rule ask_judge:
    # Run where Snakemake runs: it needs the network, which a cluster's nodes may not have, and little else.
    input:
        battles=f"{R}/battles.parquet",
    output:
        logits=f"{R}/external/{{judge}}/logits.npy",
        ids=f"{R}/external/{{judge}}/logits.ids.parquet",
        cost=f"{R}/external/{{judge}}/cost.json",
    log:
        f"{R}/logs/ask_judge/{{judge}}.log",
    benchmark:
        f"{R}/benchmarks/ask_judge/{{judge}}.tsv"
    wildcard_constraints:
        judge=one_of(ASKED),
    localrule: True
    conda:
        "../envs/arena.yaml"
    resources:
        traffic=traffic,
    params:
        settings=settings_of(phase.AskingSettings),
        answers=answers,
    message:
        "Asking {wildcards.judge}"
    shell:
        "arena ask-judge --battles {input.battles} --output {output.logits} --cost {output.cost}"
        " --answers {params.answers:q} --settings {params.settings:q}"
        " --traffic {resources.traffic:q} > {log} 2>&1"


rule read_judged:
    input:
        battles=f"{R}/battles.parquet",
        file=judged,
    output:
        logits=f"{R}/external/{{judge}}/logits.npy",
        ids=f"{R}/external/{{judge}}/logits.ids.parquet",
    log:
        f"{R}/logs/read_judged/{{judge}}.log",
    benchmark:
        f"{R}/benchmarks/read_judged/{{judge}}.tsv"
    wildcard_constraints:
        judge=one_of(EXTERNAL.keys() - set(ASKED)),
    localrule: True
    conda:
        "../envs/arena.yaml"
    params:
        version=VERSIONS["judged"],
    message:
        "Reading the logits of {wildcards.judge}: {input.file}"
    shell:
        "arena read-judged --battles {input.battles} --file {input.file:q}"
        " --output {output.logits} --version {params.version} > {log} 2>&1"


rule deal_logits:
    input:
        logits=f"{R}/external/{{judge}}/logits.npy",
        folds=f"{R}/folds.parquet",
    output:
        logits=f"{R}/logits/{{judge}}/fold_{{fold}}.npy",
        ids=f"{R}/logits/{{judge}}/fold_{{fold}}.ids.parquet",
    log:
        f"{R}/logs/deal_logits/{{judge}}_fold_{{fold}}.log",
    benchmark:
        f"{R}/benchmarks/deal_logits/{{judge}}_fold_{{fold}}.tsv"
    wildcard_constraints:
        judge=one_of(EXTERNAL),
    localrule: True
    conda:
        "../envs/arena.yaml"
    params:
        settings=settings_of(phase.LogitsSettings),
    message:
        "Dealing the logits of {wildcards.judge}, fold {wildcards.fold}"
    shell:
        "arena deal-logits --logits {input.logits} --folds {input.folds} --fold {wildcards.fold}"
        " --output {output.logits} --settings {params.settings:q} > {log} 2>&1"
