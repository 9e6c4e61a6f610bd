"""One run, one Markdown table: ``python -m bench.run [--quick] [--json FILE] [ROW …]``.

The floor is `agent.chat()` called directly, in a process of its own; the server is real Gunicorn.
Both talk to the same scripted model, are measured in the same run, one after the other in turn.
"""

from __future__ import annotations

import argparse
import collections.abc as cabc
import dataclasses
import json
import os
import platform
import resource
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

from bench.child import Child
from bench.rows import MEASURES
from bench.rows import Bench
from bench.rows import Row

#: What a measured process may know of this shell's environment.
PASSED = ("PATH", "LANG", "LC_ALL", "VIRTUAL_ENV", "TMPDIR")


def main() -> int:
    arguments = _arguments()
    _raise_file_limit()
    with tempfile.TemporaryDirectory(prefix="agentao-bench-") as folder:
        rows = _measure(Path(folder), arguments.rows or list(MEASURES), arguments.quick)
    print(_table(rows))
    if arguments.json:
        report = {"about": _about(), "rows": [dataclasses.asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(report, indent=1, ensure_ascii=False))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("rows", nargs="*", help=f"of {', '.join(MEASURES)}; default all")
    parser.add_argument("--quick", action="store_true", help="less of everything, under 60 s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all samples, too")
    arguments = parser.parse_args()
    if unknown := set(arguments.rows) - set(MEASURES):
        parser.error(f"no such row: {', '.join(sorted(unknown))}")
    return arguments


def _raise_file_limit() -> None:
    """As many descriptors as allowed: a thousand streams need them at both ends."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _measure(folder: Path, names: cabc.Sequence[str], quick: bool) -> list[Row]:
    env = {name: os.environ[name] for name in PASSED if name in os.environ}
    env |= {"HOME": str(folder), "BENCH_ROOT": str(folder)}
    rows: list[Row] = []
    with Child("bench.model", env, folder / "model.log") as model:
        env |= {
            "OPENAI_API_KEY": "sk-bench",
            "OPENAI_BASE_URL": model.ask("base_url"),
            "OPENAI_MODEL": "scripted",
        }
        with Child("bench.floor", env, folder / "floor.log") as floor:
            bench = Bench(env, folder, model, floor, quick)
            for name in names:
                start = time.monotonic()
                rows += MEASURES[name](bench)
                model.ask("forget")
                print(f"{name}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    return rows


def _table(rows: cabc.Sequence[Row]) -> str:
    lines = [_about(), "", "| what | floor | agentao-web | ratio | hold |", "|---|---|---|---|---|"]
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        hold = f"**MISSED** {row.hold}" if row.held is False else row.hold
        lines.append(f"| {row.what} | {row.floor} | {row.ours} | {ratio} | {hold} |")
    return "\n".join(lines)


def _about() -> str:
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("agentao", "gunicorn"))
    load = os.getloadavg()[0]
    return (
        f"{time.strftime('%Y-%m-%d %H:%M')}, {os.cpu_count()} cores, CPython "
        f"{platform.python_version()}, {versions}, load {load:.1f}"
    )


if __name__ == "__main__":
    sys.exit(main())
