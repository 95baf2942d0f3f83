"""Modules as people write them: several inputs, shared parameters, state, ties, types, and what is refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from imaml_ext.losses.curvature import GaussNewtonOperator, HessianOperator
from imaml_ext.models import MLP, TaskModel, from_module

B, S = 3, 5


def module_of(forward: Callable[[Any, Tensor], Any], **layers: nn.Module) -> nn.Module:
    """A module with a Linear(3, 3) named `linear`, more layers, and that forward."""
    made = type("Written", (nn.Module,), {"forward": forward})()
    made.linear = nn.Linear(3, 3)
    for name, layer in layers.items():
        setattr(made, name, layer)
    return made.double()


def rows(model: TaskModel, tasks: int = B) -> Tensor:
    theta = model.init(seed=0, dtype=torch.float64)
    return theta + 0.1 * torch.randn(tasks, theta.numel(), dtype=torch.float64)


def examples(*shape: int) -> Tensor:
    return torch.randn(B, S, *(shape or (3,)), dtype=torch.float64)


def derivatives(y: Tensor, params: Tensor) -> list[Tensor]:
    """Outputs, gradients and Hessian products with ones, of Σ sin y."""
    (gradient,) = torch.autograd.grad(y.sin().sum(), params, create_graph=True)
    return [y, gradient, torch.autograd.grad(gradient.sum(), params)[0]]


def assert_equals_alone(module: nn.Module, x: Tensor, **options: Any) -> None:
    """The model against plain modules that hold a task's values themselves, twice over; on one task too."""
    model = from_module(module, **options)
    params = rows(model).requires_grad_()
    expected = []
    for row, inputs in zip(params.detach(), x, strict=True):
        plain = copy.deepcopy(module)
        assert not plain.load_state_dict(model.state_dict(row), strict=False).unexpected_keys
        leaves = [p for p in plain.parameters() if p.requires_grad]
        y = plain(inputs.clone())
        first = torch.autograd.grad(y.sin().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.sum() for g in first), leaves)
        expected.append([y, *(torch.cat([g.flatten() for g in gs]) for gs in (first, second))])
    for _ in range(2):  # a call leaves nothing behind
        for found, right in zip(derivatives(model(params, x), params), zip(*expected, strict=True), strict=True):
            torch.testing.assert_close(found, torch.stack(right), rtol=1e-11, atol=1e-12)
    one = params.detach()[1:2].requires_grad_()
    for found, right in zip(derivatives(model(one, x[1:2]), one), expected[1], strict=True):
        torch.testing.assert_close(found[0], right, rtol=1e-11, atol=1e-12)


# --- what vmap cannot run ---------------------------------------------------------------------------------------------


def _messages(self: Any, x: Tensor) -> Tensor:
    return torch.zeros(S, 3, dtype=x.dtype).index_add_(0, torch.tensor([0, 1, 1, 2, 4]), self.linear(x))


def _checkpointed(self: Any, x: Tensor) -> Tensor:
    return checkpoint(lambda z: torch.tanh(self.linear(z)), x, use_reentrant=False)


class Attending(nn.Module):
    """Attention that a checkpoint computes again, unless `reentrant` is None."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.attention, self.reentrant = nn.MultiheadAttention(4, 2, batch_first=True), reentrant

    def forward(self, x: Tensor) -> Tensor:
        def attended(x: Tensor) -> Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

        return x + (attended(x) if self.reentrant is None else checkpoint(attended, x, use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [False, True])
def test_both_kinds_of_checkpoint_have_the_values_of_the_task(reentrant: bool) -> None:
    module, x = Attending(None).double(), examples(3, 4)
    params = rows(from_module(module)).requires_grad_()
    expected = derivatives(from_module(module)(params, x), params)
    module.reentrant = reentrant
    for found, right in zip(derivatives(from_module(module, tasks="loop")(params, x), params), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-11, atol=1e-12)
    with pytest.raises(RuntimeError, match=r"activation checkpointing.*: use from_module"):
        from_module(module, tasks="vmap")(params, x)


def test_weights_of_recurrent_layers_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(layer: nn.RNNBase) -> None:
        raise RuntimeError("Cannot access data pointer of Tensor that doesn't have storage")  # on a GPU, in vmap

    model = from_module(nn.GRU(3, 2), tasks="vmap", output=0)
    monkeypatch.setattr(nn.RNNBase, "flatten_parameters", fails)
    assert model(model.init(seed=0).expand(2, -1), torch.randn(2, 4, 3)).isfinite().all()


def _forces(self: Any, x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(torch.tanh(self.linear(x)).sum(), x, create_graph=True)[0]


def _packed(self: Any, x: Tensor) -> Tensor:
    lengths = torch.tensor([1, 3, 2])
    pieces = nn.utils.rnn.pack_padded_sequence(self.linear(x).view(1, S, 3).expand(3, S, 3), lengths, True, False)
    return self.recurrent(pieces)[1]


LOOPED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "index_add_": _messages,
    "mask": lambda self, x: self.linear(x)[x[:, 0] > x[:, 0].median()],
    "if": lambda self, x: self.linear(x) if x.max() > 1.5 else self.linear(-x),
    "float": lambda self, x: self.linear(x) * float(x.std()),
    "checkpoint": _checkpointed,
    "derivative in forward": _forces,
    "packed": _packed,
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", LOOPED)
def test_what_vmap_cannot_run_runs_task_by_task(name: str) -> None:
    torch.manual_seed(3)
    module, x = module_of(LOOPED[name], recurrent=nn.GRU(3, 2, batch_first=True)), examples()
    if name != "packed":
        del module.recurrent
    assert_equals_alone(module, x, tasks="loop")
    for_all = from_module(module, tasks="vmap")
    with pytest.raises(RuntimeError, match=r"(module|layer) .*: use from_module\(…, tasks='loop'\)$"):
        for_all(rows(for_all), x)
    with pytest.warns(UserWarning, match="its tasks run one by one"):
        assert_equals_alone(module, x)


@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_a_spectral_norm_in_training_begins_where_the_module_is(norm: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    assert_equals_alone(nn.Sequential(norm(nn.Linear(3, 3)), nn.Tanh()).double(), examples(), tasks="loop")


def test_an_error_of_the_module_itself_is_its_own() -> None:
    model = from_module(module_of(lambda self, x: self.linear(x)))
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        model(rows(model), examples(2))


# --- parameters: tied, kept elsewhere, frozen, of other types ---------------------------------------------------------


class Tied(nn.Module):
    """One weight in two layers of a list, a layer under two names, and a weight that a list holds."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
        self.blocks[1].weight = self.blocks[0].weight
        self.again = self.blocks[1]
        self.kept = [self.blocks[0].weight, {"bias": self.blocks[1].bias}]

    def forward(self, x: Tensor) -> Tensor:
        for block in (*self.blocks, self.again):
            x = torch.tanh(block(x))
        return F.linear(x, self.kept[0], self.kept[1]["bias"])


@pytest.mark.parametrize("tasks", ["vmap", "loop"])
def test_tied_and_kept_parameters_are_one(tasks: str) -> None:
    torch.manual_seed(1)
    module = Tied().double()
    assert_equals_alone(module, examples(), tasks=tasks)
    model = from_module(module)
    assert model.layout.names == ("blocks.0.weight", "blocks.0.bias", "blocks.1.bias")
    assert set(model.state_dict(rows(model)[0])) == {*(f"blocks.{k}.{p}" for k in (0, 1) for p in ("weight", "bias"))}


def test_a_parameter_out_of_reach_is_refused_by_name() -> None:
    closed, aliased = module_of(lambda self, x: self.function(x)), module_of(lambda self, x: x @ self.kept)
    closed.function = lambda z: closed.linear(z)
    aliased.kept = aliased.linear.weight.data.t()
    for module, name in ((closed, "linear.weight"), (aliased, "linear.weight")):
        model = from_module(module)
        with pytest.raises(ValueError, match=rf"the module \(Written\) reads parameter '{name}' by another way"):
            model(rows(model), examples())


def test_constants_keep_a_type_of_their_own() -> None:
    """A frozen bfloat16 base with adapters: the base's products stay in bfloat16."""

    class Adapter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.up = nn.Linear(3, 3).bfloat16().requires_grad_(False), nn.Linear(3, 3)
            self.register_buffer("offset", torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            assert self.base.weight.dtype == torch.bfloat16
            return self.base(x.bfloat16()).to(x.dtype) + self.up(x) + self.offset

    module = Adapter()
    model = from_module(module)
    x = examples().float()
    found = model(model.init(seed=0).expand(B, -1), x)
    torch.testing.assert_close(found, torch.stack([module(each) for each in x]), rtol=0, atol=2**-6)
    alone = from_module(module, tasks="loop")
    assert torch.equal(alone(alone.init(seed=0).expand(B, -1), x), torch.stack([module(each) for each in x]))
    assert model(model.init(seed=0).double().expand(B, -1), x.double()).dtype == torch.float64
    with pytest.raises(TypeError, match="parameter 'weight' must be of a real floating-point type"):
        from_module(nn.Linear(2, 2, dtype=torch.complex64))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_inputs_of_another_type_are_refused_where_a_layer_does_not_take_them(dtype: torch.dtype) -> None:
    model = from_module(module_of(lambda self, x: self.linear(x)))
    words = rf"inputs must have the dtype of params, torch.float64, got {dtype}, which layer 'linear' \(Linear\)"
    with pytest.raises(TypeError, match=words):
        model(rows(model), torch.ones(B, S, 3, dtype=dtype))
    scaled = from_module(module_of(lambda self, x: self.linear(x / torch.tensor(255.0, dtype=torch.float64))))
    assert scaled(rows(scaled), torch.ones(B, S, 3, dtype=torch.uint8)).shape == (B, S, 3)


# --- state and chance -------------------------------------------------------------------------------------------------


def _assigns(self: Any, x: Tensor) -> Tensor:
    self.norm.mean = 0.9 * self.norm.mean + 0.1 * x.mean(0)
    return self.linear(x - self.norm.mean)


def _mutates(self: Any, x: Tensor) -> Tensor:
    self.norm.mean.mul_(0.9)
    return self.linear(x - self.norm.mean)


@pytest.mark.parametrize("tasks", ["vmap", "loop"])
@pytest.mark.parametrize("forward", [_assigns, _mutates])
def test_a_forward_that_changes_a_buffer_is_refused(forward: Callable[[Any, Tensor], Tensor], tasks: str) -> None:
    module = module_of(forward, norm=nn.Identity())
    module.norm.register_buffer("mean", torch.ones(3, dtype=torch.float64))
    model = from_module(module, tasks=tasks)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"layer 'norm' \(Identity\) changes its buffer 'mean' in its forward"):
            model(rows(model), examples())


@pytest.mark.parametrize(
    ("draw", "words"),
    [
        (lambda self, x: F.dropout(self.linear(x), 0.3), r"the module \(Written\)"),
        (lambda self, x: F.gumbel_softmax(self.linear(x)), r"the module \(Written\)"),
        (lambda self, x: self.linear(x) * (torch.rand(()) > 0.5), r"the module \(Written\)"),
        (lambda self, x: self.more(self.linear(x)), r"layer 'more' \(RReLU\)"),
        (lambda self, x: self.attention(x, x, x)[0], r"layer 'attention' \(MultiheadAttention\)"),
    ],
)
def test_chance_is_refused_by_layer(draw: Callable[[Any, Tensor], Tensor], words: str) -> None:
    module = module_of(draw, more=nn.RReLU(), attention=nn.MultiheadAttention(3, 1, dropout=0.1))
    before = torch.get_rng_state()
    for tasks in ("vmap", "loop"):
        model = from_module(module, tasks=tasks)
        with pytest.raises(ValueError, match=rf"^{words} draws random numbers"):
            model(model.init(seed=0, dtype=torch.float64).expand(B, -1), torch.ones(B, S, 3, dtype=torch.float64))
    assert torch.equal(before, torch.get_rng_state())


def test_chance_in_a_later_call_is_refused_too() -> None:
    later = module_of(lambda self, x: self.linear(x) + (torch.rand(3) if x.shape[0] > S else 0))
    model = from_module(later)
    params = rows(model)
    model(params, examples())
    with pytest.raises(ValueError, match=r"the module \(Written\) draws random numbers"):
        model(params, torch.zeros(B, S + 1, 3, dtype=torch.float64))


def _keeps(self: Any, x: Tensor) -> Tensor:
    self.feature = self.linear(x)
    return torch.tanh(self.feature)


@pytest.mark.parametrize("tasks", ["vmap", "loop"])
def test_features_that_a_module_keeps_and_inputs_that_it_overwrites(tasks: str) -> None:
    torch.manual_seed(2)
    keeping, x = module_of(_keeps), examples()
    keeping(x[0])  # holds a tensor with a graph, which copy.deepcopy refuses
    model = from_module(keeping, tasks=tasks)
    params = rows(model)
    expected = torch.stack(
        [torch.tanh(F.linear(a, *model.layout.views(p).values())) for p, a in zip(params, x, strict=True)]
    )
    torch.testing.assert_close(model(params, x), expected)
    before = x.clone()
    assert_equals_alone(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 3)).double(), x, tasks=tasks)
    assert torch.equal(x, before)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_modules_that_are_wrapped_or_recomputed() -> None:
    normed, x = nn.utils.weight_norm(nn.Linear(3, 3).double()), examples()
    model = from_module(normed)
    params = rows(model)
    for row, inputs, found in zip(params, x, model(params, x), strict=True):
        bias, g, v = model.layout.views(row).values()
        torch.testing.assert_close(found, inputs @ (g * v / v.norm(dim=1, keepdim=True)).T + bias)
    for module in (nn.DataParallel(nn.Linear(3, 3)), torch.jit.script(nn.Linear(3, 3))):
        with pytest.raises(
            TypeError, match=r"module must be a plain nn.Module, got the module \(\w+\): pass the module"
        ):
            from_module(module)


def test_batch_norm_by_task_leaves_a_frozen_body_its_statistics() -> None:
    body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).requires_grad_(False).eval()
    body[1].running_mean.fill_(0.7)
    body[1].running_var.fill_(2.5)
    head = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=True))
    module, x = nn.Sequential(body, head).double(), examples()
    model = from_module(module, batch_norm="task")
    params = rows(model)
    for row, inputs, found in zip(params, x, model(params, x), strict=True):
        p = model.layout.views(row)
        y = F.linear(body(inputs), p["1.0.weight"], p["1.0.bias"])
        y = (y - y.mean(0)) / (y.var(0, unbiased=False) + 1e-5).sqrt() * p["1.1.weight"] + p["1.1.bias"]
        torch.testing.assert_close(found, y, rtol=1e-11, atol=1e-12)


# --- inputs, outputs, shared parameters -------------------------------------------------------------------------------


class Output(dict):  # type: ignore[type-arg]
    """As the transformers' ModelOutput: fields by name, by attribute."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


class Classifier(nn.Module):
    """Of the Hugging Face kind: ids and an attention mask by keyword, a ModelOutput."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4, padding_idx=0)
        self.query, self.value = nn.Linear(4, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Output:
        x = self.embed(input_ids)
        mask = None if attention_mask is None else attention_mask[:, None, :].bool()
        y = F.scaled_dot_product_attention(self.query(x), x, self.value(x), attn_mask=mask)
        return Output(loss=None, logits=self.head(y.mean(1)), hidden_states=(x, y))


def _texts() -> dict[str, Tensor]:
    ids = torch.randint(1, 9, (B, S, 6)) * (torch.arange(6) < torch.randint(1, 7, (B, S, 1)))
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


@pytest.mark.parametrize("tasks", ["vmap", "loop"])
def test_ids_masks_and_model_outputs(tasks: str) -> None:
    torch.manual_seed(4)
    module, texts = Classifier().double(), _texts()
    model = from_module(module, tasks=tasks, output="logits")
    params = rows(model).requires_grad_()
    found = derivatives(model(params, texts), params)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        alone = [
            functional_call(module, model.layout.views(row), (), {k: v[b] for k, v in texts.items()})["logits"]
            for b, row in enumerate(params)
        ]
    for ours, theirs in zip(found, derivatives(torch.stack(alone), params), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    assert found[1][:, :4].count_nonzero() == 0  # the row of the padding
    hidden = from_module(module, tasks=tasks, output=lambda y: {"all": y.hidden_states, "logits": y["logits"]})
    outputs = hidden(params, (texts["input_ids"], texts["attention_mask"]))
    assert torch.equal(outputs["logits"], found[0])
    assert [tuple(h.shape) for h in outputs["all"]] == [(B, S, 6, 4)] * 2
    with pytest.raises(TypeError, match="got one with a Output: choose what the criterion sees by output="):
        from_module(module, tasks=tasks)(params, texts)
    with pytest.raises(ValueError, match="output must be one of what the module returns, got 'logit' of a Output"):
        from_module(module, tasks=tasks, output="logit")(params, texts)


def test_inputs_are_checked_leaf_by_leaf() -> None:
    model, texts = from_module(Classifier().double(), output="logits"), _texts()
    params = rows(model)
    short = {**texts, "attention_mask": texts["attention_mask"][:2]}
    for error, words, inputs in (
        (ValueError, r"inputs must have shape \[3, S, \*\]", short),
        (TypeError, "inputs must be a tensor, got bool", {**texts, "return_dict": True}),
        (TypeError, "inputs must hold at least one tensor, got an empty dict", {}),
    ):
        with pytest.raises(error, match=words):
            model(params, inputs)
    mlp = MLP(3, (), 1)
    with pytest.raises(TypeError, match="inputs must be a tensor, got dict"):
        mlp(mlp.init(seed=0).expand(B, -1), {"x": examples()})  # type: ignore[arg-type]


@pytest.mark.parametrize("tasks", ["vmap", "loop"])
def test_parameters_by_name_and_those_that_tasks_share(tasks: str) -> None:
    torch.manual_seed(5)
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    model, whole = from_module(module, adapt=["2.*"], tasks=tasks), from_module(module)
    assert model.layout.names == ("2.weight", "2.bias")
    assert model.shared_layout.names == ("0.weight", "0.bias")
    assert (whole.shared_layout.numel, whole.initial_shared().shape) == (0, (0,))
    shared = (model.initial_shared(torch.float64) + 0.1).requires_grad_()
    params, x = rows(model).requires_grad_(), examples()
    assert torch.equal(model(params, x), model.sharing(model.initial_shared(torch.float64))(params, x))
    y = model.sharing(shared)(params, x)
    complete = torch.cat([shared.expand(B, -1), params], 1)
    torch.testing.assert_close(y, whole(complete, x), rtol=1e-12, atol=1e-13)
    found = torch.autograd.grad(y.sin().sum(), (shared, params))
    expected = torch.autograd.grad(whole(complete, x).sin().sum(), (shared, params))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    module.load_state_dict(model.sharing(shared.detach()).state_dict(params[0].detach()))
    torch.testing.assert_close(module(x[0]), y[0], rtol=1e-12, atol=1e-13)
    unfit = r"adapt must hold patterns that fit trainable parameters, got 'head\.\*'; there are 0\.weight"
    for error, words, call in (
        (ValueError, unfit, lambda: from_module(module, adapt=["head.*"])),
        (
            TypeError,
            r"adapt must be a list of patterns such as .*, got '2\.\*'",
            lambda: from_module(module, adapt="2.*"),
        ),
        (ValueError, r"values must have shape \[16\]", lambda: model.sharing(shared[1:])),
        (TypeError, "model must have parameters that tasks share, got MLP", lambda: MLP(3, (), 1).sharing(shared)),
        (ValueError, r"row must have shape \[10\]", lambda: model.state_dict(params)),
        (ValueError, "tasks must be one of 'auto', 'vmap'.*, got 'batch'", lambda: from_module(module, tasks="batch")),
        (TypeError, "output must be a name, .*, got 1.5", lambda: from_module(module, output=1.5)),  # type: ignore[arg-type]
    ):
        with pytest.raises(error, match=words):
            call()


# --- curvature --------------------------------------------------------------------------------------------------------


def test_gauss_newton_of_structured_outputs() -> None:
    torch.manual_seed(6)
    module = module_of(
        lambda self, x: {"mean": torch.tanh(self.linear(x)), "place": (x.argmax(-1), self.other(x))},
        other=nn.Linear(3, 1),
    )
    model, x = from_module(module), examples()
    params = rows(model)

    def criterion(y: dict[str, Any]) -> Tensor:
        assert y["place"][0].dtype == torch.int64
        return (
            y["mean"].square().sum((1, 2))
            + 2 * y["place"][1].square().flatten(1).sum(1)
            + y["mean"].sum((1, 2)) * y["place"][1].sum((1, 2))
        )

    operator = GaussNewtonOperator(lambda phi: model(phi, x), criterion, params)
    p = torch.randn_like(params)
    for b in range(B):

        def flat(row: Tensor, b: int = b) -> Tensor:
            y = model(row[None], x[b : b + 1])
            return torch.cat([y["mean"].flatten(), y["place"][1].flatten()])

        def loss(out: Tensor) -> Tensor:
            mean, other = out[: 3 * S], out[3 * S :]
            return mean.square().sum() + 2 * other.square().sum() + mean.sum() * other.sum()

        jacobian = torch.autograd.functional.jacobian(flat, params[b])
        curvature = torch.autograd.functional.hessian(loss, flat(params[b]))
        expected = jacobian.T @ (curvature @ (jacobian @ p[b]))
        torch.testing.assert_close(operator(p)[b], expected, rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(operator.curvature(p)[b], p[b] @ expected, rtol=1e-10, atol=1e-11)


def test_an_operation_without_a_second_derivative_is_named() -> None:
    x = examples(3, 2)
    model = from_module(nn.Sequential(nn.Conv2d(3, 3, 1), nn.CrossMapLRN2d(2)).double(), tasks="loop")
    with pytest.raises(
        ValueError, match=r"loss must be twice differentiable in params, got an operation that is not \("
    ):
        HessianOperator(lambda phi, x: model(phi, x).flatten(1).sum(1), rows(model), x.unsqueeze(-1))
