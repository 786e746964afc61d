"""Estimate what a job costs: memory on its GPUs and on the host, disk, floating-point operations, time.

This is a model of the jobs, not a measurement. It counts exactly: parameters, and so weights, gradients
and optimizer states; the battles of folds, once they exist. It derives: operations, from the shapes of
the matrices and the lengths of the sequences; other memory, from a traced step (``sizes``). It takes its
assumptions from the configuration's section ``plan``, above all one utilisation, which includes padding,
NF4's unpacking, communication and all else that keeps a GPU below its peak.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from arena_distill.battles.parts import read_parts
from arena_distill.config.backbone import Backbone
from arena_distill.config.head import JOINT
from arena_distill.config.judge import Judge
from arena_distill.config.phases.scoring import LogitsSettings
from arena_distill.config.run import Config
from arena_distill.config.training import Lora, Optimization, Training
from arena_distill.errors import InputError
from arena_distill.models.layer_reads import default_layers, keep_layers
from arena_distill.planning.devices import CORE, DEVICES, GIB, Device
from arena_distill.planning.sizes import Sizes, alive, measure, read_config
from arena_distill.planning.workload import Battles, Work
from arena_distill.runs.graph import Planned

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes per weight in NF4: four bits, a byte of scale per 64 weights, and four per 256 of those scales
(double quantisation; Dettmers et al. 2023, arXiv:2305.14314, section 3)."""

_CHECKPOINTS = 3
"""Of a training at most: two are kept, a third is being written."""

PROCESS = 3 * GIB
"""Host memory of a process that has imported PyTorch and holds a CUDA context."""

# Rates of the host's phases, battles per second on one core, and weights that GPTQ packs per second.
_READ, _TOKENIZED, _PACKED = 5_000.0, 1_900.0, 5e7
_TEXT_BYTES = 4.0  # per token, as text, ids or both; files are compressed


@dataclass(frozen=True)
class Cost:
    """What a job costs.

    gpus: devices it holds, on all its nodes; 0 is the CPU.
    cores: CPU cores it holds on each node.
    flops: floating-point operations.
    seconds: run time.
    memory: peak bytes on each of its devices, by purpose; on the host without GPUs.
    host: peak bytes of host memory on each node.
    stored: bytes of its outputs.
    checkpoints: bytes of its checkpoints, which it removes when it ends.
    fee: price of an endpoint's answers.
    nodes: machines that share its devices, each as many.
    """

    gpus: int = 0
    cores: int = 1
    flops: float = 0.0
    seconds: float = 0.0
    memory: dict[str, float] = field(default_factory=dict)
    host: float = 0.0
    stored: float = 0.0
    checkpoints: float = 0.0
    fee: float = 0.0
    nodes: int = 1

    @property
    def peak(self) -> float:
        return sum(self.memory.values())


# --- jobs -------------------------------------------------------------------------------------------


ON_THE_HOST = frozenset(
    {
        *("fetch_battles", "fetch_data_set", "simulate_arena", "read_battles", "read_solution"),
        *("assign_folds", "check_counts", "audit_leaks"),
        *("download_backbone", "prepare_backbone", "cut_download", "tokenize_battles"),
        *("gather_logits", "gather_logits_states", "read_external_logits", "split_external_logits"),
        *("fit_stack", "combine_fold", "combine_test", "combine_held_out"),
        *("check_drift", "fit_calibration", "predict_test", "write_submission"),
        *("write_config", "predict_surface", "evaluate", "render_report", "write_plan"),
        *("draw_averaging", "draw_curves", "compare_judges"),
    }
)
"""The rules that run no judge."""


class Costs:
    """The costs of a run's jobs.

    Args:
        config: with the judges of studies.
        battles: of the run.
        run: its folder.
    """

    def __init__(self, config: Config, battles: Battles, run: Path) -> None:
        self.config = config
        self.battles = battles
        self.run = run
        self._models: dict[str, Any] = {}
        self._sizes: dict[str, Sizes] = {}
        train, score = self._train, self._score_fold
        self.by_rule: dict[str, Callable[[Planned, Judge, Device], Cost]] = {
            "pretrain_adapter": train,
            "train_teacher": train,
            "distill_student": train,
            "predict_logits": score,
            "predict_logits_states": score,
            "predict_shard": score,
            "predict_shard_states": score,
            "read_features": self._read_features,
            "fit_probe": self._fit_probe,
            "score_probe": self._fit_probe,
            "merge_folds": self._merge,
            "merge_probes": self._merge,
            "quantize_model": self._quantize,
            "score_test_merged": self._score_test,
            "score_test_gptq": self._score_test,
            "score_held_out_merged": self._score_test,
            "score_held_out_gptq": self._score_test,
            "finish_merged": self._finish,
            "finish_gptq": self._finish,
            "finish_stack_merged": self._finish,
            "finish_stack_gptq": self._finish,
            "benchmark_merged": self._benchmark,
            "benchmark_gptq": self._benchmark,
            "compare_soups": self._compare_soups,
            "query_endpoint": self._ask,
        }

    def of(self, job: Planned, *, judge: Judge | None = None, device: Device | None = None) -> Cost:
        """Estimate the cost of a job, optionally with another judge or on another GPU.

        Raises:
            InputError: the size of its backbone is unknown.
        """
        node = judge or self.config.judges.get(job.wildcards.get("judge", ""))
        device = device or DEVICES[self.config.plan.accelerator]
        if node is None or job.phase not in self.by_rule:
            return self._host(job)
        if node.stack:  # its members' models, one after another in one process
            parts = self.config.trained_parts(job.wildcards["judge"])
            jobs = [replace(job, wildcards={**job.wildcards, "judge": part}) for part in parts]
            return self._in_one(self.of(part, device=device) for part in jobs)
        return self.by_rule[job.phase](job, node, device)

    def _in_one(self, costs: Iterable[Cost]) -> Cost:
        """The cost of one job that does what several do, with all their models in memory."""
        first, *more = costs
        for cost in more:
            first = replace(
                first,
                flops=first.flops + cost.flops,
                seconds=first.seconds + cost.seconds - self.config.plan.startup,
                memory={
                    name: first.memory.get(name, 0.0) + cost.memory.get(name, 0.0)
                    for name in {**first.memory, **cost.memory}
                },
                host=first.host + cost.host,
                stored=first.stored + cost.stored,
            )
        return first

    def sizes(self, judge: str) -> Sizes:
        """The sizes of a judge."""
        if judge not in self._sizes:
            node = self.config.judges[judge]
            self._sizes[judge] = measure(
                self.model_config(judge), self.config.head_of(judge), node.lora
            )
        return self._sizes[judge]

    def model_config(self, judge: str) -> Any:
        """The configuration of its backbone's model."""
        if judge not in self._models:
            prepared = self.run / "backbones" / self.config.backbone_name(judge)
            found = read_config(self.config.backbone_of(judge), prepared)
            node = self.config.judges[judge]
            if node.head.pooling == "layers" and not node.frozen:
                # It is cut after the last layer that it reads.
                keep_layers(found, max(default_layers(found.num_hidden_layers)))
            self._models[judge] = found
        return self._models[judge]

    # Jobs that compute

    def _train(self, job: Planned, judge: Judge, device: Device) -> Cost:
        name, sizes = job.wildcards["judge"], self.sizes(job.wildcards["judge"])
        how: Optimization
        if job.phase == "pretrain_adapter":
            assert judge.pretraining
            how, battles = judge.pretraining, {"ut": float(self.battles.counts["ut"])}
        else:
            how = judge.training
            battles = self.battles.training(name, int(job.wildcards["fold"]))
        pointwise = judge.head.kind == "pointwise"
        per_battle = 2 if pointwise else 1
        shown = 2 if pointwise or how.swap else 1
        work = self.battles.work(name, battles, shown) * how.epochs
        gpus, micro = _asked(job, "gpu", 0), _asked(job, "micro_batch_size", 8)
        again, fsdp = bool(_asked(job, "gradient_checkpointing", 0)), _asked(job, "fsdp", 0)
        share = max(1, how.batch_size // max(1, gpus))
        micro = min(micro, share)
        learned, spread = sizes.learned, gpus if fsdp else 1
        memory = self._weights(sizes, judge, spread=spread, training=True)
        held = learned / spread if sizes.whole else learned
        memory |= {
            "adapter": 4.0 * (sizes.lora + sizes.head),
            "gradients": 4.0 * held * (2 if gpus > spread else 1),  # DDP's buckets
            "optimizer": 8.0 * held,
            "activations": self._alive(
                job, judge, work.longest, micro * per_battle, training=True, again=again
            ),
        }
        if sizes.whole and judge.precision == "bf16" and not fsdp:  # FSDP casts before it gathers
            memory["casts"] = 2.0 * sizes.linear
        flops = sizes.training_flops(work.tokens, work.squares, checkpointing=again)
        if isinstance(how, Training) and how.fit_head:  # every process reads all features
            once = work * (1 / how.epochs)
            flops += max(1, gpus) * sizes.forward_flops(once.tokens, once.squares)
        # As many tokens as the longest have, of battles of the mean length.
        together = min(share, micro * work.longest * work.sequences / max(1.0, work.tokens))
        passes = work.sequences / (together * per_battle) * (3 if again else 2)
        if isinstance(how, Training) and how.eval_steps:
            times = (
                1 / how.eval_steps
                if how.eval_steps < 1
                else how.steps(round(work.sequences / how.epochs)) / how.eval_steps
            )
            seen = self.battles.work(name, self.battles.for_choices(), per_battle) * times
            flops += sizes.forward_flops(seen.tokens, seen.squares)
        seconds = self._seconds(job, judge, device, flops, passes, sum(memory.values()), gpus)
        cost = self._computed(job, sizes, judge, memory, flops, seconds, stored=4.0 * learned)
        # A process gathers all that is trained to write it; the best weights wait in host memory.
        best = isinstance(how, Training) and how.keep == "best"
        host = cost.host + 4.0 * learned * (1 + best)
        return replace(cost, host=host, checkpoints=_CHECKPOINTS * 12.0 * learned)  # and moments

    def _score_fold(self, job: Planned, judge: Judge, device: Device) -> Cost:
        name = job.wildcards["judge"]
        battles = self.battles.scored(name, int(job.wildcards["fold"]))
        part = judge.logits.shards if "shard" in job.wildcards else 1
        work = self.battles.work(name, battles, shown=2) * (1 / part)
        sizes = self.sizes(name)
        stored = sum(battles.values()) / part * 2 * 3 * 4.0
        for state in LogitsSettings.of(self.config, name).states:
            width = sizes.hidden if state == "features" else judge.encoding.max_length
            stored += sum(battles.values()) / part * 2 * width * 2
        return self._score(job, judge, device, work, stored)

    def _read_features(self, job: Planned, judge: Judge, device: Device) -> Cost:
        learned = {s: float(n) for s, n in self.battles.counts.items() if s not in ("test", "ut")}
        work = self.battles.work(job.wildcards["judge"], learned, shown=2)
        stored = sum(learned.values()) * 2.0 * self._features(job, judge)
        cost = self._score(job, judge, device, work, stored, dense=True)
        return replace(cost, host=cost.host + stored)

    def _fit_probe(self, job: Planned, judge: Judge, device: Device) -> Cost:
        """The features of a fold's battles in memory, in float32; a fit of all held them 4.7 times."""
        name, fold = job.wildcards["judge"], int(job.wildcards["fold"])
        fits = job.phase == "fit_probe"
        battles = self.battles.training(name, fold) if fits else self.battles.scored(name, fold)
        held = sum(battles.values()) * 4.0 * self._features(job, judge) * (5 if fits else 2)
        cost = self._host(job)
        return replace(cost, host=cost.host + held)

    def _features(self, job: Planned, judge: Judge) -> float:
        """How many numbers a frozen judge reads of a battle."""
        assert judge.frozen
        layers, poolings = judge.frozen.layers or (1, 2, 3), judge.frozen.poolings
        return 2.0 * len(layers) * len(poolings) * self.sizes(job.wildcards["judge"]).hidden

    def _score_test(self, job: Planned, judge: Judge, device: Device) -> Cost:
        prediction, battles = self.config.prediction, {"test": float(self.battles.counts["test"])}
        if job.phase.startswith("score_held_out"):
            battles = self.battles.held_out()
        work = self._views(job, judge, battles)
        stored = (
            sum(battles.values()) * len(prediction.max_lengths) * len(prediction.orders) * 3 * 4.0
        )
        return self._score(job, judge, device, work, stored, dense=True)

    def _finish(self, job: Planned, judge: Judge, device: Device) -> Cost:
        """The test vectors are seven battles; the weights are linked."""
        return self._score(
            job, judge, device, self._views(job, judge, {"test": 7.0}), 0.0, dense=True
        )

    def _benchmark(self, job: Planned, judge: Judge, device: Device) -> Cost:
        """Battles of benchmarks are taken to be as long as those of `test`."""
        battles = {"test": self._benchmarked}
        return self._score(job, judge, device, self._views(job, judge, battles), 0.0, dense=True)

    @cached_property
    def _benchmarked(self) -> float:
        """The number of battles of all benchmarks."""
        parts = read_parts({"extra": [s for of in self.config.benchmarks.values() for s in of]})
        return float(sum(part.good().sum() for part in parts))

    def _views(self, job: Planned, judge: Judge, battles: dict[str, float]) -> Work:
        """Battles in every view of the submission."""
        prediction = self.config.prediction
        orders = 2 if judge.head.kind == "pointwise" else len(prediction.orders)
        work = Work()
        for length in prediction.max_lengths:
            work += self.battles.work(job.wildcards["judge"], battles, orders, length)
        return work

    def _compare_soups(self, job: Planned, judge: Judge, device: Device) -> Cost:
        test = {"test": float(self.battles.counts["test"])}
        soups = self.config.folds.n + 3
        work = self.battles.work(job.wildcards["judge"], test, shown=2) * soups
        return self._score(job, judge, device, work, 0.0, dense=True)

    def _score(
        self,
        job: Planned,
        judge: Judge,
        device: Device,
        work: Work,
        stored: float,
        *,
        dense: bool = False,
    ) -> Cost:
        sizes, gpus = self.sizes(job.wildcards["judge"]), _asked(job, "gpu", 0)
        together = max(1, _asked(job, "batch_tokens", 16384) // max(1, work.longest))
        memory = self._merged(job, sizes, judge) if dense else self._weights(sizes, judge)
        if not dense:
            memory["adapter"] = 4.0 * (sizes.lora + sizes.head)
        for part in ("weights", "adapter"):  # several GPUs share the layers
            memory[part] = memory.get(part, 0.0) / max(1, gpus)
        memory["activations"] = self._alive(job, judge, work.longest, together, training=False)
        flops = sizes.forward_flops(work.tokens, work.squares, lora=not dense)
        passes = work.sequences / together
        # Layers run one after another: of the GPUs that share them, one works at a time.
        seconds = self._seconds(
            job, judge, device, flops, passes, sum(memory.values()), min(1, gpus)
        )
        return self._computed(job, sizes, judge, memory, flops, seconds, stored=stored)

    def _merge(self, job: Planned, judge: Judge, device: Device) -> Cost:
        name, sizes = job.wildcards["judge"], self.sizes(job.wildcards["judge"])
        size = _dense_bytes(judge)
        written = size * (sizes.base + sizes.head)
        folds = 0 if judge.frozen else self.config.folds.n
        matrices = [inputs * outputs for inputs, outputs in sizes.matrices]
        largest = 3 * 4.0 * max(*matrices, sizes.embedding if sizes.whole else 0)
        # A fold's factors are multiplied, one matrix after another; without LoRA weights are added.
        flops = 2.0 * (judge.lora.r * sizes.linear if judge.lora else sizes.base) * folds
        read = written + (4.0 * sizes.learned * folds if sizes.whole else 0.0)
        if judge.merge.weights == "greedy":
            soups = self.config.folds.n * (self.config.folds.n + 1) / 2
            work = self.battles.work(name, self.battles.for_choices(), shown=2) * soups
            return self._score(job, judge, device, work, written, dense=True)
        plan = self.config.plan
        seconds = plan.startup + (read + written) / (plan.disk_gb_per_s * 1e9)
        seconds += flops / (CORE.fp32 * plan.utilisation)
        return Cost(
            cores=job.threads,
            flops=flops,
            seconds=seconds,
            memory={"weights": written, "adapters": 4.0 * sizes.lora * folds},
            host=1.0 * GIB + written + largest + 4.0 * sizes.lora * folds,
            stored=written,
        )

    def _quantize(self, job: Planned, judge: Judge, device: Device) -> Cost:
        name, sizes = job.wildcards["judge"], self.sizes(job.wildcards["judge"])
        assert judge.quantization
        gpus, how = _asked(job, "gpu", 0), judge.quantization.sized(self.battles.counts["train"])
        assert how.samples and how.validation_rows
        rows = self.battles.work(name, {"train": float(how.samples)}, shown=1)
        drift = self.battles.work(
            name, {"train": float(how.validation_rows)}, 2 if judge.head.kind == "pointwise" else 1
        )
        # Blocks process the rows for the recording, once per group of layers, and once more after.
        flops = 6 * sizes.forward_flops(rows.tokens, rows.squares, lora=False)
        flops += 2 * sizes.forward_flops(drift.tokens, drift.squares, lora=False)
        # Each layer's Hessian, its inverse, and the propagated errors.
        flops += sum(2 * rows.tokens * i**2 + i**3 + o * i**2 for i, o in sizes.matrices)
        size = _dense_bytes(judge)
        widest = max(inputs for inputs, _ in sizes.matrices)
        together = max(1, _asked(job, "batch_tokens", 16384) // max(1, drift.longest))
        memory = {
            "weights": size * (sizes.base + sizes.head),
            "calibration": 2 * size * rows.tokens * sizes.hidden + 3 * 4.0 * widest**2,
            "activations": self._alive(job, judge, drift.longest, together, training=False),
        }
        seconds = self._seconds(job, judge, device, flops, 0.0, 0.0, min(1, gpus))
        seconds += sizes.linear / _PACKED
        stored = self._quantized_bytes(sizes, judge)
        return self._computed(job, sizes, judge, memory, flops, seconds, stored=stored)

    # Jobs on the host only

    def _host(self, job: Planned) -> Cost:
        tokens = self.config.plan.tokens_per_battle
        battles = sum(self.battles.counts.values())
        seconds, stored, host = self.config.plan.startup, 0.0, 1.0 * GIB
        if job.phase in ("read_battles", "simulate_arena"):
            seconds += battles / _READ
            stored = battles * tokens * _TEXT_BYTES
        elif job.phase == "tokenize_battles":
            seconds += battles / _TOKENIZED
            stored = battles * tokens * _TEXT_BYTES
            host += 2 * battles * tokens * _TEXT_BYTES
        elif backbone := self._backbones().get(job.wildcards.get("backbone", "")):
            config = read_config(backbone, self.run / "backbones" / job.wildcards["backbone"])
            stored = 2.0 * measure(config, JOINT, Lora()).base
            rebuilt = backbone.gguf or backbone.layers or backbone.tokenizer
            host += 2 * stored if rebuilt else 0.0
            seconds += 2 * stored / (self.config.plan.disk_gb_per_s * 1e9)
        return Cost(cores=job.threads, seconds=seconds, host=host, stored=stored)

    def _backbones(self) -> dict[str, Backbone]:
        """The backbones of all judges, also with all their layers, by name."""
        config, found = self.config, {}
        for name, judge in config.judges.items():
            if judge.backbone:
                found[config.tokenizer_name(name)] = judge.backbone.whole()
                found[config.backbone_name(name)] = judge.backbone
        return found

    def _ask(self, job: Planned, judge: Judge, device: Device) -> Cost:
        endpoint = judge.external.endpoint if judge.external else None
        assert endpoint
        sources = {"train", "extra"}
        if any(map(self.config.learns_unlabelled, self.config.students_of(job.wildcards["judge"]))):
            sources.add("unlabelled")
        requests = 2.0 * sum(self.battles.counts.get(source, 0) for source in sources)
        per_second = endpoint.concurrency / 1.0  # one second per request
        if endpoint.requests_per_minute:
            per_second = min(per_second, endpoint.requests_per_minute / 60)
        prompt = self.config.plan.tokens_per_battle + len(endpoint.instructions) / _TEXT_BYTES
        fee = prompt * (endpoint.prompt_price or 0)
        fee += endpoint.max_tokens * (endpoint.completion_price or 0)
        return Cost(
            seconds=self.config.plan.startup + requests / per_second,
            host=1.0 * GIB,
            stored=requests * 3 * 4.0,
            fee=requests * fee / 1e6,
        )

    # Parts of several jobs

    def _weights(
        self, sizes: Sizes, judge: Judge, spread: int = 1, *, training: bool = False
    ) -> dict[str, float]:
        """A judge's weights but its adapter and the head beside it; PEFT also keeps the initial head."""
        trained = training and sizes.whole
        size = 4.0 if judge.precision == "fp32" or trained else 2.0
        nf4 = judge.precision == "nf4"
        matrices = (NF4_BYTES if nf4 else size) * sizes.linear
        memory = {"weights": (matrices + size * (sizes.embedding + sizes.other)) / spread}
        memory["head"] = 0.0 if sizes.whole else 4.0 * sizes.head
        if nf4:  # unpacked for the product
            memory["unpacked"] = 2.0 * max(inputs * outputs for inputs, outputs in sizes.matrices)
        if spread > 1:  # a layer and the next one are whole, their gradients too
            memory["gathered"] = 2 * (matrices + trained * 4.0 * sizes.linear) / sizes.layers
        return memory

    def _merged(self, job: Planned, sizes: Sizes, judge: Judge) -> dict[str, float]:
        if job.phase.endswith("_gptq") and judge.quantization:  # of a stack, not all members are
            return {"weights": self._quantized_bytes(sizes, judge)}
        return {"weights": _dense_bytes(judge) * (sizes.base + sizes.head)}

    def _quantized_bytes(self, sizes: Sizes, judge: Judge) -> float:
        how = judge.quantization
        assert how
        # Per group a scale of 16 bits and a packed zero; per input the number of its group.
        packed = sizes.linear * (how.bits / 8 + (2 + how.bits / 8) / how.group_size)
        index = 4.0 * sum(inputs for inputs, _ in sizes.matrices)
        size = _dense_bytes(judge)
        return packed + index + size * (sizes.embedding + sizes.other + sizes.head)

    def _alive(
        self,
        job: Planned,
        judge: Judge,
        length: int,
        sequences: int,
        *,
        training: bool,
        again: bool = False,
    ) -> float:
        """Bytes besides the weights in a step of `sequences` of `length` tokens."""
        if not length:
            return 0.0
        name = job.wildcards["judge"]
        sizes = self.sizes(name)
        if sizes.longest and length > sizes.longest:
            raise InputError(
                f"judges.{name}: sequences have {length} tokens, but its model allows only "
                f"{sizes.longest}; lower max_length (config: encoding.max_length, "
                "prediction.max_lengths)"
            )
        traced = alive(
            self.model_config(name),
            self.config.head_of(name),
            judge.lora,
            length=length,
            precision=judge.precision,
            training=training,
            checkpointing=again,
            eager=job.resources.get("attention") == "eager",
        ).at(sizes.layers, sequences)
        if training and _asked(job, "gpu", 0) and judge.lora and judge.lora.dropout:
            # The trace is a CPU's, whose dropout keeps four bytes per number; a GPU's keeps one.
            held = 1 if again else sizes.layers
            traced -= 3.0 * sizes.adapted / sizes.layers * held * length * sequences
        return traced

    def _seconds(
        self,
        job: Planned,
        judge: Judge,
        device: Device,
        flops: float,
        passes: float,
        held: float,
        gpus: int,
    ) -> float:
        """Time of a job that computes: start, load, then the slower of arithmetic and memory.

        Args:
            passes: over all devices; each pass reads the bytes `held` once.
        """
        plan = self.config.plan
        unit, count = (device, gpus) if gpus else (CORE, job.threads)
        peak = unit.fp32 if judge.precision == "fp32" else unit.bf16
        sizes = self.sizes(job.wildcards["judge"])
        loading = 2.0 * sizes.base / (plan.disk_gb_per_s * 1e9)
        computing = flops / (peak * plan.utilisation * count)
        moving = passes / count * held / unit.bandwidth
        return plan.startup + loading + max(computing, moving)

    def _computed(
        self,
        job: Planned,
        sizes: Sizes,
        judge: Judge,
        memory: dict[str, float],
        flops: float,
        seconds: float,
        *,
        stored: float,
    ) -> Cost:
        gpus, nodes = _asked(job, "gpu", 0), _asked(job, "nodes", 1)
        if gpus:
            # Weights go through host memory one by one to the GPU.
            largest = max(sizes.embedding, *(i * o for i, o in sizes.matrices))
            processes = gpus // nodes if "micro_batch_size" in job.resources else 1
            host = processes * (PROCESS + 2 * 2.0 * largest)
        else:
            host = 1.0 * GIB + sum(memory.values())
        return Cost(gpus, job.threads, flops, seconds, memory, host, stored, nodes=nodes)


def _dense_bytes(judge: Judge) -> float:
    """Bytes per weight of the merged model."""
    return 4.0 if judge.dense_precision() == "fp32" else 2.0


def _asked(job: Planned, key: str, default: int) -> int:
    """A resource of the job."""
    return int(job.resources.get(key, default) or 0)
