# Published battles: only files that `data.fetch` names, and only if they do not exist yet.
include: "inputs/fetch.smk"


rule fetch_battles:
    # A local rule, because it needs the network, which a cluster's nodes may not have.
    input:
        without=lambda wildcards: [existing(file) for file in FETCHED[wildcards.file].without],
    output:
        file=local("{file}"),
    log:
        RUN.log("fetch_battles/{file}"),
    benchmark:
        RUN.benchmark("fetch_battles/{file}")
    wildcard_constraints:
        file=one_of(FETCHED),
    localrule: True
    conda:
        "../envs/arena.yaml"
    resources:
        download=1,
    params:
        settings=lambda wildcards: phase.FetchSettings.of(FETCHED[wildcards.file]).as_params(),
        without=as_options("without"),
    message:
        "Fetching {wildcards.file}"
    shell:
        "arena fetch-battles --output {output.file:q} --settings {params.settings:q}"
        " {params.without:q} > {log:q} 2>&1"
