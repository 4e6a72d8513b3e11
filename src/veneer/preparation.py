"""Letting an adapter see data before it is trained.

Some starting values (EVA, CorDA, LoRA-GA) and some choices of what to train (sparse masks by gradient or by Fisher
information) are made from real batches. A method that wants them says so in `Adapter.needs_data` and makes its choice
in `Adapter.prepare`, where a `Run` passes the batches through the model: forward, for the inputs of the adapted
layers; or backward too, for the gradients of their frozen weights. The base model is not changed by any of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapted import Adapted, adapters_of
from veneer.adapter import Adapter, Base
from veneer.attach import unwrap
from veneer.errors import StateError
from veneer.model import PeftModel
from veneer.sites import ParameterSite, Site
from veneer.targets import exactly, walk

See = Callable[[str, Tensor], None]
"""Gets the path of a place and the tensor that was seen there."""

Loss = Callable[[nn.Module, Any], Tensor]
"""The loss of a model on a batch."""

_PROBE = "_probe"  # adapters cannot have a name like this


def prepare(
    model: PeftModel, batches: Iterable[Any] = (), adapter_name: str | None = None, *, loss: Loss | None = None
) -> None:
    """Lets adapters that need data see it; those that need none are left as they are.

    Args:
        model: The adapted model, before training.
        batches: What the model is called with, a batch at a time: mappings of arguments, tuples of them, or single
            tensors; moved to the model's device. Methods may go through them several times; an iterator is read into
            a list for that. Methods that need gradients need labels in them, or `loss`. Scores from a file need none.
        adapter_name: The adapter; the active ones if none.
        loss: Loss of the model on a batch; none takes the one that the model gives.

    Raises:
        StateError: There is no batch, no loss, no such adapter, or adapters are merged.
    """
    names = model.active_adapters if adapter_name is None else [adapter_name]
    model._known(names)
    model._unmerged("prepare an adapter")
    for name in names:
        config = model.peft_config[name]
        method = config.method()
        if not method.needs_data(config):
            continue
        places = places_of(model, name)
        adapters: dict[str, Any] = {path: wrapper.adapters[name] for path, wrapper in places.items()}
        changed = method.prepare(adapters, config, Run(model, places, batches, loss))
        settle(model, name, adapters, changed)


def places_of(model: PeftModel, name: str) -> dict[str, Adapted]:
    """The wrappers of the places that the named method adapts, by path."""
    method = model.peft_config[name].method()
    found = adapters_of(model.get_base_model(), name)
    return {wrapper.place: wrapper for wrapper, adapter in found if isinstance(adapter, method)}


def settle(model: PeftModel, name: str, adapters: Mapping[str, Adapter], config: Any) -> None:
    """Records that an adapter has seen data.

    Args:
        model: The model.
        name: The adapter's name.
        adapters: Its places by path; those that are not among them any more are taken off the model.
        config: Its configuration, if that has changed.
    """
    root = model.get_base_model()
    gone = [wrapper for path, wrapper in places_of(model, name).items() if path not in adapters]
    for wrapper in gone:
        del wrapper.adapters[name]
    if gone:
        unwrap(root, lambda wrapper: wrapper.base_layer, lambda wrapper: not wrapper.adapters)
    for adapter in adapters.values():
        adapter.prepared = True
    if config is None:
        config = model.peft_config[name]
    if gone:
        kept = [wrapper for wrapper in places_of(model, name).values() if not isinstance(wrapper.site, ParameterSite)]
        targets = exactly(sorted(wrapper.path for wrapper in kept), dict(walk(root)))
        config = replace(config, target_modules=targets)
    model.peft_config[name] = config


def awaits_data(model: PeftModel) -> bool:
    """Whether an active adapter needs data and has not seen any."""
    return any(
        not adapter.prepared
        for name in model.active_adapters
        for _, adapter in adapters_of(model.get_base_model(), name)
    )


class Run:
    """Passes batches through an adapted model as if it had no adapters, in evaluation mode.

    Args:
        model: The model.
        places: The wrappers of the adapter's places, by path.
        batches: As in `prepare`.
        loss: As in `prepare`.
        call: How the model is called with a batch where only the forward pass is wanted; none for the usual ways.
        below: Adapters that stay in use all the same; what is shown of a weight is then as they have changed it.

    Attributes:
        batch: The batch, or with `each_example` the row of it, that is running; on the model's device.
    """

    def __init__(
        self,
        model: PeftModel,
        places: Mapping[str, Adapted],
        batches: Iterable[Any],
        loss: Loss | None = None,
        call: Callable[[nn.Module, Any], Any] | None = None,
        below: Sequence[str] = (),
    ) -> None:
        self.model = model
        self.places = places
        self.batches = list(batches) if isinstance(batches, Iterator) else batches
        self.loss = loss or _own_loss
        self.call = call or _call
        self.below = tuple(below)
        self.batch: Any = None

    def forward(self, until: Callable[[], bool] | None = None) -> int:
        """Runs the batches forward, without gradients, for hooks of the caller's own.

        Args:
            until: Asked after each batch; True ends the run.

        Returns:
            How many batches were run.

        Raises:
            StateError: There is no batch.
        """
        return self._forward(until)

    def inputs(self, see: See, until: Callable[[], bool] | None = None) -> int:
        """Runs the batches forward and shows the input of every adapted layer as it comes.

        A bare parameter has no input of its own: what is shown for it is that of the module which it is in.

        Args:
            see: Gets path and input, in the shape in which the layer gets it.
            until: As in `forward`.

        Returns:
            How many batches were run.

        Raises:
            StateError: There is no batch.
        """
        with self.showing({path: _Watch(wrapper.site, path, see) for path, wrapper in self.places.items()}):
            return self._forward(until)

    def rows(self, x: Tensor, unlabelled: int | None = None) -> Tensor:
        """A layer's input `(..., in)` as `(rows, in)`, without the positions that the running batch has as padding.

        Args:
            x: What `inputs` shows.
            unlabelled: Leave out positions with this label too.
        """
        batch = self.batch if isinstance(self.batch, Mapping) else {}
        keep, labels = batch.get("attention_mask"), batch.get("labels")
        if keep is not None and keep.shape != x.shape[:-1]:
            keep = None  # not of these positions
        if unlabelled is not None and labels is not None and labels.shape == x.shape[:-1]:
            labelled = labels != unlabelled
            keep = labelled if keep is None else keep.bool() & labelled
        return x.flatten(0, -2) if keep is None else x[keep.bool()]

    def gradients(
        self,
        see: See,
        *,
        paths: Iterable[str] | None = None,
        each_example: bool = False,
        until: Callable[[], bool] | None = None,
    ) -> int:
        """Runs the batches forward and backward and shows the gradient of the loss by every adapted frozen weight.

        It is that of the dense weight, `(out, in)`, or `(n, out, in)` for a stack; once a batch for every place that
        takes part in the loss. It is formed, shown and dropped for one place before the next has any, so never more
        than one is held unless `see` keeps it.

        Args:
            see: Gets path and gradient.
            paths: The places; all if none.
            each_example: Run the rows of every batch one by one, for gradients of single examples.
            until: As in `forward`.

        Returns:
            How many batches, or rows, were run.

        Raises:
            StateError: There is no batch, or no loss that depends on an adapted weight.
        """
        probes = self.slopes(see, paths)
        count = 0
        with self.showing(probes), torch.enable_grad():
            for batch in self._on_device():
                for part in _rows(batch) if each_example else [batch]:
                    self.batch = part
                    loss = self.loss(self.model, part)
                    if not loss.requires_grad:
                        raise StateError("The loss depends on no adapted weight, so none has a gradient.")
                    loss.backward()
                    count += 1
                    for probe in probes.values():
                        probe.weight = None
                if until is not None and until():
                    break
        return _some(count)

    def train(self, probes: Mapping[str, Adapter], step: Callable[[], None], steps: int) -> None:
        """Trains what stands in the place of all adapters, over the batches as often as it takes.

        Args:
            probes: What stands there, by path.
            step: Called after every backward pass; moves the parameters and clears their gradients.
            steps: How many batches.

        Raises:
            StateError: There is no batch, or no loss.
        """
        done = 0
        with self.showing(probes), torch.enable_grad():
            while done < steps:
                before = done
                for batch in self._on_device():
                    self.batch = batch
                    self.loss(self.model, batch).backward()
                    step()
                    done += 1
                    if done == steps:
                        break
                _some(done - before)

    def slopes(self, see: See, paths: Iterable[str] | None = None) -> dict[str, _Slope]:
        """Probes for `showing`, in a backward pass of the caller's own, what `gradients` shows."""
        return {path: _Slope(self.places[path].site, path, see) for path in paths or self.places}

    def _forward(self, until: Callable[[], bool] | None) -> int:
        count = 0
        with self.showing({}), torch.no_grad():
            for batch in self._on_device():
                self.batch = batch
                self.call(self.model, batch)
                count += 1
                if until is not None and until():
                    break
        return _some(count)

    def _on_device(self) -> Iterator[Any]:
        device = next((p.device for p in self.model.parameters() if p.device.type != "meta"), torch.device("cpu"))
        return (_each(batch, lambda tensor: tensor.to(device)) for batch in self.batches)

    @contextmanager
    def showing(self, probes: Mapping[str, Adapter]) -> Iterator[None]:
        """Evaluation mode, probes in the place of all adapters, and nothing else that asks for a gradient."""
        switch = self.model.switch
        before = switch.enabled, switch.active
        training = [module for module in self.model.modules() if module.training]
        asking = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        try:
            for module in training:
                module.training = False
            for parameter in asking:
                parameter.requires_grad_(False)
            for path, probe in probes.items():
                self.places[path].adapters[_PROBE] = probe
            switch.enabled, switch.active = True, (*self.below, _PROBE)
            yield
        finally:
            switch.enabled, switch.active = before
            for path in probes:
                self.places[path].adapters.pop(_PROBE)
            for parameter in asking:
                parameter.requires_grad_(True)
            for module in training:
                module.training = True
            self.batch = None


class _Watch(Adapter):
    """Shows the input of its place, and changes nothing."""

    def __init__(self, site: Site | None, path: str, see: See) -> None:
        super().__init__(site, None)
        self.path = path
        self.see = see

    def forward(self, x: Tensor, base: Base) -> Tensor:
        self.see(self.path, x)
        return base(x)


class _Slope(_Watch):
    """Runs the layer with a weight that has a gradient, which is shown as soon as it is there."""

    def __init__(self, site: Site | None, path: str, see: See) -> None:
        super().__init__(site, path, see)
        self.weight: Tensor | None = None

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if self.site is None:  # any module: it has no weight that could be known
            return base(x)
        if self.weight is None:  # one for all calls of a batch, so that its gradient is the sum
            self.weight = base.weight().detach().requires_grad_(True)
            self.weight.register_post_accumulate_grad_hook(self._show)
        return self.site.apply(x, self.weight, base.bias(), base.args, base.kwargs)

    def _show(self, weight: Tensor) -> None:
        gradient, weight.grad = weight.grad, None
        self.weight = None  # where reading it made a copy, that goes with the graph
        assert gradient is not None
        with torch.no_grad():
            self.see(self.path, gradient)


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def _own_loss(model: nn.Module, batch: Any) -> Tensor:
    loss: Tensor | None = getattr(_call(model, batch), "loss", None)
    if loss is None:
        raise StateError(
            "The model gives no loss on these batches. Put labels into them, or pass `loss`, a function of the model "
            "and a batch."
        )
    return loss


def _each(batch: Any, change: Callable[[Tensor], Any]) -> Any:
    """The batch with every tensor changed."""
    if isinstance(batch, Mapping):
        return {key: _each(value, change) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return tuple(_each(value, change) for value in batch)
    return change(batch) if isinstance(batch, Tensor) else batch


def _rows(batch: Any) -> Iterator[Any]:
    """The batch as batches of one row."""
    sizes: list[int] = []
    _each(batch, lambda tensor: sizes.append(tensor.shape[0]) if tensor.dim() else None)
    for row in range(sizes[0] if sizes else 0):
        # Tensors of another length are no rows: they belong to the whole batch.
        yield _each(batch, lambda t, row=row: t[row : row + 1] if t.dim() and t.shape[0] == sizes[0] else t)  # type: ignore[misc]


def _some(count: int) -> int:
    if count == 0:
        raise StateError("There was no batch to prepare the adapter with. Pass at least one.")
    return count
