"""CREATE, ALTER, DROP and RUN SCHEDULE: parsing and running them."""

from __future__ import annotations

import re
from typing import Any, assert_never

import msgspec

from kalamdb.errors import IdempotencyConflict, InvalidRequest, NotFound
from kalamdb.jobs.schedules import JobSchedules, Misfire, Schedule
from kalamdb.result import Result
from kalamdb.sql import statements as st
from kalamdb.sql.caller import Caller
from kalamdb.sql.cursor import Cursor

_UNITS_S = {"SECOND": 1, "MINUTE": 60, "HOUR": 3600, "DAY": 86_400, "WEEK": 7 * 86_400}
_SPAN = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*\Z")
_STOPS = ("WITH", "PARAMETERS", "CRON", "EVERY", "TIME", "MISFIRE", "QUEUE", "PRIORITY")


def parse_schedule_statement(cursor: Cursor) -> st.ScheduleStatement:
    """A statement about a schedule. Raises InvalidRequest."""
    verb = st.ScheduleVerb(cursor.take().upper)
    cursor.expect("SCHEDULE")
    guard = False
    if verb is st.ScheduleVerb.CREATE:
        guard = cursor.accept("IF", "NOT", "EXISTS")
    elif verb is st.ScheduleVerb.DROP:
        guard = cursor.accept("IF", "EXISTS")
    name = cursor.name_or_string("a schedule name")
    changes: dict[str, st.Expr] = {}
    match verb:
        case st.ScheduleVerb.CREATE:
            cursor.expect("FOR", "JOB")
            changes["job_type"] = cursor.name_or_string("a job type")
            while cursor.token is not None:
                _clause(cursor, changes)
        case st.ScheduleVerb.ALTER:
            if cursor.accept("PAUSE"):
                changes["paused"] = True
            elif cursor.accept("RESUME"):
                changes["paused"] = False
            else:
                while cursor.token is not None:
                    cursor.expect("SET")
                    _clause(cursor, changes)
                    cursor.accept(",")
        case st.ScheduleVerb.DROP | st.ScheduleVerb.RUN:
            pass
        case _:
            assert_never(verb)
    cursor.end()
    return st.ScheduleStatement(cursor.sql, verb, name, changes, guard)


def _clause(cursor: Cursor, changes: dict[str, st.Expr]) -> None:
    before = len(changes)
    if cursor.accept("WITH", "PARAMETERS") or cursor.accept("PARAMETERS"):
        changes["parameters"] = cursor.expression(*_STOPS, "SET", ",")
    elif cursor.accept("CRON"):
        changes["cron"] = cursor.string("a cron expression")
    elif cursor.accept("EVERY"):
        changes["interval_s"] = _span(cursor)
    elif cursor.accept("TIME", "ZONE"):
        changes["time_zone"] = cursor.string("a time zone")
    elif cursor.accept("MISFIRE"):
        word = cursor.name("SKIP, ONCE or ALL").lower()
        try:
            changes["misfire"] = Misfire(word)
        except ValueError:
            raise InvalidRequest(f"MISFIRE {word} is not one of {', '.join(Misfire)}") from None
        if cursor.accept("MAX"):
            changes["catch_up_max"] = cursor.whole("a number of times")
            before += 1
    elif cursor.accept("QUEUE"):
        changes["queue"] = cursor.name_or_string("a queue name")
    elif cursor.accept("PRIORITY"):
        changes["priority"] = cursor.whole("a priority")
    else:
        raise cursor.unexpected("CRON, EVERY, PARAMETERS, TIME ZONE, MISFIRE, QUEUE or PRIORITY")
    if len(changes) == before:
        raise InvalidRequest(f"the statement states the same clause twice: {cursor.sql[:80]}")


def _span(cursor: Cursor) -> float:
    """'5 minutes', 300 SECONDS, 1 HOUR: seconds."""
    token = cursor.take()
    text = token.string if token.text[:1] == "'" else token.text
    if text == token.text and cursor.token is not None and cursor.token.upper.rstrip("S") in _UNITS_S:
        text += " " + cursor.take().text
    match = _SPAN.match(text)
    unit = "SECOND" if match is None or not match.group(2) else match.group(2).upper().rstrip("S")
    if match is None or unit not in _UNITS_S:
        raise InvalidRequest(f"EVERY '{text}' is not a span such as '90 seconds', '5 minutes', '1 hour' or '1 day'")
    return float(match.group(1)) * _UNITS_S[unit]


class ScheduleAdmin:
    """Runs statements about schedules."""

    def __init__(self, schedules: JobSchedules) -> None:
        self._schedules = schedules

    def run(self, statement: st.ScheduleStatement, caller: Caller) -> Result:
        """Run one statement; the role of the caller was checked."""
        schedules, name = self._schedules, statement.name
        changes = {field: caller.bind(value) for field, value in statement.changes.items()}
        if "parameters" in changes:
            changes["parameters"] = _parameters(changes["parameters"])
        match statement.verb:
            case st.ScheduleVerb.CREATE:
                if statement.guard and any(one.name == name for one in schedules.all()):
                    return Result(message=f"Schedule '{name}' already exists")
                created = schedules.create(Schedule(name=name, created_by=caller.user, **changes))
                return Result(message=f"Schedule '{name}' created for job type '{created.job_type}'")
            case st.ScheduleVerb.ALTER:
                schedules.alter(name, **changes)
                return Result(message=f"Schedule '{name}' altered")
            case st.ScheduleVerb.DROP:
                try:
                    schedules.drop(name)
                except NotFound:
                    if not statement.guard:
                        raise
                    return Result(message=f"Schedule '{name}' does not exist")
                return Result(message=f"Schedule '{name}' dropped")
            case st.ScheduleVerb.RUN:
                try:
                    job_id = schedules.run(name, by=caller.user)
                except IdempotencyConflict as conflict:
                    job = conflict.job
                    return Result(message=f"Schedule '{name}' skipped: job '{job.job_id}' is already {job.status}")
                return Result(message=f"Schedule '{name}' runs now. Job ID: {job_id}")
            case _:
                assert_never(statement.verb)


def _parameters(value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    try:
        return msgspec.json.decode(value if isinstance(value, str) else "", type=dict[str, Any])
    except msgspec.DecodeError:
        raise InvalidRequest('PARAMETERS must be a JSON object, as in PARAMETERS \'{"table_id": "app.t"}\'') from None
