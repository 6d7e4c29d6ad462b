"""What the tests of webhooks share with those of jobs."""

from tests.api.jobs.conftest import add_job as add_job
