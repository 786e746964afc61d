# Published battles: only sources with `kaggle` or `hub`, and only if their files do not exist yet.
from arena_distill.config.phases.battles import FetchSettings


include: "inputs/fetch.smk"


rule fetch_battles:
    # A local rule, because it needs the network, which a cluster's nodes may not have.
    output:
        local("{file}"),
    log:
        RUN.log("fetch_battles/{file}"),
    benchmark:
        RUN.benchmark("fetch_battles/{file}")
    wildcard_constraints:
        file=one_of(file for file, source in FETCHED.items() if source.kaggle),
    localrule: True
    conda:
        "../envs/arena.yaml"
    resources:
        download=1,
    params:
        settings=lambda wildcards: FetchSettings.of(FETCHED[wildcards.file]).as_params(),
    message:
        "Fetching {wildcards.file}"
    shell:
        "arena fetch-battles --output {output:q} --settings {params.settings:q} > {log:q} 2>&1"


use rule fetch_battles as fetch_data_set with:
    output:
        directory(local("{file}")),
    log:
        RUN.log("fetch_data_set/{file}"),
    benchmark:
        RUN.benchmark("fetch_data_set/{file}")
    wildcard_constraints:
        file=one_of(file for file, source in FETCHED.items() if source.hub),
