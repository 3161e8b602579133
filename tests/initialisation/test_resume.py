# SPDX-License-Identifier: Apache-2.0
"""Killed at any moment, alone or beside others: the same call goes on, and ends with the same bytes."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
from checkpoints import Stack, contents, on_meta, write_checkpoint
from processes import CONTEXT, SECONDS

import osora
from osora.initialisation import work

BLOCKS, PAUSE = 6, 0.02
# Ranks of their own make a unit of each layer.
CONFIG = osora.OsoraConfig(
    r=4, rank_pattern={rf"blocks\.{b}\.{n}": 1 + b for b in range(BLOCKS) for n in ("up", "down", "side")}
)
LAYERS = 3 * BLOCKS


def make(base: str, out: str, part: str | None, log: str) -> None:
    """In a process of its own: slowly, and every layer that is decomposed is a line of the log."""
    compute = work.Work.compute

    def slowly(self: work.Work, task: work.Task, weights: list) -> list:
        with open(log, "a", encoding="utf-8") as file:
            file.writelines(f"{layer.name}\n" for layer in task.layers)
        time.sleep(PAUSE)
        return compute(self, task, weights)

    work.Work.compute = slowly  # type: ignore[method-assign]
    osora.initialise(base, out, CONFIG, model=on_meta(blocks=BLOCKS), part=part, progress=False)


def started(base: Path, out: Path, part: str | None, log: Path):
    process = CONTEXT.Process(target=make, args=(str(base), str(out), part, str(log)))
    process.start()
    return process


def finished(out: Path) -> set[str]:
    return {path.name.removesuffix(".safetensors") for path in out.glob("*.safetensors")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[Path, dict[str, bytes]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    base = write_checkpoint(Stack(blocks=BLOCKS), folder / "base")
    osora.initialise(base, folder / "basis", CONFIG, model=on_meta(blocks=BLOCKS), progress=False)
    return base, contents(folder / "basis")


def moment(out: Path, chance: random.Random) -> None:
    """Wait until so many layers are there, and a little more."""
    wanted, deadline = chance.randrange(LAYERS + 1), time.monotonic() + 60
    while len(finished(out)) < wanted and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(chance.random() * 2 * PAUSE)


def check_killed(seed: int, parts: list[str | None], undisturbed, tmp_path: Path) -> None:
    base, wanted = undisturbed
    chance, out, log = random.Random(seed), tmp_path / "basis", tmp_path / "log"
    for again in range(2):
        before = finished(out)
        log.write_text("")
        processes = [started(base, out, part, log) for part in parts]
        moment(out, chance)
        if chance.random() < 0.5 and again == 0 and len(parts) > 1:
            processes[0].kill()  # the others take over what it had
            processes[0].join()
            for process in processes[1:]:
                process.join(SECONDS)
                assert process.exitcode == 0
            assert contents(out) == wanted
        for process in processes:
            process.kill()
            process.join()
        assert not before & set(log.read_text().split()), "a layer that was there is not made again"
        torn = [name for name in finished(out) if not (out / f"{name}.safetensors").read_bytes()]
        assert not torn
    before = finished(out)
    done = osora.initialise(base, out, CONFIG, model=on_meta(blocks=BLOCKS), progress=False)
    assert done.kept == len(before) and set(done.computed) == set(finished(out)) - before
    assert contents(out) == wanted, "and nothing else is left in the folder"


@pytest.mark.parametrize("seed", [*range(2), *(pytest.param(n, marks=pytest.mark.slow) for n in range(2, 8))])
def test_killed_alone(seed, undisturbed, tmp_path):
    check_killed(seed, [None], undisturbed, tmp_path)


@pytest.mark.parametrize("seed", [*range(2), *(pytest.param(n, marks=pytest.mark.slow) for n in range(2, 8))])
def test_killed_beside_another(seed, undisturbed, tmp_path):
    check_killed(100 + seed, ["1/2", "2/2"], undisturbed, tmp_path)


def test_two_processes_share_the_work(undisturbed, tmp_path):
    base, wanted = undisturbed
    logs = [tmp_path / "one", tmp_path / "two"]
    processes = [started(base, tmp_path / "basis", f"{n + 1}/2", log) for n, log in enumerate(logs)]
    for process in processes:
        process.join(SECONDS)
        assert process.exitcode == 0
    done = [set(log.read_text().split()) for log in logs if log.exists()]
    assert contents(tmp_path / "basis") == wanted
    assert not set.intersection(*done) or len(done) == 1, "nothing is made twice"
    assert sum(map(len, done)) == LAYERS


def test_one_that_stands_still_is_waited_for(undisturbed, tmp_path):
    """It lives: nobody takes what it has; when it goes on, all is there, once."""
    base, wanted = undisturbed
    out, log = tmp_path / "basis", tmp_path / "log"
    first = started(base, out, "1/2", log)
    deadline = time.monotonic() + 60
    while not finished(out) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(first.pid, signal.SIGSTOP)
    try:
        other = started(base, out, "2/2", tmp_path / "other")
        while len(finished(out)) < LAYERS - 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert other.is_alive() or finished(out) == LAYERS
    finally:
        os.kill(first.pid, signal.SIGCONT)
    for process in (first, other):
        process.join(SECONDS)
        assert process.exitcode == 0
    assert contents(out) == wanted
    made = log.read_text().split() + (tmp_path / "other").read_text().split()
    assert sorted(made) == sorted(set(made))


def test_a_damaged_layer_is_made_again(undisturbed, tmp_path):
    base, wanted = undisturbed
    out = tmp_path / "basis"
    osora.initialise(base, out, CONFIG, model=on_meta(blocks=BLOCKS), progress=False)
    path = out / "blocks.2.up.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 16
    path.write_bytes(data)
    with pytest.raises(osora.BasisError, match=r"blocks.2.up.safetensors is damaged"):
        osora.attach(Stack(blocks=BLOCKS), CONFIG, basis=out)
    with pytest.warns(RuntimeWarning, match=r"blocks.2.up.safetensors is damaged.*it is made again"):
        done = osora.initialise(base, out, CONFIG, model=on_meta(blocks=BLOCKS), progress=False)
    assert done.computed == ("blocks.2.up",) and contents(out) == wanted


def test_torchruns_ranks_are_parts(undisturbed, tmp_path, monkeypatch):
    base, wanted = undisturbed
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    done = osora.initialise(base, tmp_path / "basis", CONFIG, model=on_meta(blocks=BLOCKS), progress=False)
    assert len(done.computed) == LAYERS and contents(tmp_path / "basis") == wanted


def test_two_bases_do_not_share_a_folder(undisturbed, tmp_path):
    """Of equal shapes and names: the one that comes second is refused, whatever part it is."""
    base, _ = undisturbed
    other = write_checkpoint(Stack(blocks=BLOCKS, seed=77), tmp_path / "other")
    out, log = tmp_path / "basis", tmp_path / "log"
    process = started(base, out, "1/2", log)
    deadline = time.monotonic() + 60
    while len(finished(out)) < 4 and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    process.join()
    before = contents(out)
    for part in ("1/2", "2/2", None):
        with pytest.raises(osora.BasisError, match="was begun with another base, other options"):
            osora.initialise(other, out, CONFIG, model=on_meta(blocks=BLOCKS), part=part, progress=False)
    assert contents(out) == before


def test_killed_while_the_index_is_written(undisturbed, tmp_path, monkeypatch):
    base, wanted = undisturbed
    out = tmp_path / "basis"
    real = os.replace

    def stop(source: object, target: object) -> None:
        if str(target).endswith("basis.json"):
            raise KeyboardInterrupt
        real(source, target)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        osora.initialise(base, out, CONFIG, model=on_meta(blocks=BLOCKS), progress=False)
    monkeypatch.undo()
    (out / ".unfinished/.basis.json.abc").write_text("{")  # what kill -9 would have left
    (out / ".DS_Store").write_text("")
    osora.initialise(base, out, CONFIG, model=on_meta(blocks=BLOCKS), progress=False)
    assert contents(out) == wanted | {".DS_Store": b""}


def test_a_damaged_index_or_request_has_a_cure(undisturbed, tmp_path):
    base, wanted = undisturbed
    out = tmp_path / "basis"
    osora.initialise(base, out, CONFIG, model=on_meta(blocks=BLOCKS), progress=False)
    for text in ("[", wanted["basis.json"].decode().replace('"seed":0', '"seed":1', 1)):
        (out / "basis.json").write_text(text)
        with pytest.raises(osora.BasisError, match=r"is damaged.*run the same osora init again"):
            osora.attach(Stack(blocks=BLOCKS), CONFIG, basis=out)
        with pytest.warns(RuntimeWarning, match="the index is made again"):
            done = osora.initialise(base, out, CONFIG, model=on_meta(blocks=BLOCKS), progress=False)
        assert done.kept == LAYERS and contents(out) == wanted
    for content in (b"", b"\xff\xfe\x00", b"[" * 100_000):
        (out / ".unfinished").mkdir()
        (out / ".unfinished/request.json").write_bytes(content)
        with pytest.raises(osora.BasisError, match=r"request.json is damaged .*: remove it"):
            osora.initialise(base, out, CONFIG, model=on_meta(blocks=BLOCKS), progress=False)
        (out / ".unfinished/request.json").unlink()
        osora.initialise(base, out, CONFIG, model=on_meta(blocks=BLOCKS), progress=False)
        assert contents(out) == wanted
    one, other = out / "blocks.0.up.safetensors", out / "blocks.1.up.safetensors"
    swapped = one.read_bytes(), other.read_bytes()
    other.write_bytes(swapped[0])
    one.write_bytes(swapped[1])
    with pytest.warns(RuntimeWarning, match=r"is a file of blocks.[01].up: it is made again"):
        osora.initialise(base, out, CONFIG, model=on_meta(blocks=BLOCKS), progress=False)
    assert contents(out) == wanted
