# SPDX-License-Identifier: Apache-2.0
"""Two hundred adapters damaged by a seeded generator: each loads right or is refused, and none loads wrong.

Right means that the model gives, bit for bit, what the undamaged adapter gives.
"""

import json
import random
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import move_adapter
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import osora
from osora import AdapterError, OsoraConfig, SorsaConfig

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
EACH = 50  # mutations of each of the four adapters
HOSTILE: list[Any] = [
    None, True, False, 0, 1, 2, -1, 3, 2**31, 2**63, 10**18, 10**400, 0.0, -0.5, 0.5, 1e308, 1e-308, float("nan"),
    float("inf"), "", "0", "a", "osora", "SORSA", "OSORA", "LORA", "../../x", "/etc/passwd", "a/../b", "__class__",
    "inner", "inner.b", "float64", "bfloat16", "load", "\u0000", "é" * 99, "x" * 10_000, [], {}, [[]], [0.0] * 4,
    [None] * 4, {"a": 1}, ["a", "inner.c"], {"": []}, "(a+)+$", "[",
]  # fmt: skip


class Net(nn.Module):
    """Two layers of one shape, so that exchanged tensors fit."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.a = nn.Linear(9, 9)
        self.inner = nn.ModuleDict({"b": nn.Linear(9, 9), "c": nn.Linear(9, 7)})

    def forward(self, x: Tensor) -> Tensor:
        return self.inner["c"](self.inner["b"](self.a(x).tanh()).tanh())


# -- the text of the configuration -----------------------------------------------------------------------------------


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of everything within a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def parent_of(config: Any, path: tuple) -> Any:
    for key in path[:-1]:
        config = config[key]
    return config


def edit(folder: Path, change: Callable[[dict], object]) -> None:
    path = folder / CONFIG
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def replace_value(folder: Path, rng: random.Random) -> None:
    def change(config: dict) -> None:
        path = rng.choice(list(places(config)))
        parent_of(config, path)[path[-1]] = rng.choice(HOSTILE)

    edit(folder, change)


def change_a_number(folder: Path, rng: random.Random) -> None:
    """A little: what no check of types sees."""

    def change(config: dict) -> None:
        numbers = [
            path
            for path in places(config)
            if isinstance(parent_of(config, path)[path[-1]], int | float)
            and not isinstance(parent_of(config, path)[path[-1]], bool)
        ]
        path = rng.choice(numbers)
        old = parent_of(config, path)[path[-1]]
        parent_of(config, path)[path[-1]] = rng.choice([old + 1, old - 1, 2 * old, -old, old * 1.01])

    edit(folder, change)


def delete_value(folder: Path, rng: random.Random) -> None:
    def change(config: dict) -> None:
        path = rng.choice(list(places(config)))
        del parent_of(config, path)[path[-1]]

    edit(folder, change)


def exchange_values(folder: Path, rng: random.Random) -> None:
    """Between two modules: each digest is one, but of another."""

    def change(config: dict) -> None:
        first, second = rng.sample(config["osora"]["modules"], 2)
        key = rng.choice(list(first))
        first[key], second[key] = second[key], first[key]

    edit(folder, change)


def duplicate_key(folder: Path, rng: random.Random) -> None:
    """Of two equal keys the last counts; the first is what a careless reader may have checked."""
    path = folder / CONFIG
    text = path.read_text()
    ends = [i for i, letter in enumerate(text) if letter == "{"]
    keys = ["peft_type", "osora", "rank", "name", "modules", "r", "save_basis", "alpha", "format_version"]
    where = rng.choice(ends) + 1
    extra = f"{json.dumps(rng.choice(keys))}: {json.dumps(rng.choice(HOSTILE))},"
    path.write_text(text[:where] + extra + text[where:])


def hostile_text(folder: Path, rng: random.Random) -> None:
    path = folder / CONFIG
    text = path.read_bytes()
    deep = rng.choice([10, 900, 100_000])
    path.write_bytes(
        rng.choice(
            [
                b"[" * deep + b"]" * deep,
                b'{"osora":' * deep + b"0" + b"}" * deep,
                text.replace(b'"r": ', b'"r": ' + b"9" * rng.choice([20, 5000]), 1),
                b"\xef\xbb\xbf" + text,
                text.decode().encode("utf-16"),
                text + text,
                text.replace(b"osora", b"osor\\ud800"),
                b"",
                b"\x00" * 99,
            ]
        )
    )


def damage_bytes(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    where = rng.randrange(len(data))
    kind = rng.randrange(6)
    if kind == 0:
        del data[where:]
    elif kind == 1:
        data[where] ^= 1 << rng.randrange(8)
    elif kind == 2:
        data[where:where] = rng.randbytes(rng.randint(1, 40))
    elif kind == 3:
        del data[where : where + rng.randint(1, 40)]
    elif kind == 4:
        data[where : where + 16] = bytes(len(data[where : where + 16]))
    else:
        for _ in range(20):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def config_bytes(folder: Path, rng: random.Random) -> None:
    damage_bytes(folder / CONFIG, rng)


# -- the tensors -----------------------------------------------------------------------------------------------------


def tensor_bytes(folder: Path, rng: random.Random) -> None:
    damage_bytes(folder / TENSORS, rng)


def header_bytes(folder: Path, rng: random.Random) -> None:
    """The header's length or a number in it: offsets, shapes."""
    path = folder / TENSORS
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    if rng.random() < 0.4:
        path.write_bytes(rng.choice([0, 1, length - 1, length + 1, 2**40, 2**63 + 5]).to_bytes(8, "little") + data[8:])
        return
    header = json.loads(data[8 : 8 + length])
    wanted = [p for p in places(header) if "__metadata__" not in p and not isinstance(p[-1], str)]
    where = rng.choice(wanted)
    parent_of(header, where)[where[-1]] = rng.choice([0, 1, -1, 2**40, 2**64, 10**30, 7, 9, 4, None, "F32"])
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def tensors_changed(folder: Path, rng: random.Random) -> None:
    path = folder / TENSORS
    tensors = load_file(path)
    key, other = rng.sample(sorted(tensors), 2)
    old = tensors[key]
    kind = rng.randrange(12)
    if kind == 0:
        del tensors[key]
    elif kind == 1:
        tensors[key], tensors[other] = tensors[other], old
    elif kind == 2:
        tensors[rng.choice(["", "a", "../x", key + ".more", key.upper(), "__metadata"])] = tensors.pop(key)
    elif kind == 3:
        tensors["more"] = old.clone()
    elif kind == 4:
        tensors[key] = old.t().contiguous() if old.dim() == 2 else old[None]
    elif kind == 5:
        tensors[key] = old.to(rng.choice([torch.float64, torch.bfloat16, torch.int32, torch.complex64, torch.bool]))
    elif kind == 6:
        old.view(-1)[rng.randrange(old.numel())] = rng.choice([float("nan"), float("inf"), -float("inf"), 1e30])
    elif kind == 7:
        tensors[key] = -old
    elif kind == 8:
        tensors[key] = old[: rng.randrange(len(old))].clone()
    elif kind == 9:
        old.view(-1)[rng.randrange(old.numel())] += 1e-3
    elif kind == 10:
        tensors[key] = old.flip(0)
    else:
        same = [k for k in sorted(tensors) if k != key and tensors[k].shape == old.shape]
        partner = rng.choice(same or [other])
        tensors[key], tensors[partner] = tensors[partner], old
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def file_gone(folder: Path, rng: random.Random) -> None:
    path = folder / rng.choice([CONFIG, TENSORS])
    path.unlink()
    if rng.random() < 0.5:
        path.mkdir()


def other_file(folder: Path, rng: random.Random) -> None:
    """One file of another, equally good adapter."""
    name = rng.choice([CONFIG, TENSORS])
    shutil.copy(folder.parent / "other" / name, folder / name)


FAMILIES = [
    replace_value, replace_value, change_a_number, change_a_number, delete_value, exchange_values, duplicate_key,
    hostile_text, config_bytes, tensor_bytes, header_bytes, tensors_changed, tensors_changed, file_gone, other_file,
]  # fmt: skip


def load(folder: Path, x: Tensor) -> Tensor | Exception:
    """The outputs with the adapter, or the refusal, after which the model must be as it was."""
    model = Net().eval()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        with torch.no_grad():
            return osora.load_adapter(model, folder, progress=False)(x)
    except (AdapterError, FileNotFoundError) as error:
        assert {type(module) for module in model.modules()} == {Net, nn.Linear, nn.ModuleDict}
        assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
        assert str(error) and len(str(error)) < 30_000
        return error


FOUND = {
    "an int beyond every float as a residual": lambda c: c["osora"]["modules"][1].update(max_residual=10**400),
    "an int beyond every float as an option": lambda c: c.update(dropout=10**400),
    "a residual that is no number": lambda c: c["osora"]["modules"][0].update(max_residual=float("nan")),
    "another scale": lambda c: c.update(alpha=2.9),
    "no scale": lambda c: c.update(alpha=None),
}


@pytest.mark.parametrize("found", FOUND)
def test_what_longer_runs_of_the_generator_have_found(found, tmp_path):
    model = osora.attach(Net(), SorsaConfig(r=4, alpha=3.0))
    osora.save_adapter(move_adapter(model), tmp_path)
    edit(tmp_path, FOUND[found])
    with pytest.raises(AdapterError):
        osora.load_adapter(Net(), tmp_path)


@pytest.mark.parametrize("save_basis", [True, False], ids=["basis", "no basis"])
@pytest.mark.parametrize("method", ["osora", "sorsa"])
def test_damaged_adapters_load_right_or_are_refused(method, save_basis, tmp_path):
    kind = {"osora": OsoraConfig, "sorsa": SorsaConfig}[method]
    options: dict[str, Any] = {"r": 4, "tol": 1e-4} | ({"alpha": 3.0} if method == "sorsa" else {})
    x = torch.randn(5, 9)
    for seed, name in enumerate(("good", "other")):
        model = osora.attach(Net().eval(), kind(**options))
        torch.manual_seed(seed)
        move_adapter(model, 0.2)
        osora.save_adapter(model, tmp_path / name, save_basis=save_basis)
    wish, base = load(tmp_path / "good", x), Net()(x).detach()
    other = load(tmp_path / "other", x)
    assert isinstance(wish, Tensor) and isinstance(other, Tensor)
    assert (wish - base).abs().max() > 0.05 and (wish - other).abs().max() > 0.05

    met: Counter[str] = Counter()
    for seed in range(EACH):
        rng = random.Random(f"{method} {save_basis} {seed}")
        damage = FAMILIES[seed % len(FAMILIES)]
        folder = tmp_path / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "good", folder)
        damage(folder, rng)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # an honest one may come with a right load
            try:
                found = load(folder, x)
            except Exception as error:
                raise AssertionError(f"{damage.__name__}, seed {seed}: {type(error).__name__}: {error}") from error
        met["refused" if isinstance(found, Exception) else "loaded"] += 1
        met[damage.__name__] += 1
        if isinstance(found, Tensor):
            # The same decomposition gives the same bits; a damaged tol or seed gives another one, as exact as it says.
            close = torch.equal(found, wish) if save_basis else torch.allclose(found, wish, rtol=0, atol=1e-4)
            assert close, f"{damage.__name__}, seed {seed}: loads wrong, off by {(found - wish).abs().max():.1e}"
        try:
            osora.adapter_info(folder)
        except (AdapterError, FileNotFoundError):
            assert isinstance(found, Exception), f"{damage.__name__}, seed {seed}: loaded, and refused by adapter_info"
        except Exception as error:
            raise AssertionError(f"{damage.__name__}, seed {seed}: adapter_info: {error!r}") from error
    assert met["refused"] > EACH / 2 and met["loaded"] > 2, met
    assert all(met[damage.__name__] for damage in FAMILIES)
