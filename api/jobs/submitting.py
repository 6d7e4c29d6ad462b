"""From a submission to a job in the queue: accepting, previewing, estimating and cloning.

Models are looked up between two transactions, with none open: it may take long. Functions that take a session
work in the caller's transaction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from pydantic import ValidationError
from sqlalchemy.orm import Session

from api import database as clock
from api.database import Database
from api.errors import Unprocessable
from api.ids import new_id
from api.jobs.estimates import Estimate
from api.jobs.ledger import events, repository
from api.jobs.ledger.models import Job, JobStatus
from api.jobs.ledger.views import JobRead
from api.jobs.queue import deduplication, quotas
from api.jobs.queue.attempts import deadline
from api.jobs.schemas import JobOutline, JobPlanned
from api.jobs.service import get_job
from api.jobs.submission import digests, idempotency
from api.jobs.submission.idempotency import IdempotentRequest
from api.jobs.submission.planning import SHORT_FORM, PlannedJob, plan_job
from api.jobs.submission.request import JobOverrides, JobSubmit
from api.projects.principal import Principal
from api.projects.service import s3_access
from api.settings import Settings
from api.tracing import current_traceparent
from api.webhooks.service import check_callback
from compression.recipe import DatasetSpec

SUBMIT_ROUTE = "POST /v1/jobs"


@dataclass(frozen=True)
class Submitted:
    """The job that a submission made. is_new: False where an earlier request with the same key made it."""

    job: JobRead
    is_new: bool


def submit(
    database: Database,
    settings: Settings,
    caller: Principal,
    body: JobSubmit,
    idempotency_key: str | None,
    *,
    clone_of: str | None = None,
) -> Submitted:
    """Plan and store a job, or find the one that an earlier request with the same Idempotency-Key made.

    Raises:
        Unprocessable: it cannot succeed; or `idempotency_key_reused`, for the same key with another body.
        Unavailable: `hub_unreachable`, `s3_unreachable`.
        TooManyRequests: `quota_queued`.
    """
    with database.read() as session:
        earlier = find_earlier(session, caller.project_id, idempotency_key, body)
    if earlier is not None:
        return Submitted(JobRead.of(earlier), is_new=False)
    planned = _plan(database, settings, caller.project_id, body)
    with database.write() as session:
        return create(
            session,
            caller.project_id,
            planned,
            settings,
            idempotency_key,
            max_queued=caller.limits.max_queued,
            clone_of=clone_of,
        )


def clone(
    database: Database,
    settings: Settings,
    caller: Principal,
    job_id: str,
    overrides: JobOverrides,
    idempotency_key: str | None,
) -> Submitted:
    """Submit a job like another of the project, with changes. Raises what `submit` raises, and:

    Raises:
        NotFound: `job_not_found`.
    """
    with database.read() as session:
        body = cloned(session, caller.project_id, job_id, overrides)
    return submit(database, settings, caller, body, idempotency_key, clone_of=job_id)


def preview(database: Database, settings: Settings, caller: Principal, body: JobSubmit) -> JobPlanned:
    """What a submission would become. Raises what `submit` raises of it."""
    planned = _plan(database, settings, caller.project_id, body)
    return JobPlanned(**outline(planned).model_dump(), plan=planned.shared.document)


def estimate(database: Database, settings: Settings, caller: Principal, body: JobSubmit) -> Estimate:
    """What a job would take. Raises what `submit` raises of its plan."""
    with database.read() as session:
        access = s3_access(session, caller.project_id, settings)
    return Estimate.model_validate(plan_job(body, settings, access).shared.document)


def _plan(database: Database, settings: Settings, project_id: str, body: JobSubmit) -> PlannedJob:
    """Plan a submission; no transaction is open while its sources are looked up."""
    with database.read() as session:
        check_callback(session, project_id, body.callback)
        access = s3_access(session, project_id, settings)
    return plan_job(body, settings, access)


def find_earlier(session: Session, project_id: str, key: str | None, body: JobSubmit) -> Job | None:
    """The job that an earlier request with the same Idempotency-Key made, if there was one.

    Raises:
        Unprocessable: `idempotency_key_reused`, for the same key with another body.
    """
    job_id = idempotency.find(session, _idempotent_request(project_id, key, body))
    return None if job_id is None else get_job(session, project_id, job_id)


def outline(planned: PlannedJob) -> JobOutline:
    """What a planned job would be, in short."""
    plan = planned.shared.plan
    return JobOutline(
        model=planned.body.model,
        scheme=plan.recipe.representation,
        method=plan.recipe.methods,
        layers_total=len(plan.layers),
        device_class=planned.body.resources.device_class,
    )


def create(
    session: Session,
    project_id: str,
    planned: PlannedJob,
    settings: Settings,
    idempotency_key: str | None,
    *,
    max_queued: int | None,
    clone_of: str | None = None,
) -> Submitted:
    """Store a planned job with its first event, or find the one of a request with the same key, which came in
    while this one was planned.

    Raises:
        TooManyRequests: `quota_queued`.
    """
    now = clock.now(session)
    job = new_job(new_id("job", now), project_id, planned, settings, now)
    request = _idempotent_request(project_id, idempotency_key, planned.body)
    made = idempotency.keep(session, request, job.id, now)
    if made != job.id:
        return Submitted(JobRead.of(get_job(session, project_id, made)), is_new=False)
    quotas.require_room(session, project_id, max_queued)
    add(session, [(job, planned)], {} if clone_of is None else {"clone_of": clone_of})
    return Submitted(JobRead.of(job), is_new=True)


def add(session: Session, planned: Sequence[tuple[Job, PlannedJob]], origin: dict[str, str]) -> None:
    """Store new jobs of a project, each with its first events. Those whose work was done before end at once.

    origin: data for the first event: the batch or the job that it comes from.
    """
    repository.keep_plans(session, {each.shared.sha256: each.shared.text for _, each in planned})
    digests.set_cache_keys(session, planned)
    jobs = [job for job, _ in planned]
    finished = deduplication.attach_new(session, jobs)
    first_events = []
    for job, each in planned:
        first = ("job_queued", {"device_class": job.device_class, **origin})
        warnings = [
            ("warning", {"code": warning.code, "message": warning.message})
            for warning in each.shared.plan.warnings
        ]
        first_events += events.numbered(job, [first, *warnings], job.created_at)
    session.add_all(jobs)
    session.flush()  # before the events, which refer to them
    events.store(session, first_events)
    for job, original in finished:
        deduplication.copy_result(session, job, original)


def cloned(session: Session, project_id: str, job_id: str, overrides: JobOverrides) -> JobSubmit:
    """The submission of a job, with changes; a `recipe` or anything of the short form replaces its recipe.

    Raises:
        NotFound: `job_not_found`.
        Unprocessable: what was stored is no longer taken.
    """
    job = get_job(session, project_id, job_id, deferred=[Job.dataset])
    fields = {name: getattr(job, name) for name in JobSubmit.model_fields if hasattr(job, name)}
    given = overrides.model_dump(mode="json", exclude_unset=True)
    if SHORT_FORM & given.keys():
        del fields["recipe"]
    fields = {name: value for name, value in fields.items() if name not in SHORT_FORM}
    fields["resources"] = {"device_class": job.device_class}
    try:
        return JobSubmit.model_validate(fields | given)
    except ValidationError as error:
        hint = "The job was stored by another version. Give what it no longer takes anew, such as the recipe."
        raise Unprocessable.of_fields(error, fields | given, hint) from error


def new_job(job_id: str, project_id: str, planned: PlannedJob, settings: Settings, now: datetime) -> Job:
    """The row of a planned job, which is for the caller to `add`."""
    body, plan = planned.body, planned.shared.plan
    memory = planned.shared.document["memory"]["exact"]
    return Job(
        id=job_id,
        project_id=project_id,
        name=body.name,
        labels=body.labels,
        priority=body.priority,
        model=body.model,
        source=planned.source,
        dataset_label=_dataset_label(body.dataset),
        scheme=plan.recipe.representation,
        method=plan.recipe.methods,
        recipe=plan.recipe.model_dump(mode="json"),
        dataset=planned.dataset and planned.dataset.model_dump(mode="json"),
        calibration=body.calibration.model_dump(mode="json"),
        evaluation=body.evaluation.model_dump(mode="json"),
        quality_gate=body.quality_gate and body.quality_gate.model_dump(mode="json"),
        require=body.require,
        max_runtime_seconds=body.max_runtime_seconds,
        max_queue_seconds=body.max_queue_seconds,
        cache=body.cache,
        callback=body.callback,
        output=body.output,
        max_attempts=settings.max_attempts,
        plan_id=planned.shared.sha256,
        device_class=body.resources.device_class,
        required_host_bytes=memory["host_bytes"],
        required_gpu_bytes=memory["gpu_bytes"],
        status=JobStatus.QUEUED,
        layers_done=0,
        layers_total=len(plan.layers),
        event_seq=0,
        attempts_made=0,
        attempts_counted=0,
        lease_token=0,
        created_at=now,
        available_at=now,
        queue_deadline=deadline(now, body.max_queue_seconds),
        traceparent=current_traceparent(),
    )


def _dataset_label(dataset: DatasetSpec | None) -> str | None:
    if dataset is None:
        return None
    if dataset.generated:
        return "self"
    return dataset.path or dataset.hub or dataset.s3 or f"{len(dataset.texts or ())} inline texts"


def _idempotent_request(project_id: str, key: str | None, body: JobSubmit) -> IdempotentRequest:
    return IdempotentRequest(project_id, SUBMIT_ROUTE, key, body)
