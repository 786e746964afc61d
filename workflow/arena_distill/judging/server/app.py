"""Define the server's application: what it answers at which path."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any

import anyio.to_thread
import jinja2
import numpy as np
from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from arena_distill.encoding.sequences import FIELDS, Sequences, offsets_of
from arena_distill.errors import InputError
from arena_distill.judging.judge import Forward, Judge, ModelJudge
from arena_distill.judging.kept import characters_kept
from arena_distill.judging.server.batching import Batcher, Busy, Gone, Late, TooLarge
from arena_distill.judging.server.guard import GONE, NOBODY, RETRY, Guard, Limits, refusal
from arena_distill.judging.server.messages import (
    About,
    Classified,
    ClassifyAnswer,
    ClassifyRequest,
    Health,
    JudgeAnswer,
    JudgeRequest,
    Model,
    Models,
    Refusal,
    RewardAnswer,
    RewardRequest,
    Usage,
    VerdictOfBattle,
)
from arena_distill.judging.server.metrics import Metrics
from arena_distill.metrics import softmax

PAGE = Path(__file__).parent / "page"

NO_TELEMETRY: Any = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}
"""FastAPI would send figures to where variables of the environment say."""


async def _gone(request: Request) -> Future[None]:
    found: Future[None] = request.scope[GONE]
    return found


Leaving = Annotated[Future[None], Depends(_gone)]
"""Is done once the client of a request has gone away."""


class Server:
    """A judge for many callers at a time: every request has a thread, and all share the model's.

    Its methods check what pydantic cannot know, and raise InputError; `gone` is done once the client has
    gone away, and then they raise Gone.
    """

    def __init__(
        self, judge: Judge, batchers: Mapping[ModelJudge, Batcher], limits: Limits
    ) -> None:
        self._judge, self._batchers, self.limits = judge, batchers, limits
        self.contract = judge.contract

    @property
    def alive(self) -> bool:
        return all(batcher.alive for batcher in self._batchers.values())

    def _model(self) -> ModelJudge:
        """The judge, for what only a model can answer."""
        if not isinstance(self._judge, ModelJudge):
            raise InputError(f"{self.contract.judge} is a stack of judges: only /v1/judge asks it")
        return self._judge

    def _forward_of(self, gone: Future[None]) -> Callable[[ModelJudge], Forward]:
        """What runs each model for one request, whose time begins now."""
        until = time.monotonic() + self.limits.seconds
        return lambda model: partial(self._batchers[model].forward, until=until, gone=gone)

    def about(self) -> About:
        contract = self.contract
        return About(
            judge=contract.judge,
            kind=self._judge.contract.head.kind if isinstance(self._judge, ModelJudge) else "stack",
            classes=list(contract.classes),
            orders=list(contract.orders),
            lengths=list(contract.lengths),
            calibration=contract.calibration.method if contract.calibration else None,
            scores=contract.scores.model_dump() if contract.scores else None,
            examples=[
                vector.model_dump(mode="json", include={"about", *FIELDS})
                for vector in contract.vectors
            ],
        )

    def judge(self, request: JudgeRequest, gone: Future[None]) -> JudgeAnswer:
        self._count("battles", request.battles)
        battles = [
            {"id": str(number if battle.id is None else battle.id)}
            | battle.model_dump(include={*FIELDS})
            for number, battle in enumerate(request.battles)
        ]
        judge = self._judge.run_by(self._forward_of(gone))
        verdicts = judge.predict(battles)
        kept = characters_kept(self._judge, battles) if request.kept else None
        return JudgeAnswer(
            judge=self.contract.judge,
            classes=list(self.contract.classes),
            verdicts=[
                VerdictOfBattle(
                    id=verdicts.ids[row].as_py(), kept=kept[row] if kept else None, **vars(verdict)
                )
                for row, verdict in enumerate(verdicts)
            ],
        )

    def classify(self, request: ClassifyRequest, gone: Future[None]) -> ClassifyAnswer:
        if request.model not in (None, self.contract.judge):
            raise HTTPException(404, f"model: this server has {self.contract.judge!r}")
        model = self._model()
        contract = model.contract
        sequences = self._sequences(request.input, model)
        outputs = self._forward_of(gone)(model)(sequences).astype(np.float64)
        if contract.head.kind == "joint" and request.use_activation is not False:
            outputs = softmax(outputs)
        labels = contract.head.outputs
        tokens = int(sequences.offsets[-1])
        return ClassifyAnswer(
            model=contract.judge,
            data=[
                Classified(index=i, label=labels[best], probs=row, num_classes=len(row))
                for i, (row, best) in enumerate(
                    zip(outputs.tolist(), outputs.argmax(axis=1).tolist(), strict=True)
                )
            ],
            usage=Usage(prompt_tokens=tokens, total_tokens=tokens),
        )

    def reward(self, request: RewardRequest, gone: Future[None]) -> RewardAnswer:
        self._count("query", request.query)
        if len(request.query) != len(request.prompts):
            raise InputError(
                f"prompts: {len(request.prompts)}, and there are {len(request.query)} in query; one each"
            )
        pairs = list(zip(request.query, request.prompts, strict=True))
        for row, (query, prompt) in enumerate(pairs):
            if not query.startswith(prompt):
                raise InputError(f"query.{row}: does not begin with prompts.{row}")
        answers = [query[len(prompt) :] for query, prompt in pairs]
        judge = self._judge.run_by(self._forward_of(gone))
        rewards = judge.rewards(request.prompts, answers).tolist()
        return RewardAnswer(rewards=rewards, scores=rewards)

    def _count(self, name: str, items: Sequence[Any]) -> None:
        if len(items) > self.limits.items:
            raise TooLarge(f"{name}: {len(items):,}, at most {self.limits.items} at a time")

    def _sequences(
        self, given: str | list[int] | list[str] | list[list[int]], model: ModelJudge
    ) -> Sequences:
        """The sequences of a /classify request, all safe for the model."""
        if not given:
            raise InputError("input: a text, token ids, or a list of either expected")
        first = given[0]
        rows: Any = [given] if isinstance(given, str) or isinstance(first, int) else given
        self._count("input", rows)
        if isinstance(first, str):
            rows = model.text_ids(rows)
        sequences = Sequences(
            np.array([token for row in rows for token in row], np.int64),
            offsets_of(np.fromiter(map(len, rows), np.int64)),
        )
        longest = max(model.contract.lengths)
        if sequences.lengths.min() < 1 or sequences.lengths.max() > longest:
            row = int(np.argmax((sequences.lengths < 1) | (sequences.lengths > longest)))
            raise InputError(
                f"input.{row}: {sequences.lengths[row]} tokens; from 1 to {longest} expected"
            )
        known, pad = len(model.tokenizer), model.contract.pad
        if sequences.ids.max() >= known or (sequences.ids == pad).any():
            raise InputError(
                f"input: ids from 0 to {known - 1} expected, and not {pad}, which pads"
            )
        return Sequences(sequences.ids.astype(np.int32), sequences.offsets)


def make_app(
    server: Server, metrics: Metrics, *, token: str | None = None, hosts: Sequence[str] = ("*",)
) -> FastAPI:
    """The application of a server.

    Args:
        token: that requests need; None: none.
        hosts: names of this machine that requests may use. A page of another site that makes its own name
            lead here is refused by it.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        anyio.to_thread.current_default_thread_limiter().total_tokens = server.limits.requests
        yield

    refusals: dict[int | str, dict[str, Any]] = {
        code: {"model": Refusal} for code in (400, 401, 408, 413, 415, 422, 503, 504)
    }
    app = FastAPI(
        title="Arena Distill",
        summary=f"Ask the judge {server.contract.judge} which of two answers people prefer.",
        docs_url=None,  # they load scripts of other hosts
        redoc_url=None,
        lifespan=lifespan,
        responses=refusals,
        telemetry=NO_TELEMETRY,
    )

    @app.post("/v1/judge")
    def judge(request: JudgeRequest, gone: Leaving) -> JudgeAnswer:
        """Judge battles: probabilities of the workflow's own predictions."""
        return server.judge(request, gone)

    @app.get("/v1/judge")
    async def about() -> About:
        """How the judge is asked, what it scored, and battles to try."""
        return server.about()

    @app.post("/classify")
    def classify(request: ClassifyRequest, gone: Leaving) -> ClassifyAnswer:
        """The model's part alone, as vLLM answers it."""
        return server.classify(request, gone)

    @app.post("/get_reward")
    def reward(request: RewardRequest, gone: Leaving) -> RewardAnswer:
        """Rewards of answers, as OpenRLHF asks for them; of a pointwise judge."""
        return server.reward(request, gone)

    @app.get("/v1/models")
    async def models() -> Models:
        """The judge's name, as OpenAI lists models."""
        return Models(data=[Model(id=server.contract.judge)])

    @app.get("/health", response_model=Health)
    async def health() -> Any:
        """Whether the model can answer."""
        if not server.alive:
            return refusal(503, "the model's thread has ended: start the server again")
        return Health(judge=server.contract.judge)

    @app.get("/metrics", response_class=Response)
    async def figures() -> Response:
        """Figures for Prometheus."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(_reference(app.openapi()))

    app.mount("/page", StaticFiles(directory=PAGE), name="page")
    _refuse_in_one_line(app)
    paths = frozenset(path for route in app.routes if (path := getattr(route, "path", None)))
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)
    app.user_middleware.insert(
        0,
        Middleware(Guard, limits=server.limits, token=token, metrics=metrics, paths=paths),
    )
    return app


def _refuse_in_one_line(app: FastAPI) -> None:
    """Say what an exception means, with its status."""

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        status, why = _mistake(error)
        return refusal(status, why)

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> Response:
        unread = error.status_code == 400
        why = "the body is no JSON, or nested too deeply" if unread else error.detail
        return refusal(error.status_code, why, dict(error.headers or {}))

    @app.exception_handler(InputError)
    async def wrong(_: Request, error: InputError) -> Response:
        return refusal(413 if isinstance(error, TooLarge) else 422, str(error))

    @app.exception_handler(Busy)
    async def busy(_: Request, error: Busy) -> Response:
        return refusal(503, str(error), RETRY)

    @app.exception_handler(Gone)
    async def gone(_: Request, error: Gone) -> Response:
        return refusal(NOBODY, "the client has gone away")

    @app.exception_handler(Late)
    async def late(_: Request, error: Late) -> Response:
        return refusal(504, "no answer in time: send fewer battles, or later")


def _mistake(error: RequestValidationError) -> tuple[int, str]:
    """Status and line for the first mistake in a body."""
    first, *others = error.errors()
    if first["type"] == "json_invalid":
        return 400, f"the body is no JSON: {first['ctx']['error']}"
    where = _place(first)
    told = dict.fromkeys(e["msg"] for e in (first, *others) if _place(e) == where)
    name = ".".join(where) or "the body"
    return 422, f"{name}: {', or: '.join(told)}"


def _place(error: Any) -> list[str]:
    """Where a mistake is, without the choices of types that pydantic names there."""
    parts = map(str, error["loc"][1:])
    return list(takewhile(lambda part: "[" not in part and part not in ("str", "int"), parts))


def _reference(schema: dict[str, Any]) -> str:
    """The OpenAPI description as a page without scripts."""
    loader = jinja2.FileSystemLoader(PAGE.parent)
    page = jinja2.Environment(loader=loader, autoescape=True).get_template("docs.html.j2")
    return page.render(schema=schema)
