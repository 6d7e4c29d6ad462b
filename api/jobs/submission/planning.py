"""From a request body to a planned job: read the recipe, find the sources, plan from the headers."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, TypeVar, get_args

from pydantic import ValidationError

from api.errors import Unprocessable, pointer_to
from api.jobs.submission import cache_keys
from api.jobs.submission.request import JobSubmit, ShortForm
from api.jobs.submission.sources import (
    LocalFolders,
    ModelSource,
    output_problems,
    resolve_dataset,
    resolve_model,
)
from api.projects.prefixes import S3Access
from api.settings import Settings
from api.store.factory import local_folder
from compression.errors import CompressionError, PlanError, Problem
from compression.hub.environment import HubEnvironment
from compression.planning.planner import Require, plan
from compression.planning.plans import Plan
from compression.planning.survey import survey
from compression.recipe import Calibration, DatasetSpec, Evaluation, Recipe

SHORT_FORM: frozenset[str] = frozenset(get_args(ShortForm))
_ANY_SEED = 0
_STEP = re.compile(r"/recipe/steps/\d+/")

Asked = TypeVar("Asked")
Found = TypeVar("Found")


@dataclass(frozen=True)
class SharedPlan:
    """A plan, shared by the jobs of a request that differ in nothing that it depends on (in the seed, for
    example).

    document: the plan as JSON. text: the document as it is stored; sha256: its digest. stamps: of the files
    that the result depends on, by name; None where one is gone.
    """

    plan: Plan
    document: dict[str, Any]
    text: str
    sha256: str
    stamps: Mapping[str, str] | None


@dataclass(frozen=True)
class PlannedJob:
    """A submission that was planned. source: the model as the worker gets it. dataset: with path or revision
    resolved."""

    body: JobSubmit
    source: str
    dataset: DatasetSpec | None
    shared: SharedPlan


class _Work(NamedTuple):
    """All that a plan depends on: equal work is planned once."""

    source: ModelSource
    recipe: Recipe
    dataset: DatasetSpec | None
    calibration: Calibration
    evaluation: Evaluation
    require: Require | None


class Planner:
    """Plans submissions that come in one request: sources are looked up once, a model is surveyed once, and
    the same work is planned once."""

    def __init__(self, settings: Settings, access: S3Access) -> None:
        hub = HubEnvironment.read()
        folders = LocalFolders(settings.local_roots, local_folder(settings.store_url))
        self._access = access
        self._activation_budget_bytes = settings.activation_budget_bytes

        def model(name: str) -> ModelSource:
            return resolve_model(name, folders, access, hub)

        def dataset(asked: DatasetSpec) -> DatasetSpec:
            return resolve_dataset(asked, folders, access, hub)

        self._model = _once(model)
        self._dataset = _once(dataset)
        self._survey = _once(survey)
        self._work = _once(self._plan_work)

    def plan(self, body: JobSubmit) -> PlannedJob:
        """Plan a submission. Reads headers only, of models elsewhere over the network; takes no database.

        Raises:
            Unprocessable: it cannot succeed; with every problem that could be found.
            Unavailable: `hub_unreachable`, `s3_unreachable`.
        """
        problems: list[Problem] = []
        recipe = source = dataset = None
        try:
            recipe = _recipe(body)
        except PlanError as error:
            problems += error.problems
        try:
            source = self._model(body.model)
        except PlanError as error:
            problems += error.problems
        try:
            dataset = body.dataset and self._dataset(body.dataset)
        except PlanError as error:
            problems += error.problems
        problems += _gate_problems(body) + output_problems(body.output, self._access)
        if recipe is None or source is None or problems:
            raise Unprocessable(*problems)
        calibration = body.calibration.model_copy(update={"seed": _ANY_SEED})
        work = _Work(source, recipe, dataset, calibration, body.evaluation, body.require)
        try:
            shared = self._work(work)
        except PlanError as error:
            raise Unprocessable(*(_in_body(problem, body) for problem in error.problems)) from error
        return PlannedJob(body, source.source, dataset, shared)

    def _plan_work(self, work: _Work) -> SharedPlan:
        planned = plan(
            work.source.folder,
            work.recipe,
            name=work.source.name,
            dataset=work.dataset,
            calibration=work.calibration,
            evaluation=work.evaluation,
            activation_budget_bytes=self._activation_budget_bytes,
            require=work.require,
            look=self._survey,
        )
        checkpoint = planned.checkpoint if cache_keys.is_local(work.source.source) else None
        try:
            stamps = cache_keys.stamps_of(cache_keys.files_of(checkpoint, work.dataset))
        except OSError:
            stamps = None
        document = planned.to_dict()
        if document["calibration"] is not None:
            del document["calibration"]["seed"]
        text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return SharedPlan(planned, document, text, hashlib.sha256(text.encode()).hexdigest(), stamps)


def plan_job(body: JobSubmit, settings: Settings, access: S3Access) -> PlannedJob:
    """Plan one submission; raises what `Planner.plan` raises."""
    return Planner(settings, access).plan(body)


def _once(find: Callable[[Asked], Found]) -> Callable[[Asked], Found]:
    """`find`, called once for each argument. Its result is remembered, or the error that it raised."""

    @cache
    def outcome(asked: Asked) -> Found | CompressionError:
        try:
            return find(asked)
        except CompressionError as error:
            return error

    def found(asked: Asked) -> Found:
        result = outcome(asked)
        if isinstance(result, CompressionError):
            raise result.with_traceback(None)
        return result

    return found


def _recipe(body: JobSubmit) -> Recipe:
    given = {
        name: getattr(body, name)
        for name in JobSubmit.model_fields
        if name in SHORT_FORM and getattr(body, name) is not None
    }
    if body.recipe is not None:
        if given:
            message = f"The body has a recipe and {', '.join(given)}."
            hint = "Give either a recipe or a scheme with its options."
            raise PlanError(Problem("recipe_and_scheme", message, hint, "/" + next(iter(given))))
        return body.recipe
    if body.scheme is None:
        hint = 'Give a scheme, such as "W4A16", or a recipe.'
        raise PlanError(Problem("scheme_missing", "The body has neither scheme nor recipe.", hint, "/scheme"))
    try:
        return Recipe.from_short(
            body.scheme,
            method=body.method,
            has_dataset=body.dataset is not None,
            **{name: value for name, value in given.items() if name not in ("scheme", "method")},
        )
    except ValidationError as error:
        details = [dict(detail) for detail in error.errors() if len(detail["loc"]) > 1]
        raise PlanError(*(_short_problem(detail, given) for detail in details)) from error


def _short_problem(detail: dict[str, Any], given: dict[str, Any]) -> Problem:
    """A problem of the step that the short form expanded to, with the short form's own fields."""
    if detail["type"] == "union_tag_invalid":
        hint = f"Use one of {detail['ctx']['expected_tags']}."
        return Problem("unknown_method", f"There is no method named {given['method']!r}.", hint, "/method")
    path = detail["loc"][3:]  # what comes after "steps", 0 and the method
    return Problem(detail["type"], detail["msg"], "", pointer_to(path, given, detail["type"]))


def _gate_problems(body: JobSubmit) -> list[Problem]:
    if body.quality_gate is None or (body.dataset is not None and body.evaluation.enabled):
        return []
    message = "A quality gate needs an evaluation, and this job has none."
    hint = "Give a dataset and leave the evaluation on, or drop the gate."
    return [Problem("quality_gate_without_evaluation", message, hint, "/quality_gate")]


def _in_body(problem: Problem, body: JobSubmit) -> Problem:
    """The problem with its pointer into the body: in the short form, a step's fields are at the top."""
    if body.recipe is not None:
        return problem
    return Problem(problem.code, problem.message, problem.hint, _STEP.sub("/", problem.pointer))
