# Backbones as ordinary folders; battles as token ids, once per tokenizer.


rule download_backbone:
    # Run where Snakemake runs: it needs the network, which a cluster's nodes may not have.
    output:
        directory(f"{R}/backbones/{{backbone}}"),
    log:
        f"{R}/logs/download_backbone/{{backbone}}.log",
    benchmark:
        f"{R}/benchmarks/download_backbone/{{backbone}}.tsv"
    wildcard_constraints:
        backbone=one_of(DOWNLOADS),
    localrule: True
    conda:
        "../envs/arena.yaml"
    resources:
        download=1,
        disk_mb=disk_of_download,
    params:
        version=VERSIONS["backbone"],
        settings=lambda wildcards: DOWNLOADS[wildcards.backbone].model_dump_json(),
    message:
        "Downloading backbone {wildcards.backbone} ({resources.disk_mb} MB of disk)"
    shell:
        "arena prepare-backbone --output {output} --version {params.version}"
        " --settings {params.settings:q} > {log} 2>&1"


rule prepare_backbone:
    output:
        directory(f"{R}/backbones/{{backbone}}"),
    log:
        f"{R}/logs/prepare_backbone/{{backbone}}.log",
    benchmark:
        f"{R}/benchmarks/prepare_backbone/{{backbone}}.tsv"
    wildcard_constraints:
        backbone=one_of(BACKBONES, but=(*DOWNLOADS, *PARTS)),
    conda:
        "../envs/arena.yaml"
    params:
        version=VERSIONS["backbone"],
        settings=lambda wildcards: BACKBONES[wildcards.backbone].model_dump_json(),
    message:
        "Preparing backbone {wildcards.backbone}"
    shell:
        "arena prepare-backbone {input} --output {output} --version {params.version}"
        " --settings {params.settings:q} > {log} 2>&1"


use rule prepare_backbone as cut_download with:
    input:
        download_of,
    log:
        f"{R}/logs/cut_download/{{backbone}}.log",
    benchmark:
        f"{R}/benchmarks/cut_download/{{backbone}}.tsv"
    wildcard_constraints:
        backbone=one_of(PARTS),


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
