# Inputs of rules/prediction.smk: the calibration.
def calibration(wildcards):
    """The calibration of a judge's test predictions, if `prediction.calibration` is set."""
    if CONFIG.prediction.calibration == "none":
        return {}
    return {"calibration": RUN.calibration(wildcards.judge), "battles": RUN.battles}
