"""What the API takes and answers, as JSON. Made by `python -m api.typed`; do not edit."""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict


class AWQStep(TypedDict):
    """Scales up, before the linears are quantized, the channels that matter, and down in the norm or linear
    in front of them (Lin et al., 2023, arXiv:2306.00978, section 3.2), so that least is lost when they are
    rounded by the observer of the step that follows.

    n_grid: exponents that are tried. duo_scaling: whether the weights' magnitudes count beside those of the
    activations; "both" tries with and without. offload_device: accepted and without effect, since activations
    are never all on the device.
    """

    type: NotRequired[Literal["awq"]]
    n_grid: NotRequired[int]
    duo_scaling: NotRequired[bool | Literal["both"]]
    offload_device: NotRequired[Literal["cpu"] | None]


class AcceptedItem(TypedDict):
    """An item that became a job. index: where it was in the batch, from 0."""

    index: int
    job_id: str


class Alive(TypedDict):
    """`status` is alive."""

    status: str


class ArtifactList(TypedDict):
    """All files of a job."""

    job: str
    output: str | None
    files: list[ArtifactRead]


class ArtifactRead(TypedDict):
    """A published file and where to get it, relative to the server."""

    name: str
    size: int
    sha256: str
    url: str


AttemptOutcome = Literal[
    "succeeded",
    "failed",
    "cancelled",
    "crashed",
    "timed_out",
    "out_of_memory",
    "lease_lost",
    "preempted",
    "store_lost",
    "host_failed",
    "deduplicated",
]


class AttemptRead(TypedDict):
    """One try of a worker. `outcome` is null while it runs; preempted attempts do not count."""

    number: int
    worker_id: str
    device_class: str
    started_at: str
    ended_at: str | None
    seconds: float | None
    outcome: AttemptOutcome | None
    error_code: str | None
    error_message: str | None
    exit_signal: int | None
    peak_host_bytes: int | None
    peak_gpu_bytes: int | None


class BatchCounts(TypedDict):
    """Items by what became of them. total is accepted + refused; accepted is the sum of all that follow."""

    total: int
    accepted: int
    refused: int
    queued: int
    running: int
    cancelling: int
    succeeded: int
    failed: int
    cancelled: int
    expired: int
    deleted: int


class BatchDetail(TypedDict):
    """A batch and its items by their index, without those whose job was deleted. `next_cursor` is null on the
    last page.
    """

    id: str
    name: str | None
    labels: dict[str, str]
    created_at: str
    counts: BatchCounts
    items: list[AcceptedItem | RefusedItem]
    next_cursor: int | None


class BatchPage(TypedDict):
    """Batches, the newest first. `next_cursor` is null on the last page."""

    items: list[BatchRead]
    next_cursor: str | None


class BatchPlanned(TypedDict):
    """What a batch would become: nothing is stored."""

    total: int
    accepted: int
    refused: int
    items: list[PlannedItem | RefusedItem]


class BatchRead(TypedDict):
    """A batch as it stands."""

    id: str
    name: str | None
    labels: dict[str, str]
    created_at: str
    counts: BatchCounts


class BatchSubmit(TypedDict):
    """Up to 1,000 jobs, of which each is accepted or refused on its own: either `jobs` or a `sweep`."""

    name: NotRequired[str | None]
    labels: NotRequired[dict[str, str]]
    jobs: NotRequired[list[JobSubmit] | None]
    sweep: NotRequired[Sweep | None]


class Calibration(TypedDict):
    """How text becomes calibration samples.

    With packing, one sample is one block of max_seq_length tokens; without, one sample is one document,
    truncated to max_seq_length. seed: which documents are held out and in which order blocks are drawn.
    max_dropped_share: of the documents that are read, how many may be unusable: conversations that the chat
    template refuses, text that is no Unicode. They are dropped, counted and named; more are an error.
    """

    num_calibration_samples: NotRequired[int]
    max_seq_length: NotRequired[int]
    packing: NotRequired[bool]
    seed: NotRequired[int]
    max_dropped_share: NotRequired[float]


class CalibrationParameter(TypedDict):
    """A field of `calibration`. least, most: null where it is no number, or has no such bound."""

    name: str
    default: bool | int | float
    least: int | float | None
    most: int | float | None


class Check(TypedDict):
    """What one part answered. With a warning the server is ready all the same."""

    name: str
    status: Literal["ok", "warning", "failed"]
    code: str
    message: str
    hint: str


class DatasetKindRead(TypedDict):
    """A place that calibration text may come from."""

    kind: Literal["path", "hub", "s3", "texts", "self"]
    field: str
    description: str
    suffixes: list[str]
    limits: str
    available: bool
    note: str


class DatasetList(TypedDict):
    """Kinds of datasets, those that have a short name, and how much of one is taken.

    columns: where text is looked for when no column is named, the first that is there.
    """

    items: list[DatasetKindRead]
    named: list[NamedDatasetRead]
    columns: list[str]
    calibration: list[CalibrationParameter]


class DatasetSpec(TypedDict):
    """Where calibration text comes from. Exactly one of `path`, `hub`, `s3`, `texts` and `generated`.

    path: a local .jsonl, .parquet, .csv or .txt file (one document a line of JSON or a row; a text file is
    split at blank lines). hub: the name of a preset (c4, open_platypus, ultrachat_200k, wikitext), or
    `owner/name`, or either with `@revision`; config and split: which part of it; by default what the preset
    says, else `train` of the only config. s3: such a file, as `s3://bucket/key`; version_id and etag: which
    state of it, by default the one that is first fetched. texts: the documents themselves. generated: the
    model writes them (generation.py); as a string, "self".

    text_column: the column that holds the text; by default the first there is of text, content, messages,
    prompt. messages_column: a column with chat messages, each with a role, to which the model's chat template
    is applied.
    """

    path: NotRequired[str | None]
    hub: NotRequired[str | None]
    config: NotRequired[str | None]
    split: NotRequired[str | None]
    s3: NotRequired[str | None]
    version_id: NotRequired[str | None]
    etag: NotRequired[str | None]
    texts: NotRequired[list[str] | None]
    generated: NotRequired[Literal[True] | None]
    text_column: NotRequired[str | None]
    messages_column: NotRequired[str | None]


class DeliveryPage(TypedDict):
    """Messages, the newest first. `next_cursor` is null on the last page."""

    items: list[DeliveryRead]
    next_cursor: str | None


class DeliveryRead(TypedDict):
    """A message to a webhook. Its id is the header `webhook-id`, the same at every attempt."""

    id: str
    event: str
    job_id: str | None
    status: DeliveryStatus
    attempts: int
    next_attempt_at: str | None
    last_status_code: int | None
    last_error: str | None
    created_at: str
    delivered_at: str | None


DeliveryStatus = Literal[
    "pending",
    "delivered",
    "failed",
]


class DiskPart(TypedDict):
    """One part of what lies in the worker's scratch folder."""

    name: str
    bytes: int
    basis: str


class DiskRead(TypedDict):
    """What a worker's scratch folder holds."""

    bytes: int
    items: list[DiskPart]


class DurationRead(TypedDict):
    """seconds: by device class, cpu and cuda."""

    seconds: dict[str, SecondsRange]
    items: list[Work]


class Estimate(TypedDict):
    """What a job would take, itemized. docs/memory.md says how it is made, and how near it comes."""

    source_bytes: int
    output_bytes: int
    memory: MemoryBases
    disk: DiskRead
    duration: DurationRead
    warnings: list[WarningRead]


class Evaluation(TypedDict):
    """The side-by-side measurement on held-out text.

    num_samples: blocks of max_seq_length; by default 1/16 of the calibration samples, at least 2,048 tokens.
    """

    enabled: NotRequired[bool]
    num_samples: NotRequired[int | None]


class EventPage(TypedDict):
    """Events after `since`, in order. Ask again with since = next_since until the status is a last one."""

    items: list[EventRead]
    next_since: int
    status: JobStatus


class EventRead(TypedDict):
    """Something that happened. seq counts from 1 without a gap."""

    seq: int
    at: str
    attempt: int | None
    type: str
    data: dict[str, Any]


class FieldProblem(TypedDict):
    """One thing that is wrong. `pointer` (RFC 6901) is the field of the body to blame, where one is."""

    code: str
    message: str
    hint: str
    pointer: str
    parameter: str


class GPTQStep(TypedDict):
    """Second-order rounding with error feedback (Frantar et al., 2022, arXiv:2210.17323, algorithm 1).

    block_size: columns whose error is applied together. dampening_frac: fraction of the mean of the Gram
    diagonal added to it. actorder "static": columns in order of falling diagonal, groups as on disk.
    """

    targets: NotRequired[list[str]]
    ignore: NotRequired[list[str]]
    scheme: str
    group_size: NotRequired[int | Literal["auto"] | None]
    observer: NotRequired[Literal["minmax", "mse", "imatrix", "gram"] | None]
    kv_cache_scheme: NotRequired[KVCacheScheme | None]
    type: NotRequired[Literal["gptq"]]
    block_size: NotRequired[int]
    dampening_frac: NotRequired[float]
    actorder: NotRequired[Literal["static"] | None]


class JobBatch(TypedDict):
    """Which item of which batch a job was submitted as; `index` counts from 0."""

    id: str
    index: int


class JobDetail(TypedDict):
    """A job with its attempts and its plan."""

    id: str
    name: str | None
    labels: dict[str, str]
    priority: int
    status: JobStatus
    phase: str | None
    layers_done: int
    layers_total: int
    model: str
    dataset: str | None
    scheme: str
    method: str
    recipe: Recipe
    calibration: Calibration
    evaluation: Evaluation
    quality_gate: QualityGate | None
    device_class: Literal["any", "cpu", "cuda"]
    max_runtime_seconds: int | None
    max_queue_seconds: int | None
    callback: str | None
    output: str | None
    attempts_made: int
    event_seq: int
    created_at: str
    started_at: str | None
    finished_at: str | None
    error: JobError | None
    batch: JobBatch | None
    deduplicated_from: str | None
    obstacle: Obstacle | None
    attempts: list[AttemptRead]
    plan: dict[str, Any]


class JobError(TypedDict):
    """Why a job failed or expired."""

    code: str
    message: str


JobOrder = Literal[
    "-created_at",
    "created_at",
]


class JobOverrides(TypedDict):
    """What is to be different in a clone: any field of a submission. `scheme` and what goes with it, or a
    `recipe`, replace the whole recipe.
    """

    model: NotRequired[str]
    dataset: NotRequired[str | DatasetSpec | None]
    scheme: NotRequired[str | None]
    method: NotRequired[str | None]
    observer: NotRequired[Literal["minmax", "mse", "imatrix", "gram"] | None]
    group_size: NotRequired[int | Literal["auto"] | None]
    targets: NotRequired[list[str] | str | None]
    ignore: NotRequired[list[str] | str | None]
    strict: NotRequired[bool | None]
    recipe: NotRequired[Recipe | None]
    calibration: NotRequired[Calibration]
    evaluation: NotRequired[Evaluation]
    quality_gate: NotRequired[QualityGate | None]
    require: NotRequired[Literal["vllm", "transformers", "both"] | None]
    resources: NotRequired[Resources]
    priority: NotRequired[int]
    name: NotRequired[str | None]
    labels: NotRequired[dict[str, str]]
    max_runtime_seconds: NotRequired[int | None]
    max_queue_seconds: NotRequired[int | None]
    cache: NotRequired[Literal["use", "bypass"]]
    callback: NotRequired[str | None]
    output: NotRequired[str | None]


class JobPage(TypedDict):
    """Jobs, in the order that `sort` says, the newest first by default. `next_cursor` is null on the last
    page.
    """

    items: list[JobRead]
    next_cursor: str | None


class JobPlanned(TypedDict):
    """What a submission would become: nothing is stored, no job exists."""

    model: str
    scheme: str
    method: str
    layers_total: int
    device_class: Literal["any", "cpu", "cuda"]
    plan: dict[str, Any]


class JobRead(TypedDict):
    """A job as it stands."""

    id: str
    name: str | None
    labels: dict[str, str]
    priority: int
    status: JobStatus
    phase: str | None
    layers_done: int
    layers_total: int
    model: str
    dataset: str | None
    scheme: str
    method: str
    recipe: Recipe
    calibration: Calibration
    evaluation: Evaluation
    quality_gate: QualityGate | None
    device_class: Literal["any", "cpu", "cuda"]
    max_runtime_seconds: int | None
    max_queue_seconds: int | None
    callback: str | None
    output: str | None
    attempts_made: int
    event_seq: int
    created_at: str
    started_at: str | None
    finished_at: str | None
    error: JobError | None
    batch: JobBatch | None
    deduplicated_from: str | None


JobStatus = Literal[
    "queued",
    "running",
    "cancelling",
    "succeeded",
    "failed",
    "cancelled",
    "expired",
]


class JobSubmit(TypedDict):
    """One compression to run: what, with which data, how.

    Give either `scheme`, with `method`, `observer`, `group_size`, `targets`, `ignore` and `strict` where the
    defaults do not fit, or a whole `recipe`. The default method is gptq for int and fp4 weights with a
    dataset, else rtn; for a sparse scheme sparsegpt with a dataset, else magnitude.
    """

    model: str
    dataset: NotRequired[str | DatasetSpec | None]
    scheme: NotRequired[str | None]
    method: NotRequired[str | None]
    observer: NotRequired[Literal["minmax", "mse", "imatrix", "gram"] | None]
    group_size: NotRequired[int | Literal["auto"] | None]
    targets: NotRequired[list[str] | str | None]
    ignore: NotRequired[list[str] | str | None]
    strict: NotRequired[bool | None]
    recipe: NotRequired[Recipe | None]
    calibration: NotRequired[Calibration]
    evaluation: NotRequired[Evaluation]
    quality_gate: NotRequired[QualityGate | None]
    require: NotRequired[Literal["vllm", "transformers", "both"] | None]
    resources: NotRequired[Resources]
    priority: NotRequired[int]
    name: NotRequired[str | None]
    labels: NotRequired[dict[str, str]]
    max_runtime_seconds: NotRequired[int | None]
    max_queue_seconds: NotRequired[int | None]
    cache: NotRequired[Literal["use", "bypass"]]
    callback: NotRequired[str | None]
    output: NotRequired[str | None]


class KVCacheScheme(TypedDict):
    """How a server caches keys and values, in the words of LLM Compressor's kv_cache_scheme.

    What vLLM takes from a checkpoint: fp8, a scale for a layer's keys and one for its values, from data.
    """

    num_bits: NotRequired[Literal[8]]
    type: NotRequired[Literal["float"]]
    strategy: NotRequired[Literal["tensor"]]
    symmetric: NotRequired[Literal[True]]
    dynamic: NotRequired[Literal[False]]


class KeyCreate(TypedDict):
    """A key to make."""

    name: str
    scopes: list[Scope]
    expires_at: NotRequired[str | None]


class KeyCreated(TypedDict):
    """A new key, this once with the key itself."""

    id: str
    name: str
    scopes: list[Scope]
    created_at: str
    last_used_at: str | None
    expires_at: str | None
    revoked_at: str | None
    key: str


class KeyPage(TypedDict):
    """Keys, the newest first, those that are revoked among them. `next_cursor` is null on the last page."""

    items: list[KeyRead]
    next_cursor: str | None


class KeyRead(TypedDict):
    """A key, without what it is used by. `last_used_at` is up to an hour late."""

    id: str
    name: str
    scopes: list[Scope]
    created_at: str
    last_used_at: str | None
    expires_at: str | None
    revoked_at: str | None


class LimitsRead(TypedDict):
    """What the project may use, by its own limits and the server's; null: no limit."""

    max_queued: int | None
    max_running: int | None
    max_body_bytes: int
    requests_per_minute: int | None


class MagnitudeStep(TypedDict):
    """Prunes the smallest weights; needs no data."""

    targets: NotRequired[list[str]]
    ignore: NotRequired[list[str]]
    sparsity: NotRequired[float]
    mask_structure: NotRequired[str]
    type: NotRequired[Literal["magnitude"]]


class MemoryBases(TypedDict):
    """The same by two sets of rules."""

    exact: MemoryRead
    guide: MemoryRead


class MemoryPart(TypedDict):
    """One part of a peak, and how it was found: with basis exact, when it is held; with guide, where."""

    name: str
    bytes: int
    basis: str
    phases: list[str] | None
    on: Literal["host", "gpu"] | None


class MemoryRead(TypedDict):
    """The peak. basis: exact, of this engine, or guide, by the rules of LLM Compressor's guide."""

    basis: str
    host_bytes: int
    gpu_bytes: int
    items: list[MemoryPart]


class MethodList(TypedDict):
    """All methods."""

    items: list[MethodRead]


class MethodRead(TypedDict):
    """A type of step of a recipe."""

    name: str
    aliases: list[str]
    description: str
    needs_calibration: bool
    composes_with: list[str]
    recovery: str
    source: str


class NamedDatasetRead(TypedDict):
    """A dataset on the Hub that has a short name, and what is read of it unless a job says otherwise."""

    name: str
    hub: str
    config: str | None
    split: str
    columns: list[str]
    chat_template: bool
    template: str | None


class Obstacle(TypedDict):
    """What keeps a job waiting. code: no_worker or unschedulable until another worker comes, quota_running
    until another job of the project has ended, attached until the one in `deduplicated_from` has,
    store_denied, store_unreachable or host_failed until it is tried again.
    """

    code: Literal["no_worker", "unschedulable", "quota_running", "attached", "store_denied", "store_unreachable", "host_failed"]
    message: str


class PlannedItem(TypedDict):
    """An item that would become a job."""

    model: str
    scheme: str
    method: str
    layers_total: int
    device_class: Literal["any", "cpu", "cuda"]
    index: int


class ProblemDetails(TypedDict):
    """An error (RFC 9457). Programs branch on `code`, which is never renamed."""

    type: str
    title: str
    status: int
    code: str
    detail: str
    hint: str
    request_id: str
    errors: list[FieldProblem]


class ProjectRead(TypedDict):
    """The project that a key belongs to."""

    id: str
    name: str
    created_at: str
    limits: LimitsRead
    s3_prefixes: list[str]
    output_prefixes: list[str]
    use: ProjectUse


class ProjectUse(TypedDict):
    """What of it is used."""

    queued: int
    running: int


class QualityGate(TypedDict):
    """A job whose compressed model is worse than this fails, with its report and without artifacts."""

    max_perplexity_ratio: float


class QueueList(TypedDict):
    """The queues: any, cpu and cuda."""

    items: list[QueueRead]


class QueueRead(TypedDict):
    """Jobs of all projects for one device class, and the workers that take them.

    Jobs for `any` go to both kinds of workers: their queue's workers are all.
    """

    device_class: Literal["any", "cpu", "cuda"]
    queued: int
    running: int
    oldest_queued_at: str | None
    workers: int
    idle_workers: int


class RTNStep(TypedDict):
    """Round to nearest. Without a dataset the observer is minmax or mse (the default)."""

    targets: NotRequired[list[str]]
    ignore: NotRequired[list[str]]
    scheme: str
    group_size: NotRequired[int | Literal["auto"] | None]
    observer: NotRequired[Literal["minmax", "mse", "imatrix", "gram"] | None]
    kv_cache_scheme: NotRequired[KVCacheScheme | None]
    type: NotRequired[Literal["rtn"]]


class Ready(TypedDict):
    """`status` is ready. Only checks without which this server could not work keep it from being so."""

    status: str
    checks: list[Check]


class Recipe(TypedDict):
    """An ordered list of steps: at most one that smooths, then those that prune, then those that quantize.

    A linear is pruned by the first pruning step that targets it, and what is left of it is quantized by the
    first quantizing step that does. strict: a pattern in `ignore` that matches no module of the model is an
    error; otherwise it is a warning, as recipes serve several models.
    """

    steps: list[RTNStep | GPTQStep | AWQStep | SmoothQuantStep | SparseGPTStep | WandaStep | MagnitudeStep]
    strict: NotRequired[bool]


class Refusal(TypedDict):
    """Why one of several things was refused: what an error would say of it alone."""

    code: str
    detail: str
    hint: str
    errors: list[FieldProblem]


class RefusedItem(TypedDict):
    """An item that became none, and why."""

    index: int
    error: Refusal


class Resources(TypedDict):
    """What the job may run on."""

    device_class: NotRequired[Literal["any", "cpu", "cuda"]]


class SchemeList(TypedDict):
    """All schemes."""

    items: list[SchemeRead]


class SchemeRead(TypedDict):
    """A representation of weights and activations."""

    name: str
    aliases: list[str]
    description: str
    weights: str
    activations: str
    format: str
    needs_calibration: bool
    composes_with: list[str]
    recovery: str


Scope = Literal[
    "read",
    "submit",
    "admin",
]


class SecondsRange(TypedDict):
    """On the fastest and the slowest hardware of a class."""

    least: float
    most: float


class SmoothQuantStep(TypedDict):
    """Moves outliers of activations into the weights that read them, before these are quantized (Xiao et al.,
    2022, arXiv:2211.10438, equation 4).

    smoothing_strength: 0 leaves the range to the activations, 1 gives all of it to the weights.
    """

    type: NotRequired[Literal["smoothquant"]]
    smoothing_strength: NotRequired[float]


class SparseGPTStep(TypedDict):
    """Prunes with error feedback (Frantar and Alistarh, 2023, arXiv:2301.00774).

    block_size: columns whose mask is chosen together. dampening_frac: as in GPTQStep.
    """

    targets: NotRequired[list[str]]
    ignore: NotRequired[list[str]]
    sparsity: NotRequired[float]
    mask_structure: NotRequired[str]
    type: NotRequired[Literal["sparsegpt"]]
    block_size: NotRequired[int]
    dampening_frac: NotRequired[float]


class Sweep(TypedDict):
    """Every model with every scheme, the first model's first."""

    models: list[str]
    schemes: list[str | dict[str, Any]]
    base: NotRequired[dict[str, Any]]


class WandaStep(TypedDict):
    """Prunes by weight times input norm, row by row (Sun et al., 2023, arXiv:2306.11695)."""

    targets: NotRequired[list[str]]
    ignore: NotRequired[list[str]]
    sparsity: NotRequired[float]
    mask_structure: NotRequired[str]
    type: NotRequired[Literal["wanda"]]


class WarningRead(TypedDict):
    """What a plan warns of."""

    code: str
    message: str
    hint: str


class WebhookCreate(TypedDict):
    """A receiver of messages about the project's jobs."""

    url: str
    events: NotRequired[list[WebhookEvent]]
    all_jobs: NotRequired[bool]
    description: NotRequired[str | None]


class WebhookCreated(TypedDict):
    """A new webhook with the secret that its messages are signed with, which is shown this once."""

    id: str
    url: str
    events: list[WebhookEvent]
    all_jobs: bool
    description: str | None
    created_at: str
    disabled_at: str | None
    secret: str


WebhookEvent = Literal[
    "job_queued",
    "attempt_started",
    "job_succeeded",
    "job_failed",
    "job_cancelled",
    "job_expired",
]


class WebhookPage(TypedDict):
    """Webhooks, the newest first. `next_cursor` is null on the last page."""

    items: list[WebhookRead]
    next_cursor: str | None


class WebhookRead(TypedDict):
    """A receiver of messages. Its secret is not shown again."""

    id: str
    url: str
    events: list[WebhookEvent]
    all_jobs: bool
    description: str | None
    created_at: str
    disabled_at: str | None


class Work(TypedDict):
    """Work of one kind, from which times are made."""

    name: str
    amount: int
    unit: str


class WorkerList(TypedDict):
    """All workers that gave a heartbeat lately."""

    items: list[WorkerRead]


class WorkerRead(TypedDict):
    """A worker as of its last heartbeat. `job_id` is given only for a job of the caller's own project."""

    id: str
    device_class: str
    host_bytes: int
    gpu_bytes: int
    busy: bool
    job_id: str | None
    started_at: str
    heartbeat_at: str
