"""What Gunicorn is told to bind, and which worker gets which address."""

from __future__ import annotations

import os
import socket
import typing as t
from pathlib import Path
from types import SimpleNamespace

import pytest

from agentao_web import addresses
from agentao_web.config import Settings


@pytest.mark.parametrize(
    ("settings", "environ", "bound"),
    [
        (Settings(), {}, ["127.0.0.1:8000"]),
        (Settings(sockets=Path("/s")), {}, ["127.0.0.1:8000"]),
        (Settings(), {"PORT": "80"}, ["0.0.0.0:80"]),
        (Settings(workers=2), {"PORT": "80"}, ["0.0.0.0:80"]),
        (Settings(workers=2, sockets=Path("/s")), {}, ["unix:/s/0.sock", "unix:/s/1.sock"]),
        (
            Settings(workers=2),
            {"RUNTIME_DIRECTORY": "/run/a:/run/b"},
            ["unix:/run/a/0.sock", "unix:/run/a/1.sock"],
        ),
        (
            Settings(workers=2, sockets=Path("/s")),
            {"RUNTIME_DIRECTORY": "/run/a"},
            ["unix:/s/0.sock", "unix:/s/1.sock"],
        ),
    ],
)
def test_what_is_bound(settings: Settings, environ: dict[str, str], bound: list[str]) -> None:
    assert addresses.bind(settings, environ) == bound


def test_without_any_word_the_sockets_are_beside_the_root() -> None:
    here = Path.cwd() / "agentao-sockets"
    assert addresses.bind(Settings(workers=2), {})[0] == f"unix:{here}/0.sock"


class Log:
    def warning(self, *args: t.Any) -> None: ...


def server(*listeners: socket.socket, workers: int, owned: t.Sequence[int] = ()) -> t.Any:
    """As much of Gunicorn's arbiter as the hooks look at."""
    return SimpleNamespace(
        LISTENERS=list(listeners),
        WORKERS={n: SimpleNamespace(agentao_address=number) for n, number in enumerate(owned)},
        cfg=SimpleNamespace(workers=workers, address=[]),
        log=Log(),
        num_workers=workers,
    )


@pytest.mark.parametrize(
    ("owned", "given"),
    [
        ([], 0),
        ([0], 1),
        ([0, 1], 2),
        ([1, 2], 0),
        # A reload: everyone has an owner still.
        ([0, 1, 2], 0),
        ([0, 1, 2, 0], 1),
        # One that died in the middle of it.
        ([0, 1, 2, 0, 2], 1),
    ],
)
def test_a_new_worker_gets_the_address_with_the_fewest_owners(owned: list[int], given: int) -> None:
    with socket.socket(socket.AF_UNIX) as a, socket.socket(socket.AF_UNIX) as b:
        with socket.socket(socket.AF_UNIX) as c:
            worker = SimpleNamespace()
            addresses.pre_fork(server(a, b, c, workers=3, owned=owned), worker)
            assert worker.agentao_address == given


@pytest.mark.parametrize(("asked", "got"), [(3, 2), (1, 2), (2, 2), (0, 0)])
def test_the_number_is_pinned(asked: int, got: int) -> None:
    with socket.socket(socket.AF_UNIX) as a, socket.socket(socket.AF_UNIX) as b:
        master = server(a, b, workers=2)
        master.num_workers = asked
        addresses.nworkers_changed(master, asked, 2)
        assert master.num_workers == got


@pytest.mark.parametrize("families", [["TCP", "TCP"], ["unix", "TCP"], ["unix"], []])
def test_other_bindings_are_left_alone(families: list[str]) -> None:
    kinds = {"TCP": socket.AF_INET, "unix": socket.AF_UNIX}
    listeners = [socket.socket(kinds[family]) for family in families]
    try:
        master, worker = server(*listeners, workers=len(families)), SimpleNamespace()
        addresses.pre_fork(master, worker)
        addresses.post_fork(master, worker)
        assert not hasattr(worker, "agentao_address")
        addresses.nworkers_changed(master, 9, 2)
        assert master.num_workers == len(families)
    finally:
        for listener in listeners:
            listener.close()


def starting(*paths: str) -> t.Any:
    """A server that is about to bind *paths*."""
    master = server(workers=len(paths))
    master.cfg.address = list(paths)
    master.master_pid = 0
    return master


def test_the_folder_is_made_and_belongs_to_one_server(tmp_path: Path) -> None:
    paths = [str(tmp_path / "deep" / "run" / f"{n}.sock") for n in range(2)]
    first = starting(*paths)
    addresses.on_starting(first)
    try:
        assert (tmp_path / "deep" / "run").is_dir()
        with pytest.raises(SystemExit, match="another server has its sockets in"):
            addresses.on_starting(starting(*paths))
    finally:
        os.close(first.agentao_lock)
    second = starting(*paths)
    addresses.on_starting(second)
    os.close(second.agentao_lock)


def test_a_path_that_is_too_long_is_told_with_its_cure(tmp_path: Path) -> None:
    paths = [str(tmp_path / ("x" * 108) / f"{n}.sock") for n in range(2)]
    with pytest.raises(SystemExit, match="too long for a socket; set AGENTAO_SOCKETS"):
        addresses.on_starting(starting(*paths))


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    paths = [str(tmp_path / "file" / f"{n}.sock") for n in range(2)]
    with pytest.raises(SystemExit, match="AGENTAO_SOCKETS: "):
        addresses.on_starting(starting(*paths))
