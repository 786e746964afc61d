# Inputs of rules/battles.smk: files of battles.
SOURCES = CONFIG.data.sources()


def battle_files(source):
    """The files of a source: from the configuration, or from the simulated arena."""

    def files(wildcards):
        check(CONFIG.environments.main)  # every run reads battles
        if CONFIG.data.arena:
            return [RUN.arena(source)] if source in SOURCES else []
        return [
            existing(str(file)) for given in getattr(CONFIG.data, source) for file in given.inputs()
        ]

    return files


def solution(wildcards):
    """The file with the votes of the test battles."""
    given = CONFIG.data.solution
    return existing(given.path) if given else RUN.arena("test_solution")


TEST_VOTES = RUN.test_votes if CONFIG.data.arena or CONFIG.data.solution else []
TRUTH = RUN.truth if CONFIG.data.arena else []
