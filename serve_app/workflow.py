"""The durable workflow: prepare → generate → optimise → export, written as what happens to a job, in order.

It knows neither Ray nor DBOS: `step` runs a named coroutine once and remembers what it returned, also over the death of
the process; `Stages` are the calls and the records. Every step returns JSON; a failed job is a value, {"failed": …}.
"""

from collections.abc import Awaitable, Callable
from typing import Any, Protocol

VERSION = "1"
"""Changes only when the steps below change, because a job that is half done is continued by the code of its version."""

Json = dict[str, Any]
Step = Callable[..., Awaitable[Json]]


class Stages(Protocol):
    """What the workflow's steps do. Each may be repeated after a crash and must then change nothing twice."""

    async def begin(self, job_id: str) -> Json: ...
    async def prepare(self, job: Json) -> Json: ...
    async def generate(self, job: Json, views: Json) -> Json: ...
    async def pose(self, job: Json) -> Json: ...
    async def slice(
        self, job: Json, views: Json, checkpoint: Json | None, initial: Json | None, smaller: bool
    ) -> Json: ...
    async def finish(
        self, job: Json, views: Json, checkpoint: Json, smaller: bool, initial: Json | None = None
    ) -> Json: ...
    async def export(self, job: Json, views: Json | None, result: Json, facts: Json) -> Json: ...
    async def succeed(self, job: Json, done: Json) -> Json: ...
    async def fail(self, job_id: str, error: Json) -> Json: ...
    async def drop_checkpoint(self, job: Json, checkpoint: Json) -> None: ...


class StageFailed(Exception):
    """A step said that the job cannot succeed; leaves only the workflow below, never a process."""


async def reconstruct(step: Step, stages: Stages, job_id: str) -> None:
    """A reconstruction, from accepted to over."""
    job = await step("begin", stages.begin, job_id)
    if not job:
        return  # deleted or cancelled while it was queued
    try:
        prepared = _or_fail(await step("prepare", stages.prepare, job))
        views, facts = prepared["views"], prepared["facts"]
        job = {**job, **prepared.get("job", {})}  # another model, where `auto` found no cameras
        if job["kind_of_model"] == "optimiser":
            result, more, views = await _optimise(step, stages, job, views, None)
        else:
            generated = _or_fail(await step("generate", stages.generate, job, views))
            result, more = generated["result"], generated["facts"]
            views = generated.get("views", views)  # a model may have found cameras
            if job["options"].get("refine"):
                result, refined, views = await _optimise(step, stages, job, views, result)
                more = {**more, **refined}
        done = _or_fail(await step("export", stages.export, job, views, result, {**facts, **more}))
        await step("succeed", stages.succeed, job, done)
    except StageFailed as failure:
        await step("fail", stages.fail, job_id, failure.args[0])


async def export(step: Step, stages: Stages, job_id: str) -> None:
    """Another format, face count or texture size of a reconstruction that is finished: no model runs."""
    job = await step("begin", stages.begin, job_id)
    if not job:
        return
    try:
        source = job["result"]
        done = _or_fail(await step("export", stages.export, job, source["views"], source["result"], source["facts"]))
        await step("succeed", stages.succeed, job, done)
    except StageFailed as failure:
        await step("fail", stages.fail, job_id, failure.args[0])


async def _optimise(
    step: Step, stages: Stages, job: Json, views: Json, initial: Json | None
) -> tuple[Json, Json, Json]:
    """The result, facts about it, and the views that it was fitted to."""
    checkpoint, smaller, made = await _slices(step, stages, job, views, initial, smaller=False)
    warnings = []
    if made.get("look_again"):  # a generated mesh that has no place among its cameras
        posed = _or_fail(await step("pose", stages.pose, job))
        if "views" in posed:
            views = posed["views"]
            await stages.drop_checkpoint(job, checkpoint)
            checkpoint, smaller, made = await _slices(step, stages, job, views, initial, smaller=smaller)
        else:
            warnings = [posed["facts"]["reason"]]
    finished = _or_fail(await step("finish", stages.finish, job, views, checkpoint, smaller, initial))
    await stages.drop_checkpoint(job, checkpoint)
    facts = finished["facts"]
    if warnings:
        facts = {**facts, "refine_warnings": [*facts.get("refine_warnings", []), *warnings]}
    return finished["result"], facts, views


async def _slices(
    step: Step, stages: Stages, job: Json, views: Json, initial: Json | None, *, smaller: bool
) -> tuple[Json, bool, Json]:
    """Slices until done: each ends with a checkpoint, and the next one starts from it, wherever it runs. The last
    checkpoint, whether it was made with less, and what the last slice said."""
    checkpoint = None
    while True:
        made = _or_fail(await step("slice", stages.slice, job, views, checkpoint, initial, smaller))
        if checkpoint is not None and checkpoint["key"] != made["checkpoint"]["key"]:
            await stages.drop_checkpoint(job, checkpoint)
        checkpoint, smaller = made["checkpoint"], made["smaller"]
        if made["done"]:
            return checkpoint, smaller, made


def _or_fail(value: Json) -> Json:
    if "failed" in value:
        raise StageFailed(value["failed"])
    return value
