"""What several tests of generation need."""

import pytest

from transom.models.llm import LLM


@pytest.fixture
def ran(monkeypatch):
    """The number of tokens per row of every forward call of a model so far."""
    calls, forward = [], LLM.forward

    def counting(self, inputs, *args, **options):
        calls.append(inputs.tokens.size(1))
        return forward(self, inputs, *args, **options)

    monkeypatch.setattr(LLM, "forward", counting)
    return calls
