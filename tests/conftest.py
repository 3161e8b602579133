# SPDX-License-Identifier: Apache-2.0
"""Fixtures for every test."""

import gc
import importlib
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from backends import NAMES, Backend, OtherRounding, make_backend
from processor import capability, processor
from root import ROOT

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<end>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


# Files that take longest, the longest first.
LONG = "cuda_source emulation dense_cuda bench_svd bench_init bench_initialise trainer train_command bench gpu_check"
LONG = [f"test_{name}.py" for name in (*LONG.split(), "plan", "compiled")]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long comes first on every worker, so that all end at the same time.

    `--dist worksteal` deals out equal shares in this order; a worker that is through takes from the end of another's.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    files: dict[str, list[pytest.Item]] = {name: [] for name in LONG}
    rest = [item for item in items if files.get(item.path.name) is None]
    for item in items:
        if item.path.name in files:
            files[item.path.name].append(item)
    count = len(items)
    items.clear()
    for worker in range(workers):
        share = [item for name in LONG[worker::workers] for item in files[name]]
        wanted = max(0, (count - len(items)) // (workers - worker) - len(share))
        items += share + rest[:wanted]
        del rest[:wanted]
    items += rest


def pytest_report_header() -> list[str]:
    """What the outcome may depend on, for whoever reads a log."""
    return [f"processor: {processor()}", capability()]


def pytest_collection_finish() -> None:
    """What stays for the whole run, thousands of tests and all of torch, is not looked through at every collection."""
    gc.collect()
    gc.freeze()


@pytest.fixture(params=NAMES)
def backend(request: pytest.FixtureRequest) -> Backend:
    """The operators of: the plain-torch reference, the CPU kernels, the CUDA kernels emulated, and on a card."""
    return make_backend(request.param)


@pytest.fixture(scope="session", autouse=True)
def rounding() -> Iterator[None]:
    """OSORA_ROUNDING=SEED: every truncated SVD of the tests is one on a machine that rounds otherwise."""
    with pytest.MonkeyPatch.context() as change:
        if seed := os.environ.get("OSORA_ROUNDING"):
            change.setenv("OSORA_REQUIRE_EMULATION", "1")
            change.setattr("osora.svd.truncated.operators", OtherRounding(int(seed)))
        yield


@pytest.fixture(autouse=True)
def random_state() -> Iterator[None]:
    """Every test starts from seed 0 and leaves the random state as it found it."""
    python_state, torch_state = random.getstate(), torch.get_rng_state()
    random.seed(0)
    torch.manual_seed(0)
    yield
    random.setstate(python_state)
    torch.set_rng_state(torch_state)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN: whatever an operator leaves unwritten shows in its result."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(scope="module")
def bench() -> Iterator[Callable[[str], ModuleType]]:
    """The benchmarks' modules by name, on one thread."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as change:
        change.setenv("HF_HUB_OFFLINE", "1")
        change.syspath_prepend(ROOT / "bench")
        for name in ("init", "linear", "step", "svd"):
            importlib.import_module(name)
        gc.collect()  # they collect garbage before every repetition
        gc.freeze()
        yield importlib.import_module
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def example() -> Iterator[Callable[[str], ModuleType]]:
    """The example's modules by name."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the model is so small that threads would only wait for each other
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.syspath_prepend(ROOT / "examples")
        patch.setattr(importlib.import_module("evaluate"), "SAMPLE_TOKENS", 8)
        yield importlib.import_module
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Llama with a byte-level tokenizer."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("tiny") / "tiny-llama"
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
