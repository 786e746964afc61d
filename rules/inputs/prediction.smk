# Inputs of rules/prediction.smk: the calibration.
def held_out_scores(judge, model):
    """A deployed model's calibration and scores on the held-out battles, where there are any."""
    return RUN.calibration(judge, model) if CONFIG.folds.holdout else []


def calibration(wildcards):
    """The calibration of a model's test predictions, if `prediction.calibration` is set."""
    if CONFIG.prediction.calibration == "none":
        return {}
    return {
        "calibration": RUN.calibration(wildcards.judge, wildcards.model),
        "battles": RUN.battles,
    }
