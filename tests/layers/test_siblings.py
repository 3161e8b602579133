# SPDX-License-Identifier: Apache-2.0
"""Who may read one x: a guess from names and shapes, and what becomes of a wrong one."""

import torch
from layer_makers import make_layer

from osora.layers.together import Group, Known, Shape, siblings

CPU = torch.device("cpu")


def shapes(**of: int | Shape) -> dict[str, Shape]:
    plain = {name.replace("__", "."): size for name, size in of.items()}
    return {n: s if isinstance(s, Shape) else Shape(s, torch.float32, CPU) for n, s in plain.items()}


def test_siblings_have_one_parent_and_one_shape():
    found = siblings(
        shapes(
            a__q_proj=8, a__k_proj=8, a__v_proj=8, a__o_proj=6, b__q_proj=8, b__k_proj=8, mlp__up=8, mlp__down=20, top=8
        )
    )
    assert found == [["a.q_proj", "a.k_proj", "a.v_proj"], ["b.q_proj", "b.k_proj"]]


def test_dtype_and_device_divide():
    half, meta = Shape(8, torch.bfloat16, CPU), Shape(8, torch.float32, torch.device("meta"))
    assert siblings(shapes(a__x=8, a__y=half, a__z=meta)) == []
    assert siblings(shapes(a__x=half, a__y=8, a__z=half)) == [["a.x", "a.z"]]


def test_names_without_a_parent_and_none_at_all():
    assert siblings({}) == [] and siblings(shapes(x=3)) == []
    assert siblings(shapes(x=3, y=3)) == [["x", "y"]]  # of the model itself
    assert siblings(shapes(a__b__x=3, a__bb__x=3, a__b__c__x=3)) == []


def test_those_who_leave_form_a_group_and_leave_that_too():
    q, k, v, o = layers = [make_layer() for _ in range(4)]
    group = Group(layers)
    others = {id(group.leave(layer)) for layer in (k, v, o)}
    assert len(others) == 1 and group.members == (q,)
    rest = group.leave(q)
    assert id(rest) in others and rest.members == (k, v, o, q) and group.members == ()
    last = rest.leave(o)
    assert rest.members == (k, v, q) and last.members == (o,)


def test_known_follows():
    layers = {f"a.{name}": make_layer() for name in "xyz"} | {"b.w": make_layer(k=7)}
    known = Known(layers)
    assert known.layers == tuple(layers.values())
    x, y, z, w = layers.values()
    assert known.group[x] is known.group[y] is known.group[z] and w not in known.group
    known.was_wrong(w)
    known.was_wrong(y)
    assert known.group[y] is not known.group[x] and known.group[x].members == (x, z)
