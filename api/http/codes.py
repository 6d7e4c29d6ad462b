"""Which codes errors may have, by status and route: what the OpenAPI document says of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Any

from api.errors import ProblemDetails

EVERYWHERE: Mapping[int, tuple[str, ...]] = {
    401: ("missing_key", "wrong_key"),
    403: ("scope_missing",),
    422: ("validation_error", "unknown_parameter", "value_not_storable"),
    429: ("rate_limited",),
    503: ("database_unavailable",),
}
"""Of every route that needs a key. Others of the same status are added to these."""

WITH_BODY: Mapping[int, tuple[str, ...]] = {
    400: ("invalid_json", "bad_request"),
    413: ("body_too_large",),
    422: ("not_a_json_object",),
}

SUBMISSION: Mapping[int, tuple[str, ...]] = {
    **WITH_BODY,
    422: (
        *WITH_BODY[422],
        *("recipe_and_scheme", "scheme_missing", "unknown_scheme", "unknown_method", "method_does_not_fit"),
        *("quality_gate_without_evaluation", "callback_not_found", "webhook_disabled"),
        *("label_key_invalid", "output_not_allowed"),
        # where model and text are
        *("path_not_allowed", "model_not_found", "model_name_too_long", "dataset_not_found"),
        "too_many_files",
        *("dataset_format_unsupported", "dataset_required"),
        *("hub_access_denied", "hub_answer_invalid", "hub_offline", "hub_repository_not_found"),
        *("hub_revision_not_found", "s3_access_denied", "s3_object_not_found", "model_changed"),
        # the checkpoint
        *("config_missing", "config_invalid", "weights_missing", "pickle_only", "index_invalid"),
        *("invalid_safetensors", "source_unreadable", "source_changed", "unsafe_link", "unsupported_dtype"),
        *("checkpoint_incomplete", "shape_mismatch", "unsupported_architecture", "remote_code_required"),
        *("source_already_quantized", "names_of_wrapped_model"),
        # the recipe on this model
        *("nothing_to_compress", "pattern_invalid", "pattern_matches_nothing", "lm_head_not_supported"),
        *("group_size_does_not_divide", "group_size_not_applicable", "fused_group_mismatch"),
        *("too_few_outputs", "mask_structure_does_not_divide", "experts_need_dynamic_activations"),
        *("experts_not_smoothed", "nothing_to_smooth", "kv_cache_not_supported"),
        *("not_served_by_vllm", "not_loaded_by_transformers"),
        "sequence_too_long",
    ),
    503: ("hub_unreachable", "s3_unreachable"),
}
"""Of what is planned: jobs, estimates, clones, and each item of a batch."""


def documented(*given: Mapping[int, Iterable[str]]) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's `responses` for those statuses, each with the codes that it may have, those of EVERYWHERE
    first."""
    codes: dict[int, list[str]] = {}
    for each in given:
        for status, more in each.items():
            codes.setdefault(status, list(EVERYWHERE.get(status, ()))).extend(more)
    return {status: _response(status, list(dict.fromkeys(names))) for status, names in codes.items()}


def _response(status: int, codes: list[str]) -> dict[str, Any]:
    phrase = HTTPStatus(status).phrase
    detail = f"{codes[0].replace('_', ' ').capitalize()}."
    example = ProblemDetails(
        title=phrase, status=status, code=codes[0], detail=detail, request_id="08345e8e97ee1f88"
    )
    return {
        "model": ProblemDetails,
        "description": f"{phrase}: {', '.join(f'`{code}`' for code in codes)}.",
        "content": {"application/json": {"example": example.model_dump()}},
    }
