"""Several processes, as on several hosts: the same tokens as one, and one clear line when one of them is lost or differs."""

from __future__ import annotations

import json
import os
import queue
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from jax._src.clusters import ClusterEnv, cloud_tpu_cluster, cluster
from jax.experimental import multihost_utils

from llm_infer import starting
from llm_infer.base.errors import UserError
from llm_infer.decoding.sampling_params import SamplingParams
from llm_infer.llm import LLM
from llm_infer.options import EngineOptions
from llm_infer.parallel import channel, distributed
from llm_infer.parallel.distributed import join
from llm_infer.starting import follow
from pallas_kernels.cpu_ffi.compile import cache_directory
from tests.parallel.two_hosts import ARGUMENTS, generate

ROOT = Path(__file__).parents[2]
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    **dict(vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2),
    **dict(head_dim=16, intermediate_size=64, max_position_embeddings=1024, tie_word_embeddings=True),
}
PROMPT = "Some text that is longer than a page of tokens, so that there is more than one."


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


def is_free(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


def slurm(job: int, tasks: int, task: int) -> dict[str, str]:
    """What SLURM tells a task of a step."""
    counts = {"NTASKS": tasks, "STEP_NUM_TASKS": tasks, "STEP_NUM_NODES": tasks, "PROCID": task, "LOCALID": 0}
    return {"SLURM_JOB_ID": str(job), "SLURM_STEP_NODELIST": "127.0.0.1,localhost"} | {
        f"SLURM_{name}": str(count) for name, count in counts.items()
    }


class Processes:
    """Starts processes that are ended, whatever happens, when the test is over."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.started = directory, []
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        self.job = next(job for job in range(random.randrange(4096), 8192) if is_free(61440 + job % 4096))

    def start(self, *arguments: str, devices: int = 1, **variables: str) -> subprocess.Popen[str]:
        environment = (
            os.environ
            | variables
            | {
                "PYTHONPATH": str(ROOT),
                "LLM_INFER_CACHE": str(self.directory / "cache"),
                "LLM_INFER_CPU_CACHE_DIR": str(cache_directory()),
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            }
        )
        errors = (self.directory / f"stderr{len(self.started)}").open("w+")
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        self.started.append((process, errors))
        return process

    def errors(self, number: int) -> list[str]:
        """Lines on stderr that are meant for the user."""
        _, file = self.started[number]
        file.seek(0)
        return [line.strip() for line in file if line.startswith("error:")]


@pytest.fixture
def processes(directory: Path) -> Iterator[Processes]:
    made = Processes(directory)
    yield made
    for process, file in made.started:
        process.kill()
        process.wait()
        process.stdout.close()
        file.close()


def test_two_processes_give_the_tokens_of_one_and_notice_a_loss_while_idle(
    processes: Processes, directory: Path
) -> None:
    each = ["-m", "tests.parallel.two_hosts", str(directory), processes.address]
    leader, follower = processes.start(*each, "0", devices=2), processes.start(*each, "1", devices=2)
    lines = (line for line in leader.stdout if line.startswith("[[["))  # Gloo writes, too, from threads side by side
    found = json.loads(next(lines, "null"))
    assert found is not None, processes.errors(0)
    assert found == generate(LLM(str(directory), progress=False, **ARGUMENTS))
    follower.send_signal(signal.SIGKILL)
    started = time.monotonic()
    assert leader.wait(timeout=15) == 1
    assert time.monotonic() - started < 15
    assert processes.errors(0) == ["error: process 1 of 2 is gone: restart all processes"]


def test_four_processes_give_the_text_of_one_until_one_is_lost_in_a_step(processes: Processes, directory: Path) -> None:
    """Started by SLURM, which tells all but the port; JAX makes that from the job's number."""
    flags = ["--load-format", "dummy", "--raw", "--temperature", "1", "--seed", "3", "--max-tokens", "900", "-tp", "4"]
    command = ["-m", "llm_infer.commands.app", "generate", PROMPT, "--model", str(directory), *flags]
    leader, *others = [processes.start(*command, **slurm(processes.job, 4, process)) for process in range(4)]
    text = leader.stdout.read(20)
    others[1].send_signal(signal.SIGKILL)
    text += leader.stdout.read()
    assert leader.wait(timeout=30) == 1
    assert processes.errors(0) == ["error: process 2 of 4 is gone: restart all processes"]
    assert not any("[Gloo]" in file.read() for _, file in processes.started if not file.seek(0))
    for other in (others[0], others[2]):
        assert other.wait(timeout=30) == 1
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=900)
    alone = LLM(str(directory), load_format="dummy", max_num_seqs=1, max_num_batched_tokens=512, progress=False)
    (whole,) = alone.generate([PROMPT], params)
    assert len(text) >= 20 and whole.outputs[0].text.startswith(text)


@pytest.mark.parametrize("step", [pytest.param(False, marks=pytest.mark.sweep), True])
def test_a_follower_ends_with_one_line_when_the_leader_is_lost(
    processes: Processes, directory: Path, step: bool
) -> None:
    if step:
        flags = [
            "--load-format",
            "dummy",
            "--raw",
            "--temperature",
            "1",
            "--seed",
            "3",
            "--max-tokens",
            "900",
            "-tp",
            "2",
        ]
        command = ["-m", "llm_infer.commands.app", "generate", PROMPT, "--model", str(directory), *flags]
        command += ["--coordinator-address", processes.address, "--num-processes", "2", "--process-id"]
        leader, follower = (processes.start(*command, str(i)) for i in range(2))
        assert leader.stdout.read(5)
    else:
        each = ["-m", "tests.parallel.two_hosts", str(directory), processes.address]
        leader, follower = processes.start(*each, "0", devices=2), processes.start(*each, "1", devices=2)
        assert any(line.startswith("[[[") for line in leader.stdout)
    leader.send_signal(signal.SIGKILL)
    assert follower.wait(timeout=30) == 1
    assert processes.errors(1) == ["error: process 0 is gone: restart all processes"]
    processes.started[1][1].seek(0)
    assert "Check failed" not in (text := processes.started[1][1].read()) and "SIGABRT" not in text


def test_a_follower_that_is_busy_hears_that_the_leader_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: queue.SimpleQueue[str] = queue.SimpleQueue()
    monkeypatch.setattr(channel, "end_process", heard.put)
    leader = channel.Leader(1, {})
    accepted = threading.Thread(target=leader.accept, args=(10.0,))
    accepted.start()
    follower = channel.Follower(["127.0.0.1"], leader.port, leader.token, 1, {})
    accepted.join()
    leader.send({"do": "compile"})
    leader.out_of_step()
    assert heard.get(timeout=10) == "process 0 is gone: restart all processes", "although nobody receives"
    assert follower.receive()[0] == {"do": "compile"}
    assert "interrupted" in (leader.loss(0.0) or "")
    leader._listener.close()
    for connection in (*leader._followers.values(), follower._connection):
        connection.close()


def test_another_configuration_is_named_by_both(processes: Processes, directory: Path) -> None:
    command = [
        "-m",
        "llm_infer.commands.app",
        "generate",
        "x",
        "--model",
        str(directory),
        "--load-format",
        "dummy",
        "-tp",
        "2",
    ]
    hosts = ["--coordinator-address", processes.address, "--num-processes", "2", "--process-id"]
    both = [processes.start(*command, *hosts, str(i), "--max-model-len", str(64 + i)) for i in range(2)]
    for number, process in enumerate(both):
        assert process.wait(timeout=60) == 1
        assert processes.errors(number) == [
            "error: process 1 was started with max_model_len=65, process 0 with max_model_len=64: start all processes "
            "with the same command"
        ]


def test_half_of_the_arguments_is_an_error() -> None:
    with pytest.raises(UserError, match=r"num_processes=2, process_id=None: give all three"):
        join("10.0.0.1:1", 2, None, {})
    with pytest.raises(UserError, match=r"process_id=2: expected 0 to 1"):
        join("10.0.0.1:1", 2, 2, {})
    assert join(None, None, None, {}) is None


def test_only_the_first_process_makes_an_llm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: pytest.fail("nobody is to be waited for"))
    hosts = dict(coordinator_address="127.0.0.1:77", num_processes=2)
    with pytest.raises(UserError, match=r"this is process 1 of several.*call llm_infer\.follow here"):
        LLM(load_format="dummy", process_id=1, **hosts)


def test_a_process_of_a_cluster_that_is_not_the_first_is_told_the_same(
    joined: list[tuple], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in slurm(5, 3, 2).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(jax, "process_index", lambda: 2)
    with pytest.raises(UserError, match=r"this is process 2 of several.*call llm_infer\.follow here"):
        join(None, None, None, {}, as_first=True)


def test_follow_returns_at_once_where_there_is_nobody_to_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    assert follow(load_format="dummy") is False
    leader = channel.Leader(1, {})
    monkeypatch.setattr(starting, "join", lambda *_, **__: leader)
    own = EngineOptions(load_format="dummy", seed=3)
    assert starting.take_part(own) is False
    with pytest.raises(UserError, match=r"^seed: other than what llm_infer\.follow was called with"):
        join(None, None, None, EngineOptions(load_format="dummy").of_all_processes())
    starting.take_part(own)
    assert join(None, None, None, own.of_all_processes()) is leader
    assert join(None, None, None, own.of_all_processes()) is None, "the connection is taken once"
    leader._listener.close()


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What JAX's own detection makes of what it is asked: coordinator, number of processes, this one; heartbeat."""
    calls = []

    def initialize(*asked: object, heartbeat_timeout_seconds: int, initialization_timeout: int) -> None:
        found = ClusterEnv.auto_detect_unset_distributed_params(*asked, None, None, initialization_timeout)
        calls.append((*found[:3], heartbeat_timeout_seconds))

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    for name in [name for name in os.environ if name.startswith(("SLURM_", "TPU_", "MEGASCALE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    for name in ("COORDINATOR_ADDRESS", "NUM_SLICES", "SLICE_ID"):  # set, so that nobody asks Google's metadata server
        monkeypatch.setenv(f"MEGASCALE_{name}", "")
    return calls


def test_hosts_of_a_cloud_tpu_slice_find_each_other(joined: list[tuple], monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (cluster, cloud_tpu_cluster):
        monkeypatch.setattr(module, "running_in_cloud_tpu_vm", True)
    monkeypatch.setenv("TPU_WORKER_ID", "1")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    assert join(None, None, None, {}) is None and not joined, "a slice of one host"
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost,127.0.0.2")
    join(None, None, None, {})
    assert joined == [("localhost:8482", 2, 1, 10)]
    join("10.0.0.1:77", 3, 2, {})
    assert joined[1:] == [("10.0.0.1:77", 3, 2, 10)], "what is given counts"


def test_tasks_of_a_slurm_step_find_each_other(joined: list[tuple], monkeypatch: pytest.MonkeyPatch) -> None:
    for variables, found in ((slurm(5, 1, 0), []), (slurm(5, 3, 2), [("127.0.0.1:61445", 3, 2, 10)])):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert join(None, None, None, {}) is None, "JAX says that there is one process"
        assert joined == found


def test_a_process_lost_while_connecting_is_told(joined: list[tuple], monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(_: object) -> None:
        raise jax.errors.JaxRuntimeError("Gloo all-reduce failed\nand more")

    said: list[str] = []
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", lose)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(distributed, "end_process", said.append)
    with pytest.raises(jax.errors.JaxRuntimeError):
        join("127.0.0.1:77", 2, 1, {})
    assert said == ["a process is gone (Gloo all-reduce failed): restart all processes"]
