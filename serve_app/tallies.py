"""The sums of /metrics, kept in the database: the same from every process, and none falls when jobs are deleted."""

from typing import Any

import sqlalchemy as sa

from serve_app.database import tallies

ADD = sa.text(
    "INSERT INTO viewmesh_tallies (name, label, value) VALUES (:name, :label, :value) "
    "ON CONFLICT (name, label) DO UPDATE SET value = viewmesh_tallies.value + excluded.value"
)


def of_job(row: dict[str, Any]) -> dict[tuple[str, str], float]:
    """What a job that is over adds, by name and label."""
    code = (row["error"] or {}).get("code", "")
    seconds = {("stage_seconds", stage): seconds for stage, seconds in row["timings"].items()}
    return {
        ("jobs", f"{row['kind']}|{row['model']}|{row['state']}|{code}"): 1,
        ("job_seconds", f"{row['kind']}|{row['model']}"): row["finished"] - row["created"],
        **seconds,
        **{("stage_count", stage): 1 for _, stage in seconds},
    }


def add(connection: sa.Connection, added: dict[tuple[str, str], float]) -> None:
    # In one order everywhere: two transactions that each wait for a row of the other's would wait for ever.
    rows = [{"name": name, "label": label, "value": value} for (name, label), value in sorted(added.items())]
    connection.execute(ADD, rows)


def sums(connection: sa.Connection) -> list[tuple[str, str, float]]:
    """(name, label, value) of all."""
    return [(row.name, row.label, row.value) for row in connection.execute(sa.select(tallies))]
