"""`snakemake --profile slurm` on a real Slurm, with faults.

scripts/slurm_cluster.sh makes the cluster: two nodes with four simulated A100s each. The faults
hit one training that is long enough; it has to end with the weights of an uninterrupted one.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from checkouts import GPTQ, ROOT, Checkout, make_checkout, warm_python

CLUSTER = ROOT / "scripts/slurm_cluster.sh"
WEIGHTS = "adapter_model.safetensors"


def is_up() -> bool:
    return subprocess.run([CLUSTER, "status"], capture_output=True).returncode == 0


pytestmark = [
    pytest.mark.slow,
    pytest.mark.slurm,
    pytest.mark.gptq,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(not GPTQ.exists(), reason=f"no quantisation environment at {GPTQ}"),
]


def cluster(*arguments: str) -> str:
    done = subprocess.run([CLUSTER, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def ask(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def wait_for(what: Callable[[], object], seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.2)


@pytest.fixture(scope="module", autouse=True)
def slurm() -> Iterator[None]:
    """The cluster, and an environment in which jobs with fake GPUs train on the CPU."""
    (conf,) = re.findall(r"SLURM_CONF=(\S+)", cluster("env"))
    if not Path(conf).exists():
        pytest.skip(
            "no test cluster: `make test-slurm` starts one (scripts/slurm_cluster.sh start)"
        )
    wait_for(is_up)  # a test in another process may have lost a node for a while
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", conf)
        patch.setenv("ACCELERATE_USE_CPU", "true")
        yield


whole = pytest.mark.xdist_group("whole")  # tests of one run stay in one process


# --- a whole run ------------------------------------------------------------------------------------


def on_slurm(
    checkout: Checkout, *arguments: str, python: str = sys.executable
) -> subprocess.Popen[str]:
    """Snakemake as users start it, but with more frequent status checks; its jobs have the same Python."""
    command = [python, "-m", "snakemake", "--profile", "slurm", *arguments]
    log = open(checkout.folder / "snakemake.log", "a")  # noqa: SIM115
    return subprocess.Popen(
        [*command, "--slurm-init-seconds-before-status-checks", "2", "--configfile", "mini.yaml"],
        cwd=checkout.folder,
        stdout=log,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # A test suite in the background of a script has Ctrl-C switched off, and so would all below it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(snakemake: subprocess.Popen[str], checkout: Checkout, seconds: float = 1200) -> str:
    try:
        assert snakemake.wait(seconds) == 0, said(checkout)[-6000:]
    finally:
        snakemake.kill()
    return said(checkout)


def said(checkout: Checkout) -> str:
    return (checkout.folder / "snakemake.log").read_text()


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """The graph of tests/mini.yaml, each judge on one GPU, one's logits in shards; no fault hits it."""
    checkout = make_checkout(tmp_path_factory.mktemp("slurm") / "checkout")
    config = yaml.safe_load((checkout.folder / "mini.yaml").read_text())
    config["defaults"]["compute"] |= {"gpus": 1, "gpu_model": "a100"}
    config["judges"]["qwen2-teacher"]["logits"] = {"shards": 2}
    (checkout.folder / "mini.yaml").write_text(yaml.safe_dump(config))
    finish(on_slurm(checkout, "all", python=warm_python()), checkout)
    return checkout


@whole
def test_the_submission_is_that_of_a_local_run(whole_run: Checkout, finished: Checkout) -> None:
    for name in ("submission.csv", "logits/qwen2-teacher/fold_1.npy"):
        assert (whole_run.results / name).read_bytes() == (finished.results / name).read_bytes()


@dataclass(frozen=True)
class Job:
    """Slurm's record of a job: its wildcards, joined, and when and where it ran."""

    name: str
    start: str
    end: str
    node: str


def past_jobs(checkout: Checkout, rule: str) -> list[Job]:
    jobs = []
    for text in ask("scontrol", "--oneliner", "show", "job").splitlines():
        found = dict(re.findall(r"(\w+)=(\S+)", text))
        # Other tests start jobs as well, and not all of them have a comment.
        _, _, name = found.get("Comment", "").partition(f"rule_{rule}_wildcards_")
        if name and found["WorkDir"] == str(checkout.folder):
            jobs.append(Job(name, found["StartTime"], found["EndTime"], found["NodeList"]))
    return jobs


def gpus(checkout: Checkout, job: Job) -> str:
    """The devices that a training saw, from its log."""
    judge, _, fold = job.name.rpartition("_")
    log = checkout.results / f"logs/train_teacher/{judge}_fold_{fold}.log"
    return re.findall(r"^GPUs: (.*)", log.read_text(), re.MULTILINE)[-1]


@whole
def test_folds_run_at_the_same_time_on_different_gpus(whole_run: Checkout) -> None:
    jobs = past_jobs(whole_run, "train_teacher")
    assert len(jobs) == 4
    pairs = [
        (one, other)
        for one in jobs
        for other in jobs
        if one.name < other.name and one.start < other.end and other.start < one.end
    ]
    assert len(pairs) >= 2, jobs
    for one, other in pairs:
        places = {(job.node, gpus(whole_run, job)) for job in (one, other)}
        assert len(places) == 2, (one, other)
    print(*((job, gpus(whole_run, job)) for job in jobs), sep="\n")


@whole
def test_one_folds_logits_by_name_are_one_job(whole_run: Checkout) -> None:
    path = whole_run.results / "logits/llama-teacher/fold_1.npy"
    before = path.read_bytes()
    path.unlink()
    jobs = len(past_jobs(whole_run, "predict_logits"))
    logits = str(path.relative_to(whole_run.folder))
    finish(on_slurm(whole_run, logits, python=warm_python()), whole_run)
    assert len(past_jobs(whole_run, "predict_logits")) == jobs + 1
    assert path.read_bytes() == before


@whole
def test_nothing_is_left_to_do_and_no_checkpoint_lies_about(whole_run: Checkout) -> None:
    assert whole_run.would_run("--profile", "slurm") == {}
    assert not (whole_run.results / ".checkpoints").exists()


# --- faults -----------------------------------------------------------------------------------------


@dataclass
class Victim:
    """A checkout in which only one training of half a minute is missing."""

    checkout: Checkout
    uninterrupted: bytes
    snakemakes: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def adapter(self) -> Path:
        return self.checkout.results / "adapters/llama-teacher/fold_0"

    @property
    def log_file(self) -> Path:
        return self.checkout.results / "logs/train_teacher/llama-teacher_fold_0.log"

    @property
    def log(self) -> str:
        return self.log_file.read_text() if self.log_file.exists() else ""

    def start(self, *arguments: str) -> None:
        target = str(self.adapter.relative_to(self.checkout.folder))
        self.snakemakes.append(on_slurm(self.checkout, target, *arguments))

    def finish(self) -> str:
        text = finish(self.snakemakes[-1], self.checkout)
        assert (self.adapter / WEIGHTS).read_bytes() == self.uninterrupted
        return text

    def queued(self, states: str = "all") -> list[str]:
        """Ids of this checkout's jobs, oldest first."""
        lines = ask("squeue", "--noheader", f"--states={states}", "--format=%i %Z").splitlines()
        here = [line.split()[0] for line in lines if line.endswith(f" {self.checkout.folder}")]
        return sorted(here, key=int)

    @property
    def slurm_id(self) -> str:
        """The Slurm id of the training's last job."""
        return self.queued()[-1]

    @property
    def node(self) -> str:
        return ask("squeue", "--noheader", "--format=%N", f"--jobs={self.slurm_id}")

    def ranks(self) -> list[dict[str, str]]:
        """The environments of the processes that train together, and their ids, by rank."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                pairs = (folder / "environ").read_text().split("\0")
                words = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
                if "RANK" in words and (folder / "cwd").samefile(self.checkout.folder):
                    found.append(words | {"pid": folder.name})
        return sorted(found, key=lambda words: int(words["RANK"]))

    @property
    def process(self) -> int:
        """The process that trains."""
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # a process may end while it is looked at
                words = (folder / "cmdline").read_bytes().split(b"\0")
                if b"train-fold" in words and (folder / "cwd").samefile(self.checkout.folder):
                    return int(folder.name)
        raise AssertionError("nothing trains")

    def wait_for_a_checkpoint(self, times: int = 1) -> None:
        wait_for(lambda: self.log.count(": saved") >= times)

    @property
    def went_on(self) -> bool:
        """Whether the last job trained no step again: it may have found all of them done.

        Slurm gives what it ends some seconds, in which a training may get through.
        """
        return "going on from there" in self.log or "\nstep " not in self.log

    def hold_at_a_checkpoint(self) -> None:
        """Stop the training where it cannot end by itself before something ends it: Slurm wakes it then."""
        self.wait_for_a_checkpoint()
        os.kill(self.process, signal.SIGSTOP)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Victim:
    checkout = make_checkout(tmp_path_factory.mktemp("faults") / "checkout")
    config = yaml.safe_load((checkout.folder / "mini.yaml").read_text())
    config["judges"] = {"llama-teacher": {"backbone": {"tiny": "llama"}}}
    config["final"] = "llama-teacher"
    config["defaults"] |= {"pretraining": None, "quantization": None}
    config["defaults"]["training"]["epochs"] = 10
    config["defaults"]["compute"] |= {"gpus": 1, "checkpoint_minutes": 0.02}
    config["prediction"]["model"] = "merged"
    (checkout.folder / "mini.yaml").write_text(yaml.safe_dump(config))
    adapter = "results/mini/adapters/llama-teacher/fold_0"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "0")
        checkout.run(adapter)
    return Victim(checkout, (checkout.folder / adapter / WEIGHTS).read_bytes())


@pytest.fixture
def victim(prepared: Victim) -> Iterator[Victim]:
    """Start without any training done; stop what a test leaves running."""
    shutil.rmtree(prepared.adapter, ignore_errors=True)
    shutil.rmtree(prepared.checkout.results / ".checkpoints", ignore_errors=True)
    for file in (prepared.checkout.folder / "snakemake.log", prepared.log_file):
        file.unlink(missing_ok=True)
    yield prepared
    for snakemake in prepared.snakemakes:
        snakemake.kill()
    if left := prepared.queued("pending,running,completing"):
        ask("scancel", *left)
    wait_for(lambda: not prepared.queued("pending,running,completing"))
    locks = prepared.checkout.folder / ".snakemake/locks"
    shutil.rmtree(locks, ignore_errors=True)


def test_a_cancelled_training_is_tried_again_and_goes_on(victim: Victim) -> None:
    victim.start()
    victim.hold_at_a_checkpoint()
    ask("scancel", victim.slurm_id)
    assert "Trying to restart job" in victim.finish()
    assert victim.went_on


def test_a_lost_node_costs_nothing_but_time(victim: Victim) -> None:
    victim.start()
    victim.hold_at_a_checkpoint()
    job, node = victim.slurm_id, victim.node
    cluster("lose", node)
    try:
        wait_for(lambda: victim.node not in ("", node) or victim.slurm_id != job)
        victim.finish()
    finally:
        cluster("restore", node)
    assert victim.went_on


@pytest.fixture
def one_minute(victim: Victim) -> Iterator[Victim]:
    """The first attempt has one minute, the shortest limit of Slurm; the second has two."""
    victim.checkout.edit("mini.yaml", "runtime: 15", "runtime: 1")
    yield victim
    victim.checkout.edit("mini.yaml", "runtime: 1", "runtime: 15")


def test_a_time_limit_is_survived_in_the_next_attempt(one_minute: Victim) -> None:
    one_minute.start()
    one_minute.wait_for_a_checkpoint(1)
    first = one_minute.slurm_id

    def over() -> bool:
        # Held up until its minute is over, and beyond: Slurm wakes it to end it, and kills it some seconds
        # later, in which it would get through. Another test, which takes a node or all of them away, may
        # have it queued again: its minute then begins anew, in another process.
        with suppress(AssertionError, OSError):
            os.kill(one_minute.process, signal.SIGSTOP)
        return state(first) == "TIMEOUT"

    wait_for(over)
    assert "Trying to restart job" in one_minute.finish()
    assert one_minute.slurm_id != first
    assert one_minute.went_on


def state(job: str) -> str:
    return ask("squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={job}")


def test_the_warning_before_a_time_limit_saves_a_checkpoint(victim: Victim) -> None:
    """The test sends the signal: Slurm sends it at any time within a minute."""
    victim.checkout.edit("mini.yaml", "checkpoint_minutes: 0.02", "checkpoint_minutes: 30.0")
    try:
        victim.start()
        wait_for(lambda: victim.log.count("\nstep ") >= 5)
        ask("scancel", "--signal=USR1", victim.slurm_id)
        victim.wait_for_a_checkpoint(1)
        assert "Trying to restart" not in victim.finish()
    finally:
        victim.checkout.edit("mini.yaml", "checkpoint_minutes: 30.0", "checkpoint_minutes: 0.02")
    profile = yaml.safe_load((ROOT / "slurm/config.yaml").read_text())
    assert "--signal=USR1@" in profile["default-resources"]["slurm_extra"]


def test_a_preempted_training_is_queued_again_and_goes_on(victim: Victim) -> None:
    victim.start()
    victim.wait_for_a_checkpoint()
    job = victim.slurm_id
    everything = ["--partition=urgent", "--nodes=2", "--gpus-per-node=4", "--wrap=sleep 3"]
    ask("sbatch", *everything, "--output=/dev/null")
    text = victim.finish()
    if victim.slurm_id == job:  # else the training was done within its grace time
        restarts = re.findall(r"Restarts=(\d+)", ask("scontrol", "show", "job", job))
        assert restarts == ["1"] or "going on" not in victim.log
    assert "Error in rule" not in text


def test_a_snakemake_that_was_killed_does_not_start_its_jobs_twice(victim: Victim) -> None:
    victim.start()
    victim.wait_for_a_checkpoint()
    orphan = victim.slurm_id
    os.killpg(victim.snakemakes[-1].pid, signal.SIGKILL)
    victim.snakemakes[-1].wait()
    unlock = victim.checkout.snakemake("--unlock")
    assert unlock.returncode == 0, unlock.stderr
    victim.start()
    wait_for(lambda: "Waiting for Slurm jobs" in said(victim.checkout))
    assert victim.slurm_id == orphan
    steps = re.findall(r"^step (\d+)/", victim.log, re.MULTILINE)
    assert len(steps) == len(set(steps))
    victim.finish()
    # The second job took what the orphan had trained.
    assert "step" not in victim.log


def test_a_stopped_snakemake_takes_its_jobs_with_it_and_goes_on_later(victim: Victim) -> None:
    victim.start()
    victim.hold_at_a_checkpoint()
    os.killpg(victim.snakemakes[-1].pid, signal.SIGINT)
    assert victim.snakemakes[-1].wait(120) != 0
    wait_for(lambda: not victim.queued("pending,running,completing"))
    victim.start()
    victim.finish()
    assert victim.went_on


# --- several nodes ----------------------------------------------------------------------------------


@pytest.fixture
def wide(victim: Victim) -> Iterator[Victim]:
    """The same training, spread over two nodes; uninterrupted, over two processes of this machine."""
    settings = victim.checkout.folder / "mini.yaml"
    before = settings.read_text()
    victim.checkout.edit("mini.yaml", "gpus: 1", "fsdp: true\n    gpus: 2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
        victim.checkout.run(str(victim.adapter.relative_to(victim.checkout.folder)))
    alone, victim.uninterrupted = victim.uninterrupted, (victim.adapter / WEIGHTS).read_bytes()
    shutil.rmtree(victim.adapter)
    victim.log_file.unlink()
    victim.checkout.edit("mini.yaml", "gpus: 2", "gpus: 2\n    nodes: 2")
    yield victim
    victim.uninterrupted = alone
    settings.write_text(before)


def test_a_training_on_two_nodes_survives_the_loss_of_one_process(wide: Victim) -> None:
    wide.start()
    wide.wait_for_a_checkpoint()
    job = wide.slurm_id
    assert ask("squeue", "--noheader", "--format=%D %N", f"--jobs={job}") == "2 gpu[1-2]"
    first, second = wide.ranks()
    assert (first["SLURMD_NODENAME"], second["SLURMD_NODENAME"]) == ("gpu1", "gpu2")
    assert (first["WORLD_SIZE"], first["LOCAL_RANK"], second["LOCAL_RANK"]) == ("2", "0", "0")
    os.kill(int(second["pid"]), signal.SIGKILL)
    assert "Trying to restart job" in wide.finish()  # with the weights of an uninterrupted one
    assert wide.slurm_id != job
    assert wide.went_on
    assert "error: process 1 of 2 ended by SIGKILL" in said(wide.checkout)


def test_several_nodes_without_slurm_are_refused_at_once(wide: Victim) -> None:
    done = wide.checkout.snakemake(
        str(wide.adapter.relative_to(wide.checkout.folder)), "--cores", "2"
    )
    assert done.returncode == 1
    assert "judges.llama-teacher.compute.nodes: 2" in done.stdout + done.stderr
    assert not wide.log


# --- a full disk ------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(victim: Victim, tmp_path: Path) -> Iterator[Path]:
    """The results on a disk that is almost full."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "arena", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    results = victim.checkout.folder / "results"
    aside = victim.checkout.folder / "aside"
    shutil.copytree(results, disk / "results", symlinks=True)
    results.rename(aside)
    results.symlink_to(disk / "results")
    yield disk
    results.unlink()
    aside.rename(results)
    subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_full_disk_is_reported_and_nothing_is_lost(victim: Victim, small_disk: Path) -> None:
    free = shutil.disk_usage(small_disk).free
    (small_disk / "ballast").write_bytes(bytes(free - 250_000))
    victim.start("--retries", "0")
    assert victim.snakemakes[-1].wait(300) != 0
    text = said(victim.checkout)
    assert re.search(r"error: .*no space left", text, re.IGNORECASE), text[-3000:]
    assert "Traceback" not in text
    assert not victim.adapter.exists()
    (small_disk / "ballast").unlink()
    victim.start()
    victim.finish()
