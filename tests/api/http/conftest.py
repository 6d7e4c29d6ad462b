"""What the tests of routes share."""

from tests.api.jobs.conftest import add_job as add_job
