"""The backbone: published sizes and names, the forward pass against a slow reference, initialisation, pruned models."""

from __future__ import annotations

import math

import pytest
import torch

from entprune_ds.config import ModelConfig
from entprune_ds.models.dit import DiT, initial_tensor, initialize
from entprune_ds.models.layers import position_embedding, timestep_embedding
from entprune_ds.models.registry import PATCHES, SIZES, count_macs, count_parameters, model_config
from tests.reference import dit as reference
from tests.reference.toys import draws, random_dit

BLOCK = 23_905_152
POSITIONS = 294_912
"""Fixed sin-cos positions of XL/2 at 256 px (256 tokens x 1152): not trained, but the papers count them."""

STEM = ["x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2"]
IN_BLOCK = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"]
HEAD = ["final_layer.linear", "final_layer.adaLN_modulation.1"]


def public_names(blocks: list[int]) -> set[str]:
    """Trained parameters of the public DiT and SiT releases, for these blocks."""
    linear = STEM + [f"blocks.{i}.{name}" for i in blocks for name in IN_BLOCK] + HEAD
    return {f"{name}.{kind}" for name in linear for kind in ("weight", "bias")} | {"y_embedder.embedding_table.weight"}


def weights_of(model: DiT) -> dict[str, torch.Tensor]:
    """{name: detached weight}."""
    return {name: p.detach() for name, p in model.named_parameters()}


# ---------------------------------------------------------------- sizes and names


@pytest.mark.parametrize(("depth", "millions"), [(28, 675.1), (20, 483.9), (19, 460.0), (14, 340.5), (7, 173.1)])
def test_parameter_counts_are_the_published_ones(depth, millions):
    assert position_embedding(1152, 16).numel() == POSITIONS
    counted = count_parameters(model_config("SiT-XL/2", depth=depth)) + POSITIONS
    assert round(counted / 1e6, 1) == millions


def test_every_block_of_xl_has_the_same_known_size():
    full = count_parameters(model_config("SiT-XL/2"))
    assert full - count_parameters(model_config("SiT-XL/2", depth=27)) == BLOCK
    assert full - count_parameters(model_config("SiT-XL/2", kept_blocks=tuple(range(1, 28)))) == BLOCK


@pytest.mark.parametrize(("depth", "billions"), [(28, 118.6), (20, 84.7), (19, 80.5), (14, 59.3), (7, 29.7)])
def test_multiply_accumulates_are_the_published_ones(depth, billions):
    assert round(count_macs(model_config("DiT-XL/2", depth=depth)) / 1e9, 1) == billions
    assert round(count_macs(model_config("DiT-XL/2", kept_blocks=tuple(range(28 - depth, 28)))) / 1e9, 1) == billions


@pytest.mark.parametrize(
    ("name", "gmacs"), [("S/2", 6.06), ("B/2", 23.01), ("L/2", 80.71), ("XL/2", 118.64), ("S/8", 0.36), ("XL/8", 7.39)]
)
def test_multiply_accumulates_of_every_size(name, gmacs):
    """Peebles & Xie 2023, table 4; their counter also counts a little element-wise work."""
    assert count_macs(model_config(f"DiT-{name}")) / 1e9 == pytest.approx(gmacs, rel=6e-3)


def test_multiply_accumulates_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    config = ModelConfig(depth=3, hidden_size=48, num_heads=4, input_size=8, in_channels=3, num_classes=5)
    with FlopCounterMode(display=False) as counter:
        DiT(config)(torch.randn(1, 3, 8, 8), torch.rand(1), torch.tensor([2]))
    assert counter.get_total_flops() == 2 * count_macs(config)


def test_dit_predicts_epsilon_and_variance_and_sit_throws_the_second_half_away():
    sizes = dict(depth=2, hidden_size=16, num_heads=2, input_size=4, in_channels=3, num_classes=5, learn_sigma=True)
    sit = initialize(DiT(ModelConfig(process="sit", **sizes)), seed=0)
    dit = DiT(ModelConfig(process="dit", **sizes))
    with torch.no_grad():
        for parameter in sit.parameters():
            parameter.normal_(0, 0.1)
    dit.load_state_dict(sit.state_dict(), strict=True)
    inputs = torch.randn(2, 3, 4, 4), torch.tensor([0.3, 0.8]), torch.tensor([1, 5])
    assert sit(*inputs).shape == (2, 3, 4, 4) and dit(*inputs).shape == (2, 6, 4, 4)
    assert torch.equal(dit(*inputs)[:, :3], sit(*inputs))
    assert dit.final_layer.linear.out_features == 2 * 2 * 6


def test_a_frequency_shift_of_one_makes_the_last_frequency_exactly_one_ten_thousandth():
    """diffusers divides by half - 1, the official code by half."""
    t = torch.tensor([1.0], dtype=torch.float64)
    shifted = timestep_embedding(t, 8, frequency_shift=1.0)
    expected = torch.tensor([1.0, 10000 ** (-1 / 3), 10000 ** (-2 / 3), 1e-4], dtype=torch.float64)
    torch.testing.assert_close(shifted[0, :4], expected.cos(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(shifted[0, 4:], expected.sin(), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(shifted, timestep_embedding(t, 8))


def test_activation_checkpointing_changes_neither_outputs_nor_gradients_and_saves_activations():
    sizes = dict(depth=6, hidden_size=32, num_heads=2, input_size=8, in_channels=2, num_classes=5)
    models = [initialize(DiT(ModelConfig(activation_checkpointing=on, **sizes)), seed=0) for on in (False, True)]
    inputs, saved = (torch.randn(4, 2, 8, 8), torch.rand(4), torch.tensor([0, 1, 2, 5])), []
    for model in models:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x.numel()) or x, lambda x: x):
            loss = model(*inputs).square().mean()
        saved.append(sum(kept))
        loss.backward()
    assert torch.equal(models[0](*inputs), models[1](*inputs))
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    assert saved[1] < saved[0] / 3


PUBLISHED = {"S": (12, 384, 6, 33), "B": (12, 768, 12, 130), "L": (24, 1024, 16, 458), "XL": (28, 1152, 16, 675)}
"""Depth, width, heads, millions of parameters (Peebles & Xie 2023, table 1)."""


@pytest.mark.parametrize("size", PUBLISHED)
def test_the_published_sizes(size):
    depth, width, heads, millions = PUBLISHED[size]
    config = model_config(f"SiT-{size}/2")
    assert (config.depth, config.hidden_size, config.num_heads) == (depth, width, heads)
    assert (config.patch_size, config.learn_sigma, config.num_classes, config.mlp_ratio) == (2, True, 1000, 4.0)
    assert round(count_parameters(config) / 1e6) == pytest.approx(millions, abs=1)


def test_every_listed_name_is_known_and_others_are_refused_with_the_list():
    assert SIZES.keys() == PUBLISHED.keys() and PATCHES == (2, 4, 8)
    for size in SIZES:
        for patch in PATCHES:
            for family in ("DiT", "SiT"):
                config = model_config(f"{family}-{size}/{patch}")
                assert (config.patch_size, config.process) == (patch, family.lower())
    assert model_config("SiT-S/2", num_classes=7, learn_sigma=False) == ModelConfig(
        depth=12, hidden_size=384, num_heads=6, patch_size=2, num_classes=7
    )
    for name in ("SiT-XL/3", "SiT-M/2", "sit-xl/2", "SiT-XL", "", "SiT-SiT-S/2"):
        with pytest.raises(ValueError, match="is not known") as error:
            model_config(name)
        assert f"`{name}`" in str(error.value) and "SiT-XL/2, SiT-XL/4, SiT-XL/8" in str(error.value)


def test_parameter_names_are_those_of_the_public_releases():
    with torch.device("meta"):
        model = DiT(model_config("SiT-S/2", depth=2))
    assert {n for n, _ in model.named_parameters()} == public_names([0, 1])
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert shapes["x_embedder.proj.weight"] == (384, 4, 2, 2)
    assert shapes["t_embedder.mlp.0.weight"] == (384, 256)
    assert shapes["y_embedder.embedding_table.weight"] == (1001, 384)
    assert shapes["blocks.1.attn.qkv.weight"] == (3 * 384, 384)
    assert shapes["blocks.1.mlp.fc1.weight"] == (4 * 384, 384)
    assert shapes["blocks.1.adaLN_modulation.1.weight"] == (6 * 384, 384)
    assert shapes["final_layer.linear.weight"] == (2 * 2 * 8, 384)
    assert set(model.state_dict()) == set(shapes)  # no positions: they are computed
    with torch.device("meta"):
        narrow = DiT(model_config("SiT-S/2", depth=1, mlp_ratio=2.5))
    assert narrow.blocks["0"].mlp.fc1.weight.shape == (960, 384)


def test_a_pruned_model_keeps_the_names_and_weights_of_its_blocks():
    full, pruned = random_dit(), random_dit(kept_blocks=(1, 4))
    assert {n for n, _ in pruned.named_parameters()} == public_names([1, 4])
    assert list(pruned.blocks) == ["1", "4"]
    weights = weights_of(full)
    pruned.load_state_dict({n: weights[n] for n, _ in pruned.named_parameters()}, strict=True)
    z_t, t, labels, _ = draws(full, 3)
    x, c = full.embed(z_t, t, labels)
    for index in ("1", "4"):
        x = full.blocks[index](x, c)
    assert torch.equal(pruned(z_t, t, labels), full.head(x, c))


# ---------------------------------------------------------------- the forward pass

SHAPES = {
    "plain": dict(),
    "one head": dict(num_heads=1, depth=2),
    "learned sigma": dict(learn_sigma=True, in_channels=3, depth=2),
    "other patches": dict(patch_size=4, input_size=12, in_channels=2, depth=2, num_heads=4),
    "one patch a pixel": dict(patch_size=1, input_size=3, depth=1, mlp_ratio=2.5),
    "pruned": dict(kept_blocks=(0, 3)),
}


@pytest.mark.parametrize("case", SHAPES)
def test_forward_equals_the_slow_reference(case):
    model = random_dit(seed=3, **SHAPES[case])
    heads = SHAPES[case].get("num_heads", 2)
    z_t, t, labels, _ = draws(model, 4, seed=5)
    labels[0] = 3  # the null label
    blocks = [int(i) for i in model.blocks]
    positions = model.pos_embed[0].double()
    expected = reference.forward(weights_of(model), z_t, t, labels, blocks=blocks, heads=heads, positions=positions)
    found = model(z_t, t, labels)
    assert found.shape == z_t.shape and found.dtype == torch.float64
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_single_precision_follows_double_precision():
    model = random_dit()
    z_t, t, labels, _ = draws(model, 4)
    expected = model(z_t, t, labels)
    found = model.float()(z_t.float(), t.float(), labels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_forward_is_embed_then_blocks_then_head():
    model = random_dit()
    z_t, t, labels, _ = draws(model, 2)
    x, c = model.embed(z_t, t, labels)
    assert x.shape == (2, 4, 16) and c.shape == (2, 16)
    for block in model.blocks.values():
        x = block(x, c)
    assert torch.equal(model.head(x, c), model(z_t, t, labels))


def test_learned_sigma_gives_the_first_half_of_the_channels():
    model = random_dit(learn_sigma=True, in_channels=2)
    half = random_dit(learn_sigma=False, in_channels=2)
    weights = weights_of(model)
    rows = [p * 4 + channel for p in range(4) for channel in range(2)]  # 4 channels in each of 2 x 2 pixels
    for kind in ("weight", "bias"):
        weights[f"final_layer.linear.{kind}"] = weights[f"final_layer.linear.{kind}"][rows]
    half.load_state_dict(weights, strict=True)
    z_t, t, labels, _ = draws(model, 3)
    expected = half(z_t, t, labels)  # a product with fewer columns may round differently
    torch.testing.assert_close(model(z_t, t, labels), expected, rtol=1e-12, atol=1e-12)


def test_examples_do_not_see_each_other():
    model = random_dit()
    z_t, t, labels, _ = draws(model, 6)
    expected = torch.cat([model(z_t[i : i + 1], t[i : i + 1], labels[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(model(z_t, t, labels), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("width", "side"), [(8, 1), (16, 3), (96, 4), (1152, 16)])
def test_positions_are_those_of_the_official_code(width, side):
    table = position_embedding(width, side)
    assert table.shape == (1, side * side, width) and table.dtype == torch.float32
    torch.testing.assert_close(table[0].double(), reference.positions(width, side), rtol=0, atol=6e-8)  # one rounding


def test_columns_come_before_rows_in_the_positions():
    table = position_embedding(8, 2)[0]
    assert table[1, 0] == pytest.approx(math.sin(1)) and table[1, 4] == 0  # token 1 is column 1 of row 0
    assert table[2, 0] == 0 and table[2, 4] == pytest.approx(math.sin(1))


def test_timestep_features_are_those_of_the_official_code():
    t = torch.tensor([0.0, 0.25, 1.0, 999.0], dtype=torch.float64)
    expected = torch.stack([reference.timestep_features(float(value)) for value in t])
    torch.testing.assert_close(timestep_embedding(t, 256), expected, rtol=0, atol=1e-11)


# ---------------------------------------------------------------- initialisation

FRESH = ModelConfig(depth=3, hidden_size=64, num_heads=4, input_size=8, in_channels=1, num_classes=10)


def test_a_fresh_model_predicts_zero_and_its_blocks_do_nothing():
    model = initialize(DiT(FRESH), seed=0)
    generator = torch.Generator().manual_seed(0)
    z_t, t = torch.randn(5, 1, 8, 8, generator=generator), torch.rand(5, generator=generator)
    labels = torch.arange(5)
    assert torch.equal(model(z_t, t, labels), torch.zeros(5, 1, 8, 8))
    x, c = model.embed(z_t, t, labels)
    assert x.std() > 0.1 and c.abs().max() > 0
    for block in model.blocks.values():
        assert torch.equal(block(x, c), x)


def test_initial_values_depend_on_name_shape_and_seed_only():
    shape = (64, 32)
    first = initial_tensor("blocks.1.attn.proj.weight", shape, 5)
    torch.manual_seed(99)
    torch.randn(7)
    state = torch.get_rng_state()
    assert torch.equal(first, initial_tensor("blocks.1.attn.proj.weight", shape, 5))
    assert torch.equal(state, torch.get_rng_state())  # nor do they disturb other randomness
    for name, seed in (("blocks.2.attn.proj.weight", 5), ("blocks.1.attn.proj.weight", 6)):
        assert not torch.equal(first, initial_tensor(name, shape, seed))


def test_blocks_start_alike_at_every_depth():
    full, pruned = initialize(DiT(FRESH), 1), initialize(DiT(ModelConfig(**{**vars(FRESH), "kept_blocks": (2,)})), 1)
    weights = weights_of(full)
    assert all(torch.equal(p, weights[n]) for n, p in pruned.named_parameters())


def test_initial_values_have_the_official_statistics():
    model = initialize(DiT(FRESH), seed=0)
    for name, p in weights_of(model).items():
        if name.endswith(".bias") or "adaLN_modulation" in name or name.startswith("final_layer."):
            assert not p.any(), name
        elif name.startswith(("t_embedder.", "y_embedder.")):
            error = 0.02 / math.sqrt(2 * p.numel())  # standard error of a standard deviation
            assert abs(p.std().item() - 0.02) < 5 * error and abs(p.mean()) < 5 * 0.02 / math.sqrt(p.numel()), name
        else:  # Glorot & Bengio 2010: uniform within sqrt(6 / (fan_in + fan_out)), a patch kernel as a matrix
            bound = math.sqrt(6 / (p.shape[0] + p[0].numel()))
            assert 0.95 * bound < p.abs().max() <= bound, name
            assert p.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1), name
            assert abs(p.mean()) < 5 * bound / math.sqrt(3 * p.numel()), name
