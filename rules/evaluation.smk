# Every figure of the run, and the report that shows them.
REPORTED = {  # file of `render_report` → caption
    "log_loss.svg": "log_loss.rst",
    "reliability.svg": "reliability.rst",
    "variants.svg": "variants.rst",
    "cascade.svg": "cascade.rst",
    "judges.csv": "judges.rst",
    "calibration.csv": "calibration.rst",
    "position.csv": "position.rst",
    "variants.csv": "variants_table.rst",
    "folds.csv": "folds.rst",
    "audit.csv": "audit.rst",
    "rejected.csv": "rejected.rst",
}


rule write_config:
    output:
        config=f"{R}/config.yaml",
    log:
        f"{R}/logs/write_config.log",
    benchmark:
        f"{R}/benchmarks/write_config.tsv"
    localrule: True
    conda:
        "../envs/arena.yaml"
    params:
        settings=lambda wildcards: CONFIG.described(),  # a plain text's {} would be wildcards
    message:
        "Writing down the configuration"
    shell:
        "arena write-config --output {output.config} --settings {params.settings:q} > {log} 2>&1"


rule evaluate:
    input:
        folds=f"{R}/folds.parquet",
        battles=f"{R}/battles.parquet",
        rejected=f"{R}/rejected.parquet",
        logits=expand(f"{R}/logits/{{judge}}/fold_{{fold}}.npy", judge=CONFIG.judges, fold=FOLDS),
        predictions=f"{R}/predictions/{CONFIG.final}/test.parquet",
        test_logits=f"{R}/logits/{CONFIG.final}/{CONFIG.prediction.model}_test.npy",
        solution=labelled_test,
        quantized=f"{R}/gptq/{CONFIG.final}" if "gptq" in MODELS else [],
        truth=f"{R}/arena/truth.parquet" if CONFIG.data.arena else [],
        audit=f"{R}/audit.json",
    output:
        metrics=f"{R}/metrics.json",
        judges=f"{R}/tables/judges.csv",
        variants=f"{R}/tables/variants.csv",
        cascade=f"{R}/tables/cascade.csv",
    log:
        f"{R}/logs/evaluate.log",
    benchmark:
        f"{R}/benchmarks/evaluate.tsv"
    conda:
        "../envs/arena.yaml"
    params:
        settings=settings_of(phase.EvaluationSettings),
        tables=lambda wildcards, output: os.path.dirname(output.judges),
        optional=options_of("solution", "quantized", "truth", "audit"),
    message:
        "Evaluating judges, variants and quantisation"
    shell:
        "arena evaluate --folds {input.folds} --battles {input.battles} --rejected {input.rejected}"
        " --predictions {input.predictions} --test-logits {input.test_logits}"
        " --output {output.metrics} --tables {params.tables}"
        " --settings {params.settings:q} {params.optional:q} {input.logits} > {log} 2>&1"


rule render_report:
    input:
        metrics=f"{R}/metrics.json",
        config=f"{R}/config.yaml",
    output:
        page=report(f"{R}/report.html", caption="../workflow/report/report.rst", category="Report"),
        parts=[
            report(
                f"{R}/report/{name}",
                caption=f"../workflow/report/{caption}",
                category="Figures" if name.endswith(".svg") else "Tables",
            )
            for name, caption in REPORTED.items()
        ],
    log:
        f"{R}/logs/render_report.log",
    benchmark:
        f"{R}/benchmarks/render_report.tsv"
    localrule: True
    conda:
        "../envs/arena.yaml"
    params:
        version=VERSIONS["report"],
        parts=lambda wildcards, output: os.path.dirname(output.parts[0]),
    message:
        "Writing the report: {output.page}"
    shell:
        "arena render-report --metrics {input.metrics} --config {input.config}"
        " --output {output.page} --parts {params.parts} > {log} 2>&1"
