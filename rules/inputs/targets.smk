# Inputs of rules/targets.smk: judges of the run itself.
def own(judges):
    """Those of the run itself, without what studies derive from them."""
    return [judge for judge in judges if judge in CONFIG.judges]
