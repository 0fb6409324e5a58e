"""The reward service: which rewards are served, to whom, and within which limits."""

from __future__ import annotations

import hashlib
import ipaddress
import os
import re
from typing import Annotated

from pydantic import Field, model_validator

from frpo.config.rewards import Combine, RewardConfig, ServeReward, check_combination
from frpo.config.section import NAME, ConfigError, NotNegative, Positive, PositiveFloat, Section

ROUTE = r"^(/|(/[A-Za-z0-9][A-Za-z0-9._~-]*)+)$"
BEARER = re.compile(r"[A-Za-z0-9._~+/-]+=*")
"""What a header can carry (RFC 6750, 2.1)."""

TOKEN_ENV = "FRPO_SERVICE_TOKEN"


class ReplicaConfig(Section):
    min_replicas: Positive = 1
    """Processes of each reward, always up."""
    max_replicas: Positive = 1
    """Most processes of each reward; Serve adds them as requests wait."""
    num_cpus: NotNegative = 0.5
    """CPUs that Ray reserves for each."""
    num_gpus: NotNegative = 0.0
    """GPUs, or a share of one, for each."""
    num_threads: Positive = 1
    """CPU threads of each."""
    max_batch_requests: Positive = 64
    """Requests that are scored together."""
    batch_wait_s: NotNegative = 0.005
    """How long the first request of a batch waits for others, seconds."""
    max_queued_requests: Positive = 256
    """Requests that may wait in a process, and as many before all of a reward's; more are answered 503 at
    once."""


class LimitsConfig(Section):
    max_body_mib: PositiveFloat = 8.0
    """Largest request body; larger ones are answered 413."""
    max_items: Positive = 1024
    """Most completions in one request (422)."""
    max_characters: Positive = 200_000
    """Longest prompt and completion of one item together, characters (422)."""
    max_items_in_flight: Positive = 16_384
    """Completions being scored for all callers; beyond them requests are answered 429."""
    timeout_s: PositiveFloat = 60.0
    """Longest wait for the scores of a request, seconds (504)."""


class ServiceConfig(Section):
    name: str = Field("frpo-rewards", pattern=NAME)
    """Name of the Serve application; several services in one cluster have a name and a route_prefix each."""
    route_prefix: str = Field("/", pattern=ROUTE)
    """Path under which it answers, such as /safety; the services of a cluster share host and port."""
    rewards: tuple[RewardConfig, ...] = Field(min_length=1)
    """The rewards by name; a request that names none is scored by all that apply to its task."""
    combine: Combine = "weighted"
    """The score: weighted sum, weighted mean, or product of those rewards."""
    host: str = "127.0.0.1"
    """Address to bind. Anything but loopback, and every cluster that is joined, needs a token."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    """Port."""
    token_env: str = TOKEN_ENV
    """Environment variable, of the process that starts the service, with the bearer token that callers must
    send; "" asks for none, on loopback alone."""
    replicas: ReplicaConfig = ReplicaConfig()
    """Processes behind each reward."""
    limits: LimitsConfig = LimitsConfig()
    """What one request may ask for."""

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}{self.route_prefix.rstrip('/')}"

    @property
    def is_loopback(self) -> bool:
        return is_loopback(self.host)

    @model_validator(mode="after")
    def _consistent(self) -> ServiceConfig:
        check_combination(self.rewards, self.combine)
        asking = [reward.name for reward in self.rewards if isinstance(reward, ServeReward)]
        if asking:
            raise ValueError(
                f"rewards.{asking[0]}.kind: a service does not ask another by handle; name its rewards here, "
                "or use kind: url"
            )
        if self.replicas.max_replicas < self.replicas.min_replicas:
            raise ValueError(
                f"replicas.max_replicas: {self.replicas.max_replicas} is below min_replicas "
                f"{self.replicas.min_replicas}"
            )
        if not self.is_loopback and not self.token_env:
            raise ValueError(
                f"token_env: '' serves everybody who reaches {self.host}; name an environment variable that "
                "holds a token"
            )
        return self


def is_loopback(host: str) -> bool:
    """Whether nobody else reaches what listens there: of names localhost alone, since those below it are
    whatever the resolver says."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def digest_of_token(name: str) -> bytes | None:
    """SHA-256 of the token in an environment variable, 32 bytes; None where it is not set. Raises ConfigError
    for one that a header cannot carry."""
    token = os.environ.get(name, "").strip() if name else ""
    if not token:
        return None
    if not BEARER.fullmatch(token):
        raise ConfigError(
            f"token_env: {name} holds characters that no bearer token has; use letters, digits and -._~+/="
        )
    return hashlib.sha256(token.encode()).digest()


def token_digest(config: ServiceConfig, *, joined: bool) -> bytes | None:
    """SHA-256 of the token in this process's environment, 32 bytes; None where the service may go without
    one.

    That is by `token_env: ""`, and with a variable that the file does not name and that is not set, where
    frpo serve starts Ray itself on loopback. `joined`: whether it runs in a cluster that others use too.
    Raises ConfigError when a token is missing, or is none that a header can carry.
    """
    name = config.token_env
    if digest := digest_of_token(name):
        return digest
    if name and (joined or not config.is_loopback or "token_env" in config.model_fields_set):
        where = "a cluster that others reach" if joined else config.host
        remedy = "export it where you start the service"
        if config.is_loopback:
            remedy += ", or write token_env: '' to serve everybody"
        raise ConfigError(
            f"token_env: {name} is not set, and the service on {where} must know its token; {remedy}"
        )
    return None
