"""Statements about jobs and queues."""

from __future__ import annotations

from collections.abc import Callable

from kalamdb.errors import InvalidRequest
from kalamdb.sql import statements as st
from kalamdb.sql.cursor import Cursor
from kalamdb.sql.tokens import TokenKind


def parse_job_id(cursor: Cursor) -> str:
    """The rest of the statement: an id as a string, in double quotes, or bare."""
    token = cursor.token
    if token is None:
        raise cursor.unexpected("a job id")
    if token.kind is TokenKind.STRING:
        job_id = cursor.string("a job id")
    else:
        job_id = cursor.text[token.start : cursor.tokens[-1].end].strip('"')
        cursor.at = len(cursor.tokens)
    cursor.end()
    return job_id


def parse_control(verb: st.JobVerb) -> Callable[[Cursor], st.Statement]:
    """CANCEL | KILL | PAUSE | RESUME | RETRY JOB id, PAUSE | RESUME QUEUE name, CANCEL | KILL QUERY id."""

    def handler(cursor: Cursor) -> st.Statement:
        cursor.take()
        if verb in (st.JobVerb.PAUSE, st.JobVerb.RESUME) and cursor.accept("QUEUE"):
            queue = cursor.name_or_string("a queue name")
            cursor.end()
            return st.ControlQueue(cursor.sql, queue, verb is st.JobVerb.PAUSE)
        if verb is st.JobVerb.CANCEL and cursor.accept("QUERY"):
            query_id = cursor.name_or_string("a query id")
            cursor.end()
            return st.KillQuery(cursor.sql, query_id)
        cursor.expect("JOB")
        return st.ControlJob(cursor.sql, verb, parse_job_id(cursor))

    return handler


def parse_alter_queue(cursor: Cursor) -> st.Statement:
    """ALTER QUEUE name SET LIMIT n | DROP LIMIT."""
    cursor.expect("QUEUE")
    queue = cursor.name_or_string("a queue name")
    if cursor.accept("DROP", "LIMIT"):
        limit = None
    else:
        cursor.expect("SET", "LIMIT")
        limit = cursor.whole("a number of jobs")
    cursor.end()
    return st.LimitQueue(cursor.sql, queue, limit)


def parse_call(cursor: Cursor) -> st.Statement:
    """CALL create_job(type [, parameters])."""
    cursor.expect("CALL")
    name = cursor.name("a procedure name")
    if name.lower() != "create_job":
        raise InvalidRequest(f"there is no procedure '{name}'; create_job is the only one")
    cursor.expect("(")
    job_type = cursor.expression(",")
    params = cursor.expression(",") if cursor.accept(",") else None
    cursor.expect(")")
    cursor.end()
    return st.CreateJob(cursor.sql, job_type, params)
