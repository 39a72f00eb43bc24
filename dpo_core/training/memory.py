"""Estimates the memory of a training process before it runs: weights, gradients, optimiser, activations.

The activations are not estimated from a formula for one architecture. Forward and backward run on fake
tensors (shapes and dtypes without values, so they take no time or memory) of the real widths and the real
layout, while a counter tracks the lifetime of every storage. Two shallow copies of the model are traced;
each further layer counts as much as the second.
"""

import copy
import weakref
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from dpo_core.models.build import build
from dpo_core.models.dropout import set_training
from dpo_core.models.transformers_lock import quiet_transformers
from dpo_core.scoring.attention import checkpoint_layers, has_flex_heads, packed_hidden, trunk_of
from dpo_core.scoring.autocast import autocast
from dpo_core.scoring.branch_scores import hidden_of, token_scores
from dpo_core.scoring.cpu_attention import DocumentParts
from dpo_core.scoring.layout import Layout, Pack
from dpo_core.scoring.precision import Precision
from dpo_core.training.engine import EngineConfig

# Resident memory before the model is loaded: Python, PyTorch, transformers, DeepSpeed and their libraries
# (torch 2.13, CPU build). On a GPU none of it counts.
PROCESS_BYTES = 520 << 20
# glibc allocates blocks below 32 MiB from a heap that it can seldom return: weights, moments and gradients
# are allocated among the activations of a step, and the gaps that these leave do not fit the next step's.
# The heap was measured to be larger than its live blocks by this factor, in packs and padded rows, with and
# without accumulation. Larger blocks have pages of their own, and a GPU's allocator does not fragment so.
HEAP_WASTE = 0.45
_HEAP_BLOCK = 32 << 20
_FP32 = 4
# Gradients that DeepSpeed gathers before it reduces them (its reduce_bucket_size, in fp32).
_BUCKET = 500_000_000 * _FP32


@dataclass(frozen=True)
class Bytes:
    """A number of bytes, and how many of them are in blocks small enough for the heap."""

    all: int
    heap: int

    def __add__(self, other: "Bytes") -> "Bytes":
        return Bytes(self.all + other.all, self.heap + other.heap)

    def __sub__(self, other: "Bytes") -> "Bytes":
        return Bytes(self.all - other.all, self.heap - other.heap)

    def __mul__(self, factor: float) -> "Bytes":
        return Bytes(round(self.all * factor), round(self.heap * factor))


@dataclass(frozen=True)
class StepMemory:
    """Memory of forward and backward, and sizes of the weights."""

    peak: Bytes
    """Activations and temporaries at the peak of forward and backward."""
    layer: Bytes
    """The part of each layer in it."""
    weights: Bytes
    """All parameters in fp32."""
    layer_weights: Bytes
    head: Bytes
    """Weights of the output head."""
    layers: int


@dataclass(frozen=True)
class TrainingMemory:
    """Peak memory of one training process, in bytes, by part."""

    process: int
    weights: int
    reference: int
    gradients: int
    """Those that exist at the peak: with a single micro-batch in a step, not all of them."""
    optimiser: int
    step: int
    """Activations and temporaries."""
    heap: int
    """Memory that the allocator cannot return."""

    @property
    def total(self) -> int:
        """The peak."""
        return sum(vars(self).values())


class _StorageCounter(TorchDispatchMode):
    """Counts the bytes of live storages that were created within it, and their peak."""

    def __init__(self, known: list[Any]) -> None:
        super().__init__()
        self.now = self.peak = Bytes(0, 0)
        self.known = known  # kept alive, so that no other storage gets one of their ids
        self.sizes = {id(storage): Bytes(0, 0) for storage in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.add(tensor.untyped_storage())
        return out

    def add(self, storage: Any) -> None:
        """Count a storage until it is freed."""
        if id(storage) in self.sizes:
            return
        self.sizes[id(storage)] = size = _block(storage.nbytes())
        self.now = self.now + size
        if self.now.all > self.peak.all:
            self.peak = self.now
        weakref.finalize(storage, self._remove, id(storage))

    def _remove(self, key: int) -> None:
        self.now = self.now - self.sizes.pop(key)

    def reset_peak(self) -> Bytes:
        """Return the peak so far, and start a new one."""
        before, self.peak = self.peak, self.now
        return before


def _block(size: int) -> Bytes:
    return Bytes(size, size if size < _HEAP_BLOCK else 0)


def step_memory(config: Any, layout: Layout, engine: EngineConfig, *, on_gpu: bool = False) -> StepMemory:
    """Peak memory of forward and backward of one micro-batch, without weights and their gradients.

    Args:
        config: of a transformers causal language model.
        layout: the fullest micro-batch.
        on_gpu: packs use FlexAttention, which does not split them into documents.
    """
    shallow = [_trace(_Pass.of(config, layout, engine, layers, on_gpu)) for layers in (1, 2)]
    layers = config.get_text_config().num_hidden_layers
    # With few layers the peak may be at the head's or the embedding's gradient, with more at the layers.
    # The peaks before and after the gradient reaches the layers are therefore extrapolated separately.
    layer = shallow[1].early - shallow[0].early
    both = [(t.early for t in shallow), (t.late for t in shallow)]
    peaks = [first + (second - first) * (layers - 1) for first, second in both]
    layer_weights = shallow[1].weights - shallow[0].weights
    return StepMemory(
        peak=max(peaks, key=lambda peak: peak.all),
        layer=layer,
        weights=shallow[0].weights + layer_weights * (layers - 1),
        layer_weights=layer_weights,
        head=shallow[0].head,
        layers=layers,
    )


@dataclass(frozen=True)
class _Traced:
    early: Bytes
    """The peak until the gradient reaches the layers."""
    late: Bytes
    """The peak from then on."""
    weights: Bytes
    head: Bytes


@dataclass(frozen=True)
class _Pass:
    """Forward and backward of a shallow model; two are equal if a trace of them cannot differ."""

    config: Any = field(compare=False)
    layout: Layout = field(compare=False)
    parts: DocumentParts | None = field(compare=False)
    precision: Precision
    checkpointing: bool
    model: str
    """Architecture and configuration."""
    sizes: str
    """Kind of the layout, and the shapes of its tensors."""

    @classmethod
    def of(cls, config: Any, layout: Layout, engine: EngineConfig, layers: int, on_gpu: bool) -> "_Pass":
        by_flex = on_gpu and has_flex_heads(config.get_text_config())
        parts = DocumentParts.of(layout) if isinstance(layout, Pack) and not by_flex else None
        shallow, kind = _shallow(config, layers), type(config)
        tensors = [vars(layout), vars(parts) if parts else None]
        return cls(
            config=shallow,
            layout=layout,
            parts=parts,
            precision=engine.precision,
            checkpointing=engine.gradient_checkpointing,
            model=f"{kind.__module__}.{kind.__name__} {shallow.to_json_string(use_diff=False)}",
            sizes=f"{type(layout).__name__} {tree_map_only(Tensor, lambda t: tuple(t.shape), tensors)}",
        )


# The policies of a plan often have the same sizes, in a study all of them; a trace takes a second.
@lru_cache(maxsize=128)
def _trace(one: _Pass) -> _Traced:
    layout, parts = one.layout, one.parts
    with quiet_transformers(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model = build(one.config, dtype=torch.float32)
        if one.checkpointing:
            checkpoint_layers(model)
        set_training(model)
        known = [t.untyped_storage() for t in (*model.parameters(), *model.buffers())]
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
            known.append(parameter.grad.untyped_storage())

        def fake(value: Any) -> Any:
            return tuple(map(fake, value)) if isinstance(value, tuple) else mode.from_tensor(value)

        faked = type(layout)(**{name: fake(value) for name, value in vars(layout).items()})
        if parts:
            parts = DocumentParts(parts.lengths, fake(parts.biases), fake(parts.positions))
        with _StorageCounter(known) as counter:
            for bias in parts.biases if parts else ():
                counter.add(bias.untyped_storage())
            with autocast(one.precision):
                hidden = _hidden(model, faked, parts)
                loss = -token_scores(model, hidden[faked.predicts_N], faked.targets_N)["logps"].sum()
            early: list[Bytes] = []
            hidden.register_hook(lambda _: early.append(counter.reset_peak()))
            del hidden  # as in the trainer, whose forward has returned
            loss.backward()
        weights = sum((_block(p.numel() * _FP32) for p in model.parameters()), Bytes(0, 0))
        head = _block(model.get_output_embeddings().weight.numel() * _FP32)
    return _Traced(early[0], counter.peak, weights, head)


def _hidden(model: Any, layout: Layout, parts: DocumentParts | None) -> Tensor:
    if not isinstance(layout, Pack):
        return hidden_of(model, layout)
    if parts is not None:
        return packed_hidden(model, layout, parts)
    # FlexAttention cannot be traced here; plain causal attention over the pack needs the same memory.
    return trunk_of(model)(input_ids=layout.ids_T[None], use_cache=False).last_hidden_state[0]


def _shallow(config: Any, layers: int) -> Any:
    shallow = copy.deepcopy(config)
    text = shallow.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return shallow


def training_memory(
    step: StepMemory,
    engine: EngineConfig,
    *,
    micro_batches: int,
    references: int = 0,
    on_gpu: bool = False,
) -> TrainingMemory:
    """One rank's peak: resident memory on a CPU, allocated memory on a GPU.

    Args:
        micro_batches: in one optimiser step. With one, a layer's gradients replace its activations.
        references: models in memory beside the policy (a live reference, PPO's reference, a reward model).
    """
    weights, gradients, optimiser = _states(step, engine, micro_batches)
    live = weights + gradients + optimiser + step.peak
    return TrainingMemory(
        process=0 if on_gpu else PROCESS_BYTES,
        weights=weights.all,
        # Memory-mapped and never written, so not in the heap.
        reference=references * step.weights.all,
        gradients=gradients.all,
        optimiser=optimiser.all,
        step=step.peak.all,
        heap=0 if on_gpu else round(HEAP_WASTE * live.heap),
    )


def _states(step: StepMemory, engine: EngineConfig, micro_batches: int) -> tuple[Bytes, Bytes, Bytes]:
    """Weights, gradients and moments of one rank.

    Under ZeRO, DeepSpeed keeps an fp32 copy of each rank's share of the weights (stages 1 and 2), and the
    gradients of its share besides those of backward. Stage 3 is counted as the plain division.
    """
    whole, share = step.weights, step.weights * (1 / engine.processes)
    if engine.zero_stage == 0:
        if micro_batches > 1:
            return whole, whole, whole * 2
        # At the peak of activations only the head's gradient exists; a layer's replaces its activations.
        growth = step.layer_weights * step.layers if step.layer_weights.all > step.layer.all else Bytes(0, 0)
        shrink = step.layer * step.layers if growth.all else Bytes(0, 0)
        gradients = step.head + growth - shrink
        return whole, gradients if gradients.all < whole.all else whole, whole * 2
    bucket = whole * min(1.0, _BUCKET / whole.all)
    weights = share * 2 if engine.zero_stage == 3 else whole + share
    return weights, share + (whole if engine.zero_stage == 1 else bucket), share * 2
