# What one asks for by name; `all` stands in the Snakefile.


rule folds:
    input:
        rules.assign_folds.output.folds,


rule teachers:
    input:
        expand(f"{R}/adapters/{{judge}}/fold_{{fold}}", judge=own(TEACHERS), fold=FOLDS),


rule logits:
    input:
        expand(f"{R}/logits/{{judge}}/fold_{{fold}}.npy", judge=CONFIG.judges, fold=FOLDS),


rule students:
    input:
        expand(f"{R}/adapters/{{judge}}/fold_{{fold}}", judge=own(STUDENTS), fold=FOLDS),


rule merged:
    input:
        f"{R}/merged/{CONFIG.final}",


rule quantized:
    input:
        f"{R}/checks/{CONFIG.final}_drift.json" if "gptq" in MODELS else [],


rule submission:
    input:
        rules.write_submission.output.submission,


rule report:
    input:
        f"{R}/report.html",


rule compare:
    input:
        f"{R}/compare/report.html",


rule curves:
    input:
        f"{R}/curves/curves.svg",


rule drift:
    input:
        f"{R}/drift/drift.svg",


rule plan:
    input:
        rules.write_plan.output.plan,
