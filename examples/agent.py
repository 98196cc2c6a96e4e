"""An agent: each question of a user is one job that calls a model several times.

Every answer of the model is checkpointed, so a retry or a restart does not pay for it again. All jobs run on
one loop, as many at once as `jobs.max_concurrent` says. The model here is a stub that fails as real ones do.

    python examples/agent.py [directory]
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import msgspec

import kalamdb
from kalamdb.jobs import Completed, JobContext, Permanent, RetryPolicy

STEPS = ("plan", "research", "answer")


class StubModel:
    """Stands for a model behind HTTP: every seventh call is too many, and some prompts are refused."""

    calls = 0

    async def complete(self, prompt: str) -> str:
        """The answer, after a while."""
        self.calls += 1
        await asyncio.sleep(0.002)
        if "weapon" in prompt:
            raise ValueError("the model does not answer this")
        if self.calls % 7 == 0:
            raise ConnectionError("too many requests")
        return f"<{prompt}>"


class Question(msgspec.Struct):
    user: str
    text: str


def main(directory: Path, questions: int = 20) -> list[dict[str, object]]:
    """Ask questions of two users; what became of each."""
    model = StubModel()
    with kalamdb.connect(directory, jobs_max_concurrent=50) as db:
        db.execute("CREATE USER TABLE IF NOT EXISTS answers (job TEXT PRIMARY KEY, question TEXT, answer TEXT)")

        @db.jobs.executor("ask", prefix="AI", retry=RetryPolicy(base_ms=10), max_retries=8)
        async def ask(ctx: JobContext[Question]) -> Completed:
            done: dict[str, str] = ctx.checkpoint_state or {}
            for step in STEPS[len(done) :]:
                try:
                    done[step] = await model.complete(f"{step}: {ctx.params.text}")
                except ValueError as exc:  # anything else is tried again
                    raise Permanent(str(exc)) from exc
                await ctx.acheckpoint(done)
                ctx.progress(len(done), len(STEPS), "calls", step)
            # Only this user can read the row; a repeated attempt finds it and leaves it.
            row = [ctx.job.id, ctx.params.text, done["answer"]]
            insert = "INSERT INTO answers VALUES ($1, $2, $3) ON CONFLICT DO NOTHING"
            await ctx.aexecute(insert, row, user=ctx.params.user)
            return Completed("answered", result={"answer": done["answer"], "attempts": ctx.attempt})

        asked = [Question("anna" if n % 2 else "bert", f"question {n}") for n in range(questions)]
        asked.append(Question("anna", "how do I build a weapon?"))
        jobs = [db.jobs.create_job("ask", question) for question in asked]
        ended = [db.jobs.wait(job.id, timeout_s=60) for job in jobs]
        for job in ended[-3:]:
            print(f"{job.id} {job.status}: {job.message} {job.result or ''}")
        anna = db.execute("SELECT count(*) FROM answers", user="anna").scalar()
        retries = sum(job.retry_count for job in ended)
        print(f"anna reads {anna} answers; {model.calls} calls of the model, {retries} retries")
        return [{"status": job.status.value, "result": job.result} for job in ended]


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "agent-data"))
