# Every figure of the run, and the report that shows them.
FIGURES = ["log_loss", "reliability", "variants"]


rule write_config:
    output:
        config=f"{R}/config.yaml",
    log:
        f"{R}/logs/write_config.log",
    benchmark:
        f"{R}/benchmarks/write_config.tsv"
    conda:
        "../envs/arena.yaml"
    params:
        settings=CONFIG.described(),
    message:
        "Writing down the configuration"
    shell:
        "arena write-config --output {output.config} --settings {params.settings:q} > {log} 2>&1"


def labelled_test(wildcards):
    """What the test predictions are scored by, where the votes are known."""
    if CONFIG.data.arena:
        return [f"{R}/arena/test_solution.csv"]
    return [CONFIG.data.solution] if CONFIG.data.solution else []


rule evaluate:
    input:
        folds=f"{R}/folds.parquet",
        battles=f"{R}/battles.parquet",
        rejected=f"{R}/rejected.parquet",
        logits=expand(f"{R}/logits/{{judge}}/fold_{{fold}}.npy", judge=CONFIG.judges, fold=FOLDS),
        predictions=f"{R}/predictions/{CONFIG.final}/test.parquet",
        solution=labelled_test,
        quantized=f"{R}/gptq/{CONFIG.final}" if "gptq" in MODELS else [],
        truth=f"{R}/arena/truth.parquet" if CONFIG.data.arena else [],
    output:
        metrics=f"{R}/metrics.json",
        judges=report(
            f"{R}/tables/judges.csv", caption="../workflow/report/judges.rst", category="Judges"
        ),
        variants=report(
            f"{R}/tables/variants.csv", caption="../workflow/report/variants.rst", category="Test"
        ),
    log:
        f"{R}/logs/evaluate.log",
    benchmark:
        f"{R}/benchmarks/evaluate.tsv"
    conda:
        "../envs/arena.yaml"
    params:
        settings=settings_of(phase.EvaluationSettings),
        tables=lambda wildcards, output: os.path.dirname(output.judges),
        optional=lambda wildcards, input: [
            part
            for name in ("solution", "quantized", "truth")
            if input.get(name)
            for part in (f"--{name}", str(input.get(name)))
        ],
    message:
        "Evaluating judges, variants and quantisation"
    shell:
        "arena evaluate --folds {input.folds} --battles {input.battles} --rejected {input.rejected}"
        " --predictions {input.predictions} --output {output.metrics} --tables {params.tables}"
        " --settings {params.settings:q} {params.optional:q} {input.logits} > {log} 2>&1"


rule render_report:
    input:
        metrics=f"{R}/metrics.json",
        config=f"{R}/config.yaml",
    output:
        page=f"{R}/report.html",
        figures=[
            report(
                f"{R}/report/{name}.svg",
                caption=f"../workflow/report/{name}.rst",
                category="Figures",
            )
            for name in FIGURES
        ],
    log:
        f"{R}/logs/render_report.log",
    benchmark:
        f"{R}/benchmarks/render_report.tsv"
    conda:
        "../envs/arena.yaml"
    params:
        version=VERSIONS["report"],
        parts=lambda wildcards, output: os.path.dirname(output.figures[0]),
    message:
        "Writing the report: {output.page}"
    shell:
        "arena render-report --metrics {input.metrics} --config {input.config}"
        " --output {output.page} --parts {params.parts} > {log} 2>&1"
