# Studies: judges derived from the run's own, side by side. `all` asks for none of this.


rule compare_soups:
    input:
        backbone=backbone,
        adapters=fold_adapters,
        logits=fold_logits,
        tokens=tokens,
        folds=f"{R}/folds.parquet",
        battles=f"{R}/battles.parquet",
        solution=labelled_test,
    output:
        soups=f"{R}/soups/{{judge}}.json",
    log:
        f"{R}/logs/compare_soups/{{judge}}.log",
    benchmark:
        f"{R}/benchmarks/compare_soups/{{judge}}.tsv"
    conda:
        "../envs/arena.yaml"
    threads: compute("threads")
    resources:
        gpu=scoring_gpus,
        gpu_model=gpu_model,
        devices=scoring_gpus,
        mem_mb=growing("mem_mb"),
        disk_mb=growing("disk_mb"),
        runtime=growing("runtime"),
        batch_tokens=compute("batch_tokens"),
    params:
        settings=settings_of(phase.SoupSettings),
        options=as_options("logits", "solution"),
    message:
        f"Merging the folds of {{wildcards.judge}} in every way{ASKS}"
    shell:
        "arena compare-soups --backbone {input.backbone} --tokens {input.tokens}"
        " --folds {input.folds} --battles {input.battles} {params.options:q}"
        " --output {output.soups} --settings {params.settings:q}"
        " --batch-tokens {resources.batch_tokens} --gpus {resources.devices}"
        " {input.adapters} > {log} 2>&1"


rule draw_drift:
    input:
        soups=[
            f"{R}/soups/{judge}.json"
            for points in STUDIES.drifts.values()
            for judge in points.values()
        ],
    output:
        figures=f"{R}/drift/drift.json",
        table=f"{R}/drift/drift.csv",
        drawing=f"{R}/drift/drift.svg",
    log:
        f"{R}/logs/draw_drift.log",
    benchmark:
        f"{R}/benchmarks/draw_drift.tsv"
    localrule: True
    conda:
        "../envs/arena.yaml"
    params:
        settings=study_settings(phase.DriftStudySettings),
        folder=lambda wildcards, output: os.path.dirname(output.figures),
    message:
        "Drawing how far two ways of averaging part"
    shell:
        "arena draw-drift --output {params.folder} --settings {params.settings:q}"
        " {input.soups} > {log} 2>&1"


rule draw_curves:
    input:
        curve_files,
        folds=f"{R}/folds.parquet",
        battles=f"{R}/battles.parquet",
        truth=f"{R}/arena/truth.parquet" if CONFIG.data.arena else [],
    output:
        figures=f"{R}/curves/curves.json",
        table=f"{R}/curves/curves.csv",
        drawing=f"{R}/curves/curves.svg",
    log:
        f"{R}/logs/draw_curves.log",
    benchmark:
        f"{R}/benchmarks/draw_curves.tsv"
    localrule: True
    conda:
        "../envs/arena.yaml"
    params:
        settings=study_settings(phase.CurveSettings),
        run=lambda wildcards, input: os.path.dirname(input.folds),
        folder=lambda wildcards, output: os.path.dirname(output.figures),
        truth=as_options("truth"),
    message:
        "Drawing learning curves"
    shell:
        "arena draw-curves --run {params.run} --output {params.folder} {params.truth:q}"
        " --settings {params.settings:q} > {log} 2>&1"


rule compare_judges:
    input:
        compared_files,
        folds=f"{R}/folds.parquet",
        battles=f"{R}/battles.parquet",
        solution=labelled_test,
        truth=f"{R}/arena/truth.parquet" if CONFIG.data.arena else [],
    output:
        figures=f"{R}/compare/compare.json",
        table=f"{R}/compare/judges.csv",
        differences=f"{R}/compare/differences.csv",
        page=f"{R}/compare/report.html",
    log:
        f"{R}/logs/compare_judges.log",
    benchmark:
        f"{R}/benchmarks/compare_judges.tsv"
    conda:
        "../envs/arena.yaml"
    params:
        settings=study_settings(phase.CompareSettings),
        run=lambda wildcards, input: os.path.dirname(input.folds),
        folder=lambda wildcards, output: os.path.dirname(output.figures),
        options=as_options("solution", "truth"),
    message:
        "Comparing recipes"
    shell:
        "arena compare --run {params.run} --output {params.folder} {params.options:q}"
        " --settings {params.settings:q} > {log} 2>&1"
