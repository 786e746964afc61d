# Judges of the run itself: what rules/targets.smk is given.
def own(judges):
    """Those of the run itself, without what studies derive from them."""
    return [judge for judge in judges if judge in CONFIG.judges]
