"""A server in a process of its own that kills itself at a named place (see test_kills.py)."""

import importlib.util
import os
import signal
import sys
import traceback
from pathlib import Path

spec = importlib.util.spec_from_file_location("kills", Path(__file__).with_name("test_kills.py"))
kills = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kills)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def say(*words: object) -> None:
    print(*words, flush=True)


class Watched:
    """A connection that asks `before` ahead of every statement, and `after` when it is done."""

    def __init__(self, db, before=None, after=None):
        self.db, self.before, self.after = db, before, after

    def execute(self, statement, *values):
        if self.before is not None:
            self.before(statement, *values)
        found = self.db.execute(statement, *values)
        if self.after is not None:
            self.after(statement, *values)
        return found

    def __getattr__(self, name):
        return getattr(self.db, name)


def watch(server, before=None, after=None):
    server._store._db = Watched(server._store._db, before, after)


def at(text, *kinds):
    """Kill once a statement that holds `text`, with these values, is reached."""

    def reached(statement, *values):
        if text in statement and all(kind in str(values) for kind in kinds):
            die()

    return reached


def main(path, what, *rest):
    if what == "random":
        return run(path, *map(int, rest))
    server = kills.PosteriorServer(path)
    new = kills.site("new", number=2.0)
    if what == "after-commit":
        watch(server, after=at("COMMIT"))
    elif what == "inside":
        (where,) = rest
        if where == "BEGIN":
            watch(server, after=at("BEGIN"))
        elif where == "COMMIT":
            watch(server, before=at("COMMIT"))
        else:
            watch(server, after=at({"incarnation": "INSERT INTO incarnations"}.get(where, "INTO sites")))
    elif what == "epoch":
        server.register_basis(kills.LATER)
        say("registered")
        new = kills.site("earlier", number=4.0, basis=kills.LATER)
        (when,) = rest
        watch(
            server,
            **{
                "insert": {"after": at("INTO sites")},
                "closing": {"after": at("UPDATE bases", "closed")},
                "closed": {"after": at("DELETE FROM sites")},
                "COMMIT": {"before": at("COMMIT")},
                "committed": {"after": at("COMMIT")},
            }[when],
        )
    say("putting")
    server.put(new)
    say("acknowledged")


def forks():
    """For every line `path what ...`: a process that does it, and how it ended."""
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            try:
                main(*line.split())
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        _, status = os.waitpid(pid, 0)
        say("ended", os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))


def run(path, seed, statements):
    import random

    random.seed(seed)
    server = kills.PosteriorServer(path)
    left = [statements]

    def count(*_):
        left[0] -= 1
        if left[0] < 0:
            die()

    versions = {s["site_id"]: s["version"] for s in server.status()["bases"][0]["sites"]}
    incarnations = {}
    watch(server, before=count) if seed % 2 else watch(server, after=count)
    while True:
        name = f"s{random.randrange(6)}"
        if name in versions and random.random() < 0.15:
            say("try-removal", name, 0, 0)
            server.remove(name)
            say("ack-removal", name, 0, 0)
            del versions[name]
            continue
        if name not in incarnations or name not in versions:
            incarnations[name] = server.join(name)
        version, number = versions.get(name, -1) + 1, float(random.randrange(1, 64))
        new = kills.replace(kills.site(name, version, number), incarnation=incarnations[name])
        say("try-put", name, version, number)
        server.put(new)
        say("ack-put", name, version, number)
        versions[name] = version


if __name__ == "__main__":
    forks()
