# Inputs of rules/merging.smk: the folds of a merged model.
def folds_of(judge):
    """The judge whose folds are merged. Judges of a study that differ only in merging share their folds."""
    return judge if judge in CONFIG.judges else FAMILY.trained_as(judge)


def fold_adapters(wildcards):
    return [RUN.adapter(folds_of(wildcards.judge), fold) for fold in FOLDS]


def fold_logits(wildcards):
    return [RUN.logits(folds_of(wildcards.judge), fold) for fold in FOLDS]


def merge_evidence(wildcards):
    """The inputs that decide the weight of each fold in the merged model, by option."""
    weights = GRAPH.judges[wildcards.judge].merge.weights
    if weights == "validation":
        ids = carried_ids(fold_logits)(wildcards)
        return {"folds": RUN.folds, "logits": fold_logits(wildcards), "ids": ids}
    if weights == "greedy":
        return {"folds": RUN.folds, "tokens": tokens(wildcards)}
    return {}
