# Stacks: what judges, and trees over the surface, say of a battle is combined. Nothing is trained but weights.
from arena_distill.config.phases.prediction import StackedViewsSettings
from arena_distill.config.phases.scoring import StackSettings, StackedLogitsSettings


include: "inputs/stacks.smk"


rule fit_stack:
    input:
        folds=RUN.folds,
        surface=surface_of,
        logits=members_folds,
        ids=carried_ids(members_folds),
    output:
        stack=RUN.stack("{judge}"),
    log:
        RUN.log("fit_stack/{judge}"),
    benchmark:
        RUN.benchmark("fit_stack/{judge}")
    wildcard_constraints:
        judge=one_of(STACKS),
    localrule: True
    conda:
        "../envs/arena.yaml"
    params:
        settings=settings_of(StackSettings),
        surface=as_options("surface"),
        logits=by_member,
    message:
        "Fitting the weights of {wildcards.judge}"
    shell:
        "arena fit-stack --folds {input.folds:q} {params.surface:q} --output {output.stack:q}"
        " --settings {params.settings:q} {params.logits:q} > {log:q} 2>&1"


rule combine_fold:
    input:
        stack=RUN.stack("{judge}"),
        folds=RUN.folds,
        battles=battles_of_trees,
        logits=members_fold,
        ids=carried_ids(members_fold),
    output:
        logits=LOGITS,
        ids=layout.ids(LOGITS),
    log:
        RUN.log("combine_fold/{judge}_fold_{fold}"),
    benchmark:
        RUN.benchmark("combine_fold/{judge}_fold_{fold}")
    wildcard_constraints:
        judge=one_of(STACKS),
    conda:
        "../envs/arena.yaml"
    params:
        settings=settings_of(StackedLogitsSettings),
        battles=as_options("battles"),
    message:
        "Combining the members of {wildcards.judge}, fold {wildcards.fold}"
    shell:
        "arena combine-fold --stack {input.stack:q} --folds {input.folds:q} --fold {wildcards.fold}"
        " {params.battles:q} --output {output.logits:q} --settings {params.settings:q} {input.logits:q}"
        " > {log:q} 2>&1"


rule combine_test:
    input:
        stack=RUN.stack("{judge}"),
        surface=surface_of,
        logits=members_models(RUN.test_logits),
        ids=carried_ids(members_models(RUN.test_logits)),
    output:
        logits=RUN.test_logits("{judge}", "{model}"),
        ids=layout.ids(RUN.test_logits("{judge}", "{model}")),
    log:
        RUN.log("combine_test/{judge}_{model}"),
    benchmark:
        RUN.benchmark("combine_test/{judge}_{model}")
    wildcard_constraints:
        judge=one_of(STACKS),
        model=one_of(MODELS),
    localrule: True
    conda:
        "../envs/arena.yaml"
    params:
        settings=settings_of(StackedViewsSettings),
        surface=as_options("surface"),
    message:
        "Combining the members of {wildcards.judge}, {wildcards.model}, on test battles"
    shell:
        "arena combine-views --stack {input.stack:q} {params.surface:q} --output {output.logits:q}"
        " --settings {params.settings:q} {input.logits:q} > {log:q} 2>&1"


use rule combine_test as combine_held_out with:
    input:
        stack=RUN.stack("{judge}"),
        surface=surface_of,
        logits=members_models(RUN.held_out_logits),
        ids=carried_ids(members_models(RUN.held_out_logits)),
    output:
        logits=RUN.held_out_logits("{judge}", "{model}"),
        ids=layout.ids(RUN.held_out_logits("{judge}", "{model}")),
    log:
        RUN.log("combine_held_out/{judge}_{model}"),
    benchmark:
        RUN.benchmark("combine_held_out/{judge}_{model}")
    message:
        "Combining the members of {wildcards.judge}, {wildcards.model}, on held-out battles"
