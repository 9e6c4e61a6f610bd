"""What is built and installed: the wheel, the source archive, and the files of deploy/."""

from __future__ import annotations

import collections.abc as cabc
import email
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import sysconfig
import tarfile
import typing as t
import venv
import zipfile
from pathlib import Path

import dockerfile
import httpx
import pytest
import yaml

import agentao_web
from agentao_web import workers
from agentao_web.config import Settings
from agentao_web.config import from_environment
from tests.live.harness import PATIENCE
from tests.live.harness import PROJECT
from tests.live.harness import Server
from tests.live.harness import eventually
from tests.live.harness import listens

DEPLOY = PROJECT / "deploy"
UNIT = DEPLOY / "agentao-web.service"
#: What is made by working here, and is no part of the project.
MADE = (".git", ".venv*", "*.egg-info", ".*_cache", ".hypothesis", "__pycache__", "build", "dist")

USER_PROGRAM = """\
from agentao_web import AgentaoWeb, Principal, tool
from flask import Flask, Request
app = Flask(__name__)
def who(request: Request) -> Principal | None: return Principal("acme", "ann")
@tool(read_only=True)
def stock(item: str, who: Principal) -> dict[str, int]: return {item: 7}
AgentaoWeb(authenticate=who, tools=lambda principal: [stock]).init_app(app, url_prefix="/agent")
"""


def run(*command: str | Path, **options: t.Any) -> str:
    """What the command said; it must end well."""
    options = {"capture_output": True, "text": True, "timeout": 300, **options}
    done = subprocess.run([str(word) for word in command], **options)
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return str(done.stdout + done.stderr)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the archive, and the wheel that was built out of it."""
    source = tmp_path_factory.mktemp("source") / "project"
    shutil.copytree(PROJECT, source, ignore=shutil.ignore_patterns(*MADE))
    out = tmp_path_factory.mktemp("built")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source)
    return out


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def test_the_wheel_has_the_package_and_nothing_else(built: Path) -> None:
    house = Path(agentao_web.__file__).parent
    package = {
        path.relative_to(house.parent).as_posix()
        for path in house.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(only(built, "*.whl")) as wheel:
        names = set(wheel.namelist())
    info = {name for name in names if name.startswith("agentao_web-")}
    assert names - info == package and "agentao_web/py.typed" in package
    assert any(name.endswith("licenses/LICENSE") for name in info)


def test_the_archive_has_what_it_takes_to_test_and_deploy(built: Path) -> None:
    with tarfile.open(only(built, "*.tar.gz")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = [
        path.relative_to(PROJECT).as_posix()
        for folder in ("agentao_web", "tests", "docs", "deploy", "bench", "examples")
        for path in (PROJECT / folder).rglob("*")
        if path.is_file() and not {"__pycache__", "node_modules"} & set(path.parts)
    ]
    wanted += ["LICENSE", "CHANGES.md", "README.md", "Makefile", "wsgi_app.py", "gunicorn.conf.py"]
    assert not set(wanted) - names
    assert not [name for name in names if name.startswith((".venv", ".git/", "build", "dist"))]
    assert not [name for name in names if "node_modules" in name]


def test_the_metadata_is_whole(built: Path) -> None:
    assert "PASSED" in run(
        sys.executable, "-m", "twine", "check", "--strict", *sorted(built.iterdir())
    )
    with zipfile.ZipFile(only(built, "*.whl")) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith("/METADATA"))
        told = email.message_from_bytes(wheel.read(name))
    assert told["License-Expression"] == "MIT" and told["License-File"] == "LICENSE"
    assert {"example", "metrics", "otel", "postgres"} <= set(told.get_all("Provides-Extra", []))
    assert "Typing :: Typed" in told.get_all("Classifier", [])
    assert told["Requires-Python"] == ">=3.11"


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel in it; what it depends on is the tests' own."""
    home = tmp_path_factory.mktemp("venv")
    venv.create(home, symlinks=True)
    python = home / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    run(*pip, "install", "--no-deps", "--no-index", "--quiet", only(built, "*.whl"))
    # Added without its own .pth files, and so without an editable agentao-web.
    packages = next((home / "lib").glob("python*/site-packages"))
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return home


def elsewhere() -> dict[str, str]:
    """An environment in which the project's folder is not importable."""
    names = {"PYTHONPATH", "AGENTAO_ROOT", "AGENTAO_SECRET_KEYS"}
    return {k: v for k, v in os.environ.items() if k not in names}


def test_the_installed_wheel_runs(installed: Path, tmp_path: Path) -> None:
    options: dict[str, t.Any] = {"cwd": tmp_path, "env": elsewhere()}
    told = run(installed / "bin" / "agentao-web", "--help", **options)
    assert all(word in told for word in ("doctor", "serve", "token"))
    code = "import agentao_web.workers; print(agentao_web.__file__)"
    where = run(installed / "bin" / "python", "-c", code, **options)
    assert Path(where.strip()).is_relative_to(installed)


@pytest.mark.long
def test_a_program_that_uses_the_wheel_is_typed(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(USER_PROGRAM)
    python = installed / "bin" / "python"
    command = [sys.executable, "-m", "mypy", "--strict", "--no-site-packages", "program.py"]
    command[4:5] = ["--python-executable", str(python), "--cache-dir", str(tmp_path / "cache")]
    told = run(*command, cwd=tmp_path, env=elsewhere())
    assert "Success" in told
    bad = USER_PROGRAM.replace("-> Principal | None: return Principal", "-> int: return len")
    (tmp_path / "program.py").write_text(bad.replace('len("acme", "ann")', "7"))
    done = subprocess.run(
        command, cwd=tmp_path, env=elsewhere(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1 and "authenticate" in done.stdout, done.stdout


# -- systemd -----------------------------------------------------------------------------------


def unit_lines() -> list[tuple[str, str]]:
    pairs = [line.partition("=") for line in UNIT.read_text().splitlines()]
    return [(k, v) for k, sign, v in pairs if sign and not k.startswith("#")]


def unit() -> dict[str, str]:
    return dict(unit_lines())


def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path: Path) -> None:
    gunicorn = Path(sys.executable).with_name("gunicorn")
    text = UNIT.read_text().replace("/opt/agentao-web/venv/bin/gunicorn", str(gunicorn))
    (tmp_path / UNIT.name).write_text(text)
    command = ["systemd-analyze", "--man=no", "verify", str(tmp_path / UNIT.name)]
    assert run(*command) == ""
    extra = tmp_path / f"{UNIT.name}.d"
    extra.mkdir()
    shutil.copy(DEPLOY / "sandbox.conf", extra)
    assert run(*command) == ""


def test_systemd_thinks_the_unit_is_well_confined() -> None:
    # Its measure is exposure in tenths: 10.0 is a service without any confinement.
    run("systemd-analyze", "security", "--offline=yes", "--threshold=20", UNIT)


def test_the_drop_in_takes_back_every_line_that_breaks_the_sandbox() -> None:
    marked = re.findall(r"# \(sandbox\)\n(\w+)=", UNIT.read_text())
    dropped = re.findall(r"^(\w+)=", (DEPLOY / "sandbox.conf").read_text(), re.MULTILINE)
    assert sorted(marked) == sorted(dropped)


def test_the_unit_gives_the_drain_its_time_and_the_worker_its_files() -> None:
    told = unit()
    assert int(told["TimeoutStopSec"]) > workers.graceful_timeout
    assert int(told["LimitNOFILE"]) >= workers.worker_connections + 200
    assert int(told["TasksMax"]) >= 4 * (workers.threads + Settings().max_turns)


@pytest.mark.live
def test_the_units_command_starts_and_says_ready(tmp_path: Path) -> None:
    words = shlex.split(unit()["ExecStart"])
    gunicorn, *arguments, folder, app = words
    assert gunicorn == "/opt/agentao-web/venv/bin/gunicorn"
    assert arguments == ["-c", "python:agentao_web.workers", "--worker-tmp-dir"]
    assert folder == "/run/agentao-web"
    environment = dict(word.split("=", 1) for word in shlex.split(unit()["Environment"]))
    assert environment["AGENTAO_ROOT"] == "/var/lib/agentao-web"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(tmp_path / "notify"))
        notify.settimeout(PATIENCE)
        with Server(
            tmp_path,
            "--worker-tmp-dir", str(tmp_path),
            app=app, conf=arguments[1],
            AGENTAO_DEMO="1", NOTIFY_SOCKET=str(tmp_path / "notify"),
        ):  # fmt: skip
            assert notify.recv(4096).startswith(b"READY=1")


def test_the_environment_file_is_read_as_settings() -> None:
    lines = (DEPLOY / "agentao-web.env.example").read_text().splitlines()
    pairs = [line.lstrip("#").partition("=") for line in lines if re.match(r"#?[A-Z_]+=", line)]
    told = {name: value for name, _, value in pairs}
    ours = {name for name in told if name.startswith("AGENTAO_")}
    assert set(from_environment(told)) == ours and len(ours) >= 3
    settings = Settings.from_mapping(from_environment(told))
    assert settings.workers == 2 and settings.secret_keys == ()


# -- containers --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recipe() -> list[t.Any]:
    """The Dockerfile, as Docker's own parser reads it."""
    return list(dockerfile.parse_file(str(DEPLOY / "Dockerfile")))


def told(recipe: cabc.Iterable[t.Any], name: str) -> t.Any:
    (found,) = (command for command in recipe if command.cmd.upper() == name)
    return found


def test_the_image_is_made_in_two_stages_and_runs_without_root(recipe: list[t.Any]) -> None:
    stages = [n for n, command in enumerate(recipe) if command.cmd.upper() == "FROM"]
    assert len(stages) == 2
    final = recipe[stages[1] :]
    assert told(final, "USER").value == ("10001:10001",)
    assert told(final, "STOPSIGNAL").value == ("SIGTERM",)
    assert told(final, "VOLUME").value == ("/var/lib/agentao-web",)
    words = " ".join(command.original for command in final)
    assert not re.search(r"\b(apt-get|gcc|pip|curl)\b", words), "no tools in the final stage"
    assert told(final, "CMD").json and told(final, "HEALTHCHECK").json


def test_what_the_dockerfile_copies_is_there_and_not_ignored(recipe: list[t.Any]) -> None:
    kept = {line[1:] for line in (PROJECT / ".dockerignore").read_text().split() if line[0] == "!"}
    copies = [command for command in recipe if command.cmd.upper() == "COPY" and not command.flags]
    copied = {name for command in copies for name in command.value[:-1]}
    assert copied == kept
    assert all((PROJECT / name).exists() for name in copied)


def test_a_linter_finds_nothing_wrong_with_the_dockerfile() -> None:
    command = [Path(sys.executable).with_name("dockerfile-doctor"), "--no-color"]
    run(*command, "--severity", "warning", DEPLOY / "Dockerfile")


@pytest.mark.live
def test_the_images_command_and_health_check_work(tmp_path: Path, recipe: list[t.Any]) -> None:
    final = recipe[-8:]
    gunicorn, _, conf, *options, app = told(final, "CMD").value
    assert (gunicorn, conf) == ("gunicorn", "python:agentao_web.workers")
    marker, python, *arguments = told(final, "HEALTHCHECK").value
    assert (marker, python) == ("CMD", "python")
    with Server(tmp_path, *options, app=app, conf=conf, AGENTAO_DEMO="1") as server:
        environ = {**os.environ, "PORT": str(server.port)}
        run(sys.executable, *arguments, env=environ)
    done = subprocess.run(
        [sys.executable, *arguments], env=environ, capture_output=True, timeout=PATIENCE
    )
    assert done.returncode == 1


def test_compose_starts_what_the_dockerfile_makes() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    web = services["web"]
    assert (DEPLOY / web["build"]["context"] / web["build"]["dockerfile"]).is_file()
    assert (DEPLOY / f"{web['env_file']}.example").is_file()
    assert web["read_only"] and web["cap_drop"] == ["ALL"]
    assert int(web["stop_grace_period"].removesuffix("s")) > workers.graceful_timeout
    assert all(port.startswith("127.0.0.1:") for port in web["ports"])


@pytest.mark.live
def test_the_images_command_runs_where_only_its_volume_can_be_written(
    tmp_path: Path, recipe: list[t.Any]
) -> None:
    """What --read-only and the image's user make of it, without an engine."""
    root = tmp_path / "root"
    root.mkdir()
    gunicorn, *arguments, app = told(recipe[-8:], "CMD").value
    address = root / "web.sock"
    walls = ["bwrap", "--ro-bind", "/", "/", "--dev", "/dev", "--bind", str(root), str(root)]
    walls += ["--unshare-user", "--uid", "10001", "--gid", "10001", "--die-with-parent"]
    command = [*walls, sys.executable, "-m", gunicorn, *arguments, "--bind", f"unix:{address}", app]
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("AGENTAO_", "OPENAI_"))}
    image = {"HOME": str(root), "AGENTAO_ROOT": str(root), "TMPDIR": str(root)}
    with (
        subprocess.Popen(
            command,
            cwd=root,
            env={**kept, **image, "AGENTAO_DEMO": "1", "PYTHONPATH": str(PROJECT)},
            stderr=subprocess.PIPE,
            text=True,
        ) as process,
        httpx.Client(
            transport=httpx.HTTPTransport(uds=str(address)),
            base_url="http://here",
            timeout=PATIENCE,
        ) as client,
    ):
        try:
            eventually(lambda: listens(address), "it does not listen")
            answer = client.post(
                "/chat/a",
                json={"message": "say hi"},
                headers={
                    "Authorization": "Bearer dev",
                    "Accept": "application/json",
                    "Prefer": "wait=50",
                },
            )
            assert answer.json()["reply"] == "hi"
        finally:
            process.terminate()
            _, log = process.communicate(timeout=PATIENCE)
    assert "Traceback" not in log, log
