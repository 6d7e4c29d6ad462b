"""What must hold afterwards, whatever was killed. Each says what does not, and nothing when all is well."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from api.jobs.ledger.models import TERMINAL, Attempt, AttemptOutcome, Job, JobEvent, JobLayer, JobStatus
from api.store.base import ObjectNotFound, Store

_UNCOUNTED = (AttemptOutcome.SUCCEEDED, AttemptOutcome.PREEMPTED, AttemptOutcome.STORE_LOST)


@dataclass(frozen=True)
class Deaths:
    """What may count an attempt: ids of workers' processes that were killed, and how many engines were."""

    workers: frozenset[int]
    engines: int


def check(session: Session, store: Store, accepted: Sequence[str], deaths: Deaths) -> list[str]:
    """Everything that is wrong with the jobs that were accepted, and with what else there is."""
    return [
        *all_succeeded(session, accepted),
        *finished_once(session),
        *no_gaps(session),
        *layers_solved_once(session),
        *attempts_accounted_for(session, deaths),
        *one_manifest(session, store),
    ]


def all_succeeded(session: Session, accepted: Sequence[str]) -> Iterator[str]:
    """The jobs are those that were accepted, each under its own id, and every one has succeeded."""
    found = dict(session.execute(select(Job.id, Job.status)).all())
    if sorted(accepted) != sorted(found):
        yield f"{len(accepted)} jobs were accepted under {len(set(accepted))} ids; there are {len(found)}"
    for job_id, status in found.items():
        if status != JobStatus.SUCCEEDED:
            yield f"{job_id} is {status}"


def finished_once(session: Session) -> Iterator[str]:
    """One end is told of each job, and one attempt made it."""
    ends = [f"job_{status.value}" for status in TERMINAL]
    told = Counter(session.scalars(select(JobEvent.job_id).where(JobEvent.type.in_(ends))))
    succeeded = select(Attempt.job_id).where(Attempt.outcome == AttemptOutcome.SUCCEEDED)
    made = Counter(session.scalars(succeeded))
    for job_id in session.scalars(select(Job.id)):
        if (told[job_id], made[job_id]) != (1, 1):
            yield f"{job_id} ended {told[job_id]} times, by {made[job_id]} attempts that succeeded"


def no_gaps(session: Session) -> Iterator[str]:
    """Events are numbered from 1, and the job knows the last number."""
    for job_id, last in session.execute(select(Job.id, Job.event_seq)):
        seqs = session.scalars(select(JobEvent.seq).where(JobEvent.job_id == job_id).order_by(JobEvent.seq))
        if seqs.all() != list(range(1, last + 1)):
            yield f"{job_id} has a gap in its events, of which there are {last}"


def layers_solved_once(session: Session) -> Iterator[str]:
    """Each job kept to one work_key, under which every layer was finished, and told once."""
    for job in session.scalars(select(Job)):
        layers = select(JobLayer.work_key, JobLayer.layer).where(JobLayer.job_id == job.id)
        finished = sorted(session.execute(layers))
        told = session.scalars(
            select(JobEvent.data).where(JobEvent.job_id == job.id, JobEvent.type == "layer_solved")
        )
        expected = list(range(job.layers_total))
        if finished != [(job.work_key, layer) for layer in expected]:
            yield f"{job.id} finished other layers than its {job.layers_total}: {finished}"
        if sorted(data["layer"] for data in told) != expected:
            yield f"{job.id} did not tell each of its layers once"


def attempts_accounted_for(session: Session, deaths: Deaths) -> Iterator[str]:
    """An attempt that counts is one whose engine was killed, or whose worker. No other loss counts one."""
    crashed = 0
    for attempt in session.scalars(select(Attempt).where(Attempt.outcome.not_in(_UNCOUNTED))):
        name = f"attempt {attempt.number} of {attempt.job_id}"
        if attempt.outcome == AttemptOutcome.CRASHED and attempt.error_code == "engine_crashed":
            crashed += 1
        elif attempt.outcome != AttemptOutcome.LEASE_LOST:
            yield f"{name} is {attempt.outcome}: {attempt.error_code}, {attempt.error_message}"
        elif int(attempt.worker_id.split("-")[-2]) not in deaths.workers:
            yield f"{name} lost its lease, but its worker {attempt.worker_id} was not killed"
    if crashed > deaths.engines:
        yield f"{crashed} engines crashed, {deaths.engines} were killed"
    open_ends = session.scalars(select(Attempt.job_id).where(Attempt.outcome.is_(None))).all()
    yield from (f"an attempt of {job_id} has no end" for job_id in open_ends)


def one_manifest(session: Session, store: Store) -> Iterator[str]:
    """Each job has published one manifest, and the store has the files that it names, byte for byte."""
    for job_id, manifest_key in session.execute(select(Job.id, Job.manifest_key)):
        stored = list(store.list(f"artifacts/{job_id}"))
        manifests = [key for key in stored if key.endswith("/manifest.json")]
        if manifest_key is None or manifests != [manifest_key]:
            yield f"{job_id} published {manifest_key}; the store has {manifests}"
            continue
        with store.open(manifest_key) as file:
            manifest = json.load(file)
        folder = manifest_key.removesuffix("manifest.json")
        for entry in manifest["files"]:
            try:
                with store.open(folder + entry["name"]) as file:
                    content = file.read()
            except ObjectNotFound:
                yield f"{job_id} lacks {entry['name']}"
                continue
            if (len(content), hashlib.sha256(content).hexdigest()) != (entry["size"], entry["sha256"]):
                yield f"{entry['name']} of {job_id} is not what its manifest says"
