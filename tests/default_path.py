"""What a first user does, in a process of its own: the demo answers, asks, and writes a file.

Run with the name of a system to be taken for that one: every name that Python lacks there is
deleted before anything of ours is imported.
"""

from __future__ import annotations

import json
import os
import pkgutil
import sys
import typing as t

#: What Python has on Linux and not on macOS: the "Availability" lines of its library's reference.
LINUX_ONLY = {
    "os": (
        "O_PATH O_TMPFILE O_DIRECT O_LARGEFILE O_NOATIME O_RSYNC pipe2 pidfd_open memfd_create "
        "eventfd eventfd_read eventfd_write posix_fallocate posix_fadvise fdatasync sendfile "
        "sched_getaffinity sched_setaffinity sched_getscheduler sched_setscheduler sched_getparam "
        "getxattr setxattr listxattr removexattr copy_file_range splice preadv2 unshare setns "
        "getresuid getresgid setresuid setresgid getrandom P_PIDFD timerfd_create "
        "RWF_NOWAIT RWF_HIPRI RWF_SYNC RWF_DSYNC"
    ),
    "select": "epoll POLLRDHUP",
    "socket": (
        "AF_NETLINK AF_PACKET AF_VSOCK AF_ALG SO_PEERCRED SO_PEERSEC SO_BINDTODEVICE SO_DOMAIN "
        "SO_PROTOCOL SO_INCOMING_CPU SO_PRIORITY SO_PASSCRED SO_MARK TCP_USER_TIMEOUT TCP_INFO "
        "TCP_QUICKACK TCP_CORK TCP_DEFER_ACCEPT TCP_KEEPIDLE SOCK_CLOEXEC SOCK_NONBLOCK "
        "MSG_CMSG_CLOEXEC MSG_ERRQUEUE MSG_MORE MSG_CONFIRM"
    ),
    "signal": "SIGPWR SIGSTKFLT SIGPOLL SIGRTMIN SIGRTMAX pidfd_send_signal sigtimedwait "
    "sigwaitinfo SIGCLD",
    "resource": "prlimit RLIMIT_SIGPENDING RLIMIT_MSGQUEUE RLIMIT_NICE RLIMIT_RTPRIO "
    "RLIMIT_RTTIME RUSAGE_THREAD RLIMIT_OFILE",
    "fcntl": "F_ADD_SEALS F_GET_SEALS F_SETPIPE_SZ F_GETPIPE_SZ F_OFD_SETLK F_NOTIFY F_SETLEASE",
    "time": "CLOCK_BOOTTIME CLOCK_TAI pthread_getcpuclockid",
}


def become(system: str) -> None:
    """Delete what is missing there, and forbid /proc, which is missing too."""
    # Python's own library has parts for each system, and chooses when it is imported.
    for name in ("asyncio", "subprocess", "sysconfig", "urllib.request", "uuid", "zoneinfo"):
        __import__(name)
    sys.platform = system
    for module, names in LINUX_ONLY.items():
        loaded = __import__(module)
        for name in [n for n in dir(loaded) if n in names.split() or n.startswith("EPOLL")]:
            delattr(loaded, name)

    def no_proc(event: str, args: tuple[t.Any, ...]) -> None:
        if event in ("open", "os.listdir") and str(args[0]).startswith(("/proc/", "/sys/")):
            raise FileNotFoundError(f"there is no {args[0]} on {system}")

    sys.addaudithook(no_proc)


def every_error_says_something() -> None:
    from agentao_web.core import errors

    for cls in errors.WebError.__subclasses__():
        made: t.Any = cls(["GET"]) if cls is errors.MethodNotAllowed else cls()  # type: ignore[arg-type]
        if not made.message or not str(made):
            raise SystemExit(f"{cls.__name__} has no message")


def shell_needs(kind: str) -> str:
    """What it says at the start."""
    import agentao_web

    try:
        agentao_web.create_app({**os.environ, "AGENTAO_SHELL": kind})
    except RuntimeError as exc:
        return str(exc)
    raise SystemExit(f"AGENTAO_SHELL={kind} starts")


def main() -> None:
    if sys.argv[2:]:
        become(sys.argv[2])
    import agentao_web

    for found in pkgutil.walk_packages(agentao_web.__path__, "agentao_web."):
        __import__(found.name)
    every_error_says_something()
    os.environ["AGENTAO_DEMO"] = "1"
    os.environ["AGENTAO_ROOT"] = sys.argv[1]
    os.environ["AGENTAO_METRICS_TOKEN"] = "a-token-for-the-metrics"
    app = agentao_web.create_app()
    client = app.test_client()
    given = {"Authorization": "Bearer dev"}
    told: list[t.Any] = []
    for message in ("say hello", "write a.txt with milk", "read a.txt"):
        body = {"message": message}
        answer = client.post("/chat/s", json=body, headers={**given, "Accept": "application/json"})
        started = answer.get_json()
        while True:
            url = f"/chat/s/events?wait=20&after={started['cursor']}"
            page = client.get(url, headers=given).get_json()
            for question in client.get("/session/s", headers=given).get_json()["questions"]:
                yes = {"question_id": question["question_id"], "approve": True}
                client.post("/chat/s/answer", json=yes, headers=given)
            ends = [e for e in page["events"] if e["type"] in ("done", "error")]
            if ends and page["state"] == "idle":
                told.append(ends[-1])
                break
    shells = [shell_needs(kind) for kind in ("sandbox", "unconfined")] if sys.argv[2:] else []
    missing = client.get("/nowhere", headers=given).get_json()
    print(
        json.dumps(
            {"replies": [end.get("reply") for end in told], "missing": missing, "shells": shells}
        )
    )
    agentao_web.shutdown(app, grace=2)


if __name__ == "__main__":
    main()
