"""What belongs to one project does not exist for another, on every route that there is."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from itertools import product

from fastapi import FastAPI
from fastapi.routing import iter_route_contexts

from api.security import Scope
from tests.api.conftest import Server
from tests.api.jobs.leasing import start
from tests.api.test_openapi import operations
from tests.api.test_security import new_server_key

NOTHING: Mapping[str, str] = defaultdict(lambda: "nothing")
"""For every parameter in a path an id that is nobody's."""


def own_things(server: Server) -> dict[str, str]:
    """For every parameter in a path something of the first project. A parameter without a line here fails."""

    def made(path: str, body: object) -> str:
        return str(server.http.post(path, json=body).json()["id"])

    webhook = made("/v1/webhooks", {"url": "https://1.1.1.1/"})
    return {
        "job_id": server.submit()["id"],
        "batch_id": made("/v1/batches", {"jobs": [server.body()]}),
        "webhook_id": webhook,
        "delivery_id": made(f"/v1/webhooks/{webhook}/ping", None),
        "key_id": made("/v1/keys", {"name": "own", "scopes": ["read"]}),
    }


PARTS = {"name": "config.json"}
"""Parameters that name something only within one of the others."""
NESTED = {"delivery_id"}
"""What no list shows that can be read without naming something else."""
BODIES: dict[tuple[str, str], object] = {}
"""Of (method, path), where `{}` is not valid."""


def ask(
    server: Server, headers: dict[str, str], method: str, path: str, things: Mapping[str, str]
) -> tuple[int, str]:
    """Status and body, without the request's id."""
    body = BODIES.get((method, path), {}) if method in ("post", "put", "patch") else None
    answer = server.http.request(method, path.format_map(things), headers=headers, json=body)
    return answer.status_code, answer.text.replace(answer.headers["X-Request-ID"], "")


def readable(
    server: Server, headers: dict[str, str], things: Mapping[str, str]
) -> dict[str, tuple[int, str]]:
    """What can be read with a key, by path."""
    paths = [path for method, path, _ in operations(server) if method == "get"]
    return {path: ask(server, headers, "get", path, things) for path in paths}


def listed(found: Mapping[str, tuple[int, str]]) -> str:
    """What was read without naming it."""
    return " ".join(text for path, (_, text) in found.items() if "{" not in path)


def test_what_is_anothers_does_not_exist(server: Server) -> None:
    own = {"Authorization": server.http.headers["Authorization"]}
    other = new_server_key(server, "other", Scope.ADMIN)
    ids = own_things(server)
    start(server)  # so that a worker has the job
    before = readable(server, own, ids | PARTS)
    for method, path, _ in operations(server):
        if "{" not in path:
            continue
        status, text = ask(server, other, method, path, ids | PARTS)
        for each in ids.values():
            text = text.replace(each, "nothing")
        assert (status, text) == ask(server, other, method, path, NOTHING), (method, path)
        assert status == 404, (method, path)
    assert readable(server, own, ids | PARTS) == before
    to_own, to_other = listed(before), listed(readable(server, other, NOTHING))
    for parameter, each in ids.items():
        assert parameter in NESTED or each in to_own
        assert each not in to_other


def test_only_these_routes_are_not_in_the_document(server: Server) -> None:
    """What is not in it, the walks here do not see."""
    app = server.http.app
    assert isinstance(app, FastAPI)
    hidden = {route.path for route in iter_route_contexts(app.routes) if not route.include_in_schema}
    heads = {"/v1/jobs/{job_id}/artifacts/{name:path}"}
    assert hidden == {"/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc", "/metrics"} | heads


NEEDED = {
    "submit_job": Scope.SUBMIT,
    "estimate_job": Scope.SUBMIT,
    "list_jobs": Scope.READ,
    "get_job": Scope.READ,
    "list_job_events": Scope.READ,
    "get_job_report": Scope.READ,
    "cancel_job": Scope.SUBMIT,
    "retry_job": Scope.SUBMIT,
    "clone_job": Scope.SUBMIT,
    "delete_job": Scope.SUBMIT,
    "list_artifacts": Scope.READ,
    "download_artifact": Scope.READ,
    "submit_batch": Scope.SUBMIT,
    "list_batches": Scope.READ,
    "get_batch": Scope.READ,
    "cancel_batch": Scope.SUBMIT,
    "create_webhook": Scope.ADMIN,
    "list_webhooks": Scope.READ,
    "get_webhook": Scope.READ,
    "delete_webhook": Scope.ADMIN,
    "ping_webhook": Scope.SUBMIT,
    "list_deliveries": Scope.READ,
    "redeliver": Scope.SUBMIT,
    "get_project": Scope.READ,
    "create_key": Scope.ADMIN,
    "list_keys": Scope.ADMIN,
    "revoke_key": Scope.ADMIN,
    "list_workers": Scope.READ,
    "list_queues": Scope.READ,
    "list_methods": Scope.READ,
    "list_schemes": Scope.READ,
    "list_datasets": Scope.READ,
}
"""Which scope an operation needs. One without a line here fails."""
GRANTED = {
    Scope.READ: {Scope.READ},
    Scope.SUBMIT: {Scope.READ, Scope.SUBMIT},
    Scope.ADMIN: {Scope.READ, Scope.SUBMIT, Scope.ADMIN},
}


def test_every_operation_needs_its_scope(server: Server) -> None:
    keys = {scope: new_server_key(server, "default", scope) for scope in Scope}
    found = [each for each in operations(server) if each[1].startswith("/v1/")]
    assert {operation["operationId"] for _, _, operation in found} == NEEDED.keys()
    for (method, path, operation), (scope, key) in product(found, keys.items()):
        status, text = ask(server, key, method, path, NOTHING)
        if NEEDED[operation["operationId"]] in GRANTED[scope]:
            assert status not in (401, 403), (method, path, scope)
        else:
            assert status == 403, (method, path, scope)
            assert '"scope_missing"' in text


def test_only_the_health_checks_need_no_key(server: Server) -> None:
    server.http.headers.pop("Authorization")
    open_to_all = {
        path for method, path, _ in operations(server) if ask(server, {}, method, path, NOTHING)[0] != 401
    }
    assert open_to_all == {"/livez", "/readyz"}
