"""Signatures are those of Standard Webhooks."""

from __future__ import annotations

import base64
from datetime import UTC, datetime

from api.observability import hide_secrets
from api.webhooks.signing import headers, new_secret


def test_the_specification_s_own_vector() -> None:
    """Published with the reference libraries of standard-webhooks/standard-webhooks."""
    at = datetime.fromtimestamp(1614265330, UTC)
    secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    assert headers(secret, "msg_p5jXN8AQM9LWM0D4loKWxJek", at, '{"test": 2432232314}') == {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }


def test_secrets_are_32_random_bytes() -> None:
    one, other = new_secret(), new_secret()
    assert one != other
    assert one.startswith("whsec_")
    assert len(base64.b64decode(one.removeprefix("whsec_"), validate=True)) == 32


def test_secrets_are_hidden_in_logs() -> None:
    secret = new_secret()
    assert secret not in str(hide_secrets(None, "info", {"event": f"made {secret}", "webhook": [secret]}))
