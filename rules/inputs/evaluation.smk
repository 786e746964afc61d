# Inputs of rules/evaluation.smk: the folds of every judge.
SCORED = [(judge, fold) for judge in CONFIG.scored() for fold in FOLDS]


def judged_folds(wildcards, input):
    """The logits of every fold, each with the name of its judge."""
    return named([judge for judge, _ in SCORED], input.logits)
