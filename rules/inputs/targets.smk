# Inputs of rules/targets.smk: the judges of the run itself.
def own(judges):
    """The judges in the configuration, without those that studies derive."""
    return [judge for judge in judges if judge in CONFIG.judges]
