"""The command as a person meets it: texts and exit codes."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography import x509

import longshore
from longshore.cli import main

GOOD = """
name: good
tasks: {source: jsonl, path: tasks.jsonl, heldout_fraction: 0}
verifier: {name: exact-match}
train: {steps: 3}
"""


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


Command = Callable[..., Done]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The empty current folder, without settings from outside."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(("LONGSHORE_", "REDIS_URL"))]:
        monkeypatch.delenv(name)
    return tmp_path


@pytest.fixture
def command(folder: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command in this process."""

    def call(*arguments: str) -> Done:
        code = main(list(arguments))
        return Done(code, *capsys.readouterr())

    return call


@pytest.fixture
def process(folder: Path) -> Command:
    """Runs the command in a process of its own."""

    def call(*arguments: str) -> Done:
        argv = [sys.executable, "-m", "longshore", *arguments]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
        return Done(done.returncode, done.stdout, done.stderr)

    return call


def refused(done: Done, code: int) -> list[str]:
    """The lines of stderr, after checking that they are meant for people."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert lines
    assert all(line.startswith("longshore") for line in lines), done.stderr
    return lines


def test_version_and_help(command: Command) -> None:
    assert command("--version").stdout.strip() == longshore.__version__
    told = command("--help").stdout
    names = ["run", "up", "down", "submit", "jobs", "watch", "logs", "cancel", "ledger", "dead-letters", "validate"]
    assert all(f" {name} " in told for name in [*names, "serve"])
    assert "--seed" in command("run", "--help").stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["bogus"],
        ["run"],
        ["up", "--port", "x"],
        ["up", "--port", "65536"],
        ["up", "--port", "-1"],
        ["serve", "nothing"],
        ["jobs", "--x"],
        ["dead-letters", "requeue", "x"],
    ],
)
def test_wrong_usage_is_one_line(command: Command, arguments: list[str]) -> None:
    assert len(refused(command(*arguments), 2)) == 1


@pytest.mark.parametrize("name", ["run", "submit", "validate"])
def test_a_job_file_that_is_not_there(command: Command, folder: Path, name: str) -> None:
    lines = refused(command(name, "none.yaml"), 2)
    assert lines == ["longshore: none.yaml: cannot be read: No such file or directory (got 'none.yaml')"]
    # Nothing has been started.
    assert not list(folder.iterdir())


@pytest.mark.parametrize("name", ["run", "submit", "validate"])
def test_every_fault_has_its_line(command: Command, folder: Path, name: str) -> None:
    bad = folder / "bad.yaml"
    bad.write_text("name: A B\nseeed: 1\ntasks: {source: jsonl}\nverifier: {name: exact-match}\ntrain: {steps: 0}\n")
    lines = refused(command(name, "bad.yaml"), 2)
    # `submit` leaves what only the gateway's machine knows (here: the missing path) to the gateway.
    world = [] if name == "submit" else ["tasks.path"]
    assert [line.split(": ")[1] for line in lines] == ["name", "train.steps", "seeed", *world]
    assert "allowed here: environment, evaluation," in lines[2]
    assert [path.name for path in folder.iterdir()] == ["bad.yaml"]


@pytest.mark.parametrize("name", ["run", "validate"])
def test_what_only_the_plugins_know_is_a_fault_too(command: Command, folder: Path, name: str) -> None:
    job = GOOD.replace("exact-match", "no-such-verifier")
    (folder / "job.yaml").write_text(job)
    lines = refused(command(name, "job.yaml"), 2)
    # Not the whole path: long values are shown shortened.
    assert any(line.startswith("longshore: tasks.path: there is no such file") for line in lines)
    assert any(line.startswith("longshore: verifier.name: ") and "exact-match" in line for line in lines)
    assert [path.name for path in folder.iterdir()] == ["job.yaml"]


def test_a_good_job_is_valid_from_anywhere(command: Command, folder: Path) -> None:
    jobs = folder / "jobs"
    jobs.mkdir()
    (jobs / "good.yaml").write_text(GOOD)
    (jobs / "tasks.jsonl").write_text('{"prompt": "1+1", "answer": "2"}\n' * 30)
    done = command("validate", "jobs/good.yaml")
    assert (done.returncode, done.stdout) == (0, "jobs/good.yaml is a valid job\n"), done.stderr


@pytest.mark.parametrize(
    "arguments",
    [["jobs"], ["watch", "x"], ["logs", "x"], ["cancel", "x"], ["ledger", "x"], ["dead-letters", "list", "x"]],
)
def test_without_a_stack(command: Command, arguments: list[str]) -> None:
    lines = refused(command(*arguments), 1)
    assert lines == ["longshore: no stack is running here; start one with `longshore up`"]


def test_down_without_a_stack_is_done(command: Command) -> None:
    done = command("down")
    assert (done.returncode, done.stdout) == (0, "no stack is running here\n")


def test_only_a_relay_is_told_its_home(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    # Taken back after the test.
    monkeypatch.setenv("LONGSHORE_HOME_WEIGHTS", "")
    assert "LONGSHORE_BROKER_URL" in refused(command("serve", "relay", "--home", "home.example:7102"), 2)[0]
    assert os.environ["LONGSHORE_HOME_WEIGHTS"] == "home.example:7102"
    assert "only a relay has a home" in refused(command("serve", "verifier", "--home", "home.example:7102"), 2)[0]


def test_a_certificate_for_homes_servers_is_made_without_a_stack(command: Command, folder: Path) -> None:
    made = command("site", "certificate", "weights.example.com", "10.0.0.7", "--authority", "ca", "--out", "tls")
    assert made.returncode == 0, made.stderr
    assert {path.name: stat.S_IMODE(path.stat().st_mode) & 0o077 for path in (folder / "ca").iterdir()}["ca.key"] == 0
    assert stat.S_IMODE((folder / "tls" / "tls.key").stat().st_mode) == 0o600
    certificate = x509.load_pem_x509_certificate((folder / "tls" / "tls.crt").read_bytes())
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate((folder / "tls" / "ca.crt").read_bytes()))
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["weights.example.com"]
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["longshore:home"]
    # The same authority signs the next one.
    assert command("site", "certificate", "other.example.com", "--authority", "ca", "--out", "more").returncode == 0
    assert (folder / "more" / "ca.crt").read_bytes() == (folder / "tls" / "ca.crt").read_bytes()
    assert "name at least one" in refused(command("site", "certificate", "--authority", "ca", "--out", "x"), 2)[0]
    (folder / "ca" / "ca.key").chmod(0o644)
    line = refused(command("site", "certificate", "x", "--authority", "ca", "--out", "x"), 1)[0]
    assert "chmod 600" in line


def test_serve_names_every_setting_that_is_missing(command: Command) -> None:
    line = refused(command("serve", "gateway"), 2)[0]
    assert line.startswith("longshore gateway: ")
    assert all(f"LONGSHORE_{name}: " in line for name in ("BROKER_URL", "DATABASE_URL", "SUPERVISOR", "API_KEY_FILE"))


SERVE = """
import atexit, sys, types
from longshore.console.app import app
# A second of this is what an interpreter with torch in it takes.
atexit.register(lambda: print("taken apart"))
sys.modules["longshore.weights.service"] = types.SimpleNamespace(main=lambda: print("drained") or 3)
app(["serve", "weights"])
"""


def test_a_service_that_has_drained_is_gone_at_once(folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SERVE], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (3, "drained\n", "")


def test_a_service_that_the_machine_fails_says_where(folder: Path) -> None:
    failing = SERVE.replace('lambda: print("drained") or 3', 'lambda: open("/no/such/file")')
    script = failing.replace("from longshore.console.app import app", "from longshore.cli import main as app")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.endswith("FileNotFoundError: [Errno 2] No such file or directory: '/no/such/file'\n")


def test_a_taken_port_is_one_message(process: Command) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = process("up", "--port", str(port))
    assert done.returncode == 1
    assert done.stderr == f"longshore: port {port} cannot be had: Address already in use; choose another with --port\n"


@pytest.mark.parametrize("arguments", [["up"], ["up", "--detach"], ["run", "good.yaml"]])
@pytest.mark.parametrize("name", [".longshore", "runs"])
def test_a_folder_that_cannot_be_made_is_one_message(
    process: Command, folder: Path, arguments: list[str], name: str
) -> None:
    (folder / "good.yaml").write_text(GOOD)
    (folder / "tasks.jsonl").write_text('{"prompt": "1+1", "answer": "2"}\n' * 30)
    (folder / name).touch()
    done = process(*arguments)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"longshore: {folder / name}")
    assert line.endswith(("File exists", "Not a directory"))


@pytest.mark.parametrize("arguments", [["up"], ["up", "--detach"]])
def test_a_broker_that_is_not_there_is_one_message(process: Command, monkeypatch, arguments: list[str]) -> None:
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:1")
    done = process(*arguments)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "the broker at redis://127.0.0.1:1 (REDIS_URL) does not answer" in done.stderr
    assert not Path(".longshore/up.json").exists()


def test_whoever_stops_reading_gets_no_traceback(folder: Path) -> None:
    argv = [sys.executable, "-m", "longshore", "--help"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
