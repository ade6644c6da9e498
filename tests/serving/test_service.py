"""What the server's worker does before it serves."""

from safemoe_jax.inference import engine
from safemoe_jax.inference.engine import Engine
from safemoe_jax.serving import service
from safemoe_jax.serving.service import Limits

LIMITS = Limits(slots=3, max_queue=40, max_length=400, max_tokens=300)


def test_the_largest_pass_is_tried_before_anybody_waits(loaded, monkeypatch):
    """Else the first many long prompts at once would find out whether they fit into memory."""
    monkeypatch.setitem(engine._TOKENS_AT_ONCE, "cpu", 2 * LIMITS.max_length + 112)
    read = []

    class Watched(Engine):
        def _prefill(self, group, slots, rows, length):
            read.append((rows, length))
            super()._prefill(group, slots, rows, length)

    monkeypatch.setattr(service, "Engine", Watched)
    service._work(loaded, LIMITS, lambda engine: None)
    longest = engine.bucket(LIMITS.max_length - 1)
    assert read == [(2, longest), (1, longest), (1, engine.bucket(1))]
