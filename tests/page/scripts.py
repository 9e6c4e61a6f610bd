"""What the scripted agents of the page's tests say and do."""

from __future__ import annotations

import re

from agentao_web.testing import Step
from agentao_web.testing import ask
from agentao_web.testing import ask_user
from agentao_web.testing import emit
from agentao_web.testing import say

_MARKDOWN = """\
# A heading

Some **bold** and *slanted* text with `code` and a [link](https://example.com/a).

- one
- two

| Item | Left |
| --- | ---: |
| bolt | 7 |

```python
def greet(name):
    return f"Hello {name}"
```

> quoted

The end.
"""


def _pieces(text: str) -> list[str]:
    """Chunks that cut where a model's tokens would, marks of Markdown too."""
    return re.findall(r".{1,7}", text, re.DOTALL)


MARKDOWN = _pieces(_MARKDOWN)

#: Each would set this if it ran.
SENTINEL = "window.__pwned = (window.__pwned || 0) + 1"
FOREIGN = "https://elsewhere.example"
PAYLOADS = [
    f"<script>{SENTINEL}</script>",
    f'<img src=x onerror="{SENTINEL}">',
    f'<svg onload="{SENTINEL}"><a href="javascript:{SENTINEL}"><text>x</text></a></svg>',
    f'<svg><style><img src=x onerror="{SENTINEL}"></style></svg>',
    "<math><mtext><table><mglyph><style><!--</style>"
    f'<img title="--&gt;&lt;img src=1 onerror={SENTINEL}&gt;">',
    f'<noscript><p title="</noscript><img src=x onerror={SENTINEL}>"></noscript>',
    f'<iframe srcdoc="<script>parent.{SENTINEL}</script>"></iframe>',
    f'<iframe src="{FOREIGN}/frame"></iframe>',
    f'<form action="{FOREIGN}/form"><input name="body"><button>go</button></form>',
    f'<base href="{FOREIGN}/">',
    f'<meta http-equiv="refresh" content="0;url={FOREIGN}/refresh">',
    f'<link rel="stylesheet" href="{FOREIGN}/style.css">',
    f"<style>@import '{FOREIGN}/import.css'; body {{ background: url({FOREIGN}/bg.png) }}</style>",
    f'<img src="{FOREIGN}/pixel.png"><video poster="{FOREIGN}/poster.png"></video>',
    '<a id="turns" name="body">clobbered</a><form id="composer"><input id="message"></form>',
    '<img name="getElementById"><img name="implementation">',
    f"[click](javascript:{SENTINEL.replace(' ', '')})",
    "[click](data:text/html;base64,PHNjcmlwdD4=)",
    f"[click](JaVaScRiPt&colon;{SENTINEL.replace(' ', '')})",
    f"[click](vbscript:x) <javascript:{SENTINEL.replace(' ', '')}>",
    f"![pixel]({FOREIGN}/pixel.png) ![x](//elsewhere.example/p.png)",
    "![svg](data:image/svg+xml;base64,PHN2Zz4=)",
    "[here](page/main.js) [hash](#other) [other](//elsewhere.example/x)",
    f"[ref]: javascript:{SENTINEL.replace(' ', '')}\n\n[ref]",
    f'```"><script>{SENTINEL}</script>\n<script>{SENTINEL}</script>\n```',
    f"```html\n<img src=x onerror='{SENTINEL}'>\n```",
    f"| <img src=x onerror={SENTINEL}> |\n| --- |\n| <script>{SENTINEL}</script> |",
    "\u202egnp.exe \u0000 \ufeff <scr\u0000ipt>",
]


def hostile(hold: Step) -> list[Step]:
    """Everything a model or a tool may say, in every place where the page shows it."""
    bad = PAYLOADS[1]
    call = {"tool": bad, "call_id": bad}
    return [
        say(*_pieces("\n\n".join(PAYLOADS))),
        emit("thinking", text=bad),
        emit("tool_start", args={bad: bad, "path": f'"><script>{SENTINEL}</script>.txt'}, **call),
        emit("tool_output", chunk="\n".join(PAYLOADS), **call),
        emit("tool_complete", status="ok", duration_ms=1, **call),
        emit("tool_result", content="\n".join(PAYLOADS), **call),
        emit("agent_start", agent=bad, task=bad, max_turns=1, child_task_id="1"),
        ask_user(bad, bad, PAYLOADS[0], header=bad),
        ask(bad, **{"file_path": bad, "content": "\n".join(PAYLOADS)}),
        hold,
        say(*PAYLOADS),
    ]


PICTURED = {"Is the launch checklist complete? Add what is missing."}
_SEEN = """\
I read **launch.md**. Two of the five steps have *no owner* yet:

| Step | Owner | Due |
| --- | --- | ---: |
| Write the announcement | nobody | Thu |
| Raise the rate limits | nobody | Fri |

The limits are one line in `deploy/limits.toml`:

```toml
[api]
requests_per_minute = 600   # was 120
```

Shall I note both as open?
"""


#: What shows as something else than it is: a direction turned, nothing at all, far below.
UNSEEN = "pay\u202eetov\u200b" + "\n" * 60 + "rm -rf"


def unseen(hold: Step) -> list[Step]:
    """Questions that hide a part of themselves."""
    return [
        ask_user(UNSEEN, "yes\u2066", header="a\u202eb"),
        ask(
            "pay\u202e",
            **{
                "to\u2066": UNSEEN,
                "far": "x" + " " * 200 + "y",
                "family": "\U0001f469\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f 日本",
            },
        ),
        say("done"),
    ]


def launch(hold: Step) -> list[Step]:
    """A turn worth a picture."""
    call = {"tool": "read_file", "call_id": "call-1"}
    return [
        emit("tool_start", args={"file_path": "launch.md"}, **call),
        emit("tool_complete", status="ok", duration_ms=12, **call),
        emit("tool_result", content="# Launch\n\n1. Freeze the release branch (Mia, Thu)", **call),
        say(*_pieces(_SEEN)),
        hold,
        ask("write_file", file_path="launch.md", content="Open: announcement, rate limits"),
        say("Done: **launch.md** now lists both steps as open."),
    ]
