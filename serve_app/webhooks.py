"""Webhooks in the Standard Webhooks form: what is sent when a job is over, how it is signed, when it is sent again."""

import base64
import hashlib
import hmac
import json
import logging
import time
from datetime import UTC, datetime
from typing import Any

import httpcore

from serve_app import outbound
from serve_app.settings import Outbound, signing_key

log = logging.getLogger("ray.serve")

PAUSES_S = (0, 5, 30, 120, 600, 1800, 7200, 21600)
"""Before each attempt; the last comes about eight hours after the job's end."""


def body_of(row: dict[str, Any], files: list[dict[str, Any]]) -> bytes:
    """The same bytes at every attempt."""
    data: dict[str, Any] = {
        "id": row["id"],
        "state": row["state"],
        "kind": row["kind"],
        "model": row["model"],
        "url": f"/v1/reconstructions/{row['id']}",
        "artifacts": [{"name": file["name"], "bytes": file["size"], "sha256": file["sha256"]} for file in files],
    }
    if row["error"]:
        data["error"] = row["error"]
    stamp = datetime.fromtimestamp(row["finished"], UTC).isoformat()
    return json.dumps({"type": f"{row['kind']}.{row['state']}", "timestamp": stamp, "data": data}).encode()


def sign(secret: str, message_id: str, timestamp: int, body: bytes) -> str:
    """`v1,` and the base64 HMAC-SHA256 of id.timestamp.body; secret as `whsec_` and base64."""
    digest = hmac.new(signing_key(secret), f"{message_id}.{timestamp}.".encode() + body, hashlib.sha256).digest()
    return "v1," + base64.b64encode(digest).decode()


def headers_of(row: dict[str, Any], body: bytes, secret: str, timestamp: int) -> dict[str, str]:
    message_id = f"msg_{row['id']}"
    return {
        "content-type": "application/json",
        "user-agent": "viewmesh-webhooks/1",
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": sign(secret, message_id, timestamp, body),
    }


async def deliver(row: dict[str, Any], files: list[dict[str, Any]], secret: str | None, rules: Outbound) -> bool:
    """One attempt; True if there is nothing left to try: it was taken, or can never be."""
    if not secret:
        return True
    body = body_of(row, files)
    headers = headers_of(row, body, secret, int(time.time()))
    try:
        status, _ = await outbound.request(
            "POST",
            row["webhook"],
            headers=headers,
            content=body,
            timeout_s=rules.timeout_s,
            private_addresses=rules.private_addresses,
        )
    except outbound.Refused as error:
        log.warning(f"webhook of {row['id']} refused: {error}")
        return True
    except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, TimeoutError, OSError) as error:
        log.warning(f"webhook of {row['id']} failed: {type(error).__name__}")
        return False
    if 200 <= status < 300:
        return True
    log.warning(f"webhook of {row['id']} answered {status}")
    return status == 410  # gone: the receiver asks for no more
