"""A small MCP server on stdio, for tests: what it does wrong is said on its command line.

Only the standard library, so that it starts at once (``python -I -S``).

    hang          never answers, not even the first message
    ignore-eof    goes on when its input has ended, and when it is told to (SIGTERM)
    pid FILE      appends its pid to FILE
    one NAME      has one tool, of this name, and no other
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

PATH = Path(__file__)


def _tool(name: str, **hints: bool) -> dict[str, Any]:
    schema = {"type": "object", "properties": {"text": {"type": "string"}}}
    told = {"name": name, "description": f"Does {name}.", "inputSchema": schema}
    return {**told, "annotations": hints} if hints else told


TOOLS = [
    _tool("echo"),
    _tool("look", readOnlyHint=True),
    _tool("liar", readOnlyHint=True, destructiveHint=True),
    _tool("destroy", destructiveHint=True),
    _tool("environment", readOnlyHint=True),
    _tool("where", readOnlyHint=True),
    _tool("big", readOnlyHint=True),
    _tool("die", readOnlyHint=True),
    _tool("fail", readOnlyHint=True),
    _tool("sleep", readOnlyHint=True),
]


def do(name: str, text: str) -> str:
    if name == "environment":
        return json.dumps(dict(os.environ))
    if name == "where":
        return f"{os.getcwd()} {os.getpid()}"
    if name == "big":
        return "x" * int(text)
    if name == "die":
        os._exit(1)
    if name == "fail":
        raise ValueError(text)
    if name == "sleep":
        time.sleep(float(text))
    return f"{name}: {text}"


def answer(method: str, params: dict[str, Any], tools: list[dict[str, Any]]) -> dict[str, Any]:
    if method == "initialize":
        return {
            "protocolVersion": params["protocolVersion"],
            "capabilities": {"tools": {}, "resources": {}, "prompts": {}},
            "serverInfo": {"name": "test", "version": "1"},
            "instructions": "PLANTED BY THE SERVER",
        }
    if method == "tools/list":
        return {"tools": tools}
    if method == "tools/call":
        try:
            text = do(params["name"], str(params.get("arguments", {}).get("text", "")))
        except ValueError as exc:
            return {"content": [{"type": "text", "text": str(exc)}], "isError": True}
        return {"content": [{"type": "text", "text": text}]}
    return {}


def main(words: list[str]) -> None:
    tools = TOOLS
    if "pid" in words:
        with open(words[words.index("pid") + 1], "a") as file:
            file.write(f"{os.getpid()}\n")
    if "one" in words:
        tools = [_tool(words[words.index("one") + 1])]
    if "ignore-eof" in words:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while "hang" in words and sys.stdin.readline():
        pass
    for line in sys.stdin:
        message = json.loads(line)
        if "id" in message:
            result = answer(message["method"], message.get("params", {}), tools)
            print(json.dumps({"jsonrpc": "2.0", "id": message["id"], "result": result}), flush=True)
    while "ignore-eof" in words:
        time.sleep(60)


if __name__ == "__main__":
    main(sys.argv[1:])
