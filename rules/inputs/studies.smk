# Inputs of rules/studies.smk: files and settings of studies.
def study_settings(phase):
    return lambda wildcards: phase.of(GRAPH, STUDIES).as_params()


def compared_files(wildcards):
    """The files that the comparison reads of each judge."""
    if STUDIES.problem:
        raise WorkflowError(STUDIES.problem)
    judges = list(dict.fromkeys(entry.folds for entry in STUDIES.compared))
    tested = list(dict.fromkeys(entry.judge for entry in STUDIES.compared if entry.tested))
    logits = [RUN.logits(judge, fold) for judge in judges for fold in FOLDS]
    logits += [RUN.test_logits(judge, "merged") for judge in tested if TEST_VOTES]
    return [
        *logits,
        *carried_ids(logits)(wildcards),
        *(RUN.adapter(judge, fold) for judge in judges if judge in TRAINED for fold in FOLDS),
        *(RUN.weights(judge, "merged") for judge in tested),
    ]


def soups(wildcards):
    """The soups that the study of averages reads."""
    if CONFIG.final not in TRAINED:
        raise WorkflowError(f"averaging: {STUDIES.problem}")
    if CONFIG.judges[CONFIG.final].frozen:
        raise WorkflowError(
            f"averaging: {CONFIG.final} is frozen: its folds have one backbone, and the mean of their heads is exact"
        )
    return [RUN.soups(judge) for points in STUDIES.averaging.values() for judge in points.values()]


def curve_files(wildcards):
    """The files that learning curves read: the folds of every point."""
    if CONFIG.final not in TRAINED:
        raise WorkflowError(f"curves: {STUDIES.problem}")
    judges = [judge for points in STUDIES.curves.values() for judge in points.values()]
    folds = range(min(CONFIG.studies.curve_folds, CONFIG.folds.n))
    logits = [RUN.logits(judge, fold) for judge in judges for fold in folds]
    return [
        *logits,
        *carried_ids(logits)(wildcards),
        *(RUN.adapter(judge, fold) for judge in judges for fold in folds),
    ]
