# SPDX-License-Identifier: Apache-2.0
"""How many weights osora.initialise holds at a time, and what taking their evidence adds."""

import hashlib
import mmap
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import tiny_llama
from safetensors.torch import save_file

import osora
from osora.files.base_folder import BaseFolder
from osora.initialisation import layers, schedule, work
from osora.layers import fingerprint


@pytest.mark.parametrize("slow", ["write_layer", "decompose", None])
def test_three_units_are_held_at_the_most(tmp_path, monkeypatch, slow):
    """One is being read, one waits, one is in work; what is to be written holds none, however slow the disk is."""
    tiny_llama().save_pretrained(tmp_path / "base")
    monkeypatch.setattr(schedule, "CPU_ENTRIES", 1)  # a unit is a layer
    weights, held, read = [], [], work.Work.read

    def watched(self, task):
        found = read(self, task)
        weights.extend(weakref.ref(each.values) for each in found)
        held.append(sum(each() is not None for each in weights))
        return found

    monkeypatch.setattr(work.Work, "read", watched)
    if slow is not None:
        right = getattr(work, slow)
        monkeypatch.setattr(work, slow, lambda *a, **k: time.sleep(0.03) or right(*a, **k))
    done = osora.initialise(tmp_path / "base", tmp_path / "basis", osora.OsoraConfig(r=4), progress=False)
    assert len(done.computed) == len(held) == 14 and max(held) <= 3
    if slow == "decompose":
        assert max(held) == 3
    assert not any(each() is not None for each in weights)


class Unwilling(mmap.mmap):
    """Of a system without huge pages."""

    def madvise(self, *arguments):
        raise OSError(22, "Invalid argument")


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64])
@pytest.mark.parametrize("system", ["huge", "unwilling", "unknown"])
def test_a_weight_is_the_same_in_any_pages(tmp_path, monkeypatch, system, dtype):
    weights = {"odd": torch.randn(1031, 2053).bfloat16(), "small": torch.randn(3, 5).bfloat16()}
    save_file(weights, tmp_path / "model.safetensors")
    monkeypatch.setattr(layers, "HUGE", 31)
    if system == "unwilling":
        monkeypatch.setattr(mmap, "mmap", Unwilling)
    elif system == "unknown":
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE")
    base = BaseFolder(tmp_path)
    for key, weight in weights.items():
        found = layers.read_stored(tmp_path / "model.safetensors", key, base.tensors[key], dtype)
        assert found.dtype == (dtype or torch.bfloat16) and torch.equal(found, weight.to(found.dtype))
        assert found.is_contiguous() and found.data_ptr() % 16 == 0
        found.mul_(2)  # its own memory: what is on the disk stays
        assert torch.equal(layers.read_stored(tmp_path / "model.safetensors", key, base.tensors[key], None), weight)


def signs(label: str, size: int) -> torch.Tensor:
    """The bits of SHAKE-256 of the label as ±1 (docs/format.md)."""
    data = hashlib.shake_256(label.encode()).digest((size + 7) // 8)
    bits = [byte >> 7 - place & 1 for byte in data for place in range(8)]
    return torch.tensor(bits[:size], dtype=torch.float64) * 2 - 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (7, 300_001), (2049, 1031), (0, 5), (5, 0)])
def test_evidence_is_that_of_the_whole_weight(shape, dtype):
    """However it is taken in parts: the digest of all values, and the sketch by one product."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    digest, sketch = fingerprint.weight_evidence(weight, "layer")
    exact = weight.double() if dtype == torch.float64 else weight.float()
    if dtype == torch.float64 and torch.equal(weight.float().double(), weight):
        exact = weight.float()
    assert digest == hashlib.sha256(exact.numpy().tobytes()).hexdigest() == fingerprint.weight_digest(weight)
    g, h = (
        torch.stack([signs(f"layer|{side}{i}", size) for i in range(fingerprint.PROBES)], 1)
        for side, size in (("g", shape[0]), ("h", shape[1]))
    )
    true = ((g.t() @ weight.double()) @ h).diagonal()
    torch.testing.assert_close(torch.tensor(sketch, dtype=torch.float64), true, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(torch.tensor(fingerprint.weight_sketch(weight, "layer")), torch.tensor(sketch))


def test_evidence_takes_no_second_weight():
    """Of its parts few are in memory, in the thread of a reader too, whose heap is another; where the system tells."""
    if not Path("/proc/self/status").exists():
        pytest.skip("this system does not tell")
    weight, grown = torch.randn(4096, 4096).bfloat16(), []  # 34 MB; 67 MB in float32

    def kept() -> int:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))

    class Watched:
        """A digest that looks at the memory whenever it is given a part."""

        def __init__(self) -> None:
            self.digest, self.before = hashlib.sha256(), kept()

        def update(self, data) -> None:
            grown.append(kept() - self.before)
            self.digest.update(data)

        def hexdigest(self) -> str:
            return self.digest.hexdigest()

    with pytest.MonkeyPatch.context() as change:
        change.setattr(fingerprint, "hashlib", SimpleNamespace(sha256=Watched, shake_256=hashlib.shake_256))
        thread = threading.Thread(target=fingerprint.weight_evidence, args=(weight, "layer"))
        thread.start()
        thread.join()
    assert len(grown) > 8 and max(grown) < 20e6
