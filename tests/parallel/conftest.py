import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def compiles_fast():
    """Compiling is what these tests would spend their time on."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    # JAX keeps what was compiled so and would go on using it, in tests that compare bits as well.
    jax.clear_caches()
