# Judges that are not trained here: their logits come from a file or an endpoint.
from arena_distill.config.phases.scoring import ExternalSettings, LogitsSettings, QuerySettings


include: "inputs/external.smk"


rule query_endpoint:
    # A local rule, because it needs the network, which a cluster's nodes may not have, and few resources.
    input:
        battles=RUN.battles,
    output:
        logits=EXTERNAL_LOGITS,
        ids=layout.ids(EXTERNAL_LOGITS),
        cost=RUN.cost("{judge}"),
    log:
        RUN.log("query_endpoint/{judge}"),
    benchmark:
        RUN.benchmark("query_endpoint/{judge}")
    wildcard_constraints:
        judge=one_of(ENDPOINTS),
    localrule: True
    conda:
        "../envs/arena.yaml"
    resources:
        limits=endpoint_limits,
    params:
        settings=settings_of(QuerySettings),
        answers=answers,
    message:
        "Querying the endpoint of {wildcards.judge}"
    shell:
        "arena query-endpoint --battles {input.battles:q} --output {output.logits:q}"
        " --cost {output.cost:q} --answers {params.answers:q} --settings {params.settings:q}"
        " --limits {resources.limits:q} > {log:q} 2>&1"


rule read_external_logits:
    input:
        battles=RUN.battles,
        file=logits_file,
    output:
        logits=EXTERNAL_LOGITS,
        ids=layout.ids(EXTERNAL_LOGITS),
        read=RUN.external_file("{judge}"),
    log:
        RUN.log("read_external_logits/{judge}"),
    benchmark:
        RUN.benchmark("read_external_logits/{judge}")
    wildcard_constraints:
        judge=one_of(FILES),
    localrule: True
    conda:
        "../envs/arena.yaml"
    params:
        settings=settings_of(ExternalSettings),
    message:
        "Reading the logits of {wildcards.judge}: {input.file}"
    shell:
        "arena read-external-logits --battles {input.battles:q} --file {input.file:q}"
        " --output {output.logits:q} --settings {params.settings:q} > {log:q} 2>&1"


rule split_external_logits:
    input:
        logits=EXTERNAL_LOGITS,
        ids=carried_ids(EXTERNAL_LOGITS),
        folds=RUN.folds,
    output:
        logits=LOGITS,
        ids=layout.ids(LOGITS),
    log:
        RUN.log("split_external_logits/{judge}_fold_{fold}"),
    benchmark:
        RUN.benchmark("split_external_logits/{judge}_fold_{fold}")
    wildcard_constraints:
        judge=one_of(EXTERNAL),
    localrule: True
    conda:
        "../envs/arena.yaml"
    params:
        settings=settings_of(LogitsSettings),
    message:
        "Splitting the logits of {wildcards.judge}, fold {wildcards.fold}"
    shell:
        "arena split-external-logits --logits {input.logits:q} --folds {input.folds:q}"
        " --fold {wildcards.fold} --output {output.logits:q} --settings {params.settings:q}"
        " > {log:q} 2>&1"
