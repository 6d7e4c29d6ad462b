"""PostgreSQL looks at more labels when it learns how many jobs have one."""

from __future__ import annotations

from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Of 100, its default, a label that one job in fifty has is often not among them: then the first page of
    # those jobs is sorted out of all of them.
    _look_at(500)


def downgrade() -> None:
    _look_at(-1)


def _look_at(values: int) -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.execute(f"ALTER TABLE jobs ALTER COLUMN labels SET STATISTICS {values}")
