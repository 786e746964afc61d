# The calibration of a judge's probabilities, if `prediction.calibration` is set.


rule fit_calibration:
    input:
        folds=RUN.folds,
        battles=RUN.battles,
        logits=[RUN.logits("{judge}", fold) for fold in FOLDS],
    output:
        calibration=RUN.calibration("{judge}"),
    log:
        RUN.log("fit_calibration/{judge}"),
    benchmark:
        RUN.benchmark("fit_calibration/{judge}")
    localrule: True
    conda:
        "../envs/arena.yaml"
    params:
        settings=version_of("calibration"),
    message:
        "Fitting the calibration of {wildcards.judge}"
    shell:
        "arena fit-calibration --folds {input.folds:q} --battles {input.battles:q}"
        " --judge {wildcards.judge} --output {output.calibration:q} --settings {params.settings:q}"
        " {input.logits:q} > {log:q} 2>&1"
