"""A FastAPI application over an embedded database: one session per request, bound to who asks.

    pip install fastapi uvicorn
    uvicorn examples.fastapi_app:app

With `share=True` several workers may use one directory: gunicorn -w 4 -k uvicorn.workers.UvicornWorker ...
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Depends, FastAPI, Header, HTTPException, Request
from pydantic import BaseModel

import kalamdb
from kalamdb.async_database import AsyncSession


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with await kalamdb.aconnect(os.environ.get("NOTES_DATA", "notes-data")) as db:
        await db.execute("CREATE NAMESPACE IF NOT EXISTS app")
        await db.execute(
            "CREATE USER TABLE IF NOT EXISTS app.notes "
            "(id BIGINT DEFAULT SNOWFLAKE_ID() PRIMARY KEY, text TEXT NOT NULL, written TIMESTAMP DEFAULT NOW())"
        )
        app.state.db = db
        yield


app = FastAPI(lifespan=lifespan)


def session(request: Request, x_user: Annotated[str, Header()]) -> AsyncSession:
    """The database as the caller sees it. A real application takes the user from its own log-in."""
    return request.app.state.db.session(user=x_user, role="user", namespace="app")


Session = Annotated[AsyncSession, Depends(session)]


class NewNote(BaseModel):
    text: str


@app.post("/notes", status_code=201)
async def write(note: NewNote, db: Session) -> dict[str, int]:
    written = await db.execute("INSERT INTO notes (text) VALUES ($1) RETURNING id", [note.text])
    return {"id": written.scalar()}


@app.get("/notes")
async def read(db: Session) -> list[dict[str, object]]:
    return (await db.execute("SELECT id, text, written FROM notes ORDER BY id")).dicts()


@app.delete("/notes/{note_id}", status_code=204)
async def delete(note_id: int, db: Session) -> None:
    if (await db.execute("DELETE FROM notes WHERE id = $1", [note_id])).row_count == 0:
        raise HTTPException(404, f"there is no note {note_id}")
