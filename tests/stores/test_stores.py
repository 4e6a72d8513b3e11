"""What each store knows of its package's layers. `contract/test_quantised.py` tries every method on them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

import veneer
from contract.places import QUANTISED, Model, Quantised, dense
from packed_layers import PackedLinear
from veneer.errors import TargetError, UnsupportedError
from veneer.sites import LinearSite, site_of
from veneer.stores import quantised_store, store_of
from veneer.stores.packed import pack, unpack


def test_packages_that_are_not_imported_are_not_looked_at() -> None:
    code = (
        "import sys, torch, veneer.stores as s; from veneer.sites import site_of;"
        "assert s.quantised_store(torch.nn.Linear(2, 2)) is None; site_of(torch.nn.Linear(2, 2));"
        "print([m for m in ('transformers', 'bitsandbytes', 'torchao', 'hqq', 'gptqmodel') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("spot", QUANTISED, ids=lambda spot: spot.name)
def test_the_weight_read_is_the_one_that_runs(spot: Quantised) -> None:
    torch.manual_seed(0)
    layer, x = spot.layer(), spot.input()[0]
    site = site_of(layer)
    assert isinstance(site, LinearSite)
    assert (site.kind, site.shape, site.dtype, site.device.type) == ("linear", (64, 64), torch.float32, "cpu")
    assert site.is_plain
    assert site.can_hold_bias()
    y = layer(x)
    size = 0.03 if spot.computes_in_int8 else 1e-5
    near = {"rtol": 0.0, "atol": size * float(y.detach().abs().max())}
    torch.testing.assert_close(nn.functional.linear(x, site.read(), site.bias()), y, **near)
    product, kept = site.product(x)
    torch.testing.assert_close(product, y, **near)
    torch.testing.assert_close(site.store.recover(kept), x, rtol=0, atol=size * float(x.abs().max()))
    g = torch.randn(5, 64)
    torch.testing.assert_close(site.transposed(g), g @ site.read(), rtol=0, atol=size * 64**0.5)


@pytest.mark.parametrize("spot", QUANTISED, ids=lambda spot: spot.name)
def test_what_is_written_is_rounded_once(spot: Quantised) -> None:
    torch.manual_seed(0)
    layer = spot.layer()
    site = site_of(layer)
    assert site is not None
    wanted, bias = site.read() + 0.01 * torch.randn(64, 64), torch.randn(64)
    before = site.read().clone()
    written = site.on(site.write(wanted, bias))
    assert type(written.module) is type(layer)
    assert torch.equal(site.read(), before)
    assert torch.equal(written.bias(), bias)
    lost = (written.read() - wanted).norm() / wanted.norm()
    assert 0 < lost < spot.rounding
    only_bias = site.store.write(layer, {"bias": bias})
    assert torch.equal(store_of(only_bias).read(only_bias, "weight"), before)
    assert torch.equal(site.on(only_bias).bias(), bias)


@pytest.mark.parametrize("awq", [False, True])
def test_packed_numbers_are_those_of_the_layout(awq: bool) -> None:
    torch.manual_seed(0)
    layer = PackedLinear(dense(), awq)
    site = site_of(layer)
    assert site is not None
    torch.testing.assert_close(site.read(), layer.weight())
    codes = torch.randint(0, 16, (3, 16), dtype=torch.int32)
    places = (0, 4, 1, 5, 2, 6, 3, 7) if awq else ()
    assert torch.equal(unpack(pack(codes, 4, places), 4, places), codes)
    for bits in (2, 8):
        codes = torch.randint(0, 2**bits, (3, 32), dtype=torch.int32)
        assert torch.equal(unpack(pack(codes, bits), bits), codes)


def test_zeros_of_the_second_version_are_as_they_are() -> None:
    torch.manual_seed(0)
    layer = PackedLinear(dense(), awq=False)
    first = store_of(layer).read(layer, "weight")
    layer.qzeros += 0x11111111  # one more in each place; none was 15
    layer.qzero_format = lambda: 2  # type: ignore[assignment]  # as gptqmodel's layers say it
    torch.testing.assert_close(store_of(layer).read(layer, "weight"), first)


def test_a_layout_that_is_not_known_is_refused() -> None:
    layer = PackedLinear(dense(), awq=False)
    layer.bits = 3
    with pytest.raises(UnsupportedError, match="packs 3-bit codes"):
        veneer.get_peft_model(Model(layer), "lora:target_modules=['layer']")


def test_a_4_bit_layer_that_is_still_plain_is_refused() -> None:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(64, 64)
    with pytest.raises(TargetError, match="not quantised yet"):
        veneer.get_peft_model(Model(layer), "lora:target_modules=['layer']")


def test_a_layer_rearranged_for_inference_holds_the_same_weight() -> None:
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    torch.manual_seed(0)
    layer = next(spot for spot in QUANTISED if spot.name == "bitsandbytes NF4").layer()
    store = store_of(layer)
    before = store.read(layer, "weight")
    layer.weight.data, layer.weight.quant_state = _convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )
    packed = layer.weight.data.clone()
    # bitsandbytes keeps scales in bfloat16 there, so that these are near and not equal.
    torch.testing.assert_close(store.read(layer, "weight"), before, rtol=0.01, atol=1e-3)
    assert torch.equal(layer.weight.data, packed)


def test_codes_are_not_adapted_or_trained_themselves() -> None:
    layer = next(spot for spot in QUANTISED if spot.name == "bitsandbytes int8").layer()
    with pytest.raises(TargetError, match=r"'weight'.*kept quantised.*target_modules"):
        veneer.get_peft_model(Model(layer), "lora:target_parameters=['layer.weight']")
    config = veneer.LoraConfig(target_modules=["other"], modules_to_save=["layer"])
    model = Model(layer)
    model.other = nn.Linear(4, 4)
    with pytest.raises(TargetError, match="modules_to_save: the module is a quantised Linear8bitLt"):
        veneer.get_peft_model(model, config)
    assert quantised_store(nn.Embedding(3, 4)) is None


def test_the_bias_of_a_quantised_layer_is_trained_beside() -> None:
    for spot in QUANTISED:
        model = veneer.get_peft_model(spot.model(), veneer.LoraConfig(target_modules=["layer"], bias="all"))
        assert any(name.endswith("bias_delta") for name, p in model.named_parameters() if p.requires_grad), spot.name


def test_another_base_is_told_from_a_quantised_one(tmp_path: object) -> None:
    from veneer.errors import BaseMismatchError

    torch.manual_seed(0)
    plain = dense()
    near, other = Model(PackedLinear(plain, awq=False)), Model(PackedLinear(dense(), awq=False))
    veneer.get_peft_model(near, "lora:target_modules=['layer']").save_pretrained(f"{tmp_path}/quantised")
    veneer.PeftModel.from_pretrained(Model(plain), f"{tmp_path}/quantised").save_pretrained(f"{tmp_path}/plain")
    for folder in ("quantised", "plain"):
        veneer.PeftModel.from_pretrained(Model(PackedLinear(plain, awq=False)), f"{tmp_path}/{folder}")
        with pytest.raises(BaseMismatchError, match="another base model"):
            veneer.PeftModel.from_pretrained(other, f"{tmp_path}/{folder}")
    with pytest.raises(BaseMismatchError):
        veneer.PeftModel.from_pretrained(Model(dense()), f"{tmp_path}/quantised")
