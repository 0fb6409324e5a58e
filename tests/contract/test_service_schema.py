"""The service against its own OpenAPI document: whatever a request holds, the answer is one that the document
knows, never a 500."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from frpo.service.app import make_app
from tests.support.service import Here, config

CONFIG = config(
    rewards=[
        {"kind": "function", "name": "short", "function": "frpo.rewards:length"},
        {"kind": "judge", "name": "judge", "path": "org/judge", "template": "strongreject"},
    ],
    limits={"max_items": 8},
)
schema = schemathesis.openapi.from_asgi("/openapi.json", make_app(CONFIG, Here(CONFIG), None))


@pytest.mark.long
@schema.parametrize()
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_request_breaks_it(case: schemathesis.Case) -> None:
    # limits and the names of rewards are the operator's, so a request may fit the schema and still be
    # answered 422
    case.call_and_validate(excluded_checks=[positive_data_acceptance])
