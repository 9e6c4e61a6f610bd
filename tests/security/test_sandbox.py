"""What root would be inside the sandbox, and what could hide from its bounds there."""

from __future__ import annotations

import collections.abc as cabc
import json
import os
import shutil
from pathlib import Path

import pytest

from agentao_web.agents import processes
from agentao_web.agents import sandbox
from agentao_web.agents import shell
from tests.security import test_shell
from tests.security.test_shell import Web
from tests.security.test_shell import sleeping

model, web = test_shell.model, test_shell.web

MIB = 2**20


def python(program: str) -> str:
    """A command that runs *program*, of several lines."""
    return f"python3 - <<'END'\n{program}\nEND"


def refused(told: str, words: str) -> bool:
    """Whether a program was refused something, in the words of the error."""
    return words in told and "got it" not in told


# A server that is root


def test_nothing_below_proc_can_be_written(web: cabc.Callable[..., Web]) -> None:
    """For a server that is root /proc/sys is its own: core_pattern would run as the machine's root.

    It is looked at and never tried.
    """
    w = web()
    rows = [line.split() for line in w.run("cat /proc/self/mountinfo").splitlines()]
    mounts = {row[4]: row[5].split(",") for row in rows if len(row) > 5}
    assert "/proc" in mounts
    for point, flags in mounts.items():
        if f"{point}/".startswith("/proc/"):
            assert "ro" in flags, point
    told = w.run(
        "for f in /proc/sys/kernel/core_pattern /proc/sys/kernel/modprobe /proc/sysrq-trigger "
        "/proc/mtrr /proc/irq/default_smp_affinity /proc/sys /proc/self/oom_score_adj; "
        "do [ -w $f ] && echo can-be-written: $f; done; echo looked"
    )
    assert "looked" in told
    assert "can-be-written" not in told


def test_only_its_own_folders_can_be_written(web: cabc.Callable[..., Web]) -> None:
    rows = [line.split() for line in web().run("cat /proc/self/mountinfo").splitlines()]
    writable = {row[4] for row in rows if len(row) > 5 and "rw" in row[5].split(",")}
    devices = {f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom", "tty")}
    assert writable == {"/workspace", "/tmp", "/dev/shm", "/dev/pts"} | devices
    for row in rows:
        if len(row) > 5 and row[4] not in devices | {"/dev/pts"}:
            assert "nosuid" in row[5] and "nodev" in row[5], row


def test_it_refuses_to_start_unless_proc_is_proved_to_be_read_only(
    web: cabc.Callable[..., Web], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A bubblewrap that does as it is told, but for that."""
    real = shutil.which("bwrap")
    lax = tmp_path / "bwrap"
    lax.write_text(
        "#!/bin/bash\nkept=()\n"
        'while [ $# -gt 0 ]; do if [ "$1 $2" = "--remount-ro /proc" ]; then shift 2; '
        'else kept+=("$1"); shift; fi; done\n'
        f'exec {real} "${{kept[@]}}"\n'
    )
    lax.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(RuntimeError, match="/proc/sys.*AGENTAO_SHELL=off"):
        web()


def test_no_mounts_said_is_no_proof() -> None:
    for said in ("", "\n", "garbage", "1 2 0:3 / /process ro - proc proc rw"):
        assert not sandbox._is_proc_read_only(said)
    row = "67 65 0:41 / /proc {} - proc proc rw\n68 67 0:41 /sys /proc/sys {} - proc proc rw"
    assert sandbox._is_proc_read_only(row.format("ro,nosuid", "ro"))
    assert not sandbox._is_proc_read_only(row.format("ro,nosuid", "rw"))
    assert not sandbox._is_proc_read_only(row.format("rw,nosuid", "ro"))


PRIVILEGED = {
    "mount": "mount -t tmpfs none /tmp && echo got it",
    "remount": "mount -o remount,rw /proc && echo got it",
    "device": "mknod /tmp/d c 1 5 && echo got it",
    "namespace": "unshare --user --map-root-user true && echo got it",
    "chroot": "chroot / true && echo got it",
    "clock": "date -s 2000-01-01 && echo got it",
    "host name": "hostname mine && echo got it",
    "priority": "nice -n -5 true && [ $(nice -n -5 nice) -lt 5 ] && echo got it",
    "owner": "touch f && chown 0 f && echo got it",
}


@pytest.mark.parametrize("how", PRIVILEGED)
def test_root_is_nobody_in_there(web: cabc.Callable[..., Web], how: str) -> None:
    told = web().run(f"id -u; {PRIVILEGED[how]}; echo tried")
    assert "1000" in told and "tried" in told
    assert "got it" not in told


# What could hide from the bounds


def test_there_is_no_shared_memory_that_nobody_holds(web: cabc.Callable[..., Web]) -> None:
    """SysV memory, memfds and shared mappings stay when every process has let go of their pages."""
    w = web()
    assert refused(w.run("ipcmk -M 1048576 && echo got it"), "not implemented")
    assert refused(w.run("ipcmk -Q && echo got it"), "not implemented")
    assert refused(w.run("ipcmk -S 100 && echo got it"), "not implemented")
    told = w.run(python("import os; os.memfd_create('x'); print('got it')"))
    assert refused(told, "not implemented")
    shared = "import mmap; mmap.mmap(-1, 4096); print('got it')"
    assert refused(w.run(python(shared)), "not supported")
    of_zero = (
        "import mmap, os\n"
        "fd = os.open('/dev/zero', os.O_RDWR)\n"
        "mmap.mmap(fd, 4096, mmap.MAP_SHARED)\nprint('got it')"
    )
    assert refused(w.run(python(of_zero)), "No such device")


def test_what_programs_need_of_memory_is_there(web: cabc.Callable[..., Web]) -> None:
    w = web()
    assert "4096" in w.run("head -c 4096 /dev/zero | wc -c")
    private = "import mmap\nmmap.mmap(-1, 2**20, mmap.MAP_PRIVATE)[5] = 1\nprint('got it')"
    assert "got it" in w.run(python(private))
    of_file = (
        "import mmap\nf = open('f', 'w+b'); f.truncate(4096)\n"
        "mmap.mmap(f.fileno(), 4096)[5] = 1\nprint('got it')"
    )
    assert "got it" in w.run(python(of_file))
    pool = (
        "import asyncio, multiprocessing\n"
        "def double(n): return 2 * n\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.Pool(2) as pool: print(pool.map(double, [20, 1]))\n"
        "    asyncio.run(asyncio.sleep(0))\n"
        "    print('got it')"
    )
    assert "got it" in w.run(f"cat > pool.py <<'END'\n{pool}\nEND\npython3 pool.py")


@pytest.mark.parametrize("family", ["AF_VSOCK", "AF_ALG", "AF_PACKET", "AF_CAN"])
def test_no_socket_leads_past_the_network(web: cabc.Callable[..., Web], family: str) -> None:
    told = web().run(python(f"import socket; socket.socket(socket.{family}, 1); print('got it')"))
    assert refused(told, "not supported by protocol") or "not permitted" in told


HOLDS = {
    # The first thread has ended, and all it could say of the process with it.
    "memory of a process without a first thread": """
import ctypes, threading, time
def hold():
    data = bytearray({size})
    for at in range(0, len(data), 4096):
        data[at] = 1
    time.sleep(1000)
threading.Thread(target=hold).start()
ctypes.CDLL(None).pthread_exit(None)
""",
    "files open in one thread only": """
import ctypes, os, threading, time
def hold():
    ctypes.CDLL(None).unshare(0x400)  # CLONE_FILES
    fd = os.open('gone', os.O_CREAT | os.O_WRONLY)
    os.unlink('gone')
    for _ in range({size} // 65536):
        os.write(fd, bytes(65536))
    time.sleep(1000)
threading.Thread(target=hold).start()
time.sleep(1000)
""",
    "empty files in memory": """
import time
for n in range({size} // 1024):
    open(f'/tmp/{{n}}', 'w').close()
time.sleep(1000)
""",
    "sockets": """
import socket, time
held = [socket.socketpair() for _ in range({size} // (2 * 425984))]
time.sleep(1000)
""",
}


@pytest.mark.parametrize("how", HOLDS)
def test_what_is_held_where_it_is_hard_to_see_counts(
    web: cabc.Callable[..., Web], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(processes, "MAX_MEMORY", 100 * MIB)
    told = web().run(python(HOLDS[how].format(size=110 * MIB)))
    assert "more than 104,857,600 bytes of memory" in told


def test_threads_are_counted_as_processes_are(
    web: cabc.Callable[..., Web], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel counts them too, but not those of root."""
    monkeypatch.setattr(processes, "MAX_THREADS", 50)
    many = (
        "import threading, time\n"
        "for _ in range(60): threading.Thread(target=time.sleep, args=(1000,)).start()"
    )
    assert "stopped: more than 50 threads" in web().run(python(many))


NAMELESS = {
    "on their way over a socket": """
import os, socket, time
one, other = socket.socketpair()
for n in range(6):
    fd = os.open('gone', os.O_CREAT | os.O_WRONLY)
    os.unlink('gone')
    os.write(fd, os.urandom({size} // 4))
    os.fsync(fd)
    socket.send_fds(one, [b'x'], [fd])
    os.close(fd)
time.sleep(1000)
""",
    "mapped, one page of each": """
import mmap, os, time
held = []
for n in range(6):
    fd = os.open('gone', os.O_CREAT | os.O_RDWR)
    os.unlink('gone')
    os.write(fd, os.urandom({size} // 4))
    os.fsync(fd)
    held.append(mmap.mmap(fd, 4096))
    os.close(fd)
time.sleep(1000)
""",
}


@pytest.mark.parametrize("how", NAMELESS)
def test_files_that_no_process_has_open_are_bounded(
    web: cabc.Callable[..., Web], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """They are in no folder and in no list of descriptors: only the disk shows that they are there.

    Other tests write to the same disk, and free some: so any loss is too much here, or none is.
    """
    monkeypatch.setattr(shell, "MAX_LOST", -(2**60))
    w = web()
    held = NAMELESS[how].format(size=MIB)
    assert "files without a name" in w.run(python(held))
    monkeypatch.setattr(shell, "MAX_LOST", 2**60)
    assert "fine" in w.run(python(held.replace("sleep(1000)", "sleep(2.5); print('fine')")))


def test_a_disk_that_others_fill_ends_no_command(
    web: cabc.Callable[..., Web], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shell, "MAX_LOST", -(2**60))
    assert "fine" in web().run("sleep 2.5; echo fine")


def test_the_last_of_the_disk_is_not_for_commands(
    web: cabc.Callable[..., Web], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shell, "KEPT_FREE", 2**60)
    monkeypatch.setattr(shell, "KEPT_PART", 1)
    w = web()
    told = w.run("echo more > file; ls; echo listed")
    assert "listed" in told and "File too large" in told
    assert "the server's disk is almost full" in told


def test_of_all_processes_the_kernel_ends_a_command_first(web: cabc.Callable[..., Web]) -> None:
    w = web()
    assert "score: 1000" in w.run("echo score: $(cat /proc/self/oom_score_adj)")
    assert Path("/proc/self/oom_score_adj").read_text() != "1000\n"


def test_it_is_gone_when_it_was_too_much(
    web: cabc.Callable[..., Web], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "MAX_MEMORY", 100 * MIB)
    sleep, mark = test_shell.a_long_sleep()
    told = web().run(f"setsid {sleep} & " + python(f"x = b'x' * {200 * MIB}\nwhile x: pass"))
    assert "bytes of memory" in told, json.dumps(told)
    test_shell.eventually(lambda: not sleeping(mark), "it outlived its command")
