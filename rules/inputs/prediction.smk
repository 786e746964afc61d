# Inputs of rules/prediction.smk: what calibrates predictions.
def calibration(wildcards):
    """What calibrates the test predictions of a judge, where they are to be calibrated."""
    if CONFIG.prediction.calibration == "none":
        return {}
    return {"calibration": RUN.calibration(wildcards.judge), "battles": RUN.battles}
