"""Who calls, and what that caller may do."""

from __future__ import annotations

from dataclasses import dataclass

from api.projects.limits import Limits
from api.security import Scope

_IMPLIED = {
    Scope.READ: {Scope.READ},
    Scope.SUBMIT: {Scope.READ, Scope.SUBMIT},
    Scope.ADMIN: set(Scope),
}


@dataclass(frozen=True)
class Principal:
    """Who calls: the project that owns what is made, with its limits, and the scopes of the key.

    use_is_noted: whether the key's last_used_at is recent enough.
    """

    project_id: str
    key_id: str
    scopes: frozenset[Scope]
    limits: Limits
    use_is_noted: bool

    def may(self, scope: Scope) -> bool:
        return any(scope in _IMPLIED[own] for own in self.scopes)
