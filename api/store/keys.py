"""Keys of what is in the store.

work/<job>/<sha256>.safetensors       a finished layer
artifacts/<job>/<token>/<file>        what a job published; manifest.json is written last
"""

from __future__ import annotations


def work_key(job_id: str, sha256: str) -> str:
    """Key of a finished layer's shard."""
    return f"work/{job_id}/{sha256}.safetensors"


def artifact_folder(job_id: str) -> str:
    """Where a job's files are, those of each attempt below its fencing token."""
    return f"artifacts/{job_id}"


def artifact_key(job_id: str, token: int, name: str) -> str:
    """Key of a published file; the fencing token keeps attempts apart."""
    return f"{artifact_folder(job_id)}/{token}/{name}"
