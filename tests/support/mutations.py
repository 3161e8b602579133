# SPDX-License-Identifier: Apache-2.0
"""Adapters, and ways to damage one of them."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class Net(nn.Module):
    """Two layers of one shape, so that exchanged tensors fit."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.a = nn.Linear(9, 9)
        self.inner = nn.ModuleDict({"b": nn.Linear(9, 9), "c": nn.Linear(9, 7)})

    def forward(self, x: Tensor) -> Tensor:
        return self.inner["c"](self.inner["b"](self.a(x).tanh()).tanh())


CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


HOSTILE: list[Any] = [
    None, True, False, 0, 1, 2, -1, 3, 2**31, 2**63, 10**18, 10**400, 0.0, -0.5, 0.5, 1e308, 1e-308, float("nan"),
    float("inf"), "", "0", "a", "osora", "SORSA", "OSORA", "LORA", "../../x", "/etc/passwd", "a/../b", "__class__",
    "inner", "inner.b", "float64", "bfloat16", "load", "\u0000", "é" * 99, "x" * 10_000, [], {}, [[]], [0.0] * 4,
    [None] * 4, {"a": 1}, ["a", "inner.c"], {"": []}, "(a+)+$", "[",
]  # fmt: skip


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
