"""Uses a generated client, in the generator's environment: `python generated.py URL KEY`, in its folder."""

from __future__ import annotations

import json
import sys

from bitmill_client import AuthenticatedClient
from bitmill_client.api.catalogue import list_schemes
from bitmill_client.api.jobs import clone_job, submit_job
from bitmill_client.models import JobOverrides, JobSubmit

client = AuthenticatedClient(base_url=sys.argv[1], token=sys.argv[2], raise_on_unexpected_status=True)
schemes = list_schemes.sync(client=client)
job = submit_job.sync(client=client, body=JobSubmit.from_dict(json.load(sys.stdin)))
clone = clone_job.sync(job.id, client=client, body=JobOverrides(scheme="W8A16", priority=7))
answer = {
    "schemes": [scheme.name for scheme in schemes.items],
    "job": job.to_dict(),
    "clone": clone.to_dict(),
}
sys.stdout.write(json.dumps(answer))
