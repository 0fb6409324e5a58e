"""Joins a Ray cluster, or starts one on this machine that nobody else can reach.

Imports Ray when it is called: what is wrong with an address or a folder is found before.
"""

from __future__ import annotations

import os
import signal
import socket
import tempfile
import threading
from pathlib import Path
from typing import Any

from frpo.config import ConfigError, find_cluster
from frpo.roles import WorkerFailed

STARTS = 3
PROBE_S = 8.0
"""Longest wait for a cluster's first answer, seconds; it is asked twice, by TCP and by gRPC."""
ALONE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Ray's own name for it: "0" makes 127.0.0.1 the address of this node, so that no server of Ray's binds
another.

It is what macOS and Windows have by default. A node_ip_address of 127.0.0.1 alone is replaced by the
machine's own.
"""
SOCKET_PATH = 107
"""Longest path of a Unix socket, bytes (unix(7))."""
SESSION = len("/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.1")
"""What Ray puts behind its temporary folder, bytes."""
QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
"""Options of ray.init."""
REMEDY = "is the head up, the address that of its GCS, and the token that of the head?"


def join(address: str | None, object_store: int, option: str = "cluster.address") -> None:
    """Join the cluster of the job or of the address, else start one here with so many bytes of object store.

    Raises ConfigError when the cluster does not answer, within 20 s, or this machine can't hold one;
    WorkerFailed when Ray's own processes do not come up in STARTS tries.
    """
    handler = signal.getsignal(signal.SIGTERM)
    cluster = find_cluster(address, option)
    if cluster:
        connect(*cluster)
    else:
        start_here(object_store)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # ray.init replaces it


def connect(address: str, field: str) -> None:
    """Raises ConfigError that names the address."""
    import ray
    from ray._private import services

    refuse_no_head(address, field)
    if not services.find_node_ids():
        remedy = "submit it there as a job (ray job submit)"
        raise ConfigError(f"{field}: {address} is up, but this machine is none of its nodes; {remedy}")
    try:
        ray.init(address=address, **QUIET)
    except Exception as error:
        raise ConfigError(f"{field}: {address} can't be joined: {_first_line(error)}; {REMEDY}") from None


def start_here(object_store: int) -> None:
    """Raises ConfigError, WorkerFailed."""
    import ray
    from ray._private import ray_constants

    folder = find_temporary_folder()
    os.environ[ALONE] = "0"  # for Ray's processes, and for those of a sweep that join them
    ray_constants.ENABLE_RAY_CLUSTER = False  # for this process, which has read it already
    options = QUIET | {
        "num_cpus": os.cpu_count(),
        "include_dashboard": False,
        "object_store_memory": object_store,
        "_node_ip_address": "127.0.0.1",
        "_temp_dir": str(folder),
    }
    for left in reversed(range(STARTS)):
        before = _child_processes()
        try:
            ray.init(address="local", **options)
            return
        # node.py raises bare ones: its processes have 30 s, and a cold disk is slower
        except Exception as error:
            ray.shutdown()
            _kill(_child_processes() - before)
            reason = _first_line(error)
        if not left:
            told = f"its logs are in {folder}. It waited for its own gcs_server and raylet: {reason}"
            raise WorkerFailed(f"Ray did not start on this machine in {STARTS} tries; {told}")
        print(f"Ray is slow to start ({reason}); trying again, {left} more at most", flush=True)


def name_temporary_folder() -> Path:
    """Where the sessions of a Ray that starts here lie: its own choice (RAY_TMPDIR, TMPDIR, /tmp), or a short
    path where those of its sockets would be too long."""
    asked = Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp").absolute()
    fits = len(os.fsencode(asked / "ray")) + SESSION <= SOCKET_PATH
    return asked / "ray" if fits else Path("/tmp") / f"frpo-ray-{os.getuid()}"


def find_temporary_folder() -> Path:
    """Raises ConfigError when it can't be written."""
    folder = name_temporary_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        remedy = "set RAY_TMPDIR to a short path that it can"
        raise ConfigError(f"TMPDIR: Ray can't write to {folder} ({error.strerror}); {remedy}") from None
    return folder


def refuse_unreachable(address: str, field: str) -> str:
    """The address as host:port. Imports Ray for `auto` alone.

    Raises ConfigError when it is none, or nobody takes a connection there.
    """
    host, port = parse_address(address, field)
    try:
        socket.create_connection((host, port), timeout=PROBE_S).close()
    except OSError as error:
        raise ConfigError(
            f"{field}: {address}: no connection ({error.strerror or error}); {REMEDY}"
        ) from None
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def refuse_no_head(address: str, field: str) -> None:
    """Raises ConfigError when no Ray head answers: ray.init itself would wait for minutes, silently, or for
    ever."""
    place = refuse_unreachable(address, field)

    import grpc
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    channel = init_grpc_channel(place, [("grpc.enable_http_proxy", 0)])
    gcs = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
    try:
        messages: Any = gcs_service_pb2  # generated: its names are made at import
        gcs.GetClusterId(messages.GetClusterIdRequest(), timeout=PROBE_S)
    except grpc.RpcError as error:
        code = error.code()
        if code is grpc.StatusCode.UNAUTHENTICATED:
            remedy = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to that of the head"
            raise ConfigError(f"{field}: {address} refuses the token; {remedy}") from None
        said = f"accepts connections and gives no answer of a Ray head within {PROBE_S:g} s ({code.name})"
        raise ConfigError(f"{field}: {address} {said}; {REMEDY}") from None
    finally:
        channel.close()


def parse_address(address: str, field: str) -> tuple[str, int]:
    """Host and port of a GCS; for `auto`, of the cluster that `ray start` noted on this machine. Raises
    ConfigError."""
    if address == "auto":
        from ray._private.services import canonicalize_bootstrap_address

        try:
            address = str(canonicalize_bootstrap_address("auto"))
        except ConnectionError:
            raise ConfigError(
                f"{field}: auto: no Ray cluster is noted on this machine; give the head's host:port"
            ) from None
    if "://" in address:
        whose = "Ray Client's" if address.startswith("ray://") else "the dashboard's"
        remedy = "give the GCS's, host:port (6379 unless the head says otherwise)"
        raise ConfigError(f"{field}: {address} is {whose} address; {remedy}")
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(
            f"{field}: {address!r} is no address of a Ray head; write host:port, such as 10.0.0.1:6379"
        )
    return host.strip("[]"), int(port)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _child_processes() -> set[Any]:
    import psutil

    return set(psutil.Process().children(recursive=True))


def _kill(processes: set[Any]) -> None:
    """Those of a start that failed: Ray leaves them to the end of this process."""
    import psutil

    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(list(processes), timeout=10)
