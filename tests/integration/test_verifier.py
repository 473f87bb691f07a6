"""The verifier process over gRPC: statuses as the contract says, and life after a scorer's death."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import scorers
from processes import Service

from longshore.proto.v1 import job_pb2, task_pb2, verdict_pb2, verifier_pb2, verifier_pb2_grpc
from longshore.settings import JobFile

SERVICE = "longshore.proto.v1.VerifierService"
Code = grpc.StatusCode


def write_job(folder: Path, verifier: str) -> Path:
    spec = {
        "name": "scoring",
        "tasks": {"source": "jsonl"},
        "verifier": {"name": verifier, "timeout_s": 1.0},
        "train": {"steps": 1},
        "resources": {"verifier_workers": 2},
    }
    document = {"project": "default", "job": "scoring", "spec": spec, "learner_public_key": "00" * 32}
    path = folder / f"{verifier}-{uuid.uuid4().hex[:6]}.json"
    path.write_text(JobFile.model_validate(document).model_dump_json())
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder whose plug-ins processes find."""
    path = tmp_path_factory.mktemp("verifier")
    with pytest.MonkeyPatch.context() as patch:
        services = str(Path(__file__).parents[2] / "services")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(scorers.install(path / "site")), services]))
        yield path


@pytest.fixture(scope="module")
def verifier(folder: Path) -> Iterator[Service]:
    service = Service("verifier", folder, job_file=write_job(folder, "scripted")).start()
    yield service.wait_serving(SERVICE)
    service.stop()


@pytest.fixture
def stub(verifier: Service) -> Iterator[verifier_pb2_grpc.VerifierServiceStub]:
    with grpc.insecure_channel(verifier.address) as channel:
        yield verifier_pb2_grpc.VerifierServiceStub(channel)


def request(reply: str, **fields: object) -> verifier_pb2.VerifyRequest:
    return verifier_pb2.VerifyRequest(
        **{  # type: ignore[arg-type]
            "job": job_pb2.JobRef(project="default", job="scoring"),
            "task": task_pb2.Task(task_id="t", messages=[task_pb2.Message(role="user", content="3+4=")], answer="7"),
            "conversation": [task_pb2.Message(role="user", content="3+4=")],
            "reply": reply,
            **fields,
        }
    )


def refusal(stub: verifier_pb2_grpc.VerifierServiceStub, wanted: verifier_pb2.VerifyRequest) -> tuple[Code, str]:
    with pytest.raises(grpc.RpcError) as raised:
        stub.Verify(wanted, timeout=30)
    return raised.value.code(), raised.value.details()


def test_a_verdict(stub: verifier_pb2_grpc.VerifierServiceStub) -> None:
    verdict = stub.Verify(request("reward 0.5", role=verdict_pb2.VERDICT_ROLE_HELDOUT), timeout=30).verdict
    assert (verdict.reward, verdict.verifier, verdict.revision) == (0.5, "scripted@3", 1)
    assert (dict(verdict.breakdown), verdict.reason) == ({"half": 0.25}, "as told")
    assert verdict.role == verdict_pb2.VERDICT_ROLE_HELDOUT
    assert stub.Verify(request("reward 1"), timeout=30).verdict.role == verdict_pb2.VERDICT_ROLE_TRAIN


def test_statuses(stub: verifier_pb2_grpc.VerifierServiceStub) -> None:
    assert refusal(stub, request("spin")) == (Code.DEADLINE_EXCEEDED, "scripted@3 took longer than 1 s")
    assert refusal(stub, request("raise oh no")) == (Code.INTERNAL, "scripted@3: ValueError: oh no")
    assert refusal(stub, request("exit 3")) == (Code.INTERNAL, "scripted@3: the scoring process ended with exit code 3")
    bad = [
        request("reward 1", job=job_pb2.JobRef(project="default", job="another")),
        request("reward 1", turn_info_json=["[1]"]),
        request("reward nan"),
        request("reward 1" + " " * 9_000_000),
    ]
    assert [refusal(stub, wanted)[0] for wanted in bad] == [Code.INVALID_ARGUMENT] * 4
    assert stub.Verify(request("reward 1"), timeout=30).verdict.reward == 1.0


def test_a_verifier_that_cannot_be_made_ends_the_process_with_a_reason(folder: Path) -> None:
    service = Service("verifier", folder, job_file=write_job(folder, "unloadable")).start()
    assert service.wait(60) == 1
    assert "needs a licence" in service.tail()


def test_sigterm_ends_it_cleanly(folder: Path) -> None:
    service = Service("verifier", folder, job_file=write_job(folder, "scripted"), drain_s=5).start()
    service.wait_serving(SERVICE)
    with grpc.insecure_channel(service.address) as channel:
        running = verifier_pb2_grpc.VerifierServiceStub(channel).Verify.future(request("sleep 0.5"), timeout=30)
        worker = verifier_pb2_grpc.VerifierServiceStub(channel).Verify(request("pid"), timeout=30)
        assert service.process is not None
        service.process.terminate()
        # A score in progress is answered before the process ends.
        assert running.result().verdict.reward == 1.0
    assert service.wait(20) == 0
    assert not Path(f"/proc/{int(worker.verdict.reward)}").exists()
