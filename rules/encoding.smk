# Backbones as ordinary folders; battles as token ids, once per tokenizer.


rule prepare_backbone:
    output:
        directory(f"{R}/backbones/{{backbone}}"),
    log:
        f"{R}/logs/prepare_backbone/{{backbone}}.log",
    benchmark:
        f"{R}/benchmarks/prepare_backbone/{{backbone}}.tsv"
    conda:
        "../envs/arena.yaml"
    params:
        version=VERSIONS["backbone"],
        settings=lambda wildcards: BACKBONES[wildcards.backbone].model_dump_json(),
    message:
        "Preparing backbone {wildcards.backbone}"
    shell:
        "arena prepare-backbone --output {output} --version {params.version}"
        " --settings {params.settings:q} > {log} 2>&1"


rule tokenize_battles:
    input:
        battles=f"{R}/battles.parquet",
        backbone=tokenizer,
    output:
        tokens=f"{R}/tokens/{{tokenizer}}/battles.parquet",
    log:
        f"{R}/logs/tokenize_battles/{{tokenizer}}.log",
    benchmark:
        f"{R}/benchmarks/tokenize_battles/{{tokenizer}}.tsv"
    conda:
        "../envs/arena.yaml"
    params:
        version=VERSIONS["tokens"],
    message:
        "Tokenising battles with {wildcards.tokenizer}"
    shell:
        "arena tokenize-battles --battles {input.battles} --backbone {input.backbone}"
        " --output {output.tokens} --version {params.version} > {log} 2>&1"
