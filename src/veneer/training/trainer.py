"""transformers' `Trainer` for adapted models.

Everything that can be set, called back, logged or distributed there works here. What differs: only adapters are saved,
checkpoints are complete or absent, a resumed run ends in the weights of an uninterrupted one, and runs that cannot
come to anything stop with a reason.
"""

import functools
import inspect
import math
from collections.abc import Callable, Sized
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader, SequentialSampler
from transformers import TrainerState
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import seed_worker
from transformers.utils import logging
from transformers.utils.generic import can_return_loss, find_labels

from veneer.data.batches import IGNORED
from veneer.errors import CheckpointError, UnsupportedError
from veneer.functional import load_peft_weights, set_peft_model_state_dict
from veneer.model import PeftModel
from veneer.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from veneer.optimizers.riemannian import with_preconditioner
from veneer.structure import is_encoder_decoder
from veneer.training import checkpoints, guards, recompute, samplers, schedules
from veneer.training.clock import Clock
from veneer.training.compiled import compile_blocks
from veneer.training.labelled import LabelledLoss
from veneer.training.offload import Offload
from veneer.training.packed_run import PackedRun
from veneer.training.reuse import Reuse

STATE = "trainer_state.json"

logger = logging.get_logger(__name__)


class Trainer(transformers.Trainer):
    """Trains the adapters of a `PeftModel`; models without adapters are trained and saved as by transformers.

    Args:
        model: The adapted model.
        args: `transformers.TrainingArguments`.
        rest: As in `transformers.Trainer`.
        named: As in `transformers.Trainer`.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: transformers.TrainingArguments | None = None,
        *rest: Any,
        **named: Any,
    ) -> None:
        if isinstance(model, PeftModel) and getattr(model, "is_quantized", False):
            # transformers' sign that a quantised model has something that can be trained.
            model._hf_peft_config_loaded = True  # type: ignore[assignment]
        super().__init__(model, args, *rest, **named)
        self._inspect(_base(self.model))
        self._reuse: Reuse | None = None
        self._packing: PackedRun | None = None
        self._labelled_loss: Callable[[], AbstractContextManager[None]] | None = None
        self._activations: Callable[[], AbstractContextManager[None]] = nullcontext
        if getattr(self.args, "offload_activations", False):
            self._activations = Offload(_base(self.model))
        elif recompute.suits(self.args):
            self._activations = recompute.Recompute()
        if getattr(self.args, "compile_blocks", False):
            compile_blocks(_base(self.model))
        self.add_callback(guards.GradientGuard())
        self.add_callback(Clock())
        self.add_callback(samplers.EpochOrder())
        self.add_callback(schedules.Allocation())

    @property
    def clock(self) -> Clock:
        """Time in the training loop, evaluations excluded."""
        # Looked up, because a resumed run replaces callbacks by restored ones.
        return next(callback for callback in self.callback_handler.callbacks if isinstance(callback, Clock))

    def _inspect(self, base: nn.Module) -> None:
        """What transformers found out about the wrapper holds for the base model instead."""
        if self.args.label_names is None:
            self.label_names = find_labels(type(base))
        self.can_return_loss = can_return_loss(type(base))
        shifts = LOSS_MAPPING.get(getattr(base, "loss_type", "")) is ForCausalLMLoss
        self._loss_is_causal = shifts and not is_encoder_decoder(base)
        # Behind virtual tokens the first label of a row has something that it is predicted from, so it counts.
        adapted = self._adapted()
        self._loss_shifts_labels = self._loss_is_causal and not (adapted is not None and adapted.added()[0])
        # Makes transformers count the labels of all batches of a step; `compute_loss` weighs with them.
        self.model_accepts_loss_kwargs = True
        if self.label_smoother is not None and type(base).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
            shifted: Any = functools.partial(_smoothed, self.label_smoother)
            self.label_smoother = shifted

    def _move_model_to_device(self, model: nn.Module, device: Any) -> None:
        # Where parts lie on several devices or on the disk, each stays where it is.
        if len(set((getattr(_base(model), "hf_device_map", None) or {}).values())) <= 1:
            super()._move_model_to_device(model, device)

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            accepted = list(inspect.signature(_base(self.model).forward).parameters)
            adapted = self._adapted()
            for config in adapted.peft_config.values() if adapted is not None else ():
                accepted += sorted(config.method().own_inputs)
            columns: Any = [*accepted, *sorted({"label", "label_ids", *self.label_names})]
            self._signature_columns = columns

    # ---- Training ----

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As in transformers; `lora_optimizer` of our training arguments makes one of the LoRA family."""
        name = getattr(self.args, "lora_optimizer", None)
        if self.optimizer is not None or name is None:
            return super().create_optimizer(model)
        args: Any = self.args
        adapted: Any = self.model if model is None else model
        if name == "riemannian":
            return with_preconditioner(super().create_optimizer(model), adapted, args.riemannian_reg)
        self.optimizer = self._lora_optimizer(args, adapted)
        return self.optimizer

    def _lora_optimizer(self, args: Any, model: Any) -> torch.optim.Optimizer:
        if args.lora_optimizer == "lorafa":
            moments = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
            return create_lorafa_optimizer(model, lr=args.learning_rate, weight_decay=args.weight_decay, **moments)
        cls, settings = self.get_optimizer_cls_and_kwargs(args, model)
        if (
            not isinstance(cls, type)
            or not issubclass(cls, torch.optim.Optimizer)
            or {"params", "model"} & set(settings)
        ):
            raise UnsupportedError(f"optim={args.optim!r} chooses its own parameters: no lora_optimizer goes with it.")
        return create_loraplus_optimizer(
            model,
            cls,
            loraplus_lr_ratio=args.loraplus_lr_ratio,
            loraplus_lr_embedding=args.loraplus_lr_embedding,
            loraplus_weight_decay=args.weight_decay,
            **settings,
        )

    def train(self, resume_from_checkpoint: str | bool | None = None, *rest: Any, **named: Any) -> Any:
        """As in transformers; `resume_from_checkpoint=True` takes the newest complete checkpoint.

        Raises:
            CheckpointError: There is no checkpoint to resume from, or the one that is named is damaged.
        """
        folder = Path(str(self.args.output_dir))
        if self.args.should_save:
            checkpoints.clean(folder)
        self.accelerator.wait_for_everyone()
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(checkpoints.last_complete(folder))
        elif resume_from_checkpoint and (Path(resume_from_checkpoint) / checkpoints.MANIFEST).exists():
            problem = checkpoints.defect(Path(resume_from_checkpoint))
            if problem is not None:
                raise CheckpointError(
                    f"{resume_from_checkpoint} cannot be resumed from: {problem}. Name another checkpoint, or pass "
                    "resume_from_checkpoint=True for the newest complete one."
                )
        finished = False
        try:
            output = super().train(resume_from_checkpoint, *rest, **named)
            finished = True
        finally:
            if self._reuse is not None:
                self._reuse.close(finished=finished)
                self._reuse = None
        return output

    @property
    def reuse(self) -> Reuse:
        """What is computed once for all epochs of a run, from the first step to the last."""
        if self._reuse is None or self._reuse.model is not self.model:
            self._reuse = Reuse(self)
            logger.info(self._reuse.line)
        return self._reuse

    @property
    def packing(self) -> PackedRun:
        """How batches are computed without their padding; entered for each step of training and evaluation."""
        if self._packing is None or self._packing.model is not self.model:
            self._packing = PackedRun(self)
            logger.info(self._packing.line)
        return self._packing

    def _init_training_state(
        self, max_steps: int, steps_per_epoch: int, epochs: int, checkpoint: str | None, trial: Any
    ) -> tuple[int, int]:
        path = Path(checkpoint) / STATE if checkpoint is not None else None
        saved = TrainerState.load_from_json(str(path)) if path is not None and path.is_file() else None
        if saved is not None and saved.best_global_step is not None and checkpoint is not None:
            # The folder may have been moved since: the best checkpoint lies beside this one.
            best = Path(checkpoint).parent / f"checkpoint-{saved.best_global_step}"
            saved.best_model_checkpoint = str(best) if best.is_dir() else None
        position = super()._init_training_state(max_steps, steps_per_epoch, epochs, checkpoint, trial)
        if saved is None:
            return position
        self.state.best_model_checkpoint = saved.best_model_checkpoint
        control = (saved.stateful_callbacks or {}).get("TrainerControl", {})
        stopped = control.get("args", {}).get("should_training_stop") and saved.global_step < saved.max_steps
        # Stopped early, or complete: transformers would do at least one more step.
        return (epochs, 0) if stopped or saved.global_step >= max_steps else position

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One forward and backward pass, between checks of the labels and of the loss."""
        guards.check_labels(inputs, self.label_names, self.state.global_step, self._loss_shifts_labels)
        with self._activations(), self.reuse.training(), self.packing(), self._loss_at_labels():
            loss = super().training_step(model, inputs, num_items_in_batch)
        guards.check_loss(loss, self.state.global_step, self._get_learning_rate())
        return loss

    def prediction_step(self, *args: Any, **named: Any) -> Any:
        """As in transformers."""
        with self._reuse.evaluating() if self._reuse is not None else nullcontext(), self.packing():
            return super().prediction_step(*args, **named)

    def loss_as_in_training(self, inputs: dict[str, Any]) -> Tensor:
        """The loss of a batch, computed in the way of a training step."""
        with self.packing(), self._loss_at_labels(), self.compute_loss_context_manager():
            model: Any = self.model
            loss: Tensor = self.compute_loss(model, dict(inputs))
            return loss

    def _loss_at_labels(self) -> AbstractContextManager[None]:
        """Lets causal language models compute logits where labels are, if nothing else looks at the logits."""
        others = self.compute_loss_func is not None or self.label_smoother is not None
        others |= getattr(self.accelerator.unwrap_model(self.model), "judges_logits", False)
        if others or not self._loss_is_causal or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return nullcontext()
        if self._labelled_loss is None:
            try:
                self._labelled_loss = LabelledLoss(_base(self.accelerator.unwrap_model(self.model)))
            except UnsupportedError as error:
                logger.info(f"Logits are computed for all positions: {error}.")
                self._labelled_loss = nullcontext
        return self._labelled_loss()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The mean loss over all labels of the step's batches, for any model.

        transformers leaves this to the model and takes it for done where `forward` has `**kwargs`. Many such models
        (BERT with a classifier is one) ignore the number of labels; with gradient accumulation their gradient was as
        many times too large as there are batches. The mean of each batch, weighted by its labels, is right for all.
        """
        divided = self.args.n_gpu > 1 or self.get_tp_size() * self.get_cp_size() * self.get_sp_size() > 1
        if num_items_in_batch is None or self.compute_loss_func is not None or divided:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs.get("shift_labels", inputs["labels"])
        if self._loss_shifts_labels and "shift_labels" not in inputs:
            labels = labels[..., 1:]
        share = labels.ne(IGNORED).sum() / num_items_in_batch
        if self.args.average_tokens_across_devices:
            share = share * self.accelerator.num_processes  # the processes' gradients are averaged later
        loss, outputs = super().compute_loss(model, inputs, True, None)
        loss = loss * share.to(loss.device)
        return (loss, outputs) if return_outputs else loss

    # ---- Data ----

    def _lengths(self, dataset: Any) -> list[int]:
        names = getattr(self.processing_class, "model_input_names", None) or ["input_ids"]
        return samplers.lengths(dataset, self.args.length_column_name, names[0])

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        if self.args.train_sampling_strategy != "group_by_length" or not isinstance(dataset, Sized):
            return super()._get_train_sampler(train_dataset)
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return samplers.GroupedByLength(self._lengths(dataset), size, seed)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        if self.args.train_sampling_strategy != "group_by_length" or not isinstance(eval_dataset, Sized):
            return super()._get_eval_sampler(eval_dataset)
        return samplers.LongestFirst(self._lengths(eval_dataset))

    def token_batches(self) -> samplers.TokenBatches | None:
        """Training batches by `tokens_per_batch`; none where they are of a number of examples.

        Raises:
            ConfigError: An example alone is longer.
            UnsupportedError: Several processes share the batches, or the data set has no length.
        """
        args: Any = self.args
        if (budget := getattr(args, "tokens_per_batch", None)) is None:
            return None
        if args.world_size > 1 or args.n_gpu > 1:
            raise UnsupportedError(
                "training.tokens_per_batch: batches of unequal numbers of examples cannot be shared by several "
                "processes. Set training.per_device_train_batch_size instead, or run one process."
            )
        if not isinstance(self.train_dataset, Sized):
            raise UnsupportedError(
                "training.tokens_per_batch needs a training set of known length, and this one is a stream. Set "
                "training.per_device_train_batch_size instead."
            )
        lengths = self._lengths(self.train_dataset)
        epochs = args.num_train_epochs
        if args.max_steps > 0:  # no epoch has fewer batches than that
            fewest = max(1, sum(lengths) // budget)
            epochs = args.max_steps * args.gradient_accumulation_steps / fewest
        seed = args.data_seed if args.data_seed is not None else args.seed
        alike = args.train_sampling_strategy == "group_by_length"
        return samplers.TokenBatches(lengths, budget, seed, math.ceil(epochs), alike=alike)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """As in transformers; with `tokens_per_batch`, batches of as many examples as hold so many tokens."""
        batches = self.token_batches()
        if batches is None:
            return super().get_train_dataloader()
        args, dataset, collate = self.args, self.train_dataset, self.data_collator
        if isinstance(dataset, Dataset):
            dataset = self._remove_unused_columns(dataset, description="training")
        else:
            collate = self._get_collator_with_removed_columns(collate, description="training")
        loader: DataLoader[Any] = DataLoader(
            dataset,  # type: ignore[arg-type]
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            worker_init_fn=functools.partial(seed_worker, num_workers=args.dataloader_num_workers, rank=0),
        )
        return self.accelerator.prepare(loader)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """Batches in the order of the data set: what `predict` returns belongs to its rows."""
        sampler: Any = SequentialSampler if self.args.world_size == 1 else super()._get_eval_sampler
        return self._get_dataloader(test_dataset, "test", self.args.eval_batch_size, sampler_fn=sampler)

    # ---- Evaluation ----

    def evaluate(self, *args: Any, **named: Any) -> dict[str, float]:
        """As in transformers; whether and when it is called does not change the training."""
        with self.clock.stopped(), samplers.generators_kept():
            return super().evaluate(*args, **named)

    def predict(self, *args: Any, **named: Any) -> Any:
        """As in transformers, in the order of the data set."""
        with self.clock.stopped(), samplers.generators_kept():
            return super().predict(*args, **named)

    # ---- Checkpoints ----

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        folder = Path(self._get_output_dir(trial=trial))
        final = folder / f"checkpoint-{self.state.global_step}"
        best = folder / f"checkpoint-{self.state.best_global_step}" if self.state.best_global_step else None
        if best is not None and (best == final or best.is_dir()):
            self.state.best_model_checkpoint = str(best)
        with checkpoints.saving(final, owner=self.args.should_save) as partial:
            self.accelerator.wait_for_everyone()  # the owner clears the folder before others write into it
            self.save_model(str(partial), _internal_call=True)
            adapted = self._adapted()
            if adapted is not None and self.args.should_save:
                schedules.save(adapted, partial)
            if not self.args.save_only_model:
                self._save_optimizer_and_scheduler(str(partial))
                self._save_scaler(str(partial))
                self._save_rng_state(str(partial))
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self._save_state(partial)
                checkpoints.seal(partial, resumable=not self.args.save_only_model)
        self.accelerator.wait_for_everyone()  # others may want to load it
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if self.args.should_save:
            kept = self.state.best_model_checkpoint
            checkpoints.rotate(folder, self.args.save_total_limit, Path(kept) if kept else None)

    def _save_state(self, folder: Path) -> None:
        states: dict[str, list[Any]] = {}
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                states.setdefault(type(callback).__name__, []).append(callback.state())
        # One of a kind stands alone, several stand in a list: transformers' format.
        self.state.stateful_callbacks = {k: v[0] if len(v) == 1 else v for k, v in states.items()}  # type: ignore
        self.state.save_to_json(str(folder / STATE))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        model = self._adapted()
        if model is None:
            return super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return None
        folder = Path(output_dir or str(self.args.output_dir))
        model.save_pretrained(str(folder), **({} if state_dict is None else {"state_dict": state_dict}))
        tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(folder))
        return None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        adapted = self._adapted(model)
        if adapted is None or self.is_fsdp_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        return load_adapters(adapted, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        adapted = self._adapted()
        if adapted is None or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return super()._load_best_model()
        return load_adapters(adapted, Path(str(self.state.best_model_checkpoint)))

    def _adapted(self, model: nn.Module | None = None) -> Any:
        """The `PeftModel` inside what accelerate made of it; none if the model has no adapters."""
        inner = self.accelerator.unwrap_model(self.model if model is None else model, keep_torch_compile=False)
        return inner if isinstance(inner, PeftModel) else None


def load_adapters(model: Any, folder: Path) -> None:
    """Copies the adapters of a checkpoint into a model that has adapters of the same names.

    Only safetensors are read, which cannot run code.

    Raises:
        CheckpointError: A file is missing or damaged, or its tensors are not those of the model's adapter.
    """
    schedules.load(model, folder)
    for name in model.peft_config:
        tensors = load_peft_weights(folder if name == "default" else folder / name)
        set_peft_model_state_dict(model, tensors, adapter_name=name)


def _smoothed(smoother: Any, output: Any, labels: Tensor, **how: Any) -> Tensor:
    """The loss of a language model with label smoothing; the text stands behind any virtual tokens."""
    logits = output["logits"] if isinstance(output, dict) else output[0]
    loss: Tensor = smoother({"logits": logits[:, -labels.shape[1] :]}, labels, **{**how, "shift_labels": True})
    return loss


def _base(model: Any) -> Any:
    """The model that the adapters are on; the model itself if it has none."""
    while not isinstance(model, PeftModel) and isinstance(getattr(model, "module", None), nn.Module):
        model = model.module  # wrapped for parallel training
    return model.get_base_model() if isinstance(model, PeftModel) else model
