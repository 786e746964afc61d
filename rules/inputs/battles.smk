# Inputs of rules/battles.smk: files of battles.
SOURCES = CONFIG.data.sources()


def battle_files(source):
    """The files of a source: the configuration's, or the simulated arena's."""

    def files(wildcards):
        if CONFIG.data.arena:
            return [RUN.arena(source)] if source in SOURCES else []
        return [existing(file) for file in getattr(CONFIG.data, source)]

    return files


def labelled_test(wildcards):
    """The votes of the test battles, where they are known."""
    if CONFIG.data.arena:
        return [RUN.arena("test_solution")]
    return [existing(CONFIG.data.solution)] if CONFIG.data.solution else []


TRUTH = RUN.truth if CONFIG.data.arena else []
