"""Executors: how they are declared, registered and refused."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest

from kalamdb.errors import InvalidRequest, NotFound
from kalamdb.jobs import JobContext, JobExecutor, JobRegistry
from kalamdb.jobs.registry import executor_of
from tests.jobs.conftest import World


@dataclass
class Wanted:
    name: str
    size: int = 3


class Packed(msgspec.Struct):
    name: str


def made(**options: Any) -> JobExecutor[Any]:
    return executor_of(lambda ctx: None, **{"job_type": "x", "prefix": "XX", **options})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"job_type": "Big"}, "must be lower-case letters"),
        ({"job_type": "x" * 65}, "64 at most"),
        ({"prefix": "x1"}, "must be two capital letters"),
        ({"prefix": "ABC"}, "must be two capital letters"),
        ({"max_retries": -1}, "0 or more is allowed"),
        ({"timeout_s": 0.0}, "more than 0 is allowed"),
        ({"queue": ""}, "printable name"),
        ({"job_type": "first"}, "job type 'first' is registered already"),
        ({"prefix": "FI"}, "prefix 'FI' of job type 'x' belongs to 'first'"),
        ({"on_interrupt": "explode"}, "on_interrupt 'explode' is not one of requeue, retry, fail"),
    ],
)
def test_bad_executors_are_refused(options: dict[str, Any], said: str) -> None:
    registry = JobRegistry()
    registry.register(made(job_type="first", prefix="FI"))
    with pytest.raises(InvalidRequest, match=said):
        registry.register(made(**options))
    assert registry.job_types() == ["first"] and len(registry) == 1


def test_a_function_without_parameters_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="must take the job context"):
        executor_of(lambda: None, "x", prefix="XX")


def test_the_annotation_of_a_function_gives_the_type_of_its_parameters() -> None:
    def typed(ctx: JobContext[Wanted]) -> None: ...

    def packed(ctx: JobContext[Packed]) -> None: ...

    def plain(ctx: JobContext[dict[str, Any]]) -> None: ...

    def bare(ctx): ...

    class Callable_:
        async def __call__(self, ctx: Any) -> None: ...

    kinds = [executor_of(function, "x", prefix="XX").Params for function in (typed, packed, plain, bare)]
    assert kinds == [Wanted, Packed, dict, dict]
    assert executor_of(Callable_(), "x", prefix="XX").is_async
    assert not executor_of(functools.partial(plain), "x", prefix="XX").is_async


def test_parameters_are_checked_when_a_job_is_created(world: World) -> None:
    manager, seen = world.manager(start=1), []

    @manager.executor("typed", prefix="TY")
    def typed(ctx: JobContext[Wanted]) -> None:
        seen.append(ctx.params)

    for bad in ({}, {"name": 5}, {"name": "a", "size": "b"}, ["a"]):
        with pytest.raises(InvalidRequest, match="parameters of a 'typed' job do not fit"):
            manager.create_job("typed", bad)
    manager.wait(manager.create_job("typed", {"name": "a"}).id, 10)
    manager.wait(manager.create_job("typed", Wanted("b", 4)).id, 10)
    assert seen == [Wanted("a", 3), Wanted("b", 4)]


def test_an_executor_is_found_by_its_type() -> None:
    registry = JobRegistry()
    executor = made()
    registry.register(executor)
    assert registry.get("x") is executor is registry.get_or_error("x") and registry.contains("x")
    assert registry.get("y") is None
    with pytest.raises(NotFound, match="no executor for job type 'y'; known are x"):
        registry.get_or_error("y")


def test_schemas_of_parameters_are_told() -> None:
    def typed(ctx: JobContext[Packed]) -> None: ...

    assert made().schema() == {"type": "object"}
    schema = executor_of(typed, "x", prefix="XX").schema()
    assert schema["$defs"]["Packed"]["required"] == ["name"]


def test_a_concurrency_key_names_parameters_that_must_be_there(world: World) -> None:
    manager = world.manager()
    manager.executor("x", prefix="XX", concurrency_key="user:{user}")(lambda ctx: None)
    assert manager.create_job("x", {"user": "anna"}).concurrency_key == "user:anna"
    with pytest.raises(InvalidRequest, match="names the parameter 'user', which the job lacks"):
        manager.create_job("x", {})
