"""SQL text to statements: recognised by their first words, checked against the limits before any parsing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kalamdb.errors import InvalidRequest, LimitExceeded
from kalamdb.sql import statements as st
from kalamdb.sql.analyse import analyse_select, analyse_text, find_lookup, referenced_tables
from kalamdb.sql.backups import (
    parse_backup,
    parse_explain_restore,
    parse_prune,
    parse_restore,
    parse_show_backups,
    parse_verify,
)
from kalamdb.sql.cursor import Cursor
from kalamdb.sql.execute_as import check_inner, parse_execute_as
from kalamdb.sql.parse_jobs import parse_alter_queue, parse_call, parse_control, parse_job_id
from kalamdb.sql.parse_table import parse_alter_table, parse_create_table, parse_options
from kalamdb.sql.schedules import parse_schedule_statement
from kalamdb.sql.storages import parse_storage_check, parse_storage_statement
from kalamdb.sql.tokens import (
    SqlLimits,
    Token,
    TokenKind,
    check_shape,
    check_size,
    number_params,
    split,
    tokenize,
)
from kalamdb.sql.users import parse_user_statement
from kalamdb.types import TableKind

_KINDS = {"USER": TableKind.USER, "SHARED": TableKind.SHARED, "STREAM": TableKind.STREAM}
_USER_VERBS = frozenset(st.UserVerb)
_SCHEDULE_VERBS = frozenset(st.ScheduleVerb)
_STORAGE_VERBS = frozenset(st.StorageVerb) - {st.StorageVerb.CHECK}
_QUERY_WORDS = frozenset({"SELECT", "WITH", "VALUES", "(", "FROM", "TABLE"})


class NoStatement(InvalidRequest):
    """The SQL text holds no statement."""


def parse(text: str, limits: SqlLimits) -> st.Script:
    """All statements of a text. Raises InvalidRequest, LimitExceeded."""
    check_size(text, limits)
    tokens = tokenize(text)
    if any(token.text == "?" for token in tokens):
        text = number_params(text, tokens)
        tokens = tokenize(text)
    out: list[st.Statement] = []
    # Fewer tokens than any limit counts cannot be over one.
    shortest = min(limits.tokens_max, limits.depth_max, limits.set_operands_max)
    for part in split(tokens):
        if len(part) > shortest:
            check_shape(part, limits)
        try:
            out.append(_parse_one(text, part))
        except (RecursionError, MemoryError):
            raise LimitExceeded("the statement is nested too deeply; simplify it") from None
    if not out:
        raise NoStatement("No SQL statements provided")
    named = (token.text[1:] for token in tokens if token.kind is TokenKind.PARAM and token.text != "?")
    return st.Script(tuple(out), frozenset(int(name) if name.isdigit() else name for name in named))


def _parse_one(text: str, tokens: Sequence[Token]) -> st.Statement:
    cursor = Cursor(text, tokens)
    word = tokens[0].upper or tokens[0].text
    if word in _USER_VERBS and cursor.peek(word, "USER") and not cursor.peek(word, "USER", "TABLE"):
        return parse_user_statement(cursor)
    if word in _STORAGE_VERBS and cursor.peek(word, "STORAGE"):
        return parse_storage_statement(cursor)
    if word in _SCHEDULE_VERBS and cursor.peek(word, "SCHEDULE"):
        return parse_schedule_statement(cursor)
    handler = _HANDLERS.get(word)
    if handler is None:
        raise InvalidRequest(f"'{tokens[0].text[:60]}' does not begin a statement that KalamDB knows")
    return handler(cursor)


def _create(cursor: Cursor) -> st.Statement:
    cursor.expect("CREATE")
    or_replace = cursor.accept("OR", "REPLACE")
    if cursor.accept("VIEW"):
        view = cursor.table()
        cursor.expect("AS")
        if cursor.token is None:
            raise cursor.unexpected("a SELECT")
        query = cursor.text[cursor.token.start : cursor.tokens[-1].end]
        return st.CreateView(cursor.sql, view, query, analyse_text(query), or_replace)
    if or_replace:
        raise cursor.unexpected("VIEW")
    if cursor.accept("NAMESPACE"):
        if_not_exists = cursor.accept("IF", "NOT", "EXISTS")
        name = cursor.name("a namespace name")
        cursor.end()
        return st.CreateNamespace(cursor.sql, name, if_not_exists)
    kind = _table_kind(cursor)
    cursor.expect("TABLE")
    return parse_create_table(cursor, kind)


def _table_kind(cursor: Cursor) -> TableKind | None:
    for word, kind in _KINDS.items():
        if cursor.accept(word):
            return kind
    return None


def _drop(cursor: Cursor) -> st.Statement:
    cursor.expect("DROP")
    if cursor.accept("NAMESPACE"):
        if_exists = cursor.accept("IF", "EXISTS")
        name = cursor.name("a namespace name")
        cursor.accept("CASCADE")
        cursor.end()
        return st.DropNamespace(cursor.sql, name, if_exists)
    if cursor.accept("VIEW"):
        if_exists = cursor.accept("IF", "EXISTS")
        view = cursor.table()
        cursor.end()
        return st.DropView(cursor.sql, view, if_exists)
    kind = _table_kind(cursor)
    cursor.expect("TABLE")
    if_exists = cursor.accept("IF", "EXISTS")
    table = cursor.table()
    cursor.accept("CASCADE")
    cursor.end()
    return st.DropTable(cursor.sql, table, if_exists, kind)


def _alter(cursor: Cursor) -> st.Statement:
    cursor.expect("ALTER")
    if cursor.accept("NAMESPACE"):
        name = cursor.name("a namespace name")
        cursor.expect("SET", "OPTIONS")
        options = parse_options(cursor)
        cursor.end()
        return st.AlterNamespace(cursor.sql, name, {key.lower(): value for key, value in options.items()})
    if cursor.peek("QUEUE"):
        return parse_alter_queue(cursor)
    _table_kind(cursor)
    cursor.expect("TABLE")
    return parse_alter_table(cursor)


def _truncate(cursor: Cursor) -> st.Statement:
    cursor.expect("TRUNCATE")
    cursor.accept("TABLE")
    table = cursor.table()
    cursor.end()
    return st.TruncateTable(cursor.sql, table)


def _use(cursor: Cursor) -> st.Statement:
    cursor.expect("USE")
    cursor.accept("NAMESPACE")
    name = cursor.name("a namespace name")
    cursor.end()
    return st.UseNamespace(cursor.sql, name)


def _set(cursor: Cursor) -> st.Statement:
    cursor.expect("SET")
    if cursor.accept("NAMESPACE"):
        name = cursor.name("a namespace name")
        cursor.end()
        return st.UseNamespace(cursor.sql, name)
    parts = [cursor.name("an option")]
    while cursor.accept("."):
        parts.append(cursor.name("an option"))
    if not (cursor.accept("TO") or cursor.accept("=")):
        raise cursor.unexpected("TO")
    token = cursor.take()
    cursor.end()
    return st.SetOption(cursor.sql, ".".join(parts), token.string if token.kind is TokenKind.STRING else token.text)


def _execute(cursor: Cursor) -> st.Statement:
    user, tokens = parse_execute_as(cursor)
    inner = _parse_one(cursor.text, tokens)
    check_inner(inner)
    return st.ExecuteAs(cursor.sql, user, inner)


def _begin(cursor: Cursor) -> st.Statement:
    if cursor.accept("START"):
        cursor.expect("TRANSACTION")
    else:
        cursor.expect("BEGIN")
        cursor.accept("TRANSACTION") or cursor.accept("WORK")
    cursor.end()
    return st.TransactionControl(cursor.sql, st.TransactionVerb.BEGIN)


def _end(verb: st.TransactionVerb) -> Callable[[Cursor], st.Statement]:
    def handler(cursor: Cursor) -> st.Statement:
        cursor.take()
        cursor.accept("TRANSACTION") or cursor.accept("WORK")
        cursor.end()
        return st.TransactionControl(cursor.sql, verb)

    return handler


def _query(cursor: Cursor) -> st.Statement:
    return analyse_select(cursor.text, cursor.tokens)


def _explain(cursor: Cursor) -> st.Statement:
    cursor.expect("EXPLAIN")
    if cursor.accept("JOB"):
        return st.ExplainJob(cursor.sql, parse_job_id(cursor))
    if cursor.accept("RESTORE"):
        return parse_explain_restore(cursor)
    analyze = cursor.accept("ANALYZE")
    cursor.accept("VERBOSE")
    rest = cursor.tokens[cursor.at :]
    if not rest or (rest[0].upper or rest[0].text) not in _QUERY_WORDS:
        raise cursor.unexpected("a SELECT")
    return analyse_select(cursor.text, rest, explain=True, analyze=analyze)


def _insert(cursor: Cursor) -> st.Statement:
    cursor.expect("INSERT", "INTO")
    table = cursor.table()
    alias = cursor.name("an alias") if cursor.accept("AS") else table.name
    columns = (
        cursor.names() if cursor.peek("(") and not cursor.peek("(", "SELECT") and not cursor.peek("(", "WITH") else None
    )
    if columns is not None and len(set(columns)) != len(columns):
        raise InvalidRequest(f"the INSERT names a column twice: {', '.join(columns)}")
    rows: list[tuple[st.Expr, ...]] | None = None
    query: st.Select | None = None
    if cursor.accept("DEFAULT", "VALUES"):
        rows, columns = [()], ()
    elif cursor.accept("VALUES"):
        rows = _values(cursor)
    else:
        start = cursor.at
        if cursor.token is None or (cursor.token.upper or cursor.token.text) not in _QUERY_WORDS:
            raise cursor.unexpected("VALUES or SELECT")
        _skip_query(cursor)
        query = analyse_select(cursor.text, cursor.tokens[start : cursor.at])
    conflict = _conflict(cursor) if cursor.accept("ON", "CONFLICT") else None
    returning = _returning(cursor)
    cursor.end()
    return st.Insert(cursor.sql, table, alias, columns, rows, query, conflict, returning)


def _skip_query(cursor: Cursor) -> None:
    depth = 0
    while (token := cursor.token) is not None:
        if depth == 0 and (cursor.peek("ON", "CONFLICT") or token.upper == "RETURNING"):
            return
        depth += (token.text == "(") - (token.text == ")")
        cursor.at += 1


def _values(cursor: Cursor) -> list[tuple[st.Expr, ...]]:
    rows: list[tuple[st.Expr, ...]] = []
    while True:
        cursor.expect("(")
        row = [cursor.expression(",")]
        while cursor.accept(","):
            row.append(cursor.expression(","))
        cursor.expect(")")
        if rows and len(row) != len(rows[0]):
            raise InvalidRequest(f"row {len(rows) + 1} of VALUES has {len(row)} values, the first has {len(rows[0])}")
        rows.append(tuple(row))
        if not cursor.accept(","):
            return rows


def _conflict(cursor: Cursor) -> st.ConflictClause:
    columns = cursor.names() if cursor.peek("(") else ()
    cursor.expect("DO")
    if cursor.accept("NOTHING"):
        return st.ConflictClause(columns, st.ConflictAction.IGNORE)
    cursor.expect("UPDATE", "SET")
    assignments = _assignments(cursor, "WHERE", "RETURNING")
    where = cursor.until("RETURNING") if cursor.accept("WHERE") else None
    return st.ConflictClause(columns, st.ConflictAction.UPDATE, assignments, where)


def _assignments(cursor: Cursor, *stops: str) -> tuple[tuple[str, st.Expr], ...]:
    found: list[tuple[str, st.Expr]] = []
    while True:
        column = cursor.name("a column name")
        if cursor.accept("."):
            column = cursor.name("a column name")
        cursor.expect("=")
        found.append((column, cursor.expression(",", *stops)))
        if not cursor.accept(","):
            break
    names = [column for column, _ in found]
    if len(set(names)) != len(names):
        raise InvalidRequest(f"SET names a column twice: {', '.join(names)}")
    return tuple(found)


def _returning(cursor: Cursor) -> str | None:
    if not cursor.accept("RETURNING"):
        return None
    return cursor.until()


def _alias(cursor: Cursor, table: st.TableName, *stops: str) -> str:
    if cursor.accept("AS"):
        return cursor.name("an alias")
    token = cursor.token
    if token is not None and token.kind in (TokenKind.WORD, TokenKind.QUOTED) and token.upper not in stops:
        return cursor.name("an alias")
    return table.name


def _update(cursor: Cursor) -> st.Statement:
    cursor.expect("UPDATE")
    table = cursor.table()
    alias = _alias(cursor, table, "SET")
    cursor.expect("SET")
    assignments = _assignments(cursor, "WHERE", "RETURNING", "FROM")
    if cursor.peek("FROM"):
        raise InvalidRequest("UPDATE ... FROM is not supported; use a sub-query in SET or WHERE")
    where, key = _where(cursor, alias, "UPDATE")
    returning = _returning(cursor)
    cursor.end()
    texts = [where, *(expr.sql for _, expr in assignments if isinstance(expr, st.EngineExpr))]
    return st.Update(cursor.sql, table, alias, assignments, where, key, returning, _sub_tables(texts))


def _delete(cursor: Cursor) -> st.Statement:
    cursor.expect("DELETE", "FROM")
    table = cursor.table()
    alias = _alias(cursor, table, "WHERE", "RETURNING")
    where, key = _where(cursor, alias, "DELETE")
    returning = _returning(cursor)
    cursor.end()
    return st.Delete(cursor.sql, table, alias, where, key, returning, _sub_tables([where]))


def _where(cursor: Cursor, alias: str, verb: str) -> tuple[str, st.KeyMatch | None]:
    if not cursor.accept("WHERE"):
        raise InvalidRequest(f"{verb} needs a WHERE clause; write WHERE true to mean every row")
    start = cursor.at
    where = cursor.until("RETURNING")
    return where, find_lookup(cursor.span(start), alias)


def _sub_tables(texts: Sequence[str]) -> tuple[st.TableName, ...]:
    found: dict[st.TableName, None] = {}
    for text in texts:
        if "select" in text.lower():
            for name in referenced_tables(f"SELECT {text}"):
                found[name] = None
    return tuple(found)


def _show(cursor: Cursor) -> st.Statement:
    cursor.expect("SHOW")
    sql = cursor.sql
    if cursor.accept("NAMESPACES"):
        found = st.Show(sql, st.ShowKind.NAMESPACES)
    elif cursor.accept("TABLES"):
        namespace = None
        if cursor.accept("IN"):
            cursor.accept("NAMESPACE")
            namespace = cursor.name("a namespace name")
        found = st.Show(sql, st.ShowKind.TABLES, namespace=namespace)
    elif cursor.accept("COLUMNS"):
        if not cursor.accept("FROM"):
            cursor.expect("IN")
        found = st.Show(sql, st.ShowKind.COLUMNS, cursor.table())
    elif cursor.accept("ALL"):
        found = st.Show(sql, st.ShowKind.ALL)
    elif cursor.accept("STATS"):
        cursor.expect("FOR")
        cursor.accept("TABLE")
        found = st.Show(sql, st.ShowKind.STATS, cursor.table())
    elif cursor.accept("MANIFEST"):
        cursor.accept("CACHE")
        found = st.Show(sql, st.ShowKind.MANIFEST)
    elif cursor.accept("STORAGES"):
        found = st.Show(sql, st.ShowKind.STORAGES)
    elif cursor.accept("BACKUPS"):
        return parse_show_backups(cursor)
    elif cursor.accept("JOBS"):
        return _show_jobs(cursor)
    elif cursor.accept("JOB"):
        found = st.Show(sql, st.ShowKind.JOB, job_id=parse_job_id(cursor))
    else:
        raise cursor.unexpected("NAMESPACES, TABLES, COLUMNS, STATS, MANIFEST, STORAGES, BACKUPS, JOBS, JOB or ALL")
    cursor.end()
    return found


def _show_jobs(cursor: Cursor) -> st.Statement:
    """SHOW JOBS [WHERE ...] [ORDER BY ...] [LIMIT n]: rows of system.jobs, the newest first unless said otherwise."""
    where = f" WHERE {cursor.until('ORDER', 'LIMIT')}" if cursor.accept("WHERE") else ""
    order = f" ORDER BY {cursor.until('LIMIT')}" if cursor.accept("ORDER", "BY") else " ORDER BY created_at DESC"
    limit = f" LIMIT {cursor.until()}" if cursor.accept("LIMIT") else ""
    if cursor.token is not None:
        raise cursor.unexpected("WHERE, ORDER BY or LIMIT")
    return analyse_text(f"SELECT * FROM system.jobs{where}{order}{limit}")


def _describe(cursor: Cursor) -> st.Statement:
    cursor.take()
    plain = not cursor.accept("TABLE")
    table = cursor.table()
    kind = st.ShowKind.COLUMNS if plain else st.ShowKind.DESCRIBE
    if cursor.accept("HISTORY"):
        kind = st.ShowKind.HISTORY
    cursor.end()
    return st.Show(cursor.sql, kind, table)


def _storage(cursor: Cursor) -> st.Statement:
    cursor.accept("STORAGE")
    if cursor.accept("CHECK"):
        return parse_storage_check(cursor)
    operation = "flush" if cursor.accept("FLUSH") else "compact" if cursor.accept("COMPACT") else ""
    if not operation:
        raise cursor.unexpected("FLUSH, COMPACT or CHECK")
    if cursor.accept("ALL"):
        namespace = None
        if cursor.accept("IN"):
            cursor.accept("NAMESPACE")
            namespace = cursor.name("a namespace name")
        cursor.end()
        return st.Maintain(cursor.sql, operation, None, namespace)
    cursor.expect("TABLE")
    table = cursor.table()
    cursor.end()
    return st.Maintain(cursor.sql, operation, table, None)


def _subscribe(cursor: Cursor) -> st.Statement:
    """SUBSCRIBE TO ns.t [WHERE ...] [OPTIONS (...)], or TO SELECT ...; what may be subscribed is checked later."""
    cursor.expect("SUBSCRIBE", "TO")
    if cursor.peek("SELECT"):
        query = cursor.until("OPTIONS")
    else:
        start = cursor.at
        cursor.table()
        if cursor.accept("WHERE"):
            cursor.until("OPTIONS")
        query = f"SELECT * FROM {cursor.text[cursor.tokens[start].start : cursor.tokens[cursor.at - 1].end]}"
    options = parse_options(cursor) if cursor.accept("OPTIONS") else {}
    cursor.end()
    return st.SubscribeTo(cursor.sql, query, options)


def _kill(cursor: Cursor) -> st.Statement:
    if not cursor.peek("KILL", "LIVE"):
        return parse_control(st.JobVerb.CANCEL)(cursor)
    cursor.expect("KILL", "LIVE", "QUERY")
    live_id = cursor.string("the live_id of a subscription, in quotes")
    cursor.end()
    return st.KillLiveQuery(cursor.sql, live_id)


_HANDLERS: dict[str, Callable[[Cursor], st.Statement]] = {
    "CREATE": _create,
    "DROP": _drop,
    "ALTER": _alter,
    "TRUNCATE": _truncate,
    "USE": _use,
    "SET": _set,
    "BEGIN": _begin,
    "START": _begin,
    "COMMIT": _end(st.TransactionVerb.COMMIT),
    "END": _end(st.TransactionVerb.COMMIT),
    "ROLLBACK": _end(st.TransactionVerb.ROLLBACK),
    "SELECT": _query,
    "WITH": _query,
    "VALUES": _query,
    "(": _query,
    "EXPLAIN": _explain,
    "EXECUTE": _execute,
    "INSERT": _insert,
    "UPDATE": _update,
    "DELETE": _delete,
    "SHOW": _show,
    "DESCRIBE": _describe,
    "DESC": _describe,
    "STORAGE": _storage,
    "FLUSH": _storage,
    "COMPACT": _storage,
    "KILL": _kill,
    "SUBSCRIBE": _subscribe,
    "CANCEL": parse_control(st.JobVerb.CANCEL),
    "PAUSE": parse_control(st.JobVerb.PAUSE),
    "RESUME": parse_control(st.JobVerb.RESUME),
    "RETRY": parse_control(st.JobVerb.RETRY),
    "CALL": parse_call,
    "BACKUP": parse_backup,
    "RESTORE": parse_restore,
    "VERIFY": parse_verify,
    "PRUNE": parse_prune,
}
