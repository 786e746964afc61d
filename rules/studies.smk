# Studies compare judges that are derived from those of the run. `all` runs no study.
from arena_distill.config.phases.deployment import SoupSettings
from arena_distill.config.phases.studies import AveragingSettings, CompareSettings, CurveSettings


include: "inputs/studies.smk"


rule compare_soups:
    input:
        backbone=backbone,
        adapters=fold_adapters,
        logits=fold_logits,
        ids=carried_ids(fold_logits),
        tokens=tokens,
        folds=RUN.folds,
        test_votes=TEST_VOTES,
    output:
        soups=RUN.soups("{judge}"),
    log:
        RUN.log("compare_soups/{judge}"),
    benchmark:
        RUN.benchmark("compare_soups/{judge}")
    conda:
        "../envs/arena.yaml"
    threads: compute("threads")
    resources:
        **job_of(scoring_gpus, "batch_tokens"),
    params:
        settings=settings_of(SoupSettings),
        options=as_options("logits", "test_votes"),
    message:
        f"Merging the folds of {{wildcards.judge}} in every way{ASKS}"
    shell:
        "arena compare-soups --backbone {input.backbone:q} --tokens {input.tokens:q}"
        " --folds {input.folds:q} {params.options:q}"
        " --output {output.soups:q} --settings {params.settings:q}"
        f" {BATCH_OPTIONS} {{input.adapters:q}} > {{log:q}} 2>&1"


rule draw_averaging:
    input:
        soups=soups,
    output:
        figures=RUN.study("averaging", "averaging.json"),
        table=RUN.study("averaging", "averaging.csv"),
        drawing=RUN.study("averaging", "averaging.svg"),
    log:
        RUN.log("draw_averaging"),
    benchmark:
        RUN.benchmark("draw_averaging")
    localrule: True
    conda:
        "../envs/arena.yaml"
    params:
        settings=study_settings(AveragingSettings),
        folder=lambda wildcards, output: os.path.dirname(output.figures),
    message:
        "Drawing how far the two ways of averaging differ"
    shell:
        "arena draw-averaging --output {params.folder:q} --settings {params.settings:q}"
        " {input.soups:q} > {log:q} 2>&1"


rule draw_curves:
    input:
        curve_files,
        folds=RUN.folds,
        battles=RUN.battles,
        surface=RUN.surface,
        truth=TRUTH,
    output:
        figures=RUN.study("curves", "curves.json"),
        table=RUN.study("curves", "curves.csv"),
        drawing=RUN.study("curves", "curves.svg"),
    log:
        RUN.log("draw_curves"),
    benchmark:
        RUN.benchmark("draw_curves")
    localrule: True
    conda:
        "../envs/arena.yaml"
    params:
        settings=study_settings(CurveSettings),
        run=lambda wildcards, input: os.path.dirname(input.folds),
        folder=lambda wildcards, output: os.path.dirname(output.figures),
        truth=as_options("truth"),
    message:
        "Drawing learning curves"
    shell:
        "arena draw-curves --run {params.run:q} --output {params.folder:q} {params.truth:q}"
        " --settings {params.settings:q} > {log:q} 2>&1"


rule compare_judges:
    input:
        compared_files,
        folds=RUN.folds,
        battles=RUN.battles,
        surface=RUN.surface,
        test_votes=TEST_VOTES,
        truth=TRUTH,
    output:
        figures=RUN.study("compare", "compare.json"),
        table=RUN.study("compare", "judges.csv"),
        differences=RUN.study("compare", "differences.csv"),
        page=RUN.study("compare", "report.html"),
    log:
        RUN.log("compare_judges"),
    benchmark:
        RUN.benchmark("compare_judges")
    conda:
        "../envs/arena.yaml"
    params:
        settings=study_settings(CompareSettings),
        run=lambda wildcards, input: os.path.dirname(input.folds),
        folder=lambda wildcards, output: os.path.dirname(output.figures),
        options=as_options("test_votes", "truth"),
    message:
        "Comparing recipes"
    shell:
        "arena compare --run {params.run:q} --output {params.folder:q} {params.options:q}"
        " --settings {params.settings:q} > {log:q} 2>&1"
