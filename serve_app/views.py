"""Rows of the job store → what the API shows."""

from datetime import UTC, datetime
from typing import Any

from serve_app.schemas import TERMINAL, ArtifactView, ErrorView, ReconstructionView


def reconstruction_view(row: dict[str, Any], files: list[dict[str, Any]], position: int | None) -> ReconstructionView:
    url = f"/v1/reconstructions/{row['id']}"
    links = {"self": url, "events": f"{url}/events"}
    if row["state"] not in TERMINAL:
        links["cancel"] = f"{url}/cancel"
    if row["state"] == "succeeded":
        links["exports"] = f"{url}/exports"
    return ReconstructionView(
        id=row["id"],
        kind=row["kind"],
        parent=row["parent"],
        state=row["state"],
        model=row["model"],
        chosen_because=((row["result"] or {}).get("facts") or {}).get("chosen_because", ""),
        stage=row["stage"],
        step=row["step"],
        steps=row["steps"],
        percent=round(row["percent"], 2),
        eta_s=row["eta_s"],
        queue_position=position,
        created_at=_iso(row["created"]) or "",
        started_at=_iso(row["started"]),
        finished_at=_iso(row["finished"]),
        expires_at=_iso(row["expires"]),
        options=row["options"],
        artifacts=[
            ArtifactView(
                name=file["name"],
                url=f"{url}/artifacts/{file['name']}",
                bytes=file["size"],
                sha256=file["sha256"],
                media_type=file["media_type"],
            )
            for file in files
        ],
        report=row["report"],
        error=None if row["error"] is None else ErrorView(**row["error"]),
        resumes=row["resumes"],
        links=links,
    )


def _iso(stamp: float | None) -> str | None:
    return None if stamp is None else datetime.fromtimestamp(stamp, UTC).isoformat(timespec="milliseconds")
