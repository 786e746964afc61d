"""Write the JSON schema and the reference of the configuration from its models.

    python scripts/write_config_reference.py [--check]

With `--check` write nothing, and exit with an error if a file is out of date.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "workflow"))

from arena_distill.config.section import Section  # noqa: E402

Section.model_config["use_attribute_docstrings"] = (
    True  # before there are sections, which inherit it
)

from arena_distill.config.judge import Judge  # noqa: E402
from arena_distill.config.run import Config, schema  # noqa: E402

INTRO = """\
# Configuration

Every key with its default and meaning. `scripts/write_config_reference.py` writes this file and
`workflow/schemas/config.schema.json` (for your editor) from the models in `workflow/arena_distill/config/`.

- `config.yaml` is the embedded default. A first `--configfile` with `judges` is complete by itself. A file
  without them (a recipe) overrides keys of `config.yaml`, or of the file before it:
  `snakemake all --configfile mine.yaml config/recipes/blackpearl.yaml`.
- `defaults` holds the settings of all judges. A judge overrides them key by key, and `null` switches a part
  off.
- `compute` sets how a job runs, never what it computes: a change of it rebuilds nothing.
- An `external` judge, or a `stack`, has no other keys, and no defaults.

| file | content |
|---|---|
| `config.yaml` | the synthetic arena and three tiny models: minutes on two cores |
| `real-tokenizers.yaml` | your battles with the real tokenizers of Llama-3, Qwen2.5 and Gemma-2 |
| `smol.yaml` | your battles and real pretrained weights: first layers of SmolLM2 and Gemma 3 |
| `stack.yaml` | the same without training a backbone: a frozen judge, a stack, a student of it |
| `smol-gpt4.yaml` | `stack.yaml` with the log-odds of a large judge for battles without votes |
| `lmsys.yaml` | full scale: Llama-3-70B and Qwen2-72B teach Gemma-2-9B, on nodes of 8 A100 |
| `recipes/summary.yaml` | the widely copied description of the winning solution; the default |
| `recipes/blackpearl.yaml` | the recipe of the winners' published code |
| `recipes/best.yaml` | ours: the summary with folds by prompt and held-out battles |
| `progressive.yaml` | teacher → middle → small, compared with teacher → small |
| `ablation.yaml` | `snakemake compare`: the embedded default, one key changed at a time |
| `curves.yaml`, `averaging.yaml` | `snakemake curves`, `snakemake averaging`: both studies on the synthetic arena |

## Axes of a recipe

Each axis is a separate key; any combination runs.

| axis | key | choices and their sources |
|---|---|---|
| folds | `folds.method` | `kfold` (the summary), `stratified` (the winners), `stratified_group`: by prompt; `near_duplicates`: by MinHash (Broder 1997) |
| text | `encoding.template`, `.truncation`, `.sizes` | `winners`: their code; `markers`, `rounds`: the summary; `sizes`: ours, states the length of each answer before truncation |
| head | `head` | `joint`: both documents; `pointwise` with `davidson` (Davidson 1970) or `rao_kupper` (Rao and Kupper 1967); `pooling`: the `last` token, or ours, the `mean` |
| start | `training.fit_head` | a linear probe first: Kumar et al. 2022, arXiv:2202.10054 |
| targets | `targets` | `in_sample`: the winners' code; `out_of_fold`: the summary, which makes the student's score optimistic out of fold; `unlabelled`: battles without votes alone |
| teachers | `loss.combine`, `loss.weights` | `mean_logits`: the summary; `separate`: the winners; `mean_probabilities`: a linear pool; `fitted`: stacking on the simplex (Breiman 1996); `confidence`: Zhang et al. 2022, arXiv:2201.00007 |
| loss | `loss.*` | `kl`, `temperature`: Hinton et al. 2015, arXiv:1503.02531; `cosine`: the winners' code; `label_smoothing`: Szegedy et al. 2016, arXiv:1512.00567; `focal`: Lin et al. 2017, arXiv:1708.02002 |
| merge | `merge.*` | `factors`: both documents; `products`: exact; `greedy`: Wortsman et al. 2022, arXiv:2203.05482 |
| prediction | `prediction.*` | mean of `probabilities` over orders: the winners; of `logits` over orders and lengths: the summary; `calibration`: Guo et al. 2017, arXiv:1706.04599; `style`: the Chatbot Arena's style control (Li et al. 2024) |
| progressive | `teachers` | a student may teach: Mirzadeh et al. 2020, Improved Knowledge Distillation via Teacher Assistant, arXiv:1902.03393 |
"""


def reference() -> str:
    """The reference as Markdown: a table per part of the configuration."""
    parts = [INTRO]
    paths: dict[type[BaseModel], list[str]] = {}
    for path, model in sections(Config, ""):
        paths.setdefault(model, []).append(path)
    for model, places in paths.items():
        path = "`, `".join(places)
        rows = [
            f"| `{name}` | {_default(field)} | {_meaning(field)} |"
            for name, field in model.model_fields.items()
        ]
        doc = (model.__doc__ or "").strip()
        head = [f"## `{path}`" if path else "## Top level", "", doc, ""]
        parts.append("\n".join([*head, "| key | default | meaning |", "|---|---|---|", *rows]))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def sections(model: type[BaseModel], path: str) -> list[tuple[str, type[BaseModel]]]:
    """List every part of the configuration with its path; the parts of a judge are those of `defaults`."""
    found = [(path, model)]
    for name, field in model.model_fields.items():
        inner = _model_in(field.annotation)
        if inner is not None and model is not Judge:
            key = f"{name}.<judge>" if inner is Judge else name
            found += sections(inner, f"{path}.{key}".lstrip("."))
        elif name in ("external", "stack", "backbone", "frozen") and inner is not None:
            found += sections(inner, f"{path}.{name}")
    return found


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner = (_model_in(a) for a in get_args(annotation))
    return next((model for model in inner if model), None)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "*required*"
    if isinstance(field.default, BaseModel):
        return "see below"
    default = list(field.default) if isinstance(field.default, tuple) else field.default
    return f"`{json.dumps(default)}`"


def _meaning(field: FieldInfo) -> str:
    options = [option for part in _literals(field.annotation) for option in get_args(part)]
    allowed = "" if not options else "One of " + ", ".join(f"`{o}`" for o in options) + ". "
    return (allowed + (field.description or "")).replace("\n", " ").replace("|", "\\|")


def _literals(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Literal:
        return [annotation]
    return [found for inner in get_args(annotation) for found in _literals(inner)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for path, text in {
        ROOT / "workflow/schemas/config.schema.json": json.dumps(schema(), indent=2) + "\n",
        ROOT / "config/README.md": reference(),
    }.items():
        if check and (not path.exists() or path.read_text() != text):
            stale.append(str(path.relative_to(ROOT)))
        elif not check:
            path.write_text(text)
    sys.exit(f"not up to date: {', '.join(stale)}; run {Path(__file__).name}" if stale else 0)


if __name__ == "__main__":
    main()
