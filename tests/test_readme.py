"""Every command of the README and of the documentation is run, dry-run or parsed; links and paths exist.

A command that no handler here knows fails the test, so that none is left out.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import yaml
from checkouts import ROOT, make_checkout, warm_python
from made_up_run import made_up_run
from safetensors.numpy import save_file

from arena_distill.battles.simulation import write_arena
from arena_distill.config import checks, run
from arena_distill.config.encoding import Encoding
from arena_distill.config.head import JOINT
from arena_distill.config.model_files import WEIGHTS
from arena_distill.config.phases.battles import ArenaSettings

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PACKAGE = ROOT / "workflow/arena_distill"


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in a language."""
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Command:
    """A line of a page that people type."""

    page: str
    line: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.line, comments=True)


def commands() -> Iterator[Command]:
    for page in PAGES:
        for block in blocks(page, "sh"):
            for line in block.splitlines():
                if line.strip() and not line.lstrip().startswith("#"):
                    yield Command(page.name, line.strip())


COMMANDS = list(dict.fromkeys(commands()))
SNAKEMAKE = [c for c in COMMANDS if c.words[0] == "snakemake"]
OTHERS = [c for c in COMMANDS if c.words[0] != "snakemake"]


def name(command: Command) -> str:
    return f"{command.page}: {' '.join(command.words)}"


def run_in(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    path = os.environ | {"PYTHONPATH": str(ROOT / "workflow")}
    return subprocess.run(words, cwd=folder, env=path, capture_output=True, text=True)


LANGUAGES = {"sh", "yaml", "text", "python", "snakemake", "mermaid"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_block_hides_a_command(page: Path) -> None:
    """Blocks of other languages, and indented ones, would be left out above."""
    text = page.read_text(encoding="utf-8")
    fences = re.findall(r"^( *)```([^\n]*)$", text, re.MULTILINE)
    assert [indent for indent, _ in fences if indent] == []
    assert {language for _, language in fences[::2]} <= LANGUAGES
    assert {language for _, language in fences[1::2]} <= {""}
    for block in blocks(page, "sh"):
        assert not re.search(r"\\$|[|&;<>]", re.sub(r"'[^']*'|#.*", "", block), re.MULTILINE)
    for block in blocks(page, "python"):
        compile(block, page.name, "exec")


# --- snakemake --------------------------------------------------------------------------------------


def put_in_place(folder: Path, config: run.Config) -> None:
    """Files where a configuration names some, in which a dry run finds nothing wrong."""
    fetched = {source.path for source in config.data.files() if source.is_remote}
    for named in checks.named_files(config):
        path = folder / named.path
        if path.exists() or named.path in fetched:
            continue
        (path if named.is_folder else path.parent).mkdir(parents=True, exist_ok=True)
        if named.is_folder:
            (path / "tokenizer.json").write_text("{}")
        elif path.name == "config.json":
            path.write_text('{"model_type": "llama"}')
            (path.parent / "tokenizer.json").write_text("{}")
            save_file({"layers.0.q_proj.weight": np.zeros((1, 1024))}, path.parent / WEIGHTS)
        else:
            path.write_text("GGUF")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with the configuration and the files that the pages suppose."""
    folder = make_checkout(tmp_path_factory.mktemp("readme") / "checkout").folder
    mine = next(b for b in blocks(ROOT / "README.md", "yaml") if b.startswith("# mine.yaml\n"))
    (folder / "mine.yaml").write_text(mine)
    settings = ArenaSettings(version=1, train=60, extra=0, ut=0, test=1)
    write_arena(folder / "somebody", settings=settings)
    (folder / "somebody/train.csv").rename(folder / "battles.csv")
    (init,) = (
        command.words for command in OTHERS if command.words[:2] == ["arena-distill", "init"]
    )
    done = run_in(folder, warm_python(), "-m", "arena_distill", *init[1:])
    assert done.returncode == 0, done.stderr
    for file in (folder / "mine.yaml", *(folder / "config").glob("*.yaml")):
        put_in_place(folder, run.load(yaml.safe_load(file.read_text())))
    return folder


def dry_run(folder: Path, words: list[str]) -> None:
    """Run a snakemake command without its jobs."""
    if "--report" in words:  # it needs a finished run; what it would read is the graph of `all`
        del words[words.index("--report") : words.index("--report") + 2]
    if "--sdm" in words and not shutil.which("conda"):  # Snakemake asks conda even in a dry run
        del words[words.index("--sdm") : words.index("--sdm") + 2]
    passes(folder, *(word for word in words if word != "-n"))


@cache  # pages repeat them
def passes(folder: Path, *words: str) -> None:
    done = run_in(folder, warm_python(), "-m", *words, "-n")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("command", SNAKEMAKE, ids=name)
def test_snakemake_commands_are_dry_run(checkout: Path, command: Command) -> None:
    if "--lint" in command.words:
        pytest.skip("make lint runs it")
    dry_run(checkout, command.words)


# --- all other commands -----------------------------------------------------------------------------


def of_make(words: list[str], folder: Path) -> None:
    done = run_in(ROOT, "make", "-n", *words[1:])
    assert done.returncode == 0, done.stderr


def of_arena_distill(words: list[str], folder: Path) -> None:
    start = [warm_python(), "-m", "arena_distill"]
    match words[1:]:
        case ["show-results", metrics]:
            made = made_up_run(folder / "run").evaluate()
            assert Path(metrics).name == made.name
            done = run_in(folder, *start, "show-results", str(made))
        case ["init", battles, *_]:
            assert (folder / battles).exists() and (folder / "arena.yaml").exists()
            return
        case ["formats", file]:
            done = run_in(folder, *start, "formats", str(Path(file).with_suffix(".csv")))
        case ["verify", judge, "--server", address]:
            assert judge.startswith("results/default/merged/") and address.startswith("http://")
            return  # tests/test_vllm.py runs it
        case ["predict" | "verify" | "compare-answers" as command, judge, *rest]:
            assert judge.startswith("results/default/merged/")
            words = [
                str(folder / "battles.csv") if word == "battles.csv" else word for word in rest
            ]
            done = run_in(folder, *start, command, str(finished_judge_in(folder)), *words)
        case ["benchmark", judge, *named]:
            assert re.match(r"results/\w+/merged/", judge)
            files = [f"{word.partition('=')[0]}={folder / 'battles.csv'}" for word in named]
            done = run_in(folder, *start, "benchmark", str(finished_judge_in(folder)), *files)
        case ["serve", judge, *rest]:
            assert judge.startswith("results/default/merged/")
            words = [*start, "serve", str(finished_judge_in(folder)), *rest, "--port", "0"]
            served_until_stopped(words)
            return
        case ["push" | "submit" as command, what, "--to", place]:
            assert what.startswith("results/default") and place.startswith(("hub:", "kaggle:"))
            done = run_in(folder, *start, command, "--help")  # tests/test_publishing.py runs them
            assert "--to" in done.stdout
        case ["check", *arguments]:
            done = run_in(folder, *start, "check", *arguments)
        case ["plan" | "status" as command, *arguments]:
            # Their arguments are snakemake's: the graph that they ask it for is made without running it.
            done = run_in(folder, *start, command, "--help")
            assert done.returncode == 0, done.stderr
            own = [word for word in ("--json", "--cheaper") if word in arguments]
            assert all(word in done.stdout for word in own)
            rest = [word for word in arguments if word not in own]
            dry_run(folder, ["snakemake", *rest])
        case _:
            pytest.fail(f"no test knows how to check {shlex.join(words)}")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr


def served_until_stopped(words: list[str]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "workflow"), "ARENA_SERVER_TOKEN": "x"}
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert re.match(r"judge: http://[\d.]+:\d+/\n", process.stdout.readline())
            process.terminate()
            assert process.wait(60) == 0
            assert process.stdout.read() == "stopped\n"
        finally:
            process.kill()


@cache
def finished_judge_in(folder: Path) -> Path:
    """A judge as the default run ends with."""
    from conftest import make_backbone
    from judges import finished_judge

    backbone = make_backbone("gemma2", folder / "backbone")
    return finished_judge(folder / "finished", backbone, head=JOINT, encoding=Encoding()).folder


def of_script(words: list[str], folder: Path) -> None:
    done = run_in(ROOT, "bash", "-n", words[0])
    assert done.returncode == 0 and os.access(ROOT / words[0], os.X_OK), done.stderr


def of_python(words: list[str], folder: Path) -> None:
    """A benchmark: its file compiles, its options are among those of its text, its files are ours."""
    text = (ROOT / words[1]).read_text(encoding="utf-8")
    compile(text, words[1], "exec")
    if "import made_up" in text:
        text += (ROOT / "benchmarks/made_up.py").read_text(encoding="utf-8")
    options = [word for word in words[2:] if word.startswith("--")]
    assert all(f'"{option}"' in text for option in options)
    assert all(word in text for word in words[2:] if "/" in word)


def of_pip(words: list[str], folder: Path) -> None:
    assert words[1] == "install"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (extras,) = re.findall(r"^\.\[(.*)\]$", words[2])
    assert set(extras.split(",")) <= set(project["optional-dependencies"])


def of_export(words: list[str], folder: Path) -> None:
    """A variable that the code reads, or one that the page's own configuration names."""
    variable = words[1].partition("=")[0]
    known = [*PACKAGE.rglob("*.py"), *PAGES]
    used = [file for file in known if re.search(rf"{variable}(?!=)", file.read_text())]
    assert used, variable


def of_source(words: list[str], folder: Path) -> None:
    assert words[1] == ".venv/bin/activate"
    assert "\nsetup: .venv/.ready" in (ROOT / "Makefile").read_text()


def of_vllm(words: list[str], folder: Path) -> None:
    """tests/test_doors.py serves with the options of this line."""
    assert words[1] == "serve" and words[2].startswith("results/default/merged/")


def of_pytest(words: list[str], folder: Path) -> None:
    assert all((ROOT / word).exists() for word in words[1:] if not word.startswith("-"))


HANDLERS: dict[str, Callable[[list[str], Path], None]] = {
    "make": of_make,
    "arena-distill": of_arena_distill,
    "python": of_python,
    ".venv-gptq/bin/python": of_python,
    "pip": of_pip,
    "export": of_export,
    "pytest": of_pytest,
    "source": of_source,
    "vllm": of_vllm,
    "scripts/fetch_tokenizers.sh": of_script,
    "scripts/fetch_weights.sh": of_script,
}


def test_every_command_has_a_handler() -> None:
    assert len(SNAKEMAKE) >= 20
    assert len(OTHERS) >= 10
    unknown = [name(command) for command in OTHERS if command.words[0] not in HANDLERS]
    assert not unknown


@pytest.mark.slow
@pytest.mark.parametrize("command", OTHERS, ids=name)
def test_other_commands(checkout: Path, command: Command) -> None:
    HANDLERS[command.words[0]](command.words, checkout)


def test_targets_that_the_text_names_exist() -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = {name for page in PAGES for name in re.findall(r"`make ([\w-]+)`", page.read_text())}
    assert named and named <= set(targets)


def test_the_targets_of_the_demo_print_the_results(tmp_path: Path) -> None:
    done = run_in(ROOT, "make", "-n", "demo")
    (shown,) = re.findall(r"arena-distill (show-results .*)", done.stdout)
    of_arena_distill(["arena-distill", *shown.split()], tmp_path)


# --- configurations, links, paths, messages ---------------------------------------------------------


def configurations() -> list[tuple[str, str]]:
    return [(page.name, block) for page in PAGES for block in blocks(page, "yaml")]


@pytest.mark.parametrize(("page", "block"), configurations())
def test_configurations_are_valid(page: str, block: str) -> None:
    """Whole ones as they stand, parts laid over the demo's."""
    given = yaml.safe_load(block)
    if not {"data", "judges", "final"} <= set(given):
        demo = yaml.safe_load((ROOT / "config/config.yaml").read_text())
        given = run.overlay(demo, given)
    assert run.load(given)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if link.startswith("http"):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor in slugs, link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_functions_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    made = ("results/", "compare/", "external/", "mine/", "audit.", "https:")
    for path in re.findall(r"`([\w.-]+(?:/[\w.-]+)+\.(?:py|smk|yaml|sh|json))`", text):
        if not path.startswith(made):
            assert (ROOT / path).exists() or (PACKAGE / path).exists(), path
    for what, path in re.findall(r"`(\w+)` in `([\w/]+\.py)`", text):
        assert re.search(rf"^(?:def|class) {what}\b|^{what}\b.*=", source(path), re.MULTILINE), what


@cache
def source(path: str) -> str:
    return (PACKAGE / path).read_text(encoding="utf-8")


def texts() -> Iterator[str]:
    """Every text of the package; what is filled in is a NUL."""
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(
                    str(part.value) if isinstance(part, ast.Constant) else "\0"
                    for part in node.values
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_the_messages_of_the_troubleshooting_page_are_those_of_the_code() -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(messages) > 30
    known = list(texts())
    for message in messages:
        parts = [re.escape(part) for part in message.split("…")]
        pattern = re.compile("(?s:.*)".join(parts))
        assert any(pattern.search(text) for text in known), message


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_citation_and_catalogue_are_true() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    usage = yaml.safe_load((ROOT / ".snakemake-workflow-catalog.yml").read_text())["usage"]
    assert set(usage) == {"mandatory-flags", "software-stack-deployment", "report"}
    assert usage["software-stack-deployment"]["conda"]
    assert (ROOT / "config/README.md").exists()


def test_the_page_of_performance_is_up_to_date() -> None:
    """It holds what the measurements in benchmarks/results say."""
    script = [sys.executable, "benchmarks/write_performance.py", "--check"]
    run = subprocess.run(script, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_the_configuration_reference_is_up_to_date() -> None:
    script = [sys.executable, "scripts/write_config_reference.py", "--check"]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
