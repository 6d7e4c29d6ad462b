"""An example of every body and answer, by the name of its schema, for the OpenAPI document.

All of one day: a model is compressed, alone and in a batch.
"""

from __future__ import annotations

from typing import Any

_JOB_ID = "job_06dk2m8x0c4q7tz9h3v5n1w8er"
_BATCH_ID = "batch_06dk2m8x0c4q7tz9h3v5n1w8er"
_WEBHOOK_ID = "wh_0f3c9a1be27d45608c1f"
_SUBMITTED, _STARTED = "2026-11-26T15:00:00.123000Z", "2026-11-26T15:00:02.004000Z"
_SHA256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"

_RECIPE = {
    "steps": [
        {
            "targets": ["Linear"],
            "ignore": ["lm_head"],
            "scheme": "W4A16",
            "group_size": 128,
            "observer": "imatrix",
            "kv_cache_scheme": None,
            "type": "gptq",
            "block_size": 128,
            "dampening_frac": 0.01,
            "actorder": "static",
        }
    ]
}

_JOB: dict[str, Any] = {
    "id": _JOB_ID,
    "name": "nightly",
    "labels": {"team": "search"},
    "priority": 0,
    "status": "running",
    "phase": "compress",
    "layers_done": 7,
    "layers_total": 32,
    "model": "/models/llama",
    "dataset": "/models/texts.jsonl",
    "scheme": "W4A16",
    "method": "gptq",
    "recipe": _RECIPE,
    "calibration": {
        "num_calibration_samples": 512,
        "max_seq_length": 2048,
        "packing": True,
        "seed": 0,
        "max_dropped_share": 0.05,
    },
    "evaluation": {"enabled": True, "num_samples": None},
    "quality_gate": {"max_perplexity_ratio": 1.05},
    "device_class": "cpu",
    "max_runtime_seconds": None,
    "max_queue_seconds": None,
    "callback": None,
    "attempts_made": 1,
    "event_seq": 12,
    "created_at": _SUBMITTED,
    "started_at": _STARTED,
    "finished_at": None,
    "error": None,
    "batch": None,
    "deduplicated_from": None,
    "output": None,
}

_ATTEMPT = {
    "number": 1,
    "worker_id": "worker-1",
    "device_class": "cpu",
    "started_at": _STARTED,
    "ended_at": None,
    "seconds": None,
    "outcome": None,
    "error_code": None,
    "error_message": None,
    "exit_signal": None,
    "peak_host_bytes": None,
    "peak_gpu_bytes": None,
}

_OUTLINE = {
    "model": "/models/llama",
    "scheme": "W4A16",
    "method": "gptq",
    "layers_total": 32,
    "device_class": "any",
}

_REFUSED = {
    "index": 1,
    "error": {
        "code": "unknown_scheme",
        "detail": "There is no scheme named 'W5A16'.",
        "hint": "Use one of W4A16, W8A8, FP8_DYNAMIC.",
        "errors": [],
    },
}

_BATCH: dict[str, Any] = {
    "id": _BATCH_ID,
    "name": "first look",
    "labels": {},
    "created_at": _SUBMITTED,
    "counts": {
        "total": 2,
        "accepted": 1,
        "refused": 1,
        "queued": 0,
        "running": 1,
        "cancelling": 0,
        "succeeded": 0,
        "failed": 0,
        "cancelled": 0,
        "expired": 0,
        "deleted": 0,
    },
}

_WEBHOOK: dict[str, Any] = {
    "id": _WEBHOOK_ID,
    "url": "https://example.com/bitmill",
    "events": ["job_succeeded", "job_failed"],
    "all_jobs": True,
    "description": None,
    "created_at": _SUBMITTED,
    "disabled_at": None,
}

_DELIVERY = {
    "id": "msg_5c20f1d94b7e8a36027b",
    "event": "job_succeeded",
    "job_id": _JOB_ID,
    "status": "delivered",
    "attempts": 1,
    "next_attempt_at": None,
    "last_status_code": 204,
    "last_error": None,
    "created_at": _SUBMITTED,
    "delivered_at": _STARTED,
}

_KEY: dict[str, Any] = {
    "id": "key_0b6e2f4d9a8c1735ee41",
    "name": "nightly builds",
    "scopes": ["submit"],
    "created_at": _SUBMITTED,
    "last_used_at": None,
    "expires_at": "2027-11-26T00:00:00Z",
    "revoked_at": None,
}

_MEMORY = {
    "basis": "exact",
    "host_bytes": 2_147_483_648,
    "gpu_bytes": 0,
    "items": [
        {
            "name": "one decoder layer",
            "bytes": 436_207_616,
            "basis": "its weights, in bf16",
            "phases": ["solve"],
            "on": None,
        }
    ],
}

EXAMPLES: dict[str, Any] = {
    "JobRead": _JOB,
    "JobPage": {"items": [_JOB], "next_cursor": None},
    "JobDetail": {
        **_JOB,
        "obstacle": None,
        "plan": {"source": "llama", "modules": [], "warnings": []},
        "attempts": [_ATTEMPT],
    },
    "JobOverrides": {"scheme": "W8A8", "name": "the same in 8 bits"},
    "JobPlanned": {**_OUTLINE, "plan": {"source": "llama", "modules": [], "warnings": []}},
    "Estimate": {
        "source_bytes": 16_060_522_496,
        "output_bytes": 5_727_322_112,
        "memory": {"exact": _MEMORY, "guide": {**_MEMORY, "basis": "guide"}},
        "disk": {
            "bytes": 5_727_322_112,
            "items": [{"name": "weights", "bytes": 5_727_322_112, "basis": "to the byte"}],
        },
        "duration": {
            "seconds": {"cpu": {"least": 5400, "most": 21_600}, "cuda": {"least": 600, "most": 1800}},
            "items": [{"name": "solve", "amount": 7_516_192_768, "unit": "weights"}],
        },
        "warnings": [],
    },
    "EventPage": {
        "items": [
            {
                "seq": 12,
                "at": _STARTED,
                "attempt": 1,
                "type": "layer_solved",
                "data": {
                    "layer": 6,
                    "layers_total": 32,
                    "relative_error": 0.0061,
                    "seconds": 41.2,
                    "eta_seconds": 1030.5,
                },
            }
        ],
        "next_since": 12,
        "status": "running",
    },
    "get_job_report": {
        "schema_version": 1,
        "totals": {"source_bytes": 16_060_522_496, "output_bytes": 5_727_322_112, "seconds": 1318.6},
        "evaluation": {"perplexity_original": 6.14, "perplexity_compressed": 6.29},
        "modules": [{"name": "model.layers.0.self_attn.q_proj", "scheme": "W4A16", "relative_error": 0.004}],
        "warnings": [],
    },
    "BatchRead": _BATCH,
    "BatchPage": {"items": [_BATCH], "next_cursor": None},
    "BatchDetail": {
        **_BATCH,
        "items": [{"index": 0, "job_id": _JOB_ID}, _REFUSED],
        "next_cursor": None,
    },
    "BatchPlanned": {"total": 2, "accepted": 1, "refused": 1, "items": [{**_OUTLINE, "index": 0}, _REFUSED]},
    "ArtifactList": {
        "job": _JOB_ID,
        "output": None,
        "files": [
            {
                "name": "config.json",
                "size": 1423,
                "sha256": _SHA256,
                "url": f"/v1/jobs/{_JOB_ID}/artifacts/config.json",
            }
        ],
    },
    "WebhookCreate": {"url": "https://example.com/bitmill", "events": ["job_succeeded", "job_failed"]},
    "WebhookRead": _WEBHOOK,
    "WebhookCreated": {**_WEBHOOK, "secret": "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"},
    "WebhookPage": {"items": [_WEBHOOK], "next_cursor": None},
    "DeliveryRead": _DELIVERY,
    "DeliveryPage": {"items": [_DELIVERY], "next_cursor": None},
    "ProjectRead": {
        "id": "proj_3f9c0a5be1d27c4486aa",
        "name": "default",
        "created_at": _SUBMITTED,
        "limits": {
            "max_queued": 200,
            "max_running": None,
            "max_body_bytes": 16_777_216,
            "requests_per_minute": None,
        },
        "s3_prefixes": ["s3://texts/public"],
        "output_prefixes": ["s3://models/search"],
        "use": {"queued": 0, "running": 1},
    },
    "KeyCreate": {"name": "nightly builds", "scopes": ["submit"], "expires_at": "2027-11-26T00:00:00Z"},
    "KeyRead": _KEY,
    "KeyCreated": {**_KEY, "key": "bitmill_..."},
    "KeyPage": {"items": [_KEY], "next_cursor": None},
    "WorkerList": {
        "items": [
            {
                "id": "worker-1",
                "device_class": "cpu",
                "host_bytes": 34_359_738_368,
                "gpu_bytes": 0,
                "busy": True,
                "job_id": _JOB_ID,
                "started_at": _SUBMITTED,
                "heartbeat_at": _STARTED,
            }
        ]
    },
    "QueueList": {
        "items": [
            {
                "device_class": "any",
                "queued": 0,
                "running": 0,
                "oldest_queued_at": None,
                "workers": 1,
                "idle_workers": 0,
            }
        ]
    },
    "MethodList": {
        "items": [
            {
                "name": "gptq",
                "aliases": ["GPTQModifier"],
                "description": "Rounds column by column, and moves the error of each into those that follow.",
                "needs_calibration": True,
                "composes_with": ["rtn", "awq", "smoothquant"],
                "recovery": "High recovery; slower, for the statistics of every input.",
                "source": "https://arxiv.org/abs/2210.17323",
            }
        ]
    },
    "SchemeList": {
        "items": [
            {
                "name": "W4A16",
                "aliases": [],
                "description": "Weights in int4, activations as they are.",
                "weights": "int4, one scale for a group of 128 columns",
                "activations": "as they are",
                "format": "pack-quantized",
                "needs_calibration": False,
                "composes_with": ["rtn", "gptq", "awq", "smoothquant"],
                "recovery": "A quarter of the bytes, fastest in small batches; a small loss.",
            }
        ]
    },
    "DatasetList": {
        "items": [
            {
                "kind": "path",
                "field": "path",
                "description": "A file below one of the server's local roots.",
                "suffixes": [".jsonl", ".parquet", ".csv", ".txt"],
                "limits": "Of any size.",
                "available": False,
                "note": "The server has no BITMILL_LOCAL_ROOTS.",
            }
        ],
        "named": [
            {
                "name": "ultrachat_200k",
                "hub": "HuggingFaceH4/ultrachat_200k",
                "config": None,
                "split": "train_sft",
                "columns": ["messages"],
                "chat_template": True,
                "template": None,
            }
        ],
        "columns": ["text", "content", "messages", "prompt"],
        "calibration": [
            {"name": "num_calibration_samples", "default": 512, "least": 1, "most": 1_000_000},
            {"name": "packing", "default": True, "least": None, "most": None},
            {"name": "max_dropped_share", "default": 0.05, "least": 0, "most": 1},
        ],
    },
    "Alive": {"status": "alive"},
    "Ready": {
        "status": "ready",
        "checks": [
            {"name": "database", "status": "ok", "code": "", "message": "", "hint": ""},
            {"name": "store", "status": "ok", "code": "", "message": "", "hint": ""},
        ],
    },
}
