"""Sampler steps as recorded programs: on a GPU one CUDA graph for each kind of step.

Handed to `samplers.sample` by a generator that draws block after block. A step is a function of
tensors alone: the samples, what is added to them, and the step's numbers. Here each kind of step
has memory of its own for these and for the condition, in which the function reads: they are copied
in, the function runs, its results are copied out. On a CUDA device the first such call runs as it
is, the second is captured, and from then on the device runs a whole step, network included, on one
launch. Elsewhere the function is called each time, on the same memory.

A step and not the whole loop is captured because a loop of hundreds of steps is a graph of a
hundred thousand kernels; what a launch of each step costs beside its network is microseconds.

`ETUDE_CAPTURE=0` turns capturing off. Where it fails, one warning says why, and steps run as they
are.
"""

import itertools
import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from etude.kernels import backends

from .samplers import Taking
from .steps import Step

Program = Callable[[], tuple[Tensor, Tensor]]


class CapturedSteps:
    """The steps of one network, one sampler and one shape at a time; another replaces them.

    Attributes:
        model: what the denoiser calls; its modules, and where its weights lie, are looked at before
            every batch.
        replayed: rows that the network predicted in replayed steps, which no call of it shows.
    """

    def __init__(self, model: nn.Module, *, capture: bool | None = None) -> None:
        """
        Args:
            model: see above.
            capture: use CUDA graphs on a CUDA device; None: as `ETUDE_CAPTURE` says.
        """
        wanted = os.environ.get("ETUDE_CAPTURE", "1") not in ("", "0")
        self.model, self.capture = model, wanted if capture is None else capture
        self.replayed = 0
        self._identity: tuple[Any, ...] = ()
        self._held: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        self._slots: dict[tuple[Any, ...], _Slot] = {}
        self._graphs: _Graphs | None = None

    def of(self, take: Taking, x: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
        """`take` on held memory, until the next call of `of`.

        Args:
            take: without a guide; its conditions are tensors by name.
            x: (B, C, H, W) what the first step begins with.
        """
        given = take.predict.condition, take.predict.stacked
        identity = self._identity_of(take, x)
        if identity != self._identity:
            self._slots.clear()
            self._identity = identity
            self._held = tuple({k: v.clone() for k, v in part.items()} for part in given)
            capturing = self.capture and x.is_cuda and not backends.verifying()
            self._graphs = _Graphs(x.device) if capturing else None
        for held, part in zip(self._held, given, strict=True):
            for name, value in part.items():
                held[name].copy_(value)
        condition, stacked = self._held
        predict = replace(take.predict, condition=condition, stacked=stacked)
        return partial(self._step, replace(take, predict=predict))

    def _identity_of(self, take: Taking, x: Tensor) -> tuple[Any, ...]:
        """Everything that a recorded program has in it but the values of its tensors."""
        parts = take.predict.condition, take.predict.stacked
        shapes = [[(k, v.shape, v.dtype) for k, v in part.items()] for part in parts]
        modules = [(type(module), module.training) for module in self.model.modules()]
        weights = itertools.chain(self.model.parameters(), self.model.buffers())
        places = [(t.data_ptr(), t.dtype) for t in weights]
        kernels = backends.choice(), backends.overrides(), backends.verifying()
        kind = x.device.type
        arithmetic = (
            torch.is_autocast_enabled(kind),
            torch.get_autocast_dtype(kind),
            torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(),
        )
        sampler = take.config, take.objective.config
        given = x.shape, x.dtype, x.device, shapes
        return *sampler, *given, modules, places, kernels, arithmetic

    def _step(
        self, take: Taking, step: Step, x: Tensor, extra: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        given = step.numbers | {"x": x} | ({} if extra is None else {"extra": extra})
        key = step.kind, extra is None
        if key not in self._slots:
            self._slots[key] = _Slot(take, step, given, self._graphs)
        slot = self._slots[key]
        self.replayed += len(x) * sum(step.copies) if slot.recorded else 0
        try:
            return slot(given)
        except NotCaptured as error:
            warnings.warn(f"sampling steps run without CUDA graphs: {error}", stacklevel=2)
            self.capture, self._graphs = False, None
            self._slots.clear()
            return self._step(take, step, x, extra)


class _Slot:
    """One kind of step on memory of its own."""

    def __init__(
        self, take: Taking, step: Step, given: dict[str, Tensor], graphs: "_Graphs | None"
    ) -> None:
        self.inputs = {name: tensor.clone() for name, tensor in given.items()}
        numbers = {name: self.inputs[name] for name in step.numbers}
        x, extra, own = self.inputs["x"], self.inputs.get("extra"), replace(step, numbers=numbers)
        self.program: Program = lambda: take(own, x, extra)
        self.graphs, self.calls = graphs, 0

    @property
    def recorded(self) -> bool:
        """Whether the next call replays what a call before it recorded."""
        return self.graphs is not None and self.calls > 1

    def __call__(self, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        for name, tensor in given.items():
            self.inputs[name].copy_(tensor)
        if self.graphs is not None and self.calls == 0:
            made = self.graphs.warm_up(self.program)
        else:
            if self.graphs is not None and self.calls == 1:
                self.program = self.graphs.capture(self.program)
            made = self.program()
        self.calls += 1
        return made[0].clone(), made[1].clone()


class NotCaptured(RuntimeError):
    """A program could not become a CUDA graph; the text is the reason."""


class _Graphs:
    """Makes CUDA graphs that share their memory: none keeps anything in it but its results, which
    are copied out before another runs."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def warm_up(self, program: Program) -> tuple[Tensor, Tensor]:
        """Run a program on the stream that will capture it: compiles, allocates work spaces."""
        with torch.cuda.device(self.device):
            current = torch.cuda.current_stream()
            self.stream.wait_stream(current)
            with torch.cuda.stream(self.stream):
                made = program()
            current.wait_stream(self.stream)
        return made

    def capture(self, program: Program) -> Program:
        """The program as a graph.

        Raises:
            NotCaptured: it does what a graph cannot hold, such as looking at a value.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), torch.cuda.stream(torch.cuda.current_stream()):
            # The outer context puts the stream back, which a capture that fails leaves as it is.
            try:
                with torch.cuda.graph(
                    graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
                ):
                    made = program()
            except RuntimeError as error:
                reason = str(error.__context__ or error).strip().splitlines()
                raise NotCaptured(reason[0] if reason else type(error).__name__) from None

        def replayed() -> tuple[Tensor, Tensor]:
            graph.replay()
            return made

        return replayed
