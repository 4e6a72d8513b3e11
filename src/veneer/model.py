"""`PeftModel`: a frozen model with adapters, under the names that users of `peft` know."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from veneer import checkpoint, legacy
from veneer.adapted import BASE, Adapted, Switch, adapters_of, wrappers
from veneer.adapter import Adapter
from veneer.attach import attach, check_name, detach, let_train, switch_of, untie, unwrap
from veneer.config import PeftConfig, TaskType
from veneer.errors import ConfigError, StateError, UnsupportedError, VeneerWarning, nearest
from veneer.files import HUB_ARGUMENTS
from veneer.method_strings import parse_method
from veneer.replication import replicated, restore, settle
from veneer.status import TunerLayerStatus, TunerModelStatus, get_layer_status, get_model_status
from veneer.structure import inputs_by_name

if TYPE_CHECKING:
    from veneer.prompting.prompts import Lengthened, Lengthening

# Arguments of `peft` that say where loaded tensors go, or how they are fetched from a disk.
PLACEMENT = frozenset(
    {
        "device_map",
        "ephemeral_gpu_offload",
        "max_memory",
        "offload_dir",
        "offload_folder",
        "offload_index",
        "torch_device",
        "use_safetensors",
    }
)


class BaseModel(nn.Module):
    """Holds the adapted model as `.model`, so that paths and file keys read `base_model.model.<path>` as in `peft`."""

    def __init__(self, model: nn.Module, holder: PeftModel) -> None:
        super().__init__()
        self.model = model
        self._holder = [holder]  # in a list, so that it is no submodule

    def update_and_allocate(self, global_step: int) -> None:
        """`PeftModel.update_and_allocate`, where training loops written for `peft` call it."""
        self._holder[0].update_and_allocate(global_step)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)


class PeftModel(nn.Module):
    """A frozen model with named adapters, of which some are active.

    Attributes that are not defined here are those of the base model (`config`, `device`, `generate`'s settings ...).

    Args:
        model: The base model; its modules are wrapped in place, its weights stay as they are.
        peft_config: Configuration of the first adapter.
        adapter_name: Its name.
        autocast_adapter_dtype: Keep adapters in float32 where the base model is in a 16-bit type.

    Raises:
        TargetError: A target matches nothing or cannot be adapted.
        ConfigError: The configuration contradicts itself, or the model already is a `PeftModel`.
    """

    heads: ClassVar[tuple[str, ...]] = ()
    """Names of newly made heads, trained whole with every adapter."""

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | str | Mapping[str, Any],
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        **start: Any,
    ) -> None:
        super().__init__()
        if isinstance(model, PeftModel):
            raise ConfigError("The model already has adapters. Call its add_adapter(name, config) for another one.")
        if switch_of(model) is not None:
            raise ConfigError("The model holds adapters already. Call unload() on its PeftModel before wrapping it.")
        self.base_model = BaseModel(model, self)
        self.peft_config: dict[str, PeftConfig] = {}
        self.switch = Switch()
        self._places: list[Adapted] | None = None
        self._methods: dict[str, type[Adapter]] = {}
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(False)
        try:
            self._add(adapter_name, peft_config, autocast=autocast_adapter_dtype, **start)
        except Exception:
            for parameter in trained:
                parameter.requires_grad_(True)
            raise
        self.set_adapter(adapter_name)
        if self._recomputes():
            self._let_gradients_through()

    def __getattr__(self, name: str) -> Any:
        # One tunnel to the base model, since scripts and trainers ask a PeftModel for anything a model has.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base_model", "__setstate__"):
                raise
            return getattr(self.base_model, name)

    # Running

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Runs the base model with the active adapters; `adapter_names` gives one adapter a row of the batch."""
        with (
            self._rows(adapter_names),
            self._prompted(args, kwargs) as (text, args, kwargs),
            self._noting(args, kwargs),
        ):
            output = self.base_model(*args, **kwargs)
            output = output if text is None else text.finish(self._with_own_loss(output, text))
        return self._with_penalties(output) if self.training else output

    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The base model's `generate`; with `adapter_names`, each row of the batch has its adapter."""
        copies = 1
        if adapter_names is not None:
            # Beams and returned sequences become rows of their own, next to each other; an encoder runs before that.
            config = kwargs.get("generation_config") or self.get_base_model().generation_config
            for name in ("num_beams", "num_return_sequences"):
                copies = max(copies, kwargs.get(name) or getattr(config, name, None) or 1)
        with self._rows(adapter_names, copies), self._prompted(args, kwargs, True) as (text, args, kwargs):
            if text is None:
                with self._noting(args, kwargs, generating=True):
                    return self.base_model.generate(*args, **kwargs)
            from veneer.prompting.generation import Generation

            generation = Generation(text)
            kwargs = generation.settings(kwargs)
            with self._noting(args, kwargs, generating=True), generation.running(kwargs.get("assistant_model")):
                return generation.finish(self.base_model.generate(*args, **kwargs))

    @contextmanager
    def _rows(self, names: Sequence[str] | None, copies: int = 1) -> Iterator[None]:
        if names is None:
            yield
            return
        if not self.switch.enabled:
            raise StateError("adapter_names was given while adapters are disabled. Leave disable_adapter() first.")
        self._known([name for name in names if name != BASE])
        self.switch.rows, self.switch.copies = tuple(names), copies
        try:
            yield
        finally:
            self.switch.rows, self.switch.copies = None, 1

    @contextmanager
    def _prompted(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], generating: bool = False
    ) -> Iterator[tuple[Lengthened | None, tuple[Any, ...], dict[str, Any]]]:
        """The model's inputs with what the adapters in use put before the text, and its positions moved by prefixes."""
        how = self._lengthening()
        if how is None:
            yield None, args, kwargs
            return
        from veneer.prompting.positions import explained, moved
        from veneer.prompting.prompts import Lengthened

        root = self.get_base_model()
        alike = how.shift[0] if len(set(how.shift)) == 1 else None
        with (
            explained(root, args, kwargs, how.most, max(how.shift)),
            moved(root, how.shifts, alike) if any(how.shift) else nullcontext(),
        ):
            if not how.most:
                yield None, args, kwargs
                return
            text = Lengthened(how, root, inputs_by_name(root, args, kwargs), generating)
            yield text, (), text.inputs

    def added(self) -> tuple[int, int]:
        """How many virtual tokens the active adapters put before a text, and by how much others move its positions."""
        how = self._lengthening()
        return (0, 0) if how is None else (how.most, max(how.shift))

    def _lengthening(self) -> Lengthening | None:
        """What the adapters in use put before the text of each row; none where that is nothing."""
        prompting = {name for name, config in self.peft_config.items() if config.is_prompt_learning}
        if not prompting or not self.switch.enabled or self.switch.merged:
            return None
        rows = [self.switch.active] if self.switch.rows is None else [(name,) for name in self.switch.rows]
        if prompting.isdisjoint(itertools.chain(*rows)):
            return None
        from veneer.prompting.prompts import Lengthening

        tokens: dict[str, list[int]] = {}
        labels: dict[str, list[int]] = {}
        shift: dict[str, int] = {}
        for name in prompting:
            adapters = self._adapters(name).values()
            tokens[name] = [i for adapter in adapters for i in getattr(adapter, "ids", ())]
            labels[name] = [i for adapter in adapters for i in getattr(adapter, "labels", ())]
            shift[name] = self._methods[name].shift(self.peft_config[name])
        return Lengthening(
            [[i for name in row for i in tokens.get(name, ())] for row in rows],
            [[i for name in row for i in labels.get(name, ())] for row in rows],
            [sum(shift.get(name, 0) for name in row) for row in rows],
            getattr(getattr(self.get_base_model(), "config", None), "pad_token_id", None) or 0,
        )

    @contextmanager
    def _noting(self, args: tuple[Any, ...], kwargs: dict[str, Any], generating: bool = False) -> Iterator[None]:
        """Lets adapters that ask for it see what the model is called with, and whether to generate."""
        readers = {name: method for name, method in self._methods.items() if method.reads_inputs}
        if not readers:
            yield
            return
        inputs = {**inputs_by_name(self.get_base_model(), args, kwargs), "generating": generating}
        for name, method in readers.items():
            inputs |= method.note(inputs, self.peft_config[name])
        self.switch.inputs = inputs
        for name in kwargs.keys() & frozenset().union(*(method.own_inputs for method in readers.values())):
            del kwargs[name]
        try:
            yield
        finally:
            if not (self.training and torch.is_grad_enabled() and self._recomputes()):
                self.switch.inputs = None

    def _recomputes(self) -> bool:
        """Whether layers run again in the backward pass, where they need what the model was last called with."""
        return any(getattr(module, "gradient_checkpointing", False) for module in self.get_base_model().modules())

    @property
    def judges_logits(self) -> bool:
        """Whether an active method has a loss of its own, which needs the logits of all tokens."""
        return any(self._methods[name].loss.__func__ is not Adapter.loss.__func__ for name in self.switch.active)  # type: ignore[attr-defined]

    def _with_own_loss(self, output: Any, text: Lengthened) -> Any:
        """Puts the loss of a method that has one in place of the model's."""
        if getattr(output, "loss", None) is None:
            return output
        rows = self.switch.rows
        names = set(self.switch.active if rows is None else rows)
        losses: dict[str, Tensor] = {}
        for name in names.intersection(self._methods):
            adapters = list(self._adapters(name).values())
            loss = self._methods[name].loss(adapters, self.peft_config[name], output, text)
            if loss is not None:
                losses[name] = loss
        if len(losses) > 1 or (losses and rows is not None and len(names) > 1):
            raise UnsupportedError(
                f"{min(losses)!r} has a loss of its own, which is not that of {sorted(names - {min(losses)})}: one "
                "batch has one loss. Run them one after the other, or without labels."
            )
        for loss in losses.values():
            output.loss = loss
        return output

    def _with_penalties(self, output: Any) -> Any:
        """Adds the terms that active methods put into the loss; the model's loss is the sum, as in `peft`."""
        loss = getattr(output, "loss", None)
        if loss is None:
            return output
        for name in self.switch.active:
            config, method = self.peft_config[name], self._methods[name]
            if method.penalty.__func__ is not Adapter.penalty.__func__:  # type: ignore[attr-defined]
                term = method.penalty(list(self._adapters(name).values()), config)
                loss = loss if term is None else loss + term.to(loss.device)
        output.loss = loss
        return output

    def _adapters(self, name: str) -> dict[str, Adapter]:
        """The named method's adapters by the path of their place; copies of whole modules left out."""
        method = self._methods[name]
        found = adapters_of(self.get_base_model(), name)
        return {wrapper.place: adapter for wrapper, adapter in found if isinstance(adapter, method)}

    def update_and_allocate(self, global_step: int, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Lets methods with a schedule move their budget; for training loops of one's own, after `optimizer.step()`.

        Args:
            global_step: The step, from 0.
            optimizer: The optimiser, for methods that replace what they train (`spiel`).
        """
        for name in self.switch.active:
            config, method = self.peft_config[name], self._methods[name]
            if method.allocate.__func__ is not Adapter.allocate.__func__:  # type: ignore[attr-defined]
                renewed = method.allocate(self._adapters(name), config, global_step)
                if optimizer is not None:
                    for entries in renewed or ():
                        entries.tell(optimizer)

    def kept_schedules(self) -> dict[str, dict[str, Tensor]]:
        """What methods with a schedule go by and adapter files do not hold, by the adapter's name."""
        kept = {name: method.kept(self._adapters(name)) for name, method in self._methods.items()}
        return {name: tensors for name, tensors in kept.items() if tensors}

    def resume_schedule(self, name: str, kept: Mapping[str, Tensor]) -> None:
        """Takes over what `kept_schedules` gave for one adapter, before its file is read."""
        config = self.peft_config[name]
        self._methods[name].resume(self._adapters(name), config, kept)

    def get_base_model(self) -> nn.Module:
        """The base model, with its wrappers."""
        return self.base_model.model

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Turns on the base model's gradient checkpointing and lets gradients reach adapters in every layer."""
        root = self.get_base_model()
        if hasattr(root, "activation_checkpointing_enable"):
            self.base_model.activation_checkpointing_enable(activation_checkpointing_kwargs, **kwargs)
        else:  # transformers before 5.23
            self.base_model.gradient_checkpointing_enable(activation_checkpointing_kwargs, **kwargs)
        self._let_gradients_through()

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """`activation_checkpointing_enable` under its older name."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    def _let_gradients_through(self) -> None:
        # A checkpointed segment is only differentiated if its input asks for it, and a frozen embedding's does not.
        enable = getattr(self.get_base_model(), "enable_input_require_grads", None)
        if enable is not None:
            enable()

    # Adapters

    @property
    def active_adapters(self) -> list[str]:
        return list(self.switch.active)

    @property
    def active_adapter(self) -> str:
        """Name of the active adapter; of the lowest one where several are active."""
        return self.switch.active[0]

    @property
    def active_peft_config(self) -> PeftConfig:
        return self.peft_config[self.active_adapter]

    @property
    def peft_type(self) -> str | None:
        return self.active_peft_config.peft_type

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig | str | Mapping[str, Any],
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Adds an adapter beside the present ones; it becomes active with `set_adapter`.

        Args:
            adapter_name: A new name.
            peft_config: Its configuration, or a method string.
            low_cpu_mem_usage: Leave it without memory, to be filled by `set_peft_model_state_dict`.
            autocast_adapter_dtype: Keep it in float32 where the base model is in a 16-bit type.

        Raises:
            ConfigError, TargetError: As for the first adapter; the model is left as it was.
        """
        self._unmerged("add an adapter")
        self._add(adapter_name, peft_config, autocast=autocast_adapter_dtype, start=not low_cpu_mem_usage)
        self._train(self.switch.active if self.switch.trained else ())

    def _add(self, name: str, config: PeftConfig | str | Mapping[str, Any], **how: Any) -> None:
        config = copy.copy(parse_method(config))  # what is filled in below is not the caller's
        root = self.get_base_model()
        if name in self.peft_config:
            check_name(name, root)
        if self.heads and config.task_type is not None:
            given = getattr(config, "modules_to_save", None) or []
            config.modules_to_save = list(dict.fromkeys([*given, *self.heads]))  # type: ignore[attr-defined]
        if config.base_model_name_or_path is None:
            base_config = getattr(root, "config", None)
            config.base_model_name_or_path = (
                getattr(base_config, "name_or_path", None) or getattr(base_config, "_name_or_path", None) or None
            )
        with replicated(root, config):
            self.peft_config[name] = attach(root, name, config, self.switch, optional_copies=self.heads, **how)
        for _, adapter in adapters_of(root, name):
            adapter.train(self.training)
        self._methods[name] = self.peft_config[name].method()
        self._places = None

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Makes the named adapter active and trainable, or several, lowest first; all others rest, frozen.

        Raises:
            StateError: A name is not there, or adapters are merged.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self._known(names)
        self._unmerged("switch adapters")
        # What is neither trained now nor to be trained is not looked at, so that switching for inference is one
        # assignment, however many layers there are.
        wanted = () if inference_mode else names
        self._train(wanted, self.switch.trained.union(wanted))
        self.switch.active = tuple(names)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Lets the named adapters be trained, or freezes them, whether they are active or not."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._known(names)
        self._train(names if requires_grad else (), names)

    def _train(self, wanted: Collection[str], of: Collection[str] | None = None) -> None:
        """Lets the wanted adapters be trained, and freezes the others among those that are named, or of all."""
        if self._places is None:
            self._places = list(wrappers(self.get_base_model()))
        of = self.peft_config if of is None else of
        for name in of:
            for wrapper in self._places:
                adapter = wrapper.adapters._modules.get(name)
                if adapter is not None:
                    let_train(adapter, name in wanted)
        self.switch.trained = self.switch.trained.difference(of).union(wanted)

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter; if it was active, the first remaining one takes its place.

        Raises:
            StateError: It is not there, or adapters are merged.
        """
        self._known([adapter_name])
        self._unmerged("delete an adapter")
        trained = self.switch.trained
        self._remove(adapter_name)
        remaining = [name for name in self.switch.active if name != adapter_name] or list(self.peft_config)[:1]
        self.switch.active = tuple(remaining)
        self._train(remaining if trained else ())

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the context the model is the base model, merged adapters included."""
        before, self.switch.enabled = self.switch.enabled, False
        try:
            yield
        finally:
            self.switch.enabled = before

    def disable_adapter_layers(self) -> None:
        """Makes the model the base model until `enable_adapter_layers`."""
        self.switch.enabled = False

    def enable_adapter_layers(self) -> None:
        self.switch.enabled = True

    def _remove(self, name: str) -> None:
        detach(self.get_base_model(), name)
        del self.peft_config[name], self._methods[name]
        self._places = None
        self.switch.trained = self.switch.trained - {name}

    def _known(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self.peft_config:
                raise StateError(
                    f"There is no adapter {name!r}.{nearest(name, self.peft_config)} Loaded: {list(self.peft_config)}."
                )

    def _unmerged(self, action: str) -> None:
        if self.switch.merged:
            raise StateError(
                f"Cannot {action} while {list(self.switch.merged)} are merged. Call unmerge_adapter() first; that is "
                "exact."
            )

    # Merging

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Runs layers that hold the adapted weights; either all layers are merged or none.

        A quantised layer is quantised again in its own form, and a warning says what that loses.

        Args:
            adapter_names: Adapters to merge, lowest first; the active ones if none.
            safe_merge: Also check that the merged weights are finite.

        Raises:
            UnsupportedError: A method cannot be merged.
            StateError: Adapters are merged already, or a merged weight is not finite.
        """
        names = self.active_adapters if adapter_names is None else list(adapter_names)
        self._known(names)
        self._unmerged("merge")
        check = _check_finite if safe_merge else None
        rounding: dict[str, tuple[float, float]] = {}
        held: list[Adapted] = []
        try:
            for wrapper in _inner_first(self.get_base_model()):
                wrapper.hold(wrapper.merge(names, check, lambda place, *lost: rounding.update({place.path: lost})))
                held.append(wrapper)
        except Exception:
            for wrapper in reversed(held):
                wrapper.release()
            raise
        self.switch.merged = tuple(names)
        if rounding:
            _warn_rounded(rounding)

    def unmerge_adapter(self) -> None:
        """Goes back to the frozen layers, bit for bit."""
        for wrapper in wrappers(self.get_base_model()):
            wrapper.release()
        self.switch.merged = ()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: Sequence[str] | None = None
    ) -> nn.Module:
        """The base model with the adapters merged into it and all wrappers gone.

        Raises:
            UnsupportedError, StateError: As `merge_adapter`; the model is left as it was.
        """
        if not self.switch.merged or adapter_names is not None:
            self.merge_adapter(adapter_names, safe_merge)
        root = self.get_base_model()
        unwrap(root, _innermost)
        settle(root)
        untie(root)
        return root

    def unload(self) -> nn.Module:
        """The base model without any adapter."""
        self.unmerge_adapter()
        root = self.get_base_model()
        unwrap(root, _innermost)
        restore(root)
        return root

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        **how: Any,
    ) -> None:
        """Adds an adapter that combines others.

        LoRA adapters as in `veneer.combine.weighted.combine`; sparse ones with `combination_type="linear"`, which keeps
        their sum exactly (`veneer.combine.sparse.combine`).

        Raises:
            ConfigError: The arguments do not fit each other.
            UnsupportedError: The adapters have no combination.
        """
        from veneer.combine import sparse
        from veneer.combine.weighted import combine

        self._known(adapters)
        self._unmerged("combine adapters")
        if adapters and sparse.is_sparse(self, adapters):
            if combination_type != "linear" or how:
                raise ConfigError(
                    f"combination_type={combination_type!r}{', ' * bool(how)}{', '.join(how)}: sparse adapters are "
                    "added entry by entry, without a rank or pruning. Pass combination_type='linear' alone."
                )
            sparse.combine(self, adapters, weights, adapter_name)
            return
        combine(self, adapters, weights, adapter_name, combination_type, **how)

    # Files

    def save_pretrained(
        self, save_directory: str | Path, selected_adapters: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        """Writes adapters: `default` into the folder itself, others into a subfolder of their name.

        Args:
            save_directory: The folder; made if absent.
            selected_adapters: Which ones; all if none.
            kwargs: `is_main_process` as in `peft`. `path_initial_model_for_weight_conversion` writes adapters that
                started as part of the weight (PiSSA and the like) as plain LoRA of twice the rank; what they started
                from is known, so the folder that it names is not read. Other arguments of `peft` have no use here.

        Raises:
            CheckpointError: A file could not be written; earlier files are unchanged.
        """
        if not kwargs.pop("is_main_process", True):
            return
        unknown = set(kwargs) - {
            "safe_serialization",
            "state_dict",
            "save_embedding_layers",
            "path_initial_model_for_weight_conversion",
        }
        if unknown:
            raise TypeError(f"save_pretrained() has no argument {sorted(unknown)[0]!r}.")
        if kwargs.get("safe_serialization") is False:
            raise ConfigError("Veneer writes safetensors only. Leave out safe_serialization=False.")
        if kwargs.get("save_embedding_layers") is True:
            raise ConfigError(
                "save_embedding_layers=True: what an adapter trains is saved, and nothing else. Name the embeddings in "
                "modules_to_save before training."
            )
        names = list(self.peft_config) if selected_adapters is None else list(selected_adapters)
        self._known(names)
        for name in names:
            folder = Path(save_directory) / ("" if name == "default" else name)
            config = self.peft_config[name]
            inference = config.inference_mode
            config.inference_mode = True
            try:
                if kwargs.get("path_initial_model_for_weight_conversion") is None:
                    checkpoint.save(self.get_base_model(), name, config, folder)
                else:
                    from veneer.combine.convert import without_start

                    plain, tensors = without_start(self, name)
                    checkpoint.save(self.get_base_model(), name, plain, folder, tensors=tensors)
            finally:
                config.inference_mode = inference

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        check_base: bool = True,
        allow_pickle: bool = False,
        low_cpu_mem_usage: bool = True,
        **hub: Any,
    ) -> PeftModel:
        """The model with a saved adapter.

        Args:
            model: The base model that it was trained on.
            model_id: Folder or hub id of the adapter; also those of older and other libraries that `legacy` reads.
            adapter_name: Name to load it under.
            is_trainable: Leave it trainable.
            config: Use this configuration instead of the saved one.
            autocast_adapter_dtype: Keep it in float32 where the base model is in a 16-bit type.
            check_base: Refuse a base model whose weights are not those that the adapter was trained on.
            allow_pickle: Read pickles too, such as `adapter_model.bin`.
            low_cpu_mem_usage: Kept for `peft`; adapters are always filled without being initialised first.
            hub: `revision`, `subfolder`, `token`, `cache_dir`, `local_files_only`, `force_download`. Those that place
                tensors in `peft` (`torch_device`, `device_map`, ...) have no use: adapters lie where layers compute.

        Raises:
            CheckpointError: The files are missing, truncated, corrupted, or do not fit the model.
            BaseMismatchError: The adapter was trained on another base model.
        """
        hub = _for_the_hub(hub)
        config, tensors, header = legacy.load(model_id, config, model, allow_pickle=allow_pickle, **hub)
        wanted = class_for(config) if cls is PeftModel else cls
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        result = wanted(model, config, adapter_name, autocast_adapter_dtype, start=False)
        try:
            result._take(adapter_name, tensors, header, str(model_id), check_base, is_trainable)
        except Exception:
            result.unload()
            for parameter in trained:
                parameter.requires_grad_(True)
            raise
        return result if is_trainable else result.eval()

    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        check_base: bool = True,
        allow_pickle: bool = False,
        low_cpu_mem_usage: bool = True,
        **hub: Any,
    ) -> None:
        """Loads a saved adapter beside the present ones; arguments and errors as in `from_pretrained`."""
        self._unmerged("load an adapter")
        hub = _for_the_hub(hub)
        root = self.get_base_model()
        config, tensors, header = legacy.load(model_id, config, root, allow_pickle=allow_pickle, **hub)
        self._add(adapter_name, config, start=False, autocast=autocast_adapter_dtype)
        try:
            self._take(adapter_name, tensors, header, str(model_id), check_base, is_trainable)
        except Exception:
            self._remove(adapter_name)
            raise

    def _take(
        self,
        name: str,
        tensors: dict[str, Tensor],
        header: dict[str, Any],
        where: str,
        check_base: bool,
        trainable: bool,
    ) -> None:
        root = self.get_base_model()
        if check_base:
            checkpoint.check_base(root, name, header, where)
        self.peft_config[name].inference_mode = not trainable
        checkpoint.fill(root, name, tensors, where=where)
        self._train([name] if trainable and name in self.switch.active else (), [name])

    def push_to_hub(self, *args: Any, **kwargs: Any) -> None:
        """Not in this version; it exists so that the base model's own is not called.

        Raises:
            UnsupportedError: Always.
        """
        raise UnsupportedError(
            "push_to_hub is not in this version. Call save_pretrained(folder), then "
            "huggingface_hub.upload_folder(repo_id=..., folder_path=folder)."
        )

    # Counting

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Numbers of trainable parameters and of all parameters, each counted once."""
        parameters = list(self.parameters())
        return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """The state of every adapted module."""
        return get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        """The state of the whole model."""
        return get_model_status(self)

    def print_trainable_parameters(self) -> None:
        """Prints what is trained, in the words of `peft`."""
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )


class PeftModelForSequenceClassification(PeftModel):
    heads = ("classifier", "score")


class PeftModelForTokenClassification(PeftModel):
    heads = ("classifier", "score")


class PeftModelForQuestionAnswering(PeftModel):
    heads = ("qa_outputs",)


class PeftModelForCausalLM(PeftModel):
    pass


class PeftModelForSeq2SeqLM(PeftModel):
    pass


class PeftModelForFeatureExtraction(PeftModel):
    pass


MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[str, type[PeftModel]] = {
    TaskType.SEQ_CLS: PeftModelForSequenceClassification,
    TaskType.TOKEN_CLS: PeftModelForTokenClassification,
    TaskType.QUESTION_ANS: PeftModelForQuestionAnswering,
    TaskType.CAUSAL_LM: PeftModelForCausalLM,
    TaskType.SEQ_2_SEQ_LM: PeftModelForSeq2SeqLM,
    TaskType.FEATURE_EXTRACTION: PeftModelForFeatureExtraction,
}


def class_for(config: PeftConfig) -> type[PeftModel]:
    """The class of adapted models for the configuration's task."""
    return MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type or "", PeftModel)


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig | str | Mapping[str, Any],
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Freezes a model and puts an adapter on it.

    Args:
        model: Any module; its modules are wrapped in place.
        peft_config: A configuration, a method string such as `"lora:r=16"`, or a mapping with a `name`.
        adapter_name: Name of the adapter.
        mixed: Kept for `peft`; adapters of different methods can always stand on one model.
        autocast_adapter_dtype: Keep the adapter in float32 where the model is in a 16-bit type.
        revision: Revision of the base model, noted in the adapter's configuration.
        low_cpu_mem_usage: Leave the adapter without memory, to be filled by `set_peft_model_state_dict`.

    Returns:
        The adapted model, of the class for the configuration's `task_type`.

    Raises:
        TargetError, ConfigError: The configuration does not fit the model, which is left as it was.
    """
    config = parse_method(peft_config)
    if revision is not None:
        config.revision = revision
    return class_for(config)(model, config, adapter_name, autocast_adapter_dtype, start=not low_cpu_mem_usage)


def _for_the_hub(given: Mapping[str, Any]) -> dict[str, Any]:
    """Further arguments of loading without those of `peft` that have no use here.

    Raises:
        TypeError: One is not known.
    """
    hub = {name: value for name, value in given.items() if name not in PLACEMENT}
    for name in hub.keys() - HUB_ARGUMENTS:
        raise TypeError(f"Adapters are loaded without an argument {name!r}.{nearest(name, HUB_ARGUMENTS)}")
    return hub


def _inner_first(root: nn.Module) -> list[Adapted]:
    return list(wrappers(root))[::-1]


def _innermost(wrapper: Adapted) -> nn.Module:
    layer: nn.Module = wrapper
    while isinstance(layer, Adapted):
        layer = layer.base_layer
    return layer


def _warn_rounded(rounding: Mapping[str, tuple[float, float]]) -> None:
    """Says what quantising the merged weights has cost: by layer, the lengths of the change and of the loss."""
    path = max(rounding, key=lambda path: rounding[path][1])
    change, lost = (sum(pair[i] for pair in rounding.values()) / len(rounding) for i in (0, 1))
    warnings.warn(
        f"Merging has quantised {len(rounding)} layers again. The adapters change their weights by {change:.2g} of "
        f"their length on average, and rounding moves them by {lost:.2g}, most in {path} ({rounding[path][1]:.2g}). "
        "Keep the adapter beside the model, or merge into it in full precision (`veneer merge` does), to lose nothing.",
        VeneerWarning,
        stacklevel=3,
    )


def _check_finite(wrapper: Adapted, layer: nn.Module) -> None:
    if layer is wrapper.frozen_layer:
        return
    for name, tensor in layer.named_parameters():
        if not torch.isfinite(tensor).all():
            raise StateError(
                f"{wrapper.path}.{name} would hold NaN or infinity after merging. The adapter is broken; train it "
                "again with a lower learning rate."
            )
