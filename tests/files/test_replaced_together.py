# SPDX-License-Identifier: Apache-2.0
"""An adapter's two files are one thing: the renames that make a save are all done, or none, and never mixed."""

import os
import threading
from pathlib import Path

import peft
import pytest
import torch
from torch import nn

import osora
import osora.files.together as together
import osora.peft
from osora.files.together import replace_together

pytestmark = pytest.mark.filterwarnings("ignore")  # of PEFT's, of a model without a name


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(9, 7), nn.Linear(7, 5))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def model_of(api: str, seed: int) -> nn.Module:
    if api == "native":
        model = osora.attach(small(), osora.OsoraConfig(r=3))
    else:
        model = peft.get_peft_model(small(), osora.peft.OsoraConfig(r=3, target_modules="all-linear"))
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape))
    return model


def save(model: nn.Module, folder: Path) -> None:
    osora.save_adapter(model, folder) if not hasattr(model, "peft_config") else model.save_pretrained(folder)


def load(api: str, folder: Path) -> nn.Module:
    return osora.load_adapter(small(), folder) if api == "native" else peft.PeftModel.from_pretrained(small(), folder)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, MemoryError])
@pytest.mark.parametrize("there", [True, False], ids=["over another", "new"])
@pytest.mark.parametrize("api", ["native", "peft"])
def test_what_comes_between_the_renames_leaves_the_old_adapter(api, there, error, tmp_path, monkeypatch):
    model, real = model_of(api, 1), os.replace
    if there:
        save(model_of(api, 2), tmp_path)
    before = contents(tmp_path)
    for at in range(1, 3 if api == "native" else 4):  # PEFT's has a card, too
        count = 0

        def stopped(old, new, at=at):
            nonlocal count
            count += ".before." not in str(old)
            if count == at:
                count += 1
                raise error
            return real(old, new)

        monkeypatch.setattr(together.os, "replace", stopped)
        with pytest.raises(error):
            save(model, tmp_path)
        monkeypatch.setattr(together.os, "replace", real)
        assert contents(tmp_path) == before, at
    save(model, tmp_path)
    load(api, tmp_path)
    assert contents(tmp_path) != before and not [name for name in contents(tmp_path) if name.startswith(".")]


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "no hard links"])
def test_old_files_of_every_kind(links, tmp_path, monkeypatch):
    if not links:
        monkeypatch.setattr(together.os, "link", lambda *_: (_ for _ in ()).throw(OSError(95, "not here")))
    (tmp_path / "target").write_text("behind a link")
    (tmp_path / "a").symlink_to("target")
    (tmp_path / "b").write_text("old b")
    (tmp_path / "d").mkdir()
    news = {}
    for name in ("a", "b", "c", "d"):
        (tmp_path / f"new {name}").write_text(f"new {name}")
        news[tmp_path / name] = tmp_path / f"new {name}"
    with pytest.raises(OSError, match="d"):  # a folder is in the way
        replace_together(news)
    assert os.readlink(tmp_path / "a") == "target" and (tmp_path / "b").read_text() == "old b"
    assert not (tmp_path / "c").exists() and (tmp_path / "d").is_dir() and not list(tmp_path.glob(".*"))
    news = {tmp_path / name: tmp_path / f"again {name}" for name in ("a", "b", "c")}
    for place, new in news.items():
        new.write_text(f"new {place.name}")
    replace_together(news)
    assert [(tmp_path / name).read_text() for name in ("a", "b", "c")] == ["new a", "new b", "new c"]
    assert (tmp_path / "target").read_text() == "behind a link" and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("api", ["native", "peft"])
def test_two_savers_of_one_folder_never_mix(api, tmp_path, monkeypatch):
    """Each waits between its renames until the other one had every chance to come between."""
    models, real, met = [model_of(api, seed) for seed in (1, 2)], os.replace, threading.Barrier(2)

    def slow(old, new):
        real(old, new)
        if str(new).endswith(".safetensors"):
            try:
                met.wait(0.3)
            except threading.BrokenBarrierError:
                met.reset()

    monkeypatch.setattr(together.os, "replace", slow)
    errors: list[BaseException] = []

    def run(model: nn.Module) -> None:
        try:
            save(model, tmp_path)
        except BaseException as error:
            errors.append(error)

    for _ in range(3):
        threads = [threading.Thread(target=run, args=(model,)) for model in models]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        load(api, tmp_path)


def test_who_waits_too_long_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(together, "_WAIT", 0.05)
    (tmp_path / "new").write_text("x")
    with together._locked(tmp_path):
        with pytest.raises(TimeoutError, match=r"another process has been replacing files in .* nothing was replaced"):
            replace_together({tmp_path / "place": tmp_path / "new"})
    assert (tmp_path / "new").read_text() == "x" and not (tmp_path / "place").exists()
    replace_together({tmp_path / "place": tmp_path / "new"})
    assert (tmp_path / "place").read_text() == "x"


def test_what_is_no_folder(tmp_path, monkeypatch):
    osora.save_adapter(model_of("native", 1), tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="the folder's name is empty"):
        osora.adapter_info("")
    assert osora.adapter_info(".").modules
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json is a file, and an adapter is a folder"):
        osora.adapter_info(tmp_path / "adapter_config.json")
