"""Name the files of a run, for its rules, its studies, the planner and the tests.

The same methods name one file (``run.logits("llama", 3)``) and the pattern of a rule, whose name has
wildcards (``run.logits("{judge}", "{fold}")``). Each docstring says what the file holds.
"""

from __future__ import annotations

from dataclasses import dataclass

Number = int | str
"""The number of a fold or shard, or the wildcard for it."""


@dataclass(frozen=True)
class Layout:
    """The files of one run, as paths with forward slashes.

    Args:
        root: the folder of the run, ``<results>/<run>``.
    """

    root: str

    # --- battles ------------------------------------------------------------------------------------

    def arena(self, source: str) -> str:
        """A source of the synthetic arena, or its `test_solution`, in the Kaggle schema."""
        return f"{self.root}/arena/{source}.csv"

    @property
    def truth(self) -> str:
        """The true vote probabilities of the synthetic arena."""
        return f"{self.root}/arena/truth.parquet"

    @property
    def battles(self) -> str:
        """All battles that were read, in the canonical schema."""
        return f"{self.root}/battles.parquet"

    @property
    def test_votes(self) -> str:
        """The votes of the test battles, where they are known; `battles` has none of them."""
        return f"{self.root}/test_votes.parquet"

    @property
    def rejected(self) -> str:
        """Every refused row: its file, row, column and the reason."""
        return f"{self.root}/rejected.parquet"

    @property
    def reading(self) -> str:
        """How many rows were read, kept and refused: by source, kind of vote and reason."""
        return f"{self.root}/reading.json"

    @property
    def folds(self) -> str:
        """The fold of each labelled battle."""
        return f"{self.root}/folds.parquet"

    @property
    def surface(self) -> str:
        """Probabilities of every labelled and test battle by trees over its surface, a baseline."""
        return f"{self.root}/surface.parquet"

    @property
    def trees(self) -> str:
        """The trees that predict test and held-out battles there."""
        return f"{self.root}/surface.safetensors"

    @property
    def contradicted(self) -> str:
        """The battles whose vote every teacher of the final judge contradicts out of fold."""
        return f"{self.root}/tables/contradicted.parquet"

    @property
    def counts(self) -> str:
        """How many battles each training learns from, in how many steps: there are enough."""
        return f"{self.root}/counts.json"

    @property
    def audit(self) -> str:
        """How many battles share a prompt with a judge's training battles."""
        return f"{self.root}/audit.json"

    def tokens(self, tokenizer: str) -> str:
        """The token ids of every field of every battle."""
        return f"{self.root}/tokens/{tokenizer}/battles.parquet"

    # --- judges -------------------------------------------------------------------------------------

    def backbone(self, name: str) -> str:
        """A Hugging Face folder that was downloaded, converted or cut."""
        return f"{self.root}/backbones/{name}"

    def pretrained(self, judge: str) -> str:
        """As a fold, after post-pretraining on UT battles."""
        return f"{self.root}/adapters/{judge}/pretrained"

    def adapter(self, judge: str, fold: Number) -> str:
        """What one fold learned (see ``models.adapters``), with its metrics and history."""
        return f"{self.root}/adapters/{judge}/fold_{fold}"

    def features(self, judge: str) -> str:
        """What a frozen backbone says of every battle; judges that read the same share it."""
        return f"{self.root}/features/{judge}"

    def logits(self, judge: str, fold: Number) -> str:
        """Float32 (rows, orders, classes); rows are named in ``ids``, hidden states are in ``states``."""
        return f"{self.root}/logits/{judge}/fold_{fold}.npy"

    def shard(self, judge: str, fold: Number, shard: Number) -> str:
        """A part of the rows of one fold's logits."""
        return f"{self.root}/shards/{judge}/fold_{fold}/{shard}.npy"

    def external(self, judge: str) -> str:
        """The logits of an external judge, for all its battles."""
        return f"{self.root}/external/{judge}/logits.npy"

    def external_file(self, judge: str) -> str:
        """What was read of an external judge's file, and how its log-odds were mapped onto votes."""
        return f"{self.root}/external/{judge}/file.json"

    def stack(self, judge: str) -> str:
        """The weights of a stack's members, and what it is worth."""
        return f"{self.root}/stacks/{judge}.json"

    def cost(self, judge: str) -> str:
        """The tokens and the cost of an endpoint's answers."""
        return f"{self.root}/external/{judge}/cost.json"

    # --- the deployed model -------------------------------------------------------------------------

    def weights(self, judge: str, model: str) -> str:
        """A judge's bare model: `merged`, the folds' average in one folder; `gptq`, that one quantised."""
        return f"{self.root}/weights/{judge}/{model}"

    def finished(self, judge: str, model: str) -> str:
        """The judge to deploy: `weights` with `judge.json` and model card; `model` is merged or gptq."""
        return f"{self.root}/{model}/{judge}"

    def benchmarked(self, judge: str, model: str) -> str:
        """How often a finished judge prefers the better answer of public benchmarks."""
        return f"{self.root}/benchmarked/{judge}_{model}.json"

    def drift_check(self, judge: str) -> str:
        """Written once the quantisation error is within its bounds."""
        return f"{self.root}/checks/{judge}_drift.json"

    def test_logits(self, judge: str, model: str) -> str:
        """Float32 (rows, views, classes) of the test battles; `model` is merged or gptq."""
        return f"{self.root}/logits/{judge}/{model}_test.npy"

    def held_out_logits(self, judge: str, model: str) -> str:
        """The same of the held-out battles."""
        return f"{self.root}/logits/{judge}/{model}_held_out.npy"

    def calibration(self, judge: str, model: str) -> str:
        """The calibration fitted to these, and the model's scores on them."""
        return f"{self.root}/calibration/{judge}/{model}.json"

    def predictions(self, judge: str, model: str) -> str:
        """The averaged probabilities of the test battles, every variant; `model` is merged or gptq."""
        return f"{self.root}/predictions/{judge}/{model}.parquet"

    @property
    def submission(self) -> str:
        """`id,winner_model_a,winner_model_b,winner_tie`."""
        return f"{self.root}/submission.csv"

    # --- results ------------------------------------------------------------------------------------

    @property
    def config(self) -> str:
        """The configuration with all defaults."""
        return f"{self.root}/config.yaml"

    @property
    def metrics(self) -> str:
        """Every figure of the report."""
        return f"{self.root}/metrics.json"

    @property
    def report(self) -> str:
        """The report, one page."""
        return f"{self.root}/report.html"

    def report_part(self, name: str) -> str:
        """A figure or table of the report as a file of its own."""
        return f"{self.root}/report/{name}"

    def table(self, name: str) -> str:
        """A table of figures as CSV."""
        return f"{self.root}/tables/{name}.csv"

    @property
    def plan(self) -> str:
        """The forecast of the run's cost."""
        return f"{self.root}/plan.json"

    def soups(self, judge: str) -> str:
        """A judge's folds, merged in every way and scored."""
        return f"{self.root}/soups/{judge}.json"

    def study(self, name: str, file: str) -> str:
        """A file of a study: compare, curves or averaging."""
        return f"{self.root}/{name}/{file}"

    # --- next to the results ------------------------------------------------------------------------

    def log(self, job: str) -> str:
        """The output of a job, named by its rule and wildcards: ``rule/wildcards``."""
        return f"{self.root}/logs/{job}.log"

    def benchmark(self, job: str) -> str:
        """Time and memory of a job, as Snakemake measures them."""
        return f"{self.root}/benchmarks/{job}.tsv"

    def checkpoints(self, judge: str, adapter: str) -> str:
        """The checkpoints of a training job, outside its outputs: Snakemake deletes those on failure."""
        return f"{self.root}/.checkpoints/{judge}/{adapter}"

    def answers(self, judge: str) -> str:
        """The answers of an endpoint, kept even if the job fails."""
        return f"{self.root}/.cache/{judge}"


def tensorboard(adapter: str) -> str:
    """The folder of the TensorBoard files of an adapter's training, written while it runs."""
    return f"{adapter}.tensorboard"


def ids(logits: str) -> str:
    """The file that names the rows of logits."""
    return f"{logits.removesuffix('.npy')}.ids.parquet"


def states(logits: str) -> str:
    """The folder of the hidden states of logits."""
    return f"{logits.removesuffix('.npy')}.states"
