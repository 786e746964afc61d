# Inputs of rules/evaluation.smk: the folds of every judge.
SCORED = [(judge, fold) for judge in CONFIG.scored() for fold in FOLDS]
SCORED_LOGITS = [RUN.logits(judge, fold) for judge, fold in SCORED]


def judged_folds(wildcards, input):
    """The logits of every fold, each with the name of its judge."""
    return named([judge for judge, _ in SCORED], input.logits)
