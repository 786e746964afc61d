# What a judge's probabilities are mended by: needed where `prediction.calibration` asks for it.


rule fit_calibration:
    input:
        folds=f"{R}/folds.parquet",
        battles=f"{R}/battles.parquet",
        logits=expand(f"{R}/logits/{{{{judge}}}}/fold_{{fold}}.npy", fold=FOLDS),
    output:
        calibration=f"{R}/calibration/{{judge}}.json",
    log:
        f"{R}/logs/fit_calibration/{{judge}}.log",
    benchmark:
        f"{R}/benchmarks/fit_calibration/{{judge}}.tsv"
    localrule: True
    conda:
        "../envs/arena.yaml"
    params:
        version=VERSIONS["calibration"],
    message:
        "Calibrating {wildcards.judge}"
    shell:
        "arena fit-calibration --folds {input.folds} --battles {input.battles}"
        " --judge {wildcards.judge} --output {output.calibration} --version {params.version}"
        " {input.logits} > {log} 2>&1"
