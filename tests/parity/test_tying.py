"""Models whose input and output embeddings are one parameter."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
import veneer
from parity.families import FAMILIES
from parity.oracle import (
    EMBEDDINGS,
    TIED,
    TIGHT,
    load_here,
    load_there,
    ours,
    output,
    peft_says,
    same_tensors,
    settings,
    tensors,
    theirs,
    trained,
    twins,
)
from veneer.errors import UnsupportedError, VeneerWarning

TIED_LLAMA = replace(FAMILIES["llama"], make=lambda: tiny.llama(attention_bias=True, tie_word_embeddings=True))
OUR_TIED = r".* shares its weight with .*ensure_weight_tying=True"


@pytest.mark.parametrize(
    "changes",
    [
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
        {"modules_to_save": ["lm_head", "embed_tokens"], "ensure_weight_tying": True},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["lm_head", "q_proj"]},
    ],
)
def test_outputs_and_files(changes: dict[str, Any], tmp_path: Path) -> None:
    family, x = TIED_LLAMA, TIED_LLAMA.inputs()
    warns = "modules_to_save" in changes and "ensure_weight_tying" not in changes
    with peft_says(TIED, EMBEDDINGS, *([OUR_TIED] if warns else [])):
        here, there = twins(family, settings(family, **changes))
        same_tensors(tensors(here), tensors(there))
        assert trained(here) == trained(there)
        torch.testing.assert_close(output(here, x), output(there, x), **TIGHT)
        assert here.get_nb_trainable_parameters() == there.get_nb_trainable_parameters()
        there.save_pretrained(str(tmp_path / "theirs"))
        torch.testing.assert_close(output(load_here(family, tmp_path / "theirs"), x), output(there, x), **TIGHT)
        here.save_pretrained(tmp_path / "ours")
        torch.testing.assert_close(output(load_there(family, tmp_path / "ours"), x), output(here, x), **TIGHT)
        if warns:
            with pytest.warns(VeneerWarning, match=OUR_TIED):
                ours(family, settings(family, **changes))


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_merging_keeps_the_outputs_where_peft_changes_both_weights(target: str) -> None:
    family, x = TIED_LLAMA, TIED_LLAMA.inputs()
    with peft_says(TIED):
        here, there = twins(family, settings(family, target_modules=[target]))
    adapted = output(here, x)
    with pytest.warns(VeneerWarning, match="no longer tied"):
        merged = here.merge_and_unload()
    torch.testing.assert_close(output(merged, x), adapted, **TIGHT)
    assert merged.config.tie_word_embeddings is False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns, or not, by version of transformers
        wrong = output(there.merge_and_unload(), x)
    assert not torch.allclose(wrong, adapted, rtol=1e-2)


def test_a_merged_model_whose_copies_are_tied_stays_tied() -> None:
    family = TIED_LLAMA
    here = ours(family, settings(family, modules_to_save=["lm_head"], ensure_weight_tying=True))
    adapted, merged = output(here, family.inputs()), here.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert merged.config.tie_word_embeddings is True
    torch.testing.assert_close(output(merged, family.inputs()), adapted, **TIGHT)


def test_tied_adapters_are_refused(tmp_path: Path) -> None:
    family = TIED_LLAMA
    values = settings(family, target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    with pytest.raises(UnsupportedError, match=r"model\.embed_tokens is adapted and shares its weight with lm_head"):
        veneer.get_peft_model(family.model(), veneer.LoraConfig(**values))
    with peft_says(EMBEDDINGS):
        theirs(family, values).save_pretrained(str(tmp_path))
    with pytest.raises(UnsupportedError, match="ensure_weight_tying"):
        load_here(family, tmp_path)


def test_tying_nothing_is_said() -> None:
    family = FAMILIES["llama"]
    with pytest.warns(VeneerWarning, match="ties nothing"):
        veneer.get_peft_model(family.model(), veneer.LoraConfig(**settings(family, ensure_weight_tying=True)))
