# SPDX-License-Identifier: Apache-2.0
"""osora's operators under torch.export and torch.compile."""

import io
from collections.abc import Callable

import pytest
import torch
from composed import adapted, from_dynamo, fused, gradients, loss
from functorch.compile import make_boxed_func, nop
from helpers import linear_case, token_ids
from layer_makers import make_layer, moved
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad

# -- export ------------------------------------------------------------------------------------------------------------

exporting = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
strictly = pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])


def operators(program: torch.export.ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if "osora" in str(node.target)]


@exporting
@strictly
@pytest.mark.parametrize("training", [False, True])
def test_an_exported_layer_runs_and_trains(strict, training):
    layer = moved(make_layer()).train(training)
    rows = torch.export.Dim("rows", max=100)
    program = torch.export.export(layer, (torch.randn(3, 12),), dynamic_shapes={"x": {0: rows}}, strict=strict)
    assert operators(program) == ["osora.linear.default"]
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    module = torch.export.load(file).module()
    for n in (3, 8):
        x = torch.randn(n, 12)
        assert torch.equal(module(x), layer(x))
    x = torch.randn(5, 12)
    module(x).square().sum().backward()
    layer(x).square().sum().backward()
    got = dict(module.named_parameters())
    assert torch.equal(got["o"].grad, layer.o.grad) and torch.equal(got["s"].grad, layer.s.grad)
    assert got["base_layer.weight"].grad is None


@exporting
@strictly
def test_an_exported_model_gives_the_same_bits(strict):
    model, ids = adapted(layers=1), token_ids()
    arguments = {"input_ids": ids, "use_cache": False}
    program = torch.export.export(model, (), arguments, strict=strict)
    assert len(operators(program)) == 7
    assert torch.equal(program.module()(**arguments).logits, model(**arguments).logits)


# -- compile -----------------------------------------------------------------------------------------------------------

compilers = pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])


@pytest.fixture(autouse=True)
def no_compiled_code() -> None:
    torch._dynamo.reset()


@from_dynamo
@compilers
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_a_compiled_layer_takes_any_number_of_rows(compiler, autocast):
    """Eager's gradients; one graph for all n, with autocast in it."""
    layer = moved(make_layer())
    frames = CompileCounterWithBackend(compiler)

    def block(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return nn.functional.silu(layer(x))

    compiled = torch.compile(block, backend=frames, fullgraph=True)
    for n in (4, 7, 11):
        x, found = torch.randn(n, 12), []
        for function in (compiled, block):
            layer.zero_grad()
            leaf = x.clone().requires_grad_()
            torch._dynamo.maybe_mark_dynamic(leaf, 0)
            function(leaf).float().square().sum().backward()
            found.append((leaf.grad, layer.o.grad, layer.s.grad))
        # autocast: inductor need not round where eager does
        tolerance = {"rtol": 3e-2, "atol": 3e-2} if autocast else {}
        torch.testing.assert_close(*found, **tolerance)
    assert frames.frame_count == 1


@from_dynamo
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("trained", [False, True], ids=["inference", "training"])
def test_a_compiled_layer_has_its_operators_in_the_graph(trained, autocast):
    """Not fullgraph: what broke the graph would run uncompiled, and what took compiling for exporting keep h with y."""
    found: list[str] = []

    def note(graph: torch.fx.GraphModule, inputs: object) -> Callable:
        found.extend(str(node.target) for node in graph.graph.nodes if "osora" in str(node.target))
        return make_boxed_func(graph.forward)

    layer, x = moved(make_layer()), torch.randn(4, 12)
    compiled = torch.compile(layer, backend=aot_autograd(fw_compiler=note, bw_compiler=nop))
    with torch.set_grad_enabled(trained), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert torch.equal(compiled(x), layer(x))
    assert found == (["osora.down.default", "osora.up.default"] if trained else ["osora.linear.default"])


@from_dynamo
@compilers
def test_a_compiled_model_takes_any_length(compiler):
    model = adapted(layers=1)
    frames, counts = CompileCounterWithBackend(compiler), []
    compiled = torch.compile(model, backend=frames, fullgraph=True, dynamic=True)
    for length in (6, 9, 13):
        ids, found = token_ids(2, length), []
        for function in (compiled, model):
            model.zero_grad()
            function(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            found.append(gradients(model))
        torch.testing.assert_close(*found)
        counts.append(frames.frame_count)
    assert counts[0] == counts[-1], "compiled once for all lengths"


@from_dynamo
def test_a_compiled_transform():
    case = linear_case((3,), 5, 7, 4, torch.float64)
    function = grad(loss(fused(case)), (1, 2))
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(case.x, case.s, case.o), function(case.x, case.s, case.o))
